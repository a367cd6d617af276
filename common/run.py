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
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.backend import DEVICE, THREADS, to_device, to_host
from common.errors import Fail
from common.mpi import any_process, is_root, world

UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError)


class Stopped(Exception):
    """Training ended early, on a signal, with everything saved."""

    def __init__(self, step, number):
        super().__init__(f"stopped after step {step}; continue with --resume")
        self.status = 128 + number


class Run:
    def __init__(self, folder, cfg, seed, data_dir=None, resume=False, save_every=None):
        self.folder, self.cfg, self.seed, self.data_dir = Path(folder), cfg, seed, data_dir
        self.resume, self.save_every = resume, save_every
        self.step, self.seconds, self.latest, self.signal = 0, 0.0, {}, None
        if not resume and (self.folder / "config.json").exists():
            raise Fail(f"{folder} already holds a run: continue it with --resume, "
                       "or choose another folder with --out")
        if is_root():
            with clear_errors(f"cannot write to {folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                if not (self.folder / "config.json").exists():
                    write_text(self.folder / "config.json", json.dumps(self.facts(), indent=1))

    def facts(self):
        return {"config": asdict(self.cfg), "seed": self.seed, "command": " ".join(sys.argv),
                "device": DEVICE, "threads": THREADS, "python": platform.python_version(),
                "numpy": np.__version__, "commit": commit()}

    def steps(self, total, state):
        """Yield the number of updates made so far, until `total`; `state` is saved and restored."""
        if self.resume:
            self.restore(state)
        saved, self.clock = time.monotonic(), time.perf_counter()
        progress = Progress(self, total)
        with signals(self):
            while self.step < total:
                yield self.step
                self.step += 1
                progress.show()
                stop = any_process(self.signal)
                late = (self.step % self.save_every == 0 if self.save_every
                        else world() is None and time.monotonic() - saved > 15)
                if stop or late or self.step == total:
                    self.save(state)
                    saved = time.monotonic()
                if stop:
                    raise Stopped(self.step, self.signal or signal.SIGTERM)

    def elapsed(self):
        """Seconds of training, over all resumes."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return self.seconds

    def watch(self, **numbers):
        """Show these; stop at the first that is not finite, before it can be saved."""
        for name, x in numbers.items():
            if not math.isfinite(x):
                raise Fail(f"{name} is {x} at step {self.step}; the last good checkpoint is kept "
                           f"in {self.folder}")
        self.latest.update(numbers)

    def due(self, step, every):
        return step % every == 0

    def log(self, step, **metrics):
        self.latest.update((k, v) for k, v in metrics.items() if isinstance(v, float))
        if is_root():
            line = json.dumps({"step": step, "seconds": round(self.elapsed(), 2), **metrics})
            with (clear_errors(f"cannot write to {self.folder}"),
                  open(self.folder / "metrics.jsonl", "a") as f):
                f.write(line + "\n")

    # ------------------------------------------------------------ checkpoints

    def identity(self):
        return json.loads(json.dumps({"seed": self.seed, **asdict(self.cfg)}))

    def save(self, state):
        if is_root():
            facts = {"step": self.step, "seconds": self.elapsed(), "identity": self.identity()}
            write_npz(self.folder / "checkpoint.npz", {k: to_host(a) for k, a in state.items()},
                      facts, keep=self.folder / "checkpoint.previous.npz")

    def restore(self, state):
        """Take up the newest good checkpoint; without one, start from the beginning."""
        files = [self.folder / name for name in ("checkpoint.npz", "checkpoint.previous.npz")]
        there, found = [f for f in files if f.exists()], None
        for file in there:
            try:
                found = read_npz(file)
                break
            except UNREADABLE as e:
                say(f"{file} is damaged ({type(e).__name__}), trying the one before it")
        if there and found is None:
            raise Fail(f"no checkpoint in {self.folder} can be read: the files are truncated or "
                       "not checkpoints")
        if found is None:
            say(f"no checkpoint in {self.folder}: starting from the beginning")
        else:
            arrays, facts = found
            refuse_other(facts.get("identity"), self.identity(), file)
            for name, a in state.items():
                if name not in arrays or arrays[name].shape != a.shape:
                    raise Fail(f"{file} is a checkpoint of another model: {name} does not fit")
                a[...] = to_device(arrays[name].astype(a.dtype, copy=False))
            self.step, self.seconds = facts["step"], facts["seconds"]
        if is_root():
            self.cut_log()

    def cut_log(self):
        """Drop the lines that were logged after the checkpoint, and a torn last one."""
        path = self.folder / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] <= self.step:
                        kept.append(line + "\n")
        write_text(path, "".join(kept))


def refuse_other(theirs, ours, file):
    if not isinstance(theirs, dict):
        raise Fail(f"{file} is not a checkpoint of this program")
    for name in ours.keys() | theirs.keys():
        if theirs.get(name) != ours.get(name):
            raise Fail(f"{file} is a checkpoint of another config: {name} is {theirs.get(name)} "
                       f"there and {ours.get(name)} here")


# ---------------------------------------------------------------- weights

def save_weights(path, arrays, cfg, about):
    """Weights for sharing: half precision, with the config that they need and what they saw."""
    arrays = {name: a.astype(np.float16) for name, a in arrays.items()}
    write_npz(path, arrays, {"config": asdict(cfg), "about": about})


def load_weights(path):
    """(config as a dict, arrays in float32, what they were trained on)"""
    if not Path(path).exists():
        raise Fail(f"no weights at {path}: train first, or give --weights FILE")
    try:
        arrays, facts = read_npz(path)
        return facts["config"], {k: a.astype(np.float32) for k, a in arrays.items()}, facts["about"]
    except UNREADABLE as e:
        raise Fail(f"{path} is not a readable weights file ({type(e).__name__})") from None


# ---------------------------------------------------------------- files written whole

def write_npz(path, arrays, facts, keep=None):
    """Whole or not at all, whenever the power fails; `keep` is where the old file goes."""
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with whole_file(path, keep) as f:
        np.savez(f, facts=text, **arrays)


def read_npz(path):
    """(arrays, facts); damage shows as one of UNREADABLE (zip files carry checksums)."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays.pop("facts").tobytes().decode())


def write_text(path, text):
    with whole_file(path) as f:
        f.write(text.encode())


@contextlib.contextmanager
def whole_file(path, keep=None):
    """A temporary file that takes the place of `path` once it is safely on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with clear_errors(f"cannot write {path}", "; what was saved before is kept"):
        try:
            with open(temporary, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def clear_errors(what, kept=""):
    try:
        yield
    except OSError as e:
        raise Fail(f"{what}: {e.strerror or e}{kept}") from None


# ---------------------------------------------------------------- while it runs

@contextlib.contextmanager
def signals(run):
    """Ctrl-C and SIGTERM let the current step finish; a second one does not."""
    def note(number, frame):
        if run.signal is not None:
            raise KeyboardInterrupt
        run.signal = number

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


class Progress:
    """A bar on a terminal, else a line every ten seconds; both on stderr."""

    def __init__(self, run, total):
        self.run, self.total, self.spoken = run, total, time.monotonic()
        self.first, self.began = run.step, time.monotonic()
        self.bar = None
        if is_root() and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=run.step, unit="step", dynamic_ncols=True)

    def show(self):
        now, run = time.monotonic(), self.run
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in run.latest.items())
        rate = (run.step - self.first) / (now - self.began + 1e-9)
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(f"{rate * run.cfg.batch_size:.0f} images/s  {numbers}",
                                     refresh=False)
            if run.step == self.total:
                self.bar.close()
        elif now - self.spoken > 10 or run.step == self.total:
            self.spoken = now
            say(f"step {run.step}/{self.total}  {rate * run.cfg.batch_size:.0f} images/s  "
                f"{(self.total - run.step) / rate:.0f} s left  {numbers}")


def say(line):
    if is_root():
        print(line, file=sys.stderr, flush=True)


def commit():
    """The commit of this checkout, with a + if files differ from it; None outside of git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True, check=True, timeout=5).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
