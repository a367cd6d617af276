"""The judge of all gradients passes right ones, fails wrong ones, and leaves no trace."""

import numpy as np
import pytest

from common.gradcheck import coordinates, directional

BOUND = 1e-6        # every gradient of this project agrees with finite differences this well
EPS = 1e-5          # a step that balances rounding (losses of 100) against curvature


def pullback_error(f, arrays, p=None):
    """The worst relative error of f's pullback over all coordinates of its inputs and weights.

    f(*arrays) = (*outputs, back). No array may be written into on the way.
    """
    rng = np.random.default_rng(1)
    weights = dict(p or {})
    kept = [a.copy() for a in (*arrays, *weights.values())]
    *ys, back = f(*arrays)
    dys = [rng.standard_normal(y.shape) for y in ys]
    fixed = [a.copy() for a in (*ys, *dys)]
    g = p.grads() if p else None
    dxs = back(*dys, g) if p else back(*dys)
    dxs = dxs if isinstance(dxs, tuple) else (dxs,)
    for a, before in zip((*arrays, *weights.values(), *ys, *dys), kept + fixed, strict=True):
        np.testing.assert_array_equal(a, before)
    if p:
        g.flush()

    def loss():
        return sum((dy * y).sum() for dy, y in zip(dys, f(*arrays), strict=False))

    pairs = [*zip(arrays, dxs, strict=True), *((weights[name], g[name]) for name in weights)]
    return max(coordinates(loss, x, dx, EPS) for x, dx in pairs if dx is not None)


@pytest.fixture
def cubes(rng):
    """sum w x^3: the function, its input, its gradient."""
    x, w = rng.standard_normal((2, 3, 4))
    return lambda: float((w * x**3).sum()), x, 3 * w * x**2


def test_right_gradients_pass(cubes, rng):
    assert directional(*cubes, rng) < BOUND
    assert coordinates(*cubes) < BOUND


def test_a_gradient_wrong_by_a_thousandth_fails(cubes, rng):
    f, x, grad = cubes
    assert directional(f, x, grad * 1.001, rng) > 100 * BOUND
    for k in np.ndindex(x.shape):
        wrong = grad.copy()
        wrong[k] += 1e-3 * np.abs(grad).max()
        assert coordinates(f, x, wrong) > 100 * BOUND


def test_inputs_are_put_back(cubes, rng):
    f, x, grad = cubes
    before = x.copy()
    directional(f, x, grad, rng)
    coordinates(f, x, grad)
    np.testing.assert_array_equal(x, before)


def test_pullback_error_sees_a_wrong_pullback_and_a_written_argument(rng):
    x, y = rng.standard_normal((2, 5))
    assert pullback_error(lambda x, y: (x * y, lambda d: (d * y, d * x)), [x, y]) < BOUND
    assert pullback_error(lambda x, y: (x * y, lambda d: (d * y, d * y)), [x, y]) > 0.1
    with pytest.raises(AssertionError):
        pullback_error(lambda x: (x, lambda d: d.__imul__(2)), [x])
