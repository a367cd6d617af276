"""The command line that all scripts share: a flag for each field of the config, four verbs."""

import argparse
import inspect
import json
import math
import shlex
import sys
import traceback
from dataclasses import field, fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

from common.backend import THREADS
from common.errors import Fail
from common.processes import disband, is_root, leave, row, want
from common.run import Run, Stopped, say
from common.store import as_json, load_weights

VERBS = """the four verbs:
  python {script}.py                           train, score on fresh scenes, draw figures
  python {script}.py evaluate --scenes F.npz   score weights on scenes somebody else made
  python {script}.py infer FILE...             find the objects in your own pictures
  python {script}.py figures --run DIR...      draw the figures again, training nothing
each has its own --help. The last line on stdout is one JSON object."""


def option(default, help, *, low=None, high=None, choices=None):
    """A field of a config, and all that its flag needs to know."""
    return field(default=default, metadata={"help": help, "low": low, "high": high,
                                            "choices": choices})


def main(doc, Config, presets, *, train, evaluate, infer, figures, adjustable=(), argv=None):
    """Parse, call the verb, print its result as one JSON line; errors are one line, status 2.

    train(cfg, run), evaluate(cfg, weights, scenes_path or None, data_dir) and
    infer(cfg, weights, files, folder) return a dict; figures(folders, data_dir) draws.
    `adjustable` names the fields of the config that evaluate and infer may change although the
    weights were trained with others.
    """
    argv = sys.argv[1:] if argv is None else argv
    verbs = {"train": lambda *a: run_train(*a, presets, train),
             "evaluate": lambda *a: run_evaluate(*a, adjustable, evaluate),
             "infer": lambda *a: run_infer(*a, adjustable, infer),
             "figures": lambda *a: run_figures(*a, figures)}
    verb, words = (argv[0], argv[1:]) if argv and argv[0] in verbs else ("train", argv)
    script = Path(inspect.getfile(train))
    parser = Parser(prog=f"{script.name}{'' if verb == 'train' else ' ' + verb}",
                    description=doc if verb == "train" else verbs_help(verb),
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    try:
        result = verbs[verb](parser, words, script, Config)
        if is_root():
            print(json.dumps(as_json(result)), flush=True)
    except Stopped as e:
        say(str(e))
        raise SystemExit(e.status) from None
    except KeyboardInterrupt:
        say("interrupted")
        leave(130)
    except Fail as e:
        if row() == 0:                              # what forked processes meet is the same
            print(f"error: {e}", file=sys.stderr)
        leave(2)
    except Exception:
        traceback.print_exc()
        leave(1)
    finally:
        disband()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without its usage."""

    def error(self, message):
        raise Fail(f"{message} (see --help)")


def verbs_help(verb):
    return {"evaluate": "Score weights on scenes that somebody else made.",
            "infer": "Find the objects in your own pictures: JSON and overlay pictures.",
            "figures": "Draw the figures of run folders again; the first is shown, all are "
                       "compared."}[verb]


# ================================================================ the four verbs

def run_train(parser, words, script, Config, presets, train):
    parser.epilog = VERBS.format(script=script.stem)
    parser.add_argument("--preset", choices=list(presets), default="default",
                        help="named configs; flags change single fields of them")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N",
                        help="of weights, scenes and noise (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help=f"run folder (default runs/{script.stem}/PRESET-seedN)")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in that folder, bit for bit")
    parser.add_argument("--save-every", type=number(int, 1), metavar="N",
                        help="updates between checkpoints (default: one every 15 seconds)")
    add_machine(parser, data=True)
    add_fields(parser, Config, presets, [f.name for f in fields(Config)])
    args = parser.parse_args(words)
    cfg = configured(replace(Config(), **presets[args.preset]), args)
    folder = args.out or Path("runs") / script.stem / f"{args.preset}-seed{args.seed}"
    about = {"script": script.stem, "preset": args.preset,
             "command": shlex.join(["python", script.name, *words])}
    run = Run(folder, cfg, args.seed, args.data_dir, args.resume, args.save_every, about)
    say(f"run folder: {folder}")
    want(THREADS)
    metrics = train(cfg, run)
    return {**about, "run": folder, "seed": args.seed, "steps": cfg.steps,
            "train_seconds": round(run.seconds, 2), **metrics}


def run_evaluate(parser, words, script, Config, adjustable, evaluate):
    parser.add_argument("--scenes", type=Path, metavar="F.npz",
                        help="scene file, as the README describes (default: fresh test scenes)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR",
                        help="where MNIST and Omniglot lie, for fresh scenes")
    cfg, weights, args, origin = with_weights(parser, words, script, Config, adjustable)
    return {"scenes": args.scenes, **origin, **evaluate(cfg, weights, args.scenes, args.data_dir)}


def run_infer(parser, words, script, Config, adjustable, infer):
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("runs") / script.stem / "infer",
                        metavar="DIR", help="where overlay pictures go (default %(default)s)")
    cfg, weights, args, origin = with_weights(parser, words, script, Config, adjustable)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Fail(f"cannot make the folder {args.out}: {e.strerror}") from None
    return {**origin, **infer(cfg, weights, args.files, args.out)}


def run_figures(parser, words, script, Config, figures):
    parser.add_argument("--run", required=True, nargs="+", type=Path, metavar="DIR",
                        help="run folders")
    add_machine(parser, data=True)
    args = parser.parse_args(words)
    figures(args.run, args.data_dir)
    drawn = sorted(p.name for p in args.run[0].iterdir() if p.suffix in (".png", ".gif"))
    return {"run": args.run[0], "figures": drawn}


def with_weights(parser, words, script, Config, adjustable):
    """Parse, load the weights and the config that they were trained with."""
    default = script.parent / "results" / script.stem / "weights.npz"
    parser.add_argument("--weights", type=Path, default=default, metavar="FILE",
                        help=f"default: results/{script.stem}/weights.npz beside the script")
    add_machine(parser)
    add_fields(parser, Config, {}, adjustable)
    args = parser.parse_args(words)
    values, weights, about = load_weights(args.weights)
    cfg = configured(from_dict(Config, values, args.weights), args)
    path, here = args.weights, Path.cwd()
    path = path.relative_to(here) if path.is_relative_to(here) else path
    return cfg, weights, args, {"weights": path, "trained_on": about}


# ================================================================ flags

def add_machine(parser, data=False):
    parser.add_argument("--device", choices=("cpu", "gpu", "auto"), default="cpu",
                        help="auto: the GPU where there is one (default cpu)")
    parser.add_argument("--threads", type=number(int, 1), metavar="N",
                        help="CPU cores to use; training shares each batch between them "
                             "(default: all)")
    if data:
        parser.add_argument("--data-dir", type=Path, metavar="DIR",
                            help="where MNIST and Omniglot lie (default: the user's cache)")


def add_fields(parser, Config, presets, names):
    """One flag for each field; the default None means: as the preset or the weights have it."""
    group = parser.add_argument_group("config")
    hints = get_type_hints(Config)
    for f in fields(Config):
        meta, kind = f.metadata, hints[f.name]
        if f.name not in names:
            continue
        others = [f"{name}: {plain(p[f.name])}" for name, p in presets.items() if f.name in p]
        usual = f"default {plain(f.default)}" if presets else "default: as trained"
        notes = "; ".join([usual, *others])
        flag, text = "--" + f.name.replace("_", "-"), f"{meta['help']} ({notes})".replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        kinds = get_args(kind)                          # of tuple[int, ...]: any number of values
        inner = (kinds or (kind,))[0]
        metavar = None if meta["choices"] else {int: "N", float: "X"}.get(inner, "TEXT")
        group.add_argument(flag, type=number(inner, meta["low"], meta["high"]), help=text,
                           choices=meta["choices"], metavar=metavar,
                           nargs="+" if ... in kinds else len(kinds) or None)


def number(kind, low=None, high=None):
    """A parser of one value that refuses what is out of range."""
    def parse(text):
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is above {high}")
        return value

    parse.__name__ = kind.__name__                      # argparse: "invalid int value"
    return parse


def configured(cfg, args):
    """The config with those fields changed whose flags were given."""
    given = {f.name: getattr(args, f.name, None) for f in fields(cfg)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    return replace(cfg, **given)


def from_dict(Config, values, where):
    """A config as it was read from a file."""
    try:
        return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (TypeError, AttributeError):
        raise Fail(f"{where} belongs to another script or version: its config differs") from None


def plain(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
