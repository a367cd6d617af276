"""The whole script on the strict stand-in for CuPy: same lines, same numbers as on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

import air_multimnist as air
from common.store import read_npz

pytestmark = pytest.mark.skipif(not shutil.which("g++"),
                                reason="the stand-in compiles CUDA source with g++")

ROOT = Path(air.__file__).parent
ALONE = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OPENBLAS_NUM_THREADS": "1",
         "NUMBA_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
TINY = """--steps 4 --batch-size 4 --canvas 20 --digit-low 8 --digit-high 11 --glimpse 7 --hidden 12
          --what 5 --units 9 --eval-every 2 --eval-scenes 6 --test-scenes 8""".split()
CASES = [("air", "exact", "sprites"), ("air", "nvil", "sprites"), ("air", "relaxed", "sprites"),
         ("dair", "exact", "drawn"), ("heads", "relaxed", "drawn")]

# Many command lines in one process, for it takes seconds to start one.
MANY = """
import contextlib, io, json, runpy, sys
device, done = sys.argv[1], []
sys.argv = ["air_multimnist.py", "--device", device]
if device == "gpu":
    import strict_cupy
    strict_cupy.install()
for words in json.load(sys.stdin):
    sys.argv = ["air_multimnist.py", *words, "--device", device]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as e:
            status = e.code
    done.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


def commands(case, folder, picture):
    """Train, score the weights on fresh scenes, find objects in a picture."""
    words = [word for flag, value in zip(("--model", "--estimator", "--data"), case, strict=True)
             for word in (flag, value)]
    run = folder / "-".join(case)
    weights = ["--weights", run / "weights.npz"]
    return [[*words, *TINY, "--out", run],
            ["evaluate", "--test-scenes", 5, *weights],
            ["infer", picture, "--out", run / "found", *weights]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{device: (folder, [status, stdout, stderr] of all commands of all cases)}"""
    both, picture = {}, tmp_path_factory.mktemp("pictures") / "noise.png"
    imageio.imwrite(picture, np.random.default_rng(0).integers(0, 255, (30, 25, 3), np.uint8))
    for device in ("cpu", "gpu"):
        folder = tmp_path_factory.mktemp(device)
        todo = [[str(word) for word in words] for case in CASES
                for words in commands(case, folder, picture)]
        process = subprocess.run([sys.executable, "-c", MANY, device], input=json.dumps(todo),
                                 cwd=ROOT, env=ALONE, text=True, capture_output=True, check=False)
        assert process.returncode == 0, process.stderr
        both[device] = folder, json.loads(process.stdout)
    return both


def numbers(x):
    """All numbers in nested dicts and lists, in order."""
    if isinstance(x, (dict, list)):
        return [n for v in (x.values() if isinstance(x, dict) else x) for n in numbers(v)]
    return [x] if isinstance(x, (int, float)) else []


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gpu_and_cpu_agree(runs, case):
    results = {}
    for device, (folder, done) in runs.items():
        first = 3 * CASES.index(case)
        for status, _, err in done[first:first + 3]:
            assert status == 0, err
        run = folder / "-".join(case)
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        trained, evaluated, found = (json.loads(out) for _, out, _ in done[first:first + 3])
        for line in (trained, *logged):
            line.pop("train_seconds", line.pop("seconds", None))
        results[device] = logged, trained, evaluated, found, read_npz(run / "checkpoint.npz")
    (*cpu, (arrays, facts)), (*gpu, (gpu_arrays, gpu_facts)) = results["cpu"], results["gpu"]
    assert (facts["device"], gpu_facts["device"]) == ("cpu", "gpu")
    for ours, theirs, rounded in zip(gpu, cpu, (0, 0, 0, 0.01), strict=True):
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-4, abs=1e-6 + rounded)
    for name, a in arrays.items():
        error = np.abs(gpu_arrays[name] - a).max() / np.abs(a).max()
        assert error < 1e-4, (name, error)
