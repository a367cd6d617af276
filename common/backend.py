"""Arrays and devices: which array library, how many threads, one matrix product.

Import this before NumPy: thread counts and BLAS kernels are read once, when NumPy loads.
"""

import os
import sys

from common.errors import Fail


def _peek(flag, default):
    """The value of a command-line flag, needed before any parser can be built."""
    for k, word in enumerate(sys.argv):
        if word == flag and k + 1 < len(sys.argv):
            return sys.argv[k + 1]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return default


def _threads():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    word = _peek("--threads", os.environ.get("OPENBLAS_NUM_THREADS", ""))
    return min(int(word), cores) if word.isdigit() and int(word) > 0 else cores


def _has_avx512():
    try:
        with open("/proc/cpuinfo") as f:
            flags = f.read().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return False
    return {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags)


THREADS = _threads()
for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = str(THREADS)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # no idle threads that spin beside BLAS
if _has_avx512():  # OpenBLAS takes AVX2 kernels on some CPUs that could do twice as much
    os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")

import numpy as np  # noqa: E402


def _choose(device):
    """`cpu`, `gpu`, or `auto`: the GPU where CuPy finds one."""
    if device not in ("gpu", "auto"):
        return np, "cpu"
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() > 0:
            return cupy, "gpu"
        problem = "CuPy finds no GPU"
    except ImportError:
        problem = "CuPy is not installed (pip install -r requirements-gpu.txt)"
    except Exception as e:  # a driver that is missing or too old has many ways to say so
        problem = f"CuPy cannot use the GPU: {e}"
    if device == "auto":
        return np, "cpu"
    raise Fail(f"--device gpu: {problem}")


try:
    xp, DEVICE = _choose(_peek("--device", "cpu"))
except Fail as problem:  # imports come before main(): say the line here
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2) from None


def gemm(a, b, out=None):
    """The one place where models multiply matrices."""
    return xp.matmul(a, b, out=out)


def to_device(a):
    return xp.asarray(a)


def to_host(a):
    return a if isinstance(a, np.ndarray) else a.get()
