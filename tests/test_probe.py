"""The classifier that says what a representation knows: its gradient, and that it learns."""

import numpy as np

from common import probe
from common.gradcheck import directional
from common.params import Params


def test_gradient(rng):
    p = Params(probe.init((4, 5, 6), 0), np.float64)
    p.flat[...] += 0.1 * rng.standard_normal(p.flat.size)
    x, labels = rng.standard_normal((6, 3, 4)), rng.integers(6, size=6)
    x[0, 1] = x[1, 0] = x[2] = 0                    # one is not there; nothing is there

    def loss():
        q, back_q = probe.add(p, x)
        value, back_loss = probe.surprise(q, labels)
        return value, back_q, back_loss

    _, back_q, back_loss = loss()
    g = p.grads()
    back_q(back_loss(1.0), g)
    g.flush()
    for name in p:
        assert directional(lambda: loss()[0], p[name], g[name], rng, 1e-5) < 1e-6, name


def test_distributions_of_a_sum(rng):
    """Two dice; and three objects, of which one is not there, by going through all cases."""
    die = np.zeros((1, 13))
    die[:, 1:7] = 1 / 6
    both = np.array([0, 0, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1]) / 36
    np.testing.assert_allclose(probe.plus(die, die)[0][0], both, atol=1e-15)

    p, x = Params(probe.init((4, 5, 4), 0), np.float64), rng.standard_normal((1, 3, 4))
    one, three = (probe.add(p, x[:, [k]])[0][0] for k in (0, 2))
    x[0, 1] = 0
    want = np.zeros(4)
    for i in range(4):
        for j in range(4 - i):
            want[i + j] += one[i] * three[j]
    for order in ([0, 1, 2], [2, 0, 1]):
        np.testing.assert_allclose(probe.add(p, x[:, order])[0][0], want, rtol=1e-12)
    np.testing.assert_array_equal(probe.add(p, 0 * x)[0], [[1, 0, 0, 0]])


def test_it_learns_to_add(rng):
    """Digits as one-hot objects, up to two of them: their sum, in frames and in videos."""
    digits = rng.integers(-1, 4, (3000, 2))         # -1: not there
    x = (digits[:, None, :, None] == np.arange(4)).astype(np.float16).repeat(4, 1)
    x[:, 0] *= rng.random((3000, 1, 1)) > 0.3       # a frame may tell nothing
    sums = np.maximum(digits, 0).sum(1)
    accuracy = probe.probe((x[:2000], sums[:2000]), (x[2000:], sums[2000:]), 7, steps=400)
    assert 0.85 < accuracy["addition"] < 0.97
    assert accuracy["addition_of_videos"] > 0.97
