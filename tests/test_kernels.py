"""Three versions of each kernel, one result: numba and CUDA against the NumPy reference."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import kernels
from common.backend import DEVICE, to_device, to_host, xp

HERE = Path(__file__)
PRECISION = {np.float32: 3e-5, np.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", PRECISION)


GPUS = {"stand-in": "import strict_cupy; strict_cupy.install()", "real": "import cupy"}


@pytest.mark.skipif(DEVICE == "gpu", reason="this is that run")
@pytest.mark.parametrize("gpu", GPUS)
def test_all_of_this_on_a_gpu(gpu):
    """The CUDA source runs on the CPU, by the stand-in; and on a GPU where there is one."""
    again_on_gpu(HERE, gpu)


def again_on_gpu(file, gpu):
    """Run a test file once more with CuPy, the stand-in or the real one."""
    if gpu == "stand-in" and not shutil.which("g++"):
        pytest.skip("the stand-in compiles CUDA source with g++")
    if gpu == "real" and not has_gpu():
        pytest.skip("no CuPy with a GPU here")
    code = f"import sys; sys.argv += ['--device', 'gpu']; {GPUS[gpu]}; import pytest; " \
           f"sys.exit(pytest.main([{str(file)!r}, '-p', 'no:cacheprovider']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=file.parent, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def has_gpu():
    try:
        import cupy
        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:       # not installed, or no driver
        return False


def device(*arrays):
    return [to_device(a) for a in arrays]


def assert_close(got, want, tolerance):
    """The largest difference, measured by the largest value."""
    for a, b in zip(map(to_host, got), map(to_host, want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)


# Where target pixel j looks: a j + b. Sources have 7 to 11 pixels, targets 5 to 14.
WINDOWS = {
    "inside": (0.4137, 1.1341),
    "beyond the left": (0.6173, -2.3719),
    "beyond the right": (0.8291, 4.7137),
    "beyond both": (1.9273, -6.2917),
    "wholly left": (0.57, -40.3),
    "wholly right": (0.57, 40.3),
    "touching the left": (0.1137, -1.8719),
    "tiny, within a pixel": (1e-3, 3.213),
    "huge, one target pixel hits": (47.317, -139.219),
    "huge, none hits": (1e6, -17.3),
}
SHAPES = [(1, 7, 7, 9, 9), (3, 9, 11, 5, 14), (2, 8, 10, 13, 6)]        # C, h, w, H, W


@pytest.fixture(params=SHAPES, ids=str)
def warping(request, rng):
    """Sources, output gradients, and all windows along y with all others along x."""
    C, h, w, H, W = request.param
    a, b = np.array([*WINDOWS.values()]).T
    y, x = np.indices((len(a), len(a))).reshape(2, -1)
    return (rng.standard_normal((len(y), C, h, w)), rng.standard_normal((len(y), C, H, W)),
            np.stack([a[y], a[x]], 1), np.stack([b[y], b[x]], 1))


@dtypes
def test_warp(warping, dtype):
    src, dout, a, b = device(*(array.astype(dtype) for array in warping))
    got = kernels.warp(src, a, b, dout.shape[2:])
    want = kernels.warp_reference(src, a, b, dout.shape[2:])
    assert_close([got], [want], PRECISION[dtype])
    assert float(abs(want).max()) > 1


@dtypes
def test_warp_back(warping, dtype):
    src, dout, a, b = device(*(array.astype(dtype) for array in warping))
    got = kernels.warp_back(dout, src, a, b)
    assert_close(got, kernels.warp_back_reference(dout, src, a, b), PRECISION[dtype])
    no_src, *rest = kernels.warp_back(dout, src, a, b, want_src=False)
    assert no_src is None
    assert_close(rest, got[1:], PRECISION[dtype])


def test_no_result_shows_what_memory_held(warping, monkeypatch):
    src, dout, a, b = device(*warping)
    monkeypatch.setattr(kernels.xp, "empty", lambda shape, dtype: xp.full(shape, np.nan, dtype))
    for array in (kernels.warp(src, a, b, dout.shape[2:]), *kernels.warp_back(dout, src, a, b)):
        assert np.isfinite(to_host(array)).all()


@dtypes
def test_lstm_gates_and_back(dtype, rng):
    B, H = 5, 7
    u, c, dh, dc = device(*(rng.standard_normal((B, n)).astype(dtype) for n in (4 * H, H, H, H)))
    u[0] *= 100                                             # saturated
    h, c_new, gates = kernels.lstm_gates(u, c)
    assert_close((h, c_new, gates), kernels.lstm_gates_reference(u, c), PRECISION[dtype])
    assert_close(kernels.lstm_gates_back(dh, dc, c, gates),
                 kernels.lstm_gates_back_reference(dh, dc, c, gates), PRECISION[dtype])


UPDATES = {
    "adam": (kernels.adam, kernels.adam_reference,
             lambda t: {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "t": t}),
    "rmsprop": (kernels.rmsprop, kernels.rmsprop_reference,
                lambda t: {"lr": 1e-3, "momentum": 0.9, "rho": 0.95, "eps": 1e-8}),
}


@dtypes
@pytest.mark.parametrize("shape", [(3, 33, 7), (16, 200, 13), (1, 16, 1), (48, 17, 6), (5, 3, 4),
                                   (49, 40, 8)])
def test_times_transposed(shape, dtype, rng):
    M, N, K = shape
    a, b = (rng.standard_normal(s).astype(dtype) for s in ((M, N), (K, N)))
    want = a @ b.T
    for _ in range(2):                                      # its memory serves again
        assert_close(kernels.times_transposed(*device(a, b)), want, PRECISION[dtype])
    a[0, 0] = np.nan
    assert np.isnan(to_host(kernels.times_transposed(*device(a, b)))[0]).all()


@dtypes
@pytest.mark.parametrize("count", [2, 3])
def test_average(count, dtype, rng):
    rows = rng.standard_normal((count, 5000)).astype(dtype)
    want = rows.copy()
    want[0, 7:4321] = rows[:, 7:4321].mean(0)
    kernels.average(rows, 7, 4321)
    assert_close(rows, want, PRECISION[dtype])


@dtypes
@pytest.mark.parametrize("name", UPDATES)
def test_optimisers(name, dtype, rng):
    update, reference, numbers = UPDATES[name]
    p = rng.standard_normal(300).astype(dtype)
    p, m, v, *want = device(p, 0 * p, 0 * p, p.copy(), 0 * p, 0 * p)
    for t in range(1, 8):
        g = to_device((rng.standard_normal(300) * 10.0 ** (t - 4)).astype(dtype))
        kept = to_host(g).copy()
        update(p, g, m, v, **numbers(t), scale=0.5)
        reference(want[0], g, want[1], want[2], **numbers(t), scale=0.5)
        assert_close((p, m, v), want, PRECISION[dtype])
        np.testing.assert_array_equal(to_host(g), kept)


@dtypes
@pytest.mark.parametrize("name", UPDATES)
def test_moments_die_before_they_are_denormal(name, dtype):
    """Without gradients moments shrink for ever, and a CPU crawls once they are denormal."""
    update, reference, numbers = UPDATES[name]
    for f in (update, reference):
        p, g, m, v = device(*np.zeros((4, 9), dtype))
        m[:4], m[4:], v[...] = 3 * kernels.TINY, -3 * kernels.TINY, 1.01 * kernels.TINY
        for t in range(1, 20):
            f(p, g, m, v, **numbers(t), scale=1.0)
            for moment in (to_host(m), to_host(v)):
                assert ((moment == 0) | (abs(moment) >= 0.99 * kernels.TINY)).all()
        assert not to_host(m).any() and not to_host(v).any()
