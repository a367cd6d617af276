"""Files that are whole or not there: checkpoints, weights, logs, figures."""

import contextlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.errors import Fail


def write_npz(path, arrays, facts, keep=None, kept=""):
    """Whole or not at all, whenever the power fails; `keep` is where the old file goes."""
    text = json.dumps(as_json({**facts, "arrays": list(arrays)}))
    with whole_file(path, keep, kept) as f:
        np.savez(f, facts=np.frombuffer(text.encode(), np.uint8), **arrays)


def read_npz(path):
    """(arrays, facts). Zip files carry a checksum of each array; nothing is ever unpickled."""
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(arrays.pop("facts").tobytes().decode())
        if facts.pop("arrays") != list(arrays):
            raise ValueError("arrays are missing")
        return arrays, facts
    except Exception as e:                              # damage can upset the reader in any way
        raise Fail(f"{path} is damaged or a foreign file ({type(e).__name__})") from None


def write_text(path, content):
    with whole_file(path) as f:
        f.write(content.encode())


@contextlib.contextmanager
def whole_file(path, keep=None, kept=""):
    """A temporary file that takes the place of `path` once it is safely on disk."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with clear_errors(f"cannot write {path}", kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
            if os.name == "posix":                      # the new names must reach the disk as well
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def clear_errors(what, kept=""):
    try:
        yield
    except OSError as e:
        raise Fail(f"{what}: {e.strerror or e}{kept}") from None


def as_json(x):
    """Python's own types all the way down; NaN and infinity, which JSON lacks, as None."""
    if isinstance(x, dict):
        return {str(k): as_json(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [as_json(v) for v in x]
    if hasattr(x, "tolist"):
        return as_json(x.tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return str(x) if isinstance(x, Path) else x


# ---------------------------------------------------------------- weights

def save_weights(path, arrays, cfg, about):
    """Weights for sharing: half precision, with the config that they need and what they saw."""
    small = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
    for name, a in small.items():
        if not np.abs(a).max(initial=0) <= np.finfo(np.float16).max:
            raise Fail(f"{name} has values that half precision cannot hold")
    small = {name: a.astype(np.float16) for name, a in small.items()}
    write_npz(path, small, {"config": asdict(cfg), "about": about})


def load_weights(path):
    """(config as a dict, arrays in float32, what they were trained on)"""
    if not Path(path).exists():
        raise Fail(f"no weights at {path}: train first, or give --weights FILE")
    arrays, facts = read_npz(path)
    try:
        return facts["config"], {k: a.astype(np.float32) for k, a in arrays.items()}, facts["about"]
    except (KeyError, TypeError, ValueError):
        raise Fail(f"{path} is not a weights file") from None
