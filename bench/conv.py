"""Convolutions with their gradients beside PyTorch's, on this machine, in one process.

    python -m bench.conv                        two threads each: prints a table
    python -m bench.conv --threads 1 --save     one thread each; keeps the rows

Both run in turn, again and again, and the fastest run of each counts. One thread is timed by the
processor's time, which other programs do not take away; two are by the clock on the wall. PyTorch's
layout is the default one. Rows with ELU are layers as a model has them.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from common.backend import THREADS  # before NumPy and PyTorch

# isort: split
import numpy as np

from bench.results import machine
from common.conv import conv
from common.ops import elu, identity
from common.params import Params

RESULTS = Path("results/iodine_tetris/conv.jsonl")
clock = time.process_time if THREADS == 1 else time.perf_counter
SHAPES = [                      # images, input and output channels, kernel, stride, side
    (64, 16, 16, 3, 1, 35), (64, 32, 32, 3, 1, 35), (64, 16, 16, 5, 1, 35), (64, 32, 32, 5, 1, 35),
    (64, 32, 4, 5, 1, 35), (64, 24, 32, 5, 2, 35), (64, 32, 32, 5, 2, 18), (64, 32, 32, 3, 2, 35),
    (32, 24, 48, 4, 2, 16), (16, 48, 48, 3, 1, 64),
]


def contenders(shape, act):
    """Forward and backward of both; the difference of their gradients is checked on the way."""
    import torch
    from torch.nn import functional as F

    B, C, O, k, stride, side = shape
    rng = np.random.default_rng(0)
    p = Params({"a.W": rng.standard_normal((O, C, k, k)) / k, "a.b": rng.standard_normal(O)})
    g, x = p.grads(), rng.standard_normal((B, C, side, side)).astype(np.float32)
    W, b, images = (torch.tensor(a, requires_grad=True) for a in (p["a.W"], p["a.b"], x))

    def ours():
        return conv(p, "a", x, stride, act=act)

    def theirs():
        y = F.conv2d(images, W, b, stride, (k - 1) // 2)
        return F.elu(y) if act is elu else y

    y, back = ours()
    dy = np.ones_like(y)

    def torch_back(y):
        return torch.autograd.grad(y, (images, W, b), torch.from_numpy(dy), retain_graph=True)

    dx, theirs_dx = back(dy, g), torch_back(theirs())[0].numpy()
    assert np.abs(dx - theirs_dx).max() < 1e-4 * np.abs(dx).max()
    flops = 2 * y.size * C * k * k
    return flops, (ours, lambda made: made[1](dy, g)), (theirs, torch_back)


def race(shape, act, seconds):
    """GFLOP/s forward and backward (both gradients), ours and PyTorch's, and the ratio of times."""
    flops, *pairs = contenders(shape, act)
    best, end = np.full((2, 2), np.inf), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for row, (forward, backward) in zip(best, pairs, strict=True):
            start = clock()
            made = forward()
            middle = clock()
            backward(made)
            row[:] = np.minimum(row, (middle - start, clock() - middle))
    speed = np.round([flops, 2 * flops] / best / 1e9).astype(int).tolist()
    ratio = best.sum(1)
    return {"images, C, O, k, stride, side": shape, "act": act.__name__,
            "forward GFLOP/s": {"ours": speed[0][0], "torch": speed[1][0]},
            "backward GFLOP/s": {"ours": speed[0][1], "torch": speed[1][1]},
            "ours / torch": round(float(ratio[0] / ratio[1]), 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of both; default: all cores")
    parser.add_argument("--seconds", type=float, default=4, help="time for each row")
    parser.add_argument("--save", action="store_true", help=f"append the rows to {RESULTS}")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(THREADS)
    command = " ".join(["python -m bench.conv", *sys.argv[1:]])
    print(f"{'images, C, O, k, stride, side':32}{'act':>10}{'forward':>14}{'backward':>14}"
          f"{'time':>8}\n{'GFLOP/s, ours / torch':>56}{'':>14}{'ratio':>8}")
    for shape in SHAPES:
        for act in (identity, elu):
            row = race(shape, act, args.seconds)
            ahead, back = (" / ".join(map(str, row[f"{way} GFLOP/s"].values()))
                           for way in ("forward", "backward"))
            print(f"{shape!s:32}{act.__name__:>10}{ahead:>14}{back:>14}{row['ours / torch']:8.2f}",
                  flush=True)
            if args.save:
                row |= {"threads": THREADS, "machine": machine(), "command": command}
                with open(RESULTS, "a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
