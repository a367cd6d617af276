"""Convolutions: fast loops against the reference, pullbacks against differences and each other."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from common import conv_kernels as kernels
from common import ops
from common.backend import DEVICE, to_device, to_host, xp
from common.conv import (
    batch_norm,
    broadcast_conv,
    conv,
    conv_transpose,
    group_norm,
    layer_norm,
    max_pool,
    sub_pixel,
    upsample,
)
from common.params import Params
from test_gradcheck import BOUND, pullback_error
from test_kernels import GPUS, again_on_gpu, assert_close

HERE = Path(__file__)
PRECISION = {np.float32: 3e-5, np.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", PRECISION)
differences = pytest.mark.skipif(DEVICE == "gpu", reason="finite differences are taken on the host")
ACTS = {f.__name__: f for f in (ops.identity, ops.relu, ops.leaky_relu, ops.elu)}


@pytest.mark.skipif(DEVICE == "gpu", reason="this is that run")
@pytest.mark.parametrize("gpu", GPUS)
def test_all_of_this_on_a_gpu(gpu):
    again_on_gpu(HERE, gpu)


def normal(rng, *shape, dtype=np.float64):
    return to_device(rng.standard_normal(shape).astype(dtype))


def weights(rng, dtype=np.float64, **shapes):
    return Params({name.replace("_", "."): rng.standard_normal(s) for name, s in shapes.items()},
                  dtype)


# ---------------------------------------------------------------- kernels

GEOMETRIES = [                  # B, C, O, k, stride, H, W
    (3, 5, 4, 3, 1, 9, 11), (2, 3, 9, 5, 1, 10, 7), (7, 3, 4, 5, 2, 9, 8), (5, 3, 4, 3, 2, 8, 9),
    (5, 2, 8, 4, 2, 8, 10), (3, 2, 4, 4, 2, 9, 9), (3, 3, 4, 4, 1, 9, 8), (2, 9, 3, 1, 1, 6, 7),
    (2, 9, 3, 1, 2, 6, 7), (2, 2, 3, 3, 2, 64, 60), (1, 2, 3, 5, 1, 3, 2), (1, 2, 3, 5, 2, 3, 2),
    (61, 2, 3, 3, 2, 5, 5), (2, 17, 19, 3, 1, 5, 6), (2, 1, 1, 5, 1, 49, 50),
]


@dtypes
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_kernels_are_the_reference(geometry, dtype, rng):
    B, C, O, k, s, *size = geometry
    h, w = (kernels.out_side(n, k, s) for n in size)
    x, dy = normal(rng, B, C, *size, dtype=dtype), normal(rng, B, O, h, w, dtype=dtype)
    W = normal(rng, O, C, k, k, dtype=dtype)
    pairs = [(kernels.conv_back_w(x, dy, s, k), kernels.conv_back_w_reference(x, dy, s, k))]
    for act, biased in itertools.product(ACTS, (True, False)):
        b, c = (normal(rng, n, dtype=dtype) if biased else None for n in (O, C))
        pairs += [(kernels.conv_forward(x, W, b, s, act), kernels.conv_reference(x, W, b, s, act)),
                  (kernels.conv_back_x(dy, W, c, s, size, act),
                   kernels.conv_back_x_reference(dy, W, c, s, size, act))]
    assert_close(*zip(*pairs, strict=True), PRECISION[dtype])
    assert pairs[0][0].shape == W.shape and pairs[1][0].shape == dy.shape


def test_the_reference_is_its_definition(rng):
    """y[i, j] = sum_ab W[a, b] x[2 i + a - 1, 2 j + b - 1], one number at a time."""
    x, W = rng.standard_normal((5, 6)), rng.standard_normal((3, 3))
    want = np.zeros((3, 3))
    for i, j, a, b in np.ndindex(3, 3, 3, 3):
        u, v = 2 * i + a - 1, 2 * j + b - 1
        want[i, j] += W[a, b] * x[u, v] if 0 <= u < 5 and 0 <= v < 6 else 0
    got = kernels.conv_reference(*map(to_device, (x[None, None], W[None, None])), None, 2,
                                 "identity")
    np.testing.assert_allclose(to_host(got)[0, 0], want)


@pytest.mark.skipif(DEVICE == "gpu", reason="about CPU threads")
def test_threads_share_the_batch(rng, monkeypatch):
    x, dy, W = normal(rng, 37, 2, 9, 9), normal(rng, 37, 3, 9, 9), normal(rng, 3, 2, 3, 3)

    def all_of_it():
        return [kernels.conv_forward(x, W, None, 1, "elu"), kernels.conv_back_w(x, dy, 1, 3),
                kernels.conv_back_x(dy, W, None, 1, (9, 9)), kernels.act_back(dy, dy, "elu")]

    monkeypatch.setattr(kernels, "THREADS", 1)
    alone = all_of_it()
    monkeypatch.setattr(kernels, "THREADS", 3)
    assert_close(all_of_it(), alone, 1e-12)


def test_no_images(rng):
    x, dy, W = normal(rng, 0, 2, 6, 6), normal(rng, 0, 3, 3, 3), normal(rng, 3, 2, 3, 3)
    assert kernels.conv_forward(x, W, None, 2).shape == dy.shape
    assert kernels.conv_back_x(dy, W, None, 2, (6, 6)).shape == x.shape
    assert not to_host(kernels.conv_back_w(x, dy, 2, 3)).any()


def test_a_small_matrix_at_a_time(rng, monkeypatch):
    """The GPU's pieces of the batch."""
    x, W = normal(rng, 5, 2, 6, 6), normal(rng, 3, 2, 3, 3)
    dy = kernels.conv_reference(x, W, None, 1, "identity")
    monkeypatch.setattr(kernels, "MOST", 2 * 2 * 9 * 36)
    assert_close([kernels.conv_forward(x, W, None, 1), kernels.conv_back_w(x, dy, 1, 3),
                  kernels.conv_back_x(dy, W, None, 1, (6, 6))],
                 [dy, kernels.conv_back_w_reference(x, dy, 1, 3),
                  kernels.conv_back_x_reference(dy, W, None, 1, (6, 6), "identity")], 1e-12)


