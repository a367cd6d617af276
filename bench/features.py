"""Train the network whose features compare generated scenes with real ones, and keep it.

    python -m bench.features polygons       two minutes of one core

Writes results/features/<data>-64.npz, and appends what the network knows about fresh scenes to
results/features/runs.jsonl.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass

from common.backend import to_device, to_host  # before NumPy

# isort: split
import numpy as np

from bench.results import machine
from common import features, shapes
from common.store import save_weights

CANVAS = 64


@dataclass(frozen=True)
class About:
    data: str
    canvas: int


def polygons(seed, start, count):
    """One scene in four holds a single object."""
    one, two = (shapes.polygons(seed, start, n, CANVAS, k)
                for n, k in ((count // 4, 1), (count - count // 4, 2)))
    kinds, numbers = zip(*(features.truth(s.images, s.amodal, s.order, s.kinds)
                           for s in (one, two)), strict=True)
    kinds, numbers = ([np.pad(a, [(0, 0), (0, 2 - a.shape[1])] + [(0, 0)] * (a.ndim - 2))
                       for a in each] for each in (kinds, numbers))
    return (np.concatenate([one.images, two.images]), np.concatenate(kinds),
            np.concatenate(numbers))


SETS = {"polygons": (polygons, 2)}      # what draws labelled scenes, objects at most


def knowledge(weights, draw):
    """How well fresh scenes are told: kinds, and the error of places (pixels) and colours."""
    images, kinds, numbers = draw(1_000_003, 0, 2000)
    told = to_host(features.lesson(features.Params(weights), to_device(images), to_device(kinds),
                                   to_device(numbers))[1])
    away = np.abs(told[..., features.KINDS:] - numbers)[kinds > 0]
    right = told[..., :features.KINDS].argmax(2) == kinds
    return {"kind_nearest": float(right[:, 0].mean()), "kind_second": float(right[:, 1].mean()),
            "place_error": float(away[:, :2].mean() * CANVAS / 2),
            "colour_error": float(away[:, 3:].mean())}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(SETS))
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    draw, objects = SETS[args.data]
    start = time.monotonic()
    weights = features.fit(draw, CANVAS, objects, steps=args.steps)
    seconds = round(time.monotonic() - start, 1)
    save_weights(features.FOLDER / f"{args.data}-{CANVAS}.npz", weights,
                 About(args.data, CANVAS), about=args.data)
    record = {"row": args.data, "machine": machine(), "train_seconds": seconds,
              **knowledge(weights, draw),
              "command": " ".join(["python -m bench.features", *sys.argv[1:]])}
    with open(features.FOLDER / "runs.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
