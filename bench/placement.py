"""What placing objects costs against the size of the canvas, sharp position maps and blurred ones.

    python -m bench.placement --threads 1       prints, and appends to
                                                results/depth_scene/placement.jsonl

Milliseconds of the processor for one object of 24 x 24 pixels and four channels, the fastest of
several runs on 20 objects: `place` alone, and with its pullback. `blank` is what it takes to make
an empty canvas: the part that must grow; `beyond` is the rest of `place`. "loop" weighs every pixel
of the map that is not faint, "transform" is Fourier's way, for maps that are blurred enough.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from common.backend import THREADS  # before NumPy

# isort: split
import numpy as np

from bench.results import machine
from common import compose

RESULTS = Path("results/depth_scene/placement.jsonl")
R, C, M, SIDES = 20, 4, 24, (32, 64, 128, 256)
MAPS = {"one pixel": 0.1, "blob of 5 pixels": 0.85, "even": np.inf}


def position_maps(side, width, rng):
    """Gaussian bumps of a width in pixels, anywhere in the middle half."""
    middle = rng.integers(side // 4, 3 * side // 4, (2, R, 1, 1))
    y, x = np.mgrid[:side, :side]
    theta = np.exp(-((y - middle[0]) ** 2 + (x - middle[1]) ** 2) / (2 * width**2))
    return (theta / theta.sum((1, 2), keepdims=True)).astype(np.float32)


def least(work, seconds=0.5):
    """Milliseconds for one object."""
    work()
    best, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return round(1e3 * best / R, 4)


def measure(side, width):
    rng = np.random.default_rng(0)
    canvas = rng.random((R, C, M, M), np.float32)
    theta = position_maps(side, width, rng)
    dout = rng.random((R, C, side, side), np.float32)
    place = least(lambda: compose.place(canvas, theta))
    blank = least(lambda: np.zeros((R, C, side, side), np.float32).fill(0))
    return {"weights": int(np.count_nonzero(theta >= compose.FAINT) / R),
            "way": "transform" if compose.blurred(canvas, theta) else "loop",
            "place ms": place, "blank ms": blank, "beyond ms": round(max(place - blank, 0), 4),
            "with pullback ms": least(lambda: compose.place(canvas, theta)[1](dout))}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.parse_args()
    for name, width in MAPS.items():
        for side in SIDES:
            record = {"row": f"placement, {name}, {side}", "threads": THREADS,
                      "machine": machine(), "command": "python -m bench.placement "
                      + " ".join(sys.argv[1:]), **measure(side, width)}
            print(json.dumps(record), flush=True)
            with open(RESULTS, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
