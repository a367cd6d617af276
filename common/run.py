"""Training runs: a folder, a log, checkpoints, and a loop that can be stopped and resumed.

    for step in run.steps(cfg.steps, {"params": p.flat, ...}):
        ...                                     # one update of those arrays, in place
        run.watch(loss=float(loss))             # stops the run when a number is not finite
        if run.due(step + 1, cfg.eval_every):
            run.log(step + 1, **metrics)        # a line of metrics.jsonl

The folder holds config.json, metrics.jsonl, checkpoint.npz (and the one before it), weights.npz.
"""

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.backend import DEVICE, THREADS, to_device, to_host
from common.errors import Fail
from common.processes import disband, fork, from_root, greatest, is_root, mean_over_processes
from common.store import as_json, clear_errors, read_npz, write_npz, write_text

SAVE_SECONDS = 15


class Stopped(Exception):
    """Training ended early, on a signal, with everything saved."""

    def __init__(self, step, number):
        super().__init__(f"stopped at step {step}; continue with --resume")
        self.status = 128 + number


class Run:
    """One training run. With several processes only the first touches the folder."""

    def __init__(self, folder, cfg, seed, data_dir=None, resume=False, save_every=None, about=None):
        self.folder, self.cfg, self.seed, self.data_dir = Path(folder), cfg, seed, data_dir
        self.resume, self.save_every, self.about = resume, save_every, about or {}
        self.step, self.seconds, self.latest, self.signal, self.saved = 0, 0.0, {}, 0, None
        self.newest = self.folder / "checkpoint.npz"
        self.previous = self.folder / "checkpoint.previous.npz"
        if is_root():
            self.open()

    def open(self):
        """Make the folder; one that holds a run already is only ever continued."""
        checkpoint = self.newest.exists() or self.previous.exists()
        weights, log = (self.folder / name for name in ("weights.npz", "metrics.jsonl"))
        if not self.resume and (checkpoint or weights.exists() or log.exists()):
            raise Fail(f"{self.folder} already holds a run: continue it with --resume, "
                       "or choose another folder with --out")
        if self.resume and weights.exists() and not checkpoint:
            raise Fail(f"{self.folder} holds weights but no checkpoint to continue from: "
                       "choose another folder with --out")
        with clear_errors(f"cannot write to {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)

    def steps(self, total, state):
        """Yield the number of updates made so far, until `total`; `state` is saved and restored.

        Saved every 15 seconds or `save_every` steps, on Ctrl-C and SIGTERM, and at the end.
        """
        self.total = total
        self.restore(state)
        fork(self.cfg.batch_size)
        self.clock = saved = time.monotonic()
        with signals(self), Progress(self) as progress:
            while self.step < total:
                yield self.step
                self.step += 1
                progress.show()
                stop, now = greatest(self.signal), time.monotonic()
                late = (self.step % self.save_every == 0 if self.save_every
                        else now - saved > SAVE_SECONDS)
                if stop or late or self.step == total:
                    self.save(state)
                    saved = now
                if stop:
                    raise Stopped(self.step, stop)
        disband()

    def elapsed(self):
        """Seconds of training, over all resumes."""
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return self.seconds

    def watch(self, **numbers):
        """Average these over processes and show them; stop at the first that is not finite."""
        values = np.array(list(numbers.values()), float)
        mean_over_processes(values)
        means = dict(zip(numbers, values.tolist(), strict=True))
        for name, x in means.items():
            if not math.isfinite(x):
                raise Fail(f"{name} is {x} at step {self.step}; {self.safe()}")
        self.latest.update(means)
        return means

    def due(self, step, every):
        return step % every == 0

    def log(self, step, **metrics):
        """Append a line to metrics.jsonl: step, seconds of training, metrics."""
        self.latest.update((k, v) for k, v in metrics.items() if isinstance(v, float))
        if is_root():
            line = as_json({"step": step, "seconds": round(self.elapsed(), 2), **metrics})
            with (clear_errors(f"cannot write to {self.folder}", "; " + self.safe()),
                  open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f):
                f.write(json.dumps(line) + "\n")
                f.flush()
                os.fsync(f.fileno())

    # ------------------------------------------------------------ checkpoints

    def identity(self):
        """What must be the same for a run to continue."""
        return as_json({"seed": self.seed, **asdict(self.cfg)})

    def safe(self):
        return ("no checkpoint was written yet" if self.saved is None
                else f"the checkpoint of step {self.saved} is kept")

    def save(self, state):
        """A checkpoint, unless a number in it is not finite; the one before it is kept, too."""
        seconds = self.elapsed()
        if not is_root():
            return
        arrays = {name: to_host(a) for name, a in state.items()}
        for name, a in arrays.items():
            if not np.isfinite(a).all():
                raise Fail(f"{name} is not finite after step {self.step - 1}; {self.safe()}")
        facts = {"step": self.step, "seconds": seconds, "identity": self.identity(), **made_on()}
        write_npz(self.newest, arrays, facts, self.previous, "; " + self.safe())
        self.saved = self.step

    def restore(self, state):
        """Begin at the newest good checkpoint, if any; every process begins with the same."""
        if is_root():
            if found := self.find_checkpoint() if self.resume else None:
                self.take(*found, state)
            elif self.resume:
                say(f"no checkpoint in {self.folder}: starting from the beginning")
            if self.step == 0:
                facts = {**self.about, "seed": self.seed, "config": asdict(self.cfg), **made_on(),
                         "python": platform.python_version(), "commit": commit()}
                write_text(self.folder / "config.json", json.dumps(facts, indent=1) + "\n")
            self.cut_log()
        start = np.array([self.step, self.seconds], float)
        for a in (start, *state.values()):
            from_root(a)
        self.step, self.seconds = int(start[0]), float(start[1])

    def find_checkpoint(self):
        """(file, arrays, facts) of the newest that can be read. A damaged one is put aside."""
        problems = []
        for file in (self.newest, self.previous):
            if not file.exists():
                continue
            try:
                arrays, facts = read_npz(file)
                if not isinstance(facts["identity"], dict):
                    raise Fail(f"{file} is not a checkpoint")
            except (Fail, KeyError, TypeError):
                problems.append(f"{file} is damaged or not a checkpoint")
                continue
            if file == self.previous:
                say("; ".join([*problems, f"continuing from {file}"]))
            if problems:
                os.replace(self.newest, self.folder / "checkpoint.damaged.npz")
            return file, arrays, facts
        if problems:
            raise Fail("; ".join(problems))
        return None

    def take(self, file, arrays, facts, state):
        """Put a checkpoint into `state`, if it belongs to this config and model."""
        ours, theirs = self.identity(), facts["identity"]
        for name in (ours | theirs):
            if theirs.get(name) != ours.get(name):
                raise Fail(f"{file} is of another config: {name} is {text(theirs.get(name))} "
                           f"in the checkpoint and {text(ours.get(name))} here")
        for name, a in state.items():
            if name not in arrays or (arrays[name].shape, arrays[name].dtype) != (a.shape, a.dtype):
                raise Fail(f"{file} is of another model: {name} does not fit")
        for name, now in made_on().items():
            if facts.get(name, now) != now:
                say(f"note: {name} was {facts[name]} and is {now} now: last digits may differ")
        for name, a in state.items():
            a[...] = to_device(arrays[name])
        self.step, self.seconds, self.saved = facts["step"], facts["seconds"], facts["step"]
        say(f"continuing at step {self.step} of {self.total}")

    def cut_log(self):
        """Drop the lines that were logged after the checkpoint, and a torn last one."""
        path, kept = self.folder / "metrics.jsonl", []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] <= self.step:
                        kept.append(line + "\n")
            write_text(path, "".join(kept))


