"""Every op's pullback is the derivative of its forward; every density is one."""

import itertools

import numpy as np
import pytest

from common import ops
from common.params import Params
from test_gradcheck import BOUND, pullback_error


def away_from(rng, shape, *kinks):
    """Normal numbers, none of them near a point where the derivative jumps."""
    x = rng.standard_normal(shape) * 2
    for kink in kinks:
        x = np.where(np.abs(x - kink) < 0.01, kink + 0.1, x)
    return x


def weights(rng, **shapes):
    return Params({name.replace("_", "."): rng.standard_normal(s) for name, s in shapes.items()},
                  np.float64)


ACTIVATIONS = {
    "relu": (ops.relu, [0]),
    "elu": (ops.elu, [0]),
    "leaky_relu": (ops.leaky_relu, [0]),
    "sigmoid": (ops.sigmoid, []),
    "tanh": (ops.tanh, []),
    "softmax": (ops.softmax, []),
    "softmax of columns": (lambda x: ops.softmax(x, 0), []),
    "identity": (ops.identity, []),
    "clamp": (lambda x: ops.clamp(x, -1.5, 0.5), [-1.5, 0.5]),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, rng):
    f, kinks = ACTIVATIONS[name]
    assert pullback_error(f, [away_from(rng, (5, 7), *kinks)]) < BOUND


def test_linear(rng):
    x = rng.standard_normal((5, 3))
    for p in (weights(rng, u_W=(3, 4), u_b=(4,)), weights(rng, u_W=(3, 4))):
        assert pullback_error(lambda x, p=p: ops.linear(p, "u", x), [x], p) < BOUND


def test_linear_used_again_and_again(rng):
    """x W W + b W + b: three uses of one weight, one flush."""
    p, x = weights(rng, u_W=(3, 3), u_b=(3,)), rng.standard_normal((5, 3))

    def thrice(x):
        backs = []
        for _ in range(3):
            x, back = ops.linear(p, "u", x)
            backs.append(back)
        return x, lambda dy, g: backs[0](backs[1](backs[2](dy, g), g), g)

    assert pullback_error(thrice, [x], p) < BOUND


@pytest.mark.parametrize("act", [ops.relu, ops.elu, ops.tanh, ops.sigmoid])
def test_dense_and_mlp(act, rng):
    p = weights(rng, m_0_W=(3, 6), m_0_b=(6,), m_1_W=(6, 5), m_1_b=(5,), m_2_W=(5, 2))
    x = rng.standard_normal((4, 3))
    assert pullback_error(lambda x: ops.mlp(p, "m", x, act, last=ops.tanh), [x], p) < BOUND
    first = Params({k: p[k] for k in ("m.0.W", "m.0.b")}, np.float64)
    assert pullback_error(lambda x: ops.dense(first, "m.0", x, act), [x], first) < BOUND


def test_mlp_is_its_layers(rng):
    p = weights(rng, m_0_W=(3, 6), m_0_b=(6,), m_1_W=(6, 2), m_1_b=(2,))
    x = rng.standard_normal((4, 3))
    hidden = np.maximum(x @ p["m.0.W"] + p["m.0.b"], 0)
    np.testing.assert_allclose(ops.mlp(p, "m", x)[0], hidden @ p["m.1.W"] + p["m.1.b"])


def test_rnn(rng):
    p = weights(rng, r_x_W=(3, 4), r_x_b=(4,), r_h_W=(4, 4))
    x, h = rng.standard_normal((5, 3)), rng.standard_normal((5, 4))
    assert pullback_error(lambda x, h: ops.rnn(p, "r", x, h), [x, h], p) < BOUND


def test_lstm(rng):
    p = weights(rng, l_x_W=(3, 16), l_x_b=(16,), l_h_W=(4, 16))
    inputs = [rng.standard_normal((5, n)) for n in (16, 3, 4, 4)]
    assert pullback_error(lambda *inputs: ops.lstm(p, "l", *inputs), inputs, p) < BOUND


def test_gru(rng):
    p = weights(rng, r_x_W=(3, 12), r_x_b=(12,), r_h_W=(4, 12), r_h_b=(12,))
    x, h = rng.standard_normal((5, 3)), rng.standard_normal((5, 4))
    assert pullback_error(lambda x, h: ops.gru(p, "r", x, h), [x, h], p) < BOUND


