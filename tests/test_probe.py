"""The classifier that says what a representation knows: its gradient, and that it learns."""

import numpy as np

from common import probe
from common.gradcheck import directional
from common.params import Params


def test_gradient(rng):
    p = Params(probe.init((4, 5, 3), 0), np.float64)
    p.flat[...] += 0.1 * rng.standard_normal(p.flat.size)
    x, labels = rng.standard_normal((6, 2, 3, 4)), rng.integers(3, size=6)
    x[0, 1, 1] = x[2] = 0                           # one is not there; nothing is there

    def loss():
        logits, back_logits = probe.classify(p, x)
        value, back_loss = probe.cross_entropy(logits, labels)
        return value, back_logits, back_loss

    _, back_logits, back_loss = loss()
    g = p.grads()
    back_logits(back_loss(1.0), g)
    g.flush()
    for name in p:
        assert directional(lambda: loss()[0], p[name], g[name], rng, 1e-5) < 1e-6, name


def test_order_does_not_matter(rng):
    p = probe.init((4, 5, 3), 0)
    x = rng.standard_normal((6, 2, 3, 4)).astype(np.float32)
    for other in (x[:, ::-1], x[:, :, ::-1], np.concatenate([x, x], 1)):
        np.testing.assert_allclose(probe.classify(p, x)[0], probe.classify(p, other)[0], rtol=1e-4)


def test_it_learns_to_add(rng):
    """Digits as one-hot objects, up to two of them: their sum."""
    digits = rng.integers(-1, 4, (3000, 2))         # -1: not there
    x = (digits[:, None, :, None] == np.arange(4)).astype(np.float16)
    sums = np.maximum(digits, 0).sum(1)
    for accuracy in probe.probe((x[:2000], sums[:2000]), (x[2000:], sums[2000:]), 7, steps=300):
        assert accuracy > 0.97
