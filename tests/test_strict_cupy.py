"""The GPU's stand-in refuses what CuPy refuses, computes what NumPy computes, runs CUDA C."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import strict_cupy

TESTS = Path(__file__).resolve().parent
needs_gpp = pytest.mark.skipif(not shutil.which("g++"), reason="kernels need g++ to run here")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc to compile CUDA with")


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in under CuPy's name, for one test."""
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return strict_cupy.install()


HOST = np.arange(6, dtype=np.float32).reshape(2, 3)

MIXES = {
    "device + host": lambda xp, d: d + HOST,
    "host + device": lambda xp, d: HOST + d,
    "device @ host": lambda xp, d: d @ HOST.T,
    "host @ device": lambda xp, d: HOST.T @ d,
    "device + 0-d host": lambda xp, d: d + np.array(1.0),
    "comparison": lambda xp, d: d > HOST,
    "device += host": lambda xp, d: d.__iadd__(HOST),
    "host += device": lambda xp, d: HOST.copy().__iadd__(d),
    "device[...] = host": lambda xp, d: d.__setitem__(..., HOST),
    "device[...] = list": lambda xp, d: d.__setitem__(0, [1, 2, 3]),
    "host[...] = device": lambda xp, d: HOST.copy().__setitem__(..., d),
    "device[host]": lambda xp, d: d[np.array([0, 1])],
    "device[host mask]": lambda xp, d: d[HOST > 0],
    "host[device]": lambda xp, d: HOST[d > 0],
    "xp function": lambda xp, d: xp.maximum(d, HOST),
    "numpy ufunc": lambda xp, d: np.maximum(HOST, d),
    "numpy function": lambda xp, d: np.concatenate([d, HOST]),
    "concatenate": lambda xp, d: xp.concatenate([d, HOST]),
    "stack of host": lambda xp, d: xp.stack([HOST, HOST]),
    "where": lambda xp, d: xp.where(d > 0, d, HOST),
    "out=host": lambda xp, d: xp.add(d, d, out=HOST.copy()),
    "out=device": lambda xp, d: np.add(HOST, HOST, out=d),
    "where=host": lambda xp, d: xp.add(d, d, where=HOST > 0),
    "einsum": lambda xp, d: xp.einsum("ij,ij->i", d, HOST),
    "zeros_like(host)": lambda xp, d: xp.zeros_like(HOST),
    "add.at": lambda xp, d: xp.add.at(d, np.array([0]), 1),
    "numpy's reduce": lambda xp, d: np.add.reduce(d),
    "numpy's at": lambda xp, d: np.add.at(d, xp.arange(2), 1),
    "set(other type)": lambda xp, d: d.set(HOST.astype(np.float64)),
    "np.asarray": lambda xp, d: np.asarray(d),
    "np.array of list": lambda xp, d: np.array([d, d]),
    "np.float32": lambda xp, d: np.float32(d[0, 0]),
    "assert_allclose": lambda xp, d: np.testing.assert_allclose(d, HOST),
    "shape from device": lambda xp, d: np.full(2, d[0, 0]),
}


@pytest.mark.parametrize("name", MIXES)
def test_mixing_host_and_device_raises(cupy, name):
    with pytest.raises(TypeError):
        MIXES[name](cupy, cupy.asarray(HOST))


def test_what_cupy_lacks_is_lacking(cupy):
    for name in ("random", "load", "nothing_of_this_name"):
        with pytest.raises(AttributeError):
            getattr(cupy, name)
    with pytest.raises(TypeError):
        cupy.asarray(HOST).astype(object)
    with pytest.raises(TypeError):
        hash(cupy.asarray(HOST))
    with pytest.raises(ValueError, match="ambiguous"):
        bool(cupy.asarray(HOST) > 0)


