"""Train iodine_tetris.py again and again with one thing changed, and compare.

    python -m bench.iodine_sweep iterations     1, 2, 4, 6 refinements in training        (Fig. 8)
    python -m bench.iodine_sweep slots          3, 4, 5, 6 slots in training              (Fig. 9)
    python -m bench.iodine_sweep inputs         one input of the refinement less          (Fig. 34)
    python -m bench.iodine_sweep geco           the likelihood's weight, fixed or learned
    ... --steps N --seeds 0 1 2                 longer, with other seeds

All else is the default configuration, but scenes are read with all the noise, as in the paper.
Stop it and start it again as you like: runs lie in runs/iodine_tetris/sweep/ and are continued; a
finished one leaves a record in results/iodine_tetris/sweep-NAME.jsonl and is not trained again.
Each call draws sweep-NAME.png from the records of its number of steps.
"""

import argparse
import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import iodine_tetris as iodine  # before NumPy: common.backend sets threads
from bench.results import machine
from common.errors import Fail
from common.run import Run, Stopped, say
from common.store import as_json
from viz import slots
from viz.curves import read_jsonl

RESULTS, RUNS = Path("results/iodine_tetris"), Path("runs/iodine_tetris/sweep")
SWEEPS = {
    "iterations": {f"T = {n}": {"iterations": n} for n in (1, 2, 4, 6)},
    "slots": {f"K = {n}": {"slots": n} for n in (3, 4, 5, 6)},
    "geco": {"v = 1": {}} | {f"GECO, {error}": {"geco": error} for error in (0.02, 0.005)},
    "inputs": {"all inputs": {}} | {f"no {name}": {"without": (name,)} for name in iodine.INPUTS},
}
TESTS = {                   # (objects, slots) at test; None: as in training
    "iterations": {"": (3, None)}, "inputs": {"": (3, None)}, "geco": {"": (3, None)},
    "slots": {"3 objects in 4 slots": (3, 4), "5 objects in 6 slots": (5, 6)},
}
FIELDS = [("ari_foreground", "foreground ARI"), ("mse", "squared error per pixel"),
          ("kl", "KL (nats)")]
DIVERGED = 0.2              # squared error per pixel


def trained(sweep, name, seed, steps):
    """A model's scores after each of 15 refinements, on each test."""
    cfg = iodine.Config(steps=steps, noise=(1.0, 1.0), **SWEEPS[sweep][name])
    folder = RUNS / f"{sweep}-{name.replace(' ', '')}-steps{steps}-seed{seed}"
    run = Run(folder, cfg, seed, resume=True)
    p = iodine.learn(cfg, run)
    record = {"sweep": sweep, "name": name, "seed": seed, "steps": steps,
              "train_seconds": round(run.seconds, 2), "curves": {}}
    for test, (objects, K) in TESTS[sweep].items():
        other = replace(cfg, objects=(objects,), slots=K or cfg.slots, test_iterations=iodine.LONG)
        curves = iodine.score(p, other, iodine.stream(other, iodine.TEST, cfg.test_scenes))
        curves = {key: curves[key].round(5).tolist() for key, _ in FIELDS}
        record["curves"][test] = curves
        record |= {f"{key} {test}".strip(): v[cfg.test_iterations] for key, v in curves.items()}
    return record


def draw(sweep, records, path):
    """Fig. 8 as curves; the others as a dot for each model, after the default's refinements."""
    if sweep == "iterations":
        marks = {name: changed["iterations"] for name, changed in SWEEPS[sweep].items()}
        curves = {r["name"]: stable(r["curves"][""]) for r in records.values()}
        return slots.against(path, curves, FIELDS, range(iodine.LONG + 1), "refinements at test",
                             marks=marks)
    found = {test: {} for test in TESTS[sweep]}
    for test, models in found.items():
        for r in records.values():
            models.setdefault(r["name"], []).append([r[f"{key} {test}".strip()]
                                                     for key, _ in FIELDS])
    return slots.dots(path, found, [label for _, label in FIELDS])


def stable(curves):
    """Scores up to where a model diverges: there it draws worse than a black picture would be."""
    good = [mse is not None and mse < DIVERGED for mse in curves["mse"]]
    return {key: [v if ok else math.nan for v, ok in zip(values, good, strict=True)]
            for key, values in curves.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--steps", type=int, default=1500, help="updates of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--names", nargs="+", help="only these models")
    args = parser.parse_args()
    file = RESULTS / f"sweep-{args.sweep}.jsonl"
    command = shlex.join(["python", "-m", "bench.iodine_sweep", *sys.argv[1:]])
    try:
        for seed in args.seeds:
            for name in args.names or SWEEPS[args.sweep]:
                if (name, seed) not in kept(file, args.steps):
                    say(f"{name}, seed {seed}")
                    record = {**trained(args.sweep, name, seed, args.steps), "machine": machine(),
                              "command": command}
                    with open(file, "a", encoding="utf-8") as f:
                        f.write(json.dumps(as_json(record)) + "\n")
        draw(args.sweep, kept(file, args.steps), file.with_suffix(".png"))
    except Stopped as e:
        parser.exit(e.status, f"{e} (start the sweep again)\n")
    except Fail as e:
        parser.exit(2, f"error: {e}\n")


def kept(file, steps):
    """Records of runs that long: {(name, seed): record}."""
    lines = read_jsonl(file) if file.exists() else []
    return {(r["name"], r["seed"]): r for r in lines if r["steps"] == steps}


if __name__ == "__main__":
    main()
