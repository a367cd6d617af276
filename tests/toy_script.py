"""Linear regression by Adam: the smallest script that uses all of a training run.

    python tests/toy_script.py --out DIR

It stands in for the real scripts wherever a test has to start, stop, break and resume one.
"""
# ruff: noqa: I001

import json
import time
from dataclasses import dataclass
from pathlib import Path

from common.backend import to_device, to_host, xp  # before NumPy: sets threads and BLAS kernels

import numpy as np

from common import cli
from common.errors import Fail
from common.processes import is_root, mean_over_processes, share
from common.store import load_weights, save_weights

D = 64


@dataclass(frozen=True)
class Config:
    steps: int = cli.option(200, "optimiser updates", low=1)
    batch_size: int = cli.option(16, "rows per update", low=1)
    lr: float = cli.option(0.01, "learning rate", low=0.0, high=10.0)
    noise: str = cli.option("normal", "what disturbs the targets", choices=("normal", "none"))
    widths: tuple[int, ...] = cli.option((1, 2), "scales that rows are drawn from", low=1)
    limits: tuple[float, float] = cli.option((-1e9, 1e9), "what targets are cut to")
    bias: bool = cli.option(True, "add 100 % of a constant")
    eval_every: int = cli.option(10, "updates between two lines of metrics", low=1)
    nan_at: int = cli.option(-1, "update whose loss is not a number")
    pause: float = cli.option(0.0, "seconds that each update takes at least", low=0.0)


PRESETS = {"default": {}, "quick": {"steps": 20, "lr": 0.05}}


def draw(cfg, seed, step):
    """One batch, keyed by (seed, step)."""
    rng = np.random.default_rng([seed, step])
    x = rng.standard_normal((cfg.batch_size, D), np.float32)
    x *= rng.choice(np.array(cfg.widths, np.float32), (cfg.batch_size, 1))
    y = x @ np.linspace(-1, 1, D, dtype=np.float32) + np.float32(cfg.bias)
    if cfg.noise == "normal":
        y += 0.1 * rng.standard_normal(cfg.batch_size).astype(np.float32)
    return to_device(x), to_device(y.clip(*np.float32(cfg.limits)))


def predict(w, x):
    """y = x w + b, b the last entry of w."""
    y = x @ w[:D] + w[D]

    def back(dy):
        return xp.concatenate([x.T @ dy, dy.sum(keepdims=True)])

    return y, back


def train(cfg, run):
    """The loop of the real scripts in small."""
    w, m, v = (xp.zeros(D + 1, xp.float32) for _ in range(3))
    for step in run.steps(cfg.steps, {"w": w, "m": m, "v": v}):
        start, count = share(cfg.batch_size)
        own = slice(start, start + count)
        x, y = draw(cfg, run.seed, step)
        guess, back = predict(w, x[own])
        loss = float(((guess - y[own]) ** 2).mean()) if step != cfg.nan_at else float("nan")
        g = back(2 * (guess - y[own]) / count)
        mean_over_processes(g)
        seen = run.watch(loss=loss, gradient=float(xp.abs(g).max()))
        m[...] = 0.9 * m + 0.1 * g
        v[...] = 0.99 * v + 0.01 * g * g
        w -= cfg.lr * m / (xp.sqrt(v) + 1e-8)
        time.sleep(cfg.pause)
        if run.due(step + 1, cfg.eval_every):
            run.log(step + 1, **seen, norm=np.float32(float(xp.abs(w).sum())))
    if is_root():
        save_weights(run.folder / "weights.npz", {"w": to_host(w)}, cfg, about="rows")
    return {"bits": to_host(w).tobytes().hex(), "empty": float("nan")}


def evaluate(cfg, weights, path, data_dir):
    """Mean squared error on the rows of a file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except (OSError, ValueError, KeyError):
        raise Fail(f"{path} is not a file of rows") from None
    guess, _ = predict(weights["w"], x)
    return {"mse": ((guess - y) ** 2).mean(), "steps": cfg.steps, "noise": cfg.noise}


def infer(cfg, weights, files, out):
    """Files of numbers in, predictions out."""
    guesses = {}
    for path in files:
        x = np.array(json.loads(Path(path).read_text()), np.float32)
        guesses[str(path)] = float(predict(weights["w"], x[None])[0][0])
        (Path(out) / (Path(path).stem + ".txt")).write_text(str(guesses[str(path)]))
    return {"guesses": guesses}


def figures(folders, data_dir=None):
    """A file that a picture could be in."""
    for folder in folders:
        cli.from_dict(Config, load_weights(folder / "weights.npz")[0], folder)
    (folders[0] / "curve.png").write_bytes(b"")


if __name__ == "__main__":
    cli.main(__doc__, Config, PRESETS, train=train, evaluate=evaluate, infer=infer, figures=figures,
             adjustable=("noise",))