SAME = {
    "scalars": lambda xp, a: (2 * a + 1 - np.float32(3) / (a + 1)) ** 2,
    "matmul": lambda xp, a: a @ a.T,
    "matmul out": lambda xp, a: xp.matmul(a, a.T, out=xp.zeros((2, 2), a.dtype)),
    "reductions": lambda xp, a: a.sum(0) + xp.mean(a, 0) - a.max(axis=0, keepdims=True),
    "0-d": lambda xp, a: a.sum() * a,
    "numpy ufunc": lambda xp, a: np.exp(a) + np.tanh(a),
    "numpy function": lambda xp, a: np.concatenate([a, a], axis=1),
    "split, stack": lambda xp, a: xp.stack(xp.split(xp.concatenate([a, a], 1), 2, 1)),
    "where, clip": lambda xp, a: xp.where(a > 2, xp.clip(a, 0, 4), 0),
    "einsum": lambda xp, a: xp.einsum("ij,kj->ik", a, a),
    "index": lambda xp, a: a[xp.arange(2)[:, None], xp.asarray([[0, 1], [2, 0]])],
    "mask": lambda xp, a: a[a > 2],
    "pad, roll": lambda xp, a: xp.roll(xp.pad(a, ((0, 1), (1, 0))), 1, axis=1),
    "in place": lambda xp, a: a.copy().__iadd__(a).__imul__(2),
    "out, where": lambda xp, a: xp.add(a, 1, out=xp.zeros_like(a), where=a > 1),
    "compare": lambda xp, a: (a == 3) | ~(a <= 1),
    "linalg": lambda xp, a: xp.linalg.norm(a, axis=1),
    "iteration": lambda xp, a: sum(row * 2 for row in a),
    "windows": lambda xp, a: xp.lib.stride_tricks.sliding_window_view(a, 2, 1),
    "strings": lambda xp, a: xp.asarray(float(f"{a.sum():.3f}")),
}


@pytest.mark.parametrize("name", SAME)
def test_results_are_those_of_numpy(cupy, name):
    want, got = SAME[name](np, HOST), SAME[name](cupy, cupy.asarray(HOST))
    assert isinstance(got, cupy.ndarray)
    assert (got.shape, got.dtype) == (np.shape(want), want.dtype)
    np.testing.assert_array_equal(got.get(), want)


def test_transfers_copy_and_views_share(cupy):
    host = HOST.copy()
    d = cupy.asarray(host)
    flat, column, row = d.reshape(-1), d.T[1], d[0]
    d += 1
    assert (host == HOST).all() and (d.get() == HOST + 1).all()
    assert flat[4] == column[1] == HOST[1, 1] + 1
    row[...] = 7
    flat[5] = d[0, 0]
    assert (d.get() == [[7, 7, 7], [4, 5, 7]]).all()
    back = d.get()
    back[...] = 0
    out = cupy.empty_like(d)
    out.set(HOST)
    assert (out == cupy.asarray(HOST)).all()
    assert d[0, 0] == 7 and cupy.asarray(d) is d
    out = cupy.zeros_like(d)
    assert cupy.add(d, d, out=out) is out


def test_numbers_come_back(cupy):
    d = cupy.asarray(HOST)
    total = d.sum()
    assert isinstance(total, cupy.ndarray) and total.shape == ()
    assert float(total) == total.item() == 15 and int(d.argmax()) == 5 and total > 14
    assert d.tolist() == HOST.tolist() and list(range(d.argmax())) == list(range(5))
    assert cupy.get_array_module(d) is cupy and cupy.get_array_module(HOST) is np


SAXPY = r"""
extern "C" __global__ void saxpy(const float* __restrict__ x, float* y, float a, int n) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t < n) y[t] = fmaf(a, x[t], y[t]);
}
"""
HISTOGRAM = r"""
typedef double real;
__device__ int bin(real x, int bins) { return min(max((int)floor(x * bins), 0), bins - 1); }
extern "C" {
__global__ void histogram(const real* x, real* sums, long long* counts, int rows, int columns,
                          int bins) {
    for (int r = blockIdx.y * blockDim.y + threadIdx.y; r < rows; r += gridDim.y * blockDim.y) {
        int c = blockIdx.x * blockDim.x + threadIdx.x;
        if (c >= columns) return;
        int k = bin(x[r * columns + c], bins);
        atomicAdd(&sums[k], x[r * columns + c]);
        atomicAdd((unsigned long long*)&counts[k], 1);
    }
}
}
"""