# ---------------------------------------------------------------- while it runs

@contextlib.contextmanager
def signals(run):
    """Ctrl-C and SIGTERM let the current step finish; who cannot wait sends it again."""
    def note(number, frame):
        run.signal = number
        signal.signal(number, old[number])

    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s in old:
        signal.signal(s, note)
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


class Progress:
    """A bar on a terminal, else a line every ten seconds; both on stderr."""

    def __init__(self, run):
        self.run, self.first, self.spoken, self.bar = run, run.step, time.monotonic(), None

    def __enter__(self):
        if is_root() and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.run.total, initial=self.first, dynamic_ncols=True,
                            bar_format="{n_fmt}/{total_fmt} {bar:20} {desc}")
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()

    def show(self):
        now, run = time.monotonic(), self.run
        done, left = run.step - self.first - 1, run.total - run.step
        if done == 0:
            self.began = now                            # the first step may have to compile
        rate = done / (now - self.began) if now > self.began else 0.0
        speed = f"{rate * run.cfg.batch_size:.0f} images/s"
        words = [speed, f"{clock(left / rate)} left"] if rate else []
        words += [f"{k} {v:.4g}" for k, v in run.latest.items()]
        if self.bar is not None:
            self.bar.set_description_str("  ".join(words), refresh=False)
            self.bar.update()
        elif now - self.spoken > 10 or left == 0:
            self.spoken = now
            say("  ".join([f"step {run.step}/{run.total}", *words]))


def clock(seconds):
    """1:02:03"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def say(line):
    if is_root():
        print(line, file=sys.stderr, flush=True)


def text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def made_on():
    """Machine matters that may change a result's last digits."""
    return {"device": DEVICE, "threads": THREADS, "numpy": np.__version__,
            "blas": os.environ.get("OPENBLAS_CORETYPE", "automatic")}


def commit():
    """The commit of this checkout, with a + if files differ from it; None outside of git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True, check=True, timeout=5).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