DISTRIBUTIONS = {
    "gaussian": (ops.gaussian, 2),
    "gaussian_kl": (ops.gaussian_kl, 2),
    "gaussian_kl with a prior": (lambda m, s: ops.gaussian_kl(m, s, mean0=0.7, std0=1.6), 2),
    "latent": (ops.latent, 2),
    "bernoulli_kl": (ops.bernoulli_kl, 1),
    "gaussian_log_density": (lambda mean, x: ops.gaussian_log_density(x, mean, 0.4), 1),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(name, rng):
    f, n_inputs = DISTRIBUTIONS[name]
    fixed = [rng.uniform(0.1, 0.9, (5, 3)) for _ in range({"gaussian": 1, "latent": 1}.get(
        name, 2 - n_inputs))]                           # noise, rates or data: no gradient
    inputs = [rng.standard_normal((5, 3)) for _ in range(n_inputs)]
    assert pullback_error(lambda *inputs: f(*inputs, *fixed), inputs) < BOUND


# ---------------------------------------------------------------- values

LINE, DX = np.linspace(-30, 30, 200_001, retstep=True)


def density(z, mean, std):
    return np.exp(-0.5 * ((z - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))


@pytest.mark.parametrize(("mean", "std", "mean0", "std0"),
                         [(0, 1, 0, 1), (0.3, 0.2, 0, 1), (-1.2, 2, 0.7, 1.6)])
def test_gaussian_kl_is_the_integral_of_its_definition(mean, std, mean0, std0):
    q, p = density(LINE, mean, std), density(LINE, mean0, std0)
    there = q > 0
    want = (q[there] * np.log(q[there] / p[there])).sum() * DX
    kl, _ = ops.gaussian_kl(np.full((1, 1), mean), np.log(np.full((1, 1), std)), mean0, std0)
    assert kl[0] == pytest.approx(want, abs=1e-9)


def test_gaussian_log_density_integrates_to_one_and_factorises(rng):
    log_p, _ = ops.gaussian_log_density(LINE[:, None], np.full_like(LINE[:, None], 0.4), 0.3)
    assert np.exp(log_p).sum() * DX == pytest.approx(1, abs=1e-9)
    x, mean = rng.standard_normal((2, 4, 2, 3, 3))
    log_p, _ = ops.gaussian_log_density(x, mean, 0.3)
    np.testing.assert_allclose(log_p, np.log(density(x, mean, 0.3)).sum((1, 2, 3)))


def test_gaussian_samples_have_mean_and_std(rng):
    z, _ = ops.gaussian(np.full((200_000, 1), 2.0), np.full((200_000, 1), np.log(0.5)),
                        rng.standard_normal((200_000, 1)))
    assert z.mean() == pytest.approx(2, abs=0.01) and z.std() == pytest.approx(0.5, abs=0.01)


def test_latent_is_a_sample_and_its_kl(rng):
    mean, log_std, eps = rng.standard_normal((3, 4, 2))
    z, kl, _ = ops.latent(mean, log_std, eps)
    np.testing.assert_array_equal(z, ops.gaussian(mean, log_std, eps)[0])
    np.testing.assert_array_equal(kl, ops.gaussian_kl(mean, log_std)[0])


def test_bernoulli_kl_is_the_sum_over_both_outcomes():
    for logit, rate in itertools.product([-3.0, 0.0, 1.5], [0.1, 0.5, 0.8]):
        q = 1 / (1 + np.exp(-logit))
        want = q * np.log(q / rate) + (1 - q) * np.log((1 - q) / (1 - rate))
        got, _ = ops.bernoulli_kl(np.array(logit), np.array(rate))
        assert got == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logistic_and_its_logarithm_neither_overflow_nor_lose_their_tails(dtype):
    x = np.array([-1e4, -20, -1, 0, 1, 20, 1e4], dtype)
    np.testing.assert_allclose(ops.logistic(x), np.exp(-np.logaddexp(0, -x.astype(float))),
                               atol=1e-7)
    np.testing.assert_allclose(ops.log_logistic(x), -np.logaddexp(0, -x.astype(float)), rtol=1e-6)
    assert ops.logistic(x).dtype == ops.log_logistic(x).dtype == dtype


def test_clamp_passes_values_at_its_ends_and_cuts_beyond():
    y, back = ops.clamp(np.array([-2.0, -1, 0, 1, 2]), -1, 1)
    assert y.tolist() == [-1, -1, 0, 1, 1]
    assert back(np.ones(5)).tolist() == [0, 1, 1, 1, 0]