@needs_gpp
def test_saxpy(cupy, rng):
    x, y = (rng.standard_normal(1000).astype(np.float32) for _ in range(2))
    dx, dy = cupy.asarray(x), cupy.asarray(y)
    kernel = cupy.RawKernel(SAXPY, "saxpy")
    kernel((8,), (128,), (dx, dy, np.float32(3), np.int32(900)))
    want = np.concatenate([3 * x[:900] + y[:900], y[900:]])
    np.testing.assert_allclose(dy.get(), want, rtol=1e-5, atol=1e-6)
    kernel((1,), (100,), (dx[900:], dy[900:], np.float32(0), np.int32(100)))    # views go too
    np.testing.assert_allclose(dy.get(), want, rtol=1e-5, atol=1e-6)


@needs_gpp
def test_atomic_add_over_a_grid(cupy, rng):
    x = rng.random((33, 70))
    sums, counts = cupy.zeros(5), cupy.zeros(5, np.int64)
    kernel = cupy.RawModule(code=HISTOGRAM).get_function("histogram")
    kernel((3, 2), (32, 4), (cupy.asarray(x), sums, counts, *map(np.int32, (33, 70, 5))))
    bins = np.floor(x * 5).astype(int).ravel()
    np.testing.assert_array_equal(counts.get(), np.bincount(bins, minlength=5))
    np.testing.assert_allclose(sums.get(), np.bincount(bins, x.ravel(), 5))


@needs_gpp
@pytest.mark.parametrize(("args", "error"), [
    (lambda x: (HOST, x, np.float32(1), np.int32(6)), TypeError),           # from the host
    (lambda x: (x, x, 1.0, np.int32(6)), TypeError),                        # a double
    (lambda x: (x, x, np.float32(1), 6), TypeError),                        # a long long
    (lambda x: (x, x.astype(np.float64), np.float32(1), np.int32(6)), TypeError),
    (lambda x: (x, x, np.float32(1)), TypeError),
    (lambda x: (x.T, x, np.float32(1), np.int32(6)), ValueError),           # not C-contiguous
])
def test_wrong_kernel_arguments_raise(cupy, args, error):
    kernel = cupy.RawKernel(SAXPY, "saxpy")
    with pytest.raises(error):
        kernel((1,), (32,), args(cupy.asarray(HOST)))


@needs_gpp
def test_what_a_gpu_would_refuse(cupy):
    x = cupy.zeros(4, np.float32)
    kernel = cupy.RawKernel(SAXPY, "saxpy")
    for grid, block in [((0,), (32,)), ((1,), (2048,))]:
        with pytest.raises(RuntimeError, match="CUDA_ERROR"):
            kernel(grid, block, (x, x, np.float32(1), np.int32(4)))
    with pytest.raises(RuntimeError, match="refuses"):
        cupy.RawKernel(SAXPY.replace("x[t],", "z[t],"), "saxpy")


@needs_gpp
def test_a_script_runs_on_it(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, cupy\nassert __name__ == '__main__'\n"
        "print(sys.argv[1:], cupy.cuda.runtime.getDeviceCount(), float(cupy.arange(4).sum()))\n",
        encoding="utf-8")
    command = [sys.executable, TESTS / "strict_cupy.py", tmp_path / "script.py", "--device", "gpu"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.stdout == "['--device', 'gpu'] 1 6.0\n", done.stderr


# ---------------------------------------------------------------- the project's own kernels

@needs_nvcc
@pytest.mark.parametrize("real", ["float", "double"])
def test_cuda_source_compiles(real):
    from common.kernels import CUDA
    assert ".visible .entry" in strict_cupy.compile_cuda(f"typedef {real} real;\n" + CUDA)


@needs_nvcc
def test_nvcc_refuses_wrong_source():
    with pytest.raises(RuntimeError, match="refuses"):
        strict_cupy.compile_cuda(SAXPY.replace("x[t],", "z[t],"))
