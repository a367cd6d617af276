"""Is this pullback the derivative of this function? Finite differences in float64 decide."""

import numpy as np


def directional(f, x, grad, rng, eps=1e-5, enough=1e-6):
    """Relative error of <grad, v> against central differences of f along a random v.

    One number checks all coordinates of x at once; x is moved in place and put back. Differences
    err by themselves, over long steps for curvature and kinks, over short ones for rounding: the
    first step that errs less than `enough` decides, or the best of four.
    """
    v, kept, best = rng.standard_normal(x.shape), x.copy(), np.inf
    for step in (eps, eps / 5, eps * 5, eps / 25):
        x[...] = kept + step * v
        up = f()
        x[...] = kept - step * v
        down = f()
        x[...] = kept
        best = min(best, relative(float((grad * v).sum()), (up - down) / (2 * step)))
        if best < enough:
            break
    return best


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
