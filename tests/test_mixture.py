"""The mixture's three versions agree, and their slopes are those of finite differences."""

from pathlib import Path

import numpy as np
import pytest

from common import mixture as mix
from common.backend import DEVICE, to_device, to_host
from common.gradcheck import coordinates
from test_gradcheck import BOUND, EPS
from test_kernels import GPUS, again_on_gpu

HERE = Path(__file__)
on_cpu = pytest.mark.skipif(DEVICE == "gpu", reason="the reference is the same there")
kinds = pytest.mark.parametrize("kind", mix.KINDS)


@pytest.mark.skipif(DEVICE == "gpu", reason="this is that run")
@pytest.mark.parametrize("gpu", GPUS)
def test_all_of_this_on_a_gpu(gpu):
    """The CUDA source runs on the CPU, by the stand-in; and on a GPU where there is one."""
    again_on_gpu(HERE, gpu)


def scene(rng, dtype=np.float64, batch=2, slots=3, channels=2):
    x = rng.random((batch, channels, 4, 5))
    y = rng.standard_normal((batch, slots, channels + 1, 4, 5))
    return x.astype(dtype), y.astype(dtype)


@kinds
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [0.1, 0.7])
def test_versions_agree(kind, dtype, scale, rng):
    x, y = scene(rng, dtype, channels=3)
    want = mix.mixture_reference(*map(to_device, (x.astype(float), y.astype(float))), scale, kind)
    got = mix.mixture(to_device(x), to_device(y), scale, kind)
    for name, a, b in zip(mix.Pixels._fields, *(map(to_host, r) for r in (got, want)), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        worst = np.abs(a - b).max() / np.abs(b).max()
        bound = 3e-5 if dtype == np.float32 else 1e-12
        bound *= 30 if name == "without" else 1         # a small difference of large numbers
        assert worst < bound, (name, worst)


@on_cpu
@kinds
def test_the_slope_is_the_derivative(kind, rng):
    x, y = scene(rng)
    slope = mix.mixture_reference(x, y, 0.3, kind).slope
    error = coordinates(lambda: mix.mixture_reference(x, y, 0.3, kind).log_p.sum(), y, slope, EPS)
    assert error < BOUND


@on_cpu
def test_values_by_the_definition(rng):
    """Three slots, one channel, Gaussian: everything from the formula of the paper."""
    x, y = scene(rng, slots=3, channels=1)
    m = np.exp(y[:, :, 1]) / np.exp(y[:, :, 1]).sum(1, keepdims=True)
    n = np.exp(-0.5 * ((x - y[:, :, 0]) / 0.4) ** 2) / (0.4 * np.sqrt(2 * np.pi))
    found = mix.mixture_reference(x, y, 0.4, "gaussian")
    np.testing.assert_allclose(found.log_p, np.log((m * n).sum(1)))
    np.testing.assert_allclose(found.mask, m)
    np.testing.assert_allclose(found.posterior, n / n.sum(1, keepdims=True))
    for k in range(3):
        others = [j for j in range(3) if j != k]
        want = np.log((m * n)[:, others].sum(1) / m[:, others].sum(1))
        np.testing.assert_allclose(found.without[:, k], want, rtol=1e-6)


@on_cpu
def test_a_logistic_density_integrates_to_one():
    x = np.linspace(-20, 20, 40_001)
    e, _ = mix.density(x.reshape(1, 1, 1, -1), np.full((1, 1, 1, 1, 1), 0.3), 0.5, "logistic")
    assert np.exp(e).sum() * (x[1] - x[0]) == pytest.approx(1, abs=1e-9)


def test_far_slots_leave_finite_numbers():
    x, y = np.zeros((1, 3, 1, 1), np.float32), np.zeros((1, 2, 4, 1, 1), np.float32)
    y[:, 0, :3], y[:, 1, 3] = 50.0, 80.0                # one slot is nowhere near, and unwanted
    for kind in mix.KINDS:
        found = mix.mixture(to_device(x), to_device(y), 0.05, kind)
        assert all(np.isfinite(to_host(a)).all() for a in found)
