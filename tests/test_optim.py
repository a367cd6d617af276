"""Optimisers do what their papers say, to every weight once."""

import math

import numpy as np
import pytest

from common.optim import Optimiser, cosine, norm, pieces, ramp
from common.params import Params


def small(rng):
    p = Params({name: rng.standard_normal(4) for name in ("a.W", "b.W", "b.b", "c.W", "d.W")},
               np.float64)
    g = p.grads()
    g.flat[...] = rng.standard_normal(20)
    return p, g


def test_adam_is_the_textbook_s(rng):
    p, g = small(rng)
    x, m, v = p.flat.copy(), 0, 0
    adam = Optimiser(p)
    for t in range(1, 6):
        g.flat[...] = rng.standard_normal(20)
        m = 0.9 * m + 0.1 * g.flat
        v = 0.999 * v + 0.001 * g.flat**2
        x -= 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        adam.update(g, 0.01, t)
        np.testing.assert_allclose(p.flat, x, rtol=1e-12)


def test_rmsprop_is_the_textbook_s(rng):
    p, g = small(rng)
    x, m, v = p.flat.copy(), 0, 0
    rmsprop = Optimiser(p, "rmsprop", momentum=0.8)
    for t in range(1, 6):
        g.flat[...] = rng.standard_normal(20)
        v = 0.9 * v + 0.1 * g.flat**2
        m = 0.8 * m + 0.01 * g.flat / np.sqrt(v + 1e-10)
        x -= m
        rmsprop.update(g, 0.01, t)
        np.testing.assert_allclose(p.flat, x, rtol=1e-12)


@pytest.mark.parametrize("groups", [{}, {"b": 5.0}, {"a": 2.0, "d": 0.0}, {"d": 3.0, "b": 5.0},
                                    {"b": 2.0, "c": 3.0}, {"": 2.0}])
def test_groups_have_their_own_rate_and_each_weight_moves_once(groups, rng):
    p, g = small(rng)
    before = p.flat.copy()
    Optimiser(p, groups=groups).update(g, 0.01, 1)      # Adam's first step is lr sign(g)
    factor = np.repeat([next((f for name, f in groups.items() if k.startswith(name)), 1.0)
                        for k in p], 4)
    np.testing.assert_allclose(p.flat, before - 0.01 * factor * np.sign(g.flat), rtol=1e-6)
    covered = np.concatenate([np.arange(20)[span] for span, _ in pieces(p, groups)])
    assert covered.tolist() == [*range(20)]


def test_a_group_that_does_not_exist_is_refused(rng):
    with pytest.raises(AssertionError):
        Optimiser(small(rng)[0], groups={"e": 2.0})


def test_clipping_scales_long_gradients_and_only_those(rng):
    p, g = small(rng)
    length = norm(g.flat)
    assert length == pytest.approx(np.linalg.norm(g.flat))
    for clip, want in [(length / 4, g.flat / 4), (length * 4, g.flat)]:
        clipped = Optimiser(p, clip=clip)
        clipped.update(g, 0.01, 1)
        np.testing.assert_allclose(clipped.m, 0.1 * want, rtol=1e-9)


def test_ramp():
    assert [ramp(t, 10, 20, 5.0, 1.0) for t in (0, 10, 15, 20, 99)] == [5, 5, 3, 1, 1]
    assert [ramp(t, 0, 0, 5.0, 1.0) for t in (0, 1)] == [5, 1]


def test_cosine():
    assert [cosine(t, 100, 0.1) for t in (0, 50, 100, 200)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert cosine(25, 100, 0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    warm = [cosine(t, 10**9, 0, warmup=4) for t in range(6)]
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
