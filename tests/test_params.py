"""One flat vector holds all weights; names are views of it."""

import numpy as np
import pytest

from common.params import Params


@pytest.fixture
def p(rng):
    shapes = {"a.W": (3, 2), "a.b": (2,), "b.0.W": (2, 4), "b.1.W": (4, 1), "b.1.b": (1,)}
    return Params({name: rng.standard_normal(s) for name, s in shapes.items()}, np.float64)


def test_views_share_memory_with_flat_in_the_order_of_the_names(p):
    assert [*p] == ["a.W", "a.b", "b.0.W", "b.1.W", "b.1.b"] and len(p) == 5
    np.testing.assert_array_equal(np.concatenate([a.ravel() for a in p.values()]), p.flat)
    p.flat[...] = np.arange(p.flat.size)
    assert p["a.b"].tolist() == [6, 7]
    p["b.1.b"][...] = -1
    assert p.flat[-1] == -1 and p.flat[-2] == 19


def test_span_covers_a_prefix(p):
    assert p.span("a") == slice(0, 8)
    assert p.span("b.1") == slice(16, 21)
    assert p.span("") == slice(0, p.flat.size)
    for nothing in ("c", "W"):
        with pytest.raises(AssertionError):
            p.span(nothing)


def test_span_refuses_names_that_are_no_neighbours():
    with pytest.raises(AssertionError):
        Params({"a.0": np.zeros(1), "b": np.zeros(1), "a.1": np.zeros(1)}).span("a")


def test_parameters_are_copied_and_single_precision_by_default():
    a = np.ones(3)
    p = Params({"a": a})
    p.flat[...] = 2
    assert p.flat.dtype == np.float32 and a.tolist() == [1, 1, 1]


def test_gradients_begin_at_zero_with_the_same_names_and_types(p):
    g = p.grads()
    assert [(k, v.shape) for k, v in g.items()] == [(k, v.shape) for k, v in p.items()]
    assert g.flat.dtype == p.flat.dtype and not g.flat.any()
    assert not np.shares_memory(g.flat, p.flat)


def test_flush_adds_what_adding_at_once_would(p, rng):
    g = p.grads()
    for a in g.values():
        a += 1                                          # as pieces without a queue do
    want = {name: a.copy() for name, a in g.items()}
    for _ in range(3):
        for name, n_in, n_out in (("a", 3, 2), ("b.0", 2, 4)):      # b.0 has no bias
            x, dy = rng.standard_normal((5, n_in)), rng.standard_normal((5, n_out))
            g.queue(name, x, dy)
            want[name + ".W"] += x.T @ dy
            if name == "a":
                want["a.b"] += dy.sum(0)
    g.flush()
    for name, a in want.items():
        np.testing.assert_allclose(g[name], a, rtol=1e-12)
    g.flush()                                                       # nothing is counted twice
    np.testing.assert_allclose(g["a.W"], want["a.W"], rtol=1e-12)


def test_zero_forgets_gradients_and_queue(p):
    g = p.grads()
    g.flat[...] = 1
    g.queue("a", np.ones((1, 3)), np.ones((1, 2)))
    g.zero()
    g.flush()
    assert not g.flat.any()


def test_host_copies_can_be_read_as_parameters_again(p):
    again = Params(p.host(), np.float64)
    np.testing.assert_array_equal(again.flat, p.flat)
    again.flat[...] = 0
    assert p.flat.all()