@dtypes
def test_activations_are_those_of_ops(dtype, rng):
    """From far below to far above 0, and their slopes."""
    u = to_device(np.concatenate([np.linspace(-100, 100, 4001), 10.0 ** np.arange(-9, 2),
                                  -(10.0 ** np.arange(-9, 2))]).astype(dtype)[None])
    dy = normal(rng, *u.shape, dtype=dtype)
    for name, f in ACTS.items():
        y, back = f(u)
        got = kernels.activate(u.copy(), name)
        np.testing.assert_allclose(to_host(got), to_host(y), rtol=PRECISION[dtype] / 10)
        assert_close([kernels.act_back(dy, got, name)], [back(dy)], PRECISION[dtype])


@pytest.mark.parametrize("name", ACTS)
def test_nans_get_through(name, rng):
    """Or a run that diverges would go on."""
    x, W = normal(rng, 1, 1, 9, 9), normal(rng, 2, 1, 3, 3)
    x[0, 0, 4, 4] = np.nan
    assert int(xp.isnan(kernels.conv_forward(x, W, None, 1, name)).sum()) == 2 * 9


# ---------------------------------------------------------------- pullbacks

@differences
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("k", [1, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv(k, stride, act, rng):
    x = rng.standard_normal((2, 3, 6, 7))
    for p in (weights(rng, a_W=(4, 3, k, k), a_b=(4,)), weights(rng, a_W=(4, 3, k, k))):
        assert pullback_error(lambda x, p=p: conv(p, "a", x, stride, act=ACTS[act]), [x], p) < BOUND
    y, back = conv(p, "a", x, stride, want_dx=False)
    assert back(y, p.grads()) is None


@differences
@pytest.mark.parametrize(("k", "stride"), [(1, 1), (3, 1), (5, 1), (3, 2), (4, 2), (5, 2)])
def test_conv_transpose(k, stride, rng):
    x, p = rng.standard_normal((2, 4, 3, 5)), weights(rng, a_W=(4, 3, k, k), a_b=(3,))
    assert pullback_error(lambda x: conv_transpose(p, "a", x, stride, act=ops.elu), [x], p) < BOUND
    assert conv_transpose(p, "a", x, stride)[0].shape == (2, 3, 3 * stride, 5 * stride)


@pytest.mark.parametrize(("k", "stride"), [(1, 1), (3, 1), (5, 1), (3, 2), (4, 2), (5, 2)])
def test_conv_and_conv_transpose_are_adjoint(k, stride, rng):
    """<conv(x), y> = <x, conv_transpose(y)>"""
    p = weights(rng, a_W=(4, 3, k, k))
    x, y = normal(rng, 2, 3, 4 * stride, 5 * stride), normal(rng, 2, 4, 4, 5)
    one, other = (conv(p, "a", x, stride)[0] * y).sum(), (conv_transpose(p, "a", y, stride)[0] * x)
    assert float(one) == pytest.approx(float(other.sum()), rel=1e-10)


def test_gradients_added_at_once_and_queued_ones_meet(rng):
    """A convolution twice and a linear layer, on gradients that the step before has left."""
    p = weights(rng, a_W=(3, 3, 3, 3), a_b=(3,), l_W=(3, 2), l_b=(2,))
    x, g = normal(rng, 2, 3, 4, 4), p.grads()

    def step():
        y, back_a = conv(p, "a", x, act=ops.elu)
        y, back_b = conv(p, "a", y)
        y, back_l = ops.linear(p, "l", y.sum((2, 3)))
        dy = back_l(y, g)
        back_a(back_b(xp.ones((2, 3, 4, 4)) * dy[:, :, None, None], g), g)
        g.flush()
        return to_host(g.flat).copy()

    first = step()
    np.testing.assert_allclose(step(), 2 * first)
    g.zero()
    np.testing.assert_array_equal(step(), first)


@pytest.mark.parametrize(("k", "size"), [(1, (3, 4)), (3, (6, 7)), (5, (6, 7)), (5, (2, 3)),
                                         (5, (1, 9))])
def test_broadcast_conv_is_conv_of_the_broadcast_image(k, size, rng):
    B, K, C = 3, 4, 2
    p, q = (Params({"a.W": np.ones((5, K + C, k, k)), "a.b": np.ones(5)}, np.float64)
            for _ in range(2))
    p.flat[...] = normal(rng, p.flat.size)
    q.flat[...] = p.flat
    z, coords = normal(rng, B, K), normal(rng, C, *size)
    image = xp.concatenate([xp.broadcast_to(z[:, :, None, None], (B, K, *size)),
                            xp.broadcast_to(coords, (B, C, *size))], 1)
    got, back = broadcast_conv(p, "a", z, coords, ops.elu)
    want, want_back = conv(q, "a", image, act=ops.elu)
    dy, g, want_g = normal(rng, *want.shape), p.grads(), q.grads()
    dz, want_dz = back(dy, g), want_back(dy, want_g)[:, :K].sum((2, 3))
    g.flush()
    want_g.flush()
    assert_close([got, dz, g.flat], [want, want_dz, want_g.flat], 1e-12)


RESAMPLED = {"sub_pixel": lambda x: sub_pixel(x, 2), "max_pool": max_pool, "upsample": upsample}


@differences
@pytest.mark.parametrize("name", RESAMPLED)
def test_resampling(name, rng):
    for size in ((4, 6), (5, 7), (1, 1), (2, 3)):
        if name != "max_pool" or min(size) > 1:
            assert pullback_error(RESAMPLED[name], [rng.standard_normal((2, 8, *size))]) < BOUND


def test_resampled_values():
    x = to_device(np.arange(16.0).reshape(1, 1, 4, 4))
    assert to_host(max_pool(x)[0]).tolist() == [[[[5, 7], [13, 15]]]]
    assert to_host(max_pool(x[:, :, :3, :3])[0]).tolist() == [[[[5]]]]
    assert to_host(sub_pixel(x.reshape(1, 4, 2, 2), 2)[0])[0, 0].tolist() == [
        [0, 4, 1, 5], [8, 12, 9, 13], [2, 6, 3, 7], [10, 14, 11, 15]]
    assert to_host(upsample(x[:, :, :1])[0])[0, 0].tolist() == [
        [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]] * 2
    _, back = max_pool(xp.ones((1, 1, 2, 2)))
    assert float(back(xp.ones((1, 1, 1, 1))).sum()) == 1    # equals: one of them is the largest


@differences
@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 5, 3), None])
def test_layer_and_group_norm(shape, rng):
    x = rng.standard_normal((2, 4, 5, 3)) * 3 + 1
    p = weights(rng, a_gain=shape, a_b=shape) if shape else {}
    for f in (lambda x: layer_norm(p, "a", x, (1, 2, 3)), lambda x: layer_norm(p, "a", x, (2, 3)),
              lambda x: group_norm(p, "a", x, 2)):
        without = lambda x, f=f: (f(x)[0], lambda dy: f(x)[1](dy, None))    # noqa: E731
        assert pullback_error(f if p else without, [x], p) < BOUND


@differences
def test_batch_norm(rng):
    x, p = rng.standard_normal((3, 2, 5, 4)) * 3 + 1, weights(rng, a_gain=(2, 1, 1), a_b=(2, 1, 1))
    known = rng.standard_normal((1, 2, 1, 1)), rng.uniform(1, 2, (1, 2, 1, 1))
    for some in (None, known):
        assert pullback_error(lambda x, k=some: batch_norm(p, "a", x, k)[::2], [x], p) < BOUND
    y, moments, _ = batch_norm(p, "a", x)
    np.testing.assert_allclose(batch_norm(p, "a", x, moments)[0], y)


def test_norms_give_mean_0_and_std_1(rng):
    x = normal(rng, 3, 4, 5, 6) * 3 + 1
    for y, axes in ((layer_norm({}, "", x, (1, 2, 3))[0], (1, 2, 3)),
                    (group_norm({}, "", x, 2)[0].reshape(3, 2, -1), 2),
                    (batch_norm({}, "", x)[0], (0, 2, 3))):
        np.testing.assert_allclose(to_host(y.mean(axes)), 0, atol=1e-12)
        np.testing.assert_allclose(to_host(y.std(axes)), 1, atol=1e-5)
