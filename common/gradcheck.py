"""Is this pullback the derivative of this function? Finite differences in float64 decide."""

import numpy as np


def directional(f, x, grad, rng, eps=1e-5):
    """Relative error of <grad, v> against the central difference of f along a random v.

    One number checks all coordinates of x at once; x is moved in place and put back.
    """
    v = rng.standard_normal(x.shape)
    kept = x.copy()
    x[...] = kept + eps * v
    up = f()
    x[...] = kept - eps * v
    down = f()
    x[...] = kept
    return relative(float((grad * v).sum()), (up - down) / (2 * eps))


def coordinates(f, x, grad, eps=1e-5):
    """The worst relative error over all coordinates of x, scaled by the largest derivative."""
    numeric = np.empty_like(grad)
    for k in np.ndindex(x.shape):
        kept = x[k]
        x[k] = kept + eps
        up = f()
        x[k] = kept - eps
        down = f()
        x[k] = kept
        numeric[k] = (up - down) / (2 * eps)
    return float(np.abs(numeric - grad).max() / max(np.abs(numeric).max(), 1e-8))


def relative(a, b):
    return abs(a - b) / max(abs(a), abs(b), 1e-8)
