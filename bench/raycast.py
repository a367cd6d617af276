"""How many scenes the ray caster draws in a second, with all annotations, by the clock on the wall.

    python -m bench.raycast                 all cores: prints, and appends to
    python -m bench.raycast --threads 1     results/depth_scene/raycast.jsonl

The median of 20 batches of 100 scenes each, and the best of them: what is left when the machine has
something else to do now and then. `core` is the best by the processor's time, of one core.
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
from common.raycast import VARIANTS, clevr

RESULTS, BATCHES, BATCH = Path("results/depth_scene/raycast.jsonl"), 20, 100


def measure(variant, size):
    """Scenes a second: median, best, and of one core."""
    clevr(0, 0, 2 * THREADS, size, variant)
    wall, work = [], []
    for k in range(BATCHES):
        start = time.perf_counter(), time.process_time()
        clevr(1, k * BATCH, BATCH, size, variant)
        wall.append(time.perf_counter() - start[0])
        work.append(time.process_time() - start[1])
    return {"scenes a second": round(BATCH / np.median(wall)), "best": round(BATCH / min(wall)),
            "core": round(BATCH / min(work))}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--size", type=int, default=64, help="side of the canvas in pixels")
    args = parser.parse_args()
    for variant in VARIANTS:
        record = {"row": f"ray caster, CLEVR-{variant}, {args.size} x {args.size}",
                  "threads": THREADS, "machine": machine(),
                  "command": " ".join(["python -m bench.raycast", *sys.argv[1:]]),
                  **measure(variant, args.size)}
        print(json.dumps(record), flush=True)
        with open(RESULTS, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
