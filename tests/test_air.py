"""AIR: every gradient against finite differences, every estimator against enumeration."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import air_multimnist as air
from common.errors import Fail
from common.gradcheck import coordinates, directional
from common.optim import Optimiser
from common.params import Params
from test_gradcheck import BOUND, EPS, pullback_error

SMALL = {"canvas": 8, "glimpse": 5, "hidden": 6, "what": 4, "units": 5, "max_steps": 3}
MODELS = [*air.FIND]


def setting(batch=2, seed=13, **changes):
    """A small model in float64, its scenes and noise; with this seed no ReLU layer is dead."""
    cfg, rng = air.Config(**{**SMALL, **changes}), np.random.default_rng(seed)
    p = Params(air.init(cfg, seed), np.float64)
    p.flat[...] += 0.3 * rng.standard_normal(p.flat.size)
    x = rng.random((batch, air.channels(cfg), cfg.canvas, cfg.canvas))
    noise = vars(air.draw_noise(cfg, batch, seed, 0))
    noise = SimpleNamespace(**{name: a.astype(float) for name, a in noise.items()})
    return cfg, p, x, noise, SimpleNamespace(temperature=3.0, spread=0.4, C=2.0, presence=1.5,
                                                tau=0.7)


def gradient(p, cfg, x, noise, weights):
    g = p.grads()
    loss, back = air.objective(p, cfg, x, noise, weights)
    back(g)
    return loss, g


def freeze_residuals(monkeypatch, run):
    """DAIR's gradient takes the residuals as given: from now on they stay those of `run`."""
    seen, residual = [], air.residual
    monkeypatch.setattr(air, "residual", lambda x, y: seen.append(residual(x, y)) or seen[-1])
    run()
    again = itertools.cycle(seen)
    monkeypatch.setattr(air, "residual", lambda x, y: next(again))


# ---------------------------------------------------------------- every gradient

@pytest.mark.parametrize("data", ["digits", "sprites"])
@pytest.mark.parametrize("estimator", ["exact", "relaxed"])
@pytest.mark.parametrize("model", MODELS)
def test_objective_gradients(model, estimator, data, monkeypatch, rng):
    cfg, p, x, noise, weights = setting(model=model, estimator=estimator, data=data)
    _, g = gradient(p, cfg, x, noise, weights)
    freeze_residuals(monkeypatch, lambda: air.objective(p, cfg, x, noise, weights))
    for name in p:
        if name.startswith("baseline"):
            assert not g[name].any()
            continue
        assert g[name].any()
        error = directional(lambda: air.objective(p, cfg, x, noise, weights)[0], p[name], g[name],
                            rng, EPS)
        assert error < BOUND, (name, error)


def state(cfg, batch, rng):
    return [rng.standard_normal((batch, n)) for n in (cfg.hidden, cfg.hidden, 4 + cfg.what)]


@pytest.mark.parametrize("model", MODELS)
def test_find_gradients(model, rng):
    cfg, p, x, noise, _ = setting(model=model)

    def find(h, c, z, *a):
        trace, (h, c, z), back = air.FIND[model](p, cfg, x, *(a or [None]), (h, c, z),
                                                 noise.where[0], noise.what[0])

        def pull(dlogit, dkl, dwindow, dwhat, dh, dc, dz, g):
            da, dstate = back((dh, dc, dz), dlogit, dkl, dwindow, dwhat, g)
            return (*dstate, da) if a else dstate

        return trace.logit, trace.kl, trace.window, trace.what, h, c, z, pull

    a = [] if model == "dair" else [air.look(p, cfg, x)[0][0].copy()]
    assert pullback_error(find, state(cfg, len(x), rng) + a, p) < BOUND


def test_draw_gradients(rng):
    cfg, p, x, _, _ = setting(data="sprites")
    what, window = rng.standard_normal((4, cfg.what)), rng.uniform(0.3, 0.6, (4, 3))
    p = Params({name: p[name] for name in p if name.startswith("decode")}, np.float64)
    assert pullback_error(lambda *inputs: air.draw(p, *inputs, x.shape, cfg.glimpse)[1:],
                          [what, window], p) < BOUND


def test_step_1_is_a_step_with_zeros_before_it(rng):
    cfg, p, x, _, _ = setting()
    a, c = rng.standard_normal((len(x), 4 * cfg.hidden)), rng.standard_normal((len(x), cfg.hidden))
    h, z = np.zeros_like(c), np.zeros((len(x), 4 + cfg.what))
    for first, usual in zip(air.attend_first(p, x, a, None, None, c)[:2],
                            air.attend_air(p, x, a, z, h, c)[:2], strict=True):
        np.testing.assert_allclose(first, usual, rtol=1e-12)


def test_attend_gradients(rng):
    for model in ("air", "dair"):
        cfg, p, x, _, _ = setting(model=model)
        h, c, z = state(cfg, len(x), rng)
        a = rng.standard_normal((len(x), 4 * cfg.hidden))

        def attend(*inputs, model=model, p=p, x=x, a=a):
            h, c, back = air.ATTEND[model](p, x, *(inputs if model == "air" else (a, *inputs)))
            if model == "air":
                return h, c, back
            return h, c, lambda dh, dc, g: back(dh, dc, g)[1:]

        assert pullback_error(attend, [a, z, h, c] if model == "air" else [z, h, c], p) < BOUND


def test_head_window_encode_decode_gradients(rng):
    cfg, p, _, _, _ = setting(data="sprites")
    h, where, what = (rng.standard_normal((4, n)) for n in (cfg.hidden, 3, cfg.what))
    glimpse = rng.random((4, 3, cfg.glimpse, cfg.glimpse))
    assert pullback_error(lambda h: air.head(p, h), [h], p) < BOUND
    assert pullback_error(air.window_of, [where]) < BOUND
    assert pullback_error(lambda x: air.encode(p, x), [glimpse], p) < BOUND
    assert pullback_error(lambda z: air.decode(p, z, glimpse.shape), [what], p) < BOUND


def test_likelihood_gradients_and_values(rng):
    cfg, _, x, _, _ = setting()
    ys = rng.random((cfg.max_steps, *x.shape))

    def likelihoods(*ys):
        lls, back = air.likelihoods(cfg, x, ys)
        return lls, lambda dlls: tuple(back(dlls))

    assert pullback_error(likelihoods, [*ys]) < BOUND
    for ll, y in zip(likelihoods(*ys)[0], [np.zeros_like(x), *ys], strict=True):
        want = -0.5 * ((x - y) / cfg.std) ** 2 - np.log(cfg.std * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(ll, want.sum((1, 2, 3)))


def test_pool_is_the_mean_of_four_pixels(rng):
    x = rng.random((2, 3, 7, 7))                        # the odd row and column are left out
    want = x[:, :, :6, :6].reshape(2, 3, 3, 2, 3, 2).mean((3, 5))
    np.testing.assert_allclose(air.pool(x), want.reshape(2, -1))


def test_the_prior_s_windows_are_around_the_canvas_s_centre():
    window, _ = air.window_of(np.array([[0.0, 0, 0], [1, 2, -2]]))
    np.testing.assert_allclose(window, [[0.5, 0, 0], [0.5 * np.exp(0.15), 1, -1]])


# ---------------------------------------------------------------- the bound

def test_counts_have_probabilities_that_sum_to_one(rng):
    for logits in (rng.standard_normal((3, 4)), np.full((3, 4), 1e3), np.full((3, 4), -1e3)):
        np.testing.assert_allclose(np.exp(air.log_posterior(logits)).sum(0), 1)
    for C in (0.0, 10.0, 200.0):
        log_p = air.log_prior(setting()[0], C)
        assert np.exp(log_p).sum() == pytest.approx(1)
        np.testing.assert_allclose(np.diff(log_p), -C)


def bound_by_enumeration(cfg, x, logits, kl, ys, weights):
    """Eq. 8 with every presence vector in {0, 1}^N drawn with its probability; mean over scenes.

    A share (`spread`) of what it would be if all counts were as likely comes on top.
    """
    N, B = logits.shape
    sure = 1 / (1 + np.exp(-logits))
    ll, _ = air.likelihoods(cfg, x, ys)
    prior = np.exp(-weights.C * np.arange(N + 1))
    prior /= prior.sum()
    q, total = np.zeros((N + 1, B)), 0.0
    vectors = [(z, [*z, 0].index(0)) for z in itertools.product((0, 1), repeat=N)]
    for z, n in vectors:
        q[n] += np.prod([s if yes else 1 - s for yes, s in zip(z, sure, strict=True)], 0)
    for z, n in vectors:
        q_z = np.prod([s if yes else 1 - s for yes, s in zip(z, sure, strict=True)], 0)
        total += (q_z * (ll[n] + np.log(prior[n]) - weights.temperature * np.log(q[n])
                         - kl[:n].sum(0))).sum()
    for n in range(N + 1):
        total += weights.spread / (N + 1) * (ll[n] + np.log(prior[n]) - kl[:n].sum(0)).sum()
    return total / B


def made_up(cfg, x, rng):
    """Traces with no network behind them."""
    logits, ys = rng.standard_normal((cfg.max_steps, len(x))), rng.random((cfg.max_steps, *x.shape))
    kl = rng.random(logits.shape) * 5
    return logits, kl, ys, [SimpleNamespace(logit=logit, kl=k, y=y)
                            for logit, k, y in zip(logits, kl, ys, strict=True)]


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_exact_loss_and_its_derivatives_are_those_of_enumeration(rng, spread):
    cfg, _, x, _, weights = setting()
    weights.spread = spread
    logits, kl, ys, traces = made_up(cfg, x, rng)
    loss, back = air.exact(None, cfg, x, traces, None, weights)

    def by_enumeration():
        return -bound_by_enumeration(cfg, x, logits, kl, ys, weights)

    assert loss == pytest.approx(by_enumeration(), rel=1e-12)
    dlogits, dkl, dys = back(None)
    assert coordinates(by_enumeration, logits, dlogits, EPS) < BOUND
    assert coordinates(by_enumeration, kl, dkl, EPS) < BOUND
    assert directional(by_enumeration, ys, np.stack(dys), rng, EPS) < BOUND


# ---------------------------------------------------------------- nvil

@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("model", ["air", "dair"])
def test_nvil_is_unbiased_for_any_baseline(model, temperature):
    """sum_n q(n) grad_nvil(n) is the exact gradient: n is forced by the uniform numbers."""
    cfg, p, x, noise, weights = setting(batch=1, model=model)
    weights.temperature, weights.spread = temperature, 0.0
    want_loss, want = gradient(p, cfg, x, noise, weights)
    traces, _ = air.unroll(p, cfg, x, noise)
    q = np.exp(air.log_posterior(np.stack([t.logit for t in traces])))[:, 0]
    loss, total = 0.0, np.zeros_like(p.flat)
    for n in range(cfg.max_steps + 1):
        noise.uniform = np.where(np.arange(cfg.max_steps) < n, 1e-9, 1 - 1e-9)[:, None]
        loss_n, g = gradient(p, replace(cfg, estimator="nvil"), x, noise, weights)
        loss, total = loss + q[n] * loss_n, total + q[n] * g.flat
    model_only = slice(0, p.span("baseline").start)
    assert q.min() > 1e-3 and loss == pytest.approx(want_loss, rel=1e-12)
    worst = np.abs(total - want.flat)[model_only].max()
    assert worst < 1e-9 * np.abs(want.flat).max()


def decisions(cfg, logits, kl, ll, noise, weights):
    """Of each decision that is made: (i, scene, yes or no, what followed it), by the definition."""
    N, T = cfg.max_steps, weights.temperature
    prior = np.exp(-weights.C * np.arange(N + 1))
    for b in range(logits.shape[1]):
        sure = 1 / (1 + np.exp(-logits[:, b]))
        z = noise.uniform[:, b] < sure
        n = [*z, False].index(False)
        followed = ll[n, b]
        for i in reversed(range(min(n + 1, N))):
            p_yes = prior[i + 1:].sum() / prior[i:].sum()
            p_z, q_z = (p_yes, sure[i]) if z[i] else (1 - p_yes, 1 - sure[i])
            followed += np.log(p_z) - T * np.log(q_z) - (kl[i, b] if z[i] else 0)
            yield i, b, z[i], followed


@pytest.mark.parametrize("model", ["air", "dair"])
def test_nvil_gradients_are_those_of_its_surrogate(model, monkeypatch, rng):
    """Decisions, learning signals and the baseline's input are given; all else is differentiated.

    Only the baseline is fitted to what followed, and only the rest is trained by the bound.
    """
    cfg, p, x, noise, weights = setting(model=model, estimator="nvil", batch=6)
    n = np.arange(6) % 4                                # every count is drawn
    noise.uniform = np.where(np.arange(3)[:, None] < n, 1e-9, 1 - 1e-9)
    _, g = gradient(p, cfg, x, noise, weights)
    freeze_residuals(monkeypatch, lambda: air.unroll(p, cfg, x, noise))

    def run():
        traces, _ = air.unroll(p, cfg, x, noise)
        logits, kl, ys, hs = (np.stack([getattr(t, name) for t in traces])
                              for name in ("logit", "kl", "y", "h"))
        return logits, kl, air.likelihoods(cfg, x, ys)[0], hs

    logits, kl, ll, hs = run()
    made = [*decisions(cfg, logits, kl, ll, noise, weights)]

    def miss(i, b, followed):
        hidden = np.maximum(hs[i, b] @ p["baseline.0.W"] + p["baseline.0.b"], 0)
        return followed - ll[i, b] - 100 * (hidden @ p["baseline.1.W"] + p["baseline.1.b"])[0]

    signal = {(i, b): miss(i, b, followed) for i, b, _, followed in made}

    def surrogate():
        logits, kl, ll, _ = run()
        total = ll[n, np.arange(6)].sum()
        for i, b, yes, _ in made:
            total += signal[i, b] * -np.logaddexp(0, -logits[i, b] if yes else logits[i, b])
            total -= kl[i, b] if yes else 0
        return -total / 6

    def least_squares():
        return sum(miss(i, b, followed) ** 2 for i, b, _, followed in made) / 2 / 6

    for name in p:
        f = least_squares if name.startswith("baseline") else surrogate
        assert g[name].any()
        error = directional(f, p[name], g[name], rng, EPS)
        assert error < BOUND, (name, error)


def test_the_baseline_has_its_own_learning_rate():
    cfg, p, _, _, _ = setting(estimator="nvil", baseline_lr=7.0)
    before, g = p.flat.copy(), p.grads()
    g.flat[...] = 1
    Optimiser(p, groups={"baseline": cfg.baseline_lr}).update(g, 1e-3, 1)
    moved = Params(dict(p), np.float64)
    moved.flat[...] = before - p.flat
    for name, a in moved.items():
        np.testing.assert_allclose(a, 7e-3 if name.startswith("baseline") else 1e-3, rtol=1e-6)


# ---------------------------------------------------------------- relaxed

def test_relaxed_presence_becomes_a_decision_as_tau_falls(rng):
    """Without its KL terms the loss is then that of the canvas with the first n objects."""
    cfg, _, x, noise, weights = setting(batch=20, estimator="relaxed", kl_weight=0.0)
    weights.presence = 0.0
    logits, _, ys, traces = made_up(cfg, x, rng)
    z = np.log(noise.uniform / (1 - noise.uniform)) + logits > 0
    n = z.cumprod(0).sum(0)
    assert {*n} == {0, 1, 2, 3}
    hard = -air.likelihoods(cfg, x, ys)[0][n, np.arange(len(x))].mean()
    errors = []
    for tau in (1.0, 0.1, 1e-2, 1e-4):
        weights.tau = tau
        errors.append(abs(air.relaxed(None, cfg, x, traces, noise, weights)[0] - hard))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 * abs(hard)


@pytest.mark.parametrize("estimator", [*air.ESTIMATORS])
@pytest.mark.parametrize("sure", [-200.0, 200.0])
def test_gradients_stay_finite_however_sure_presence_is(estimator, sure):
    cfg, p, x, noise, weights = setting(estimator=estimator)
    p, weights.tau, weights.spread = Params(p.host()), 0.2, 0.0     # single precision
    p["head.b"][0] = sure
    single = SimpleNamespace(**{k: a.astype(np.float32) for k, a in vars(noise).items()})
    loss, g = gradient(p, cfg, x.astype(np.float32), single, weights)
    assert np.isfinite(loss) and np.isfinite(g.flat).all() and g["decode.2.W"].any() == (sure > 0)


# ---------------------------------------------------------------- schedules, noise, scores

def test_schedules_begin_and_end_where_the_config_says():
    cfg = air.Config(presence_first=0.3, presence_weight=3.0, spread=0.4)
    first, last = air.schedule(cfg, 0), air.schedule(cfg, cfg.steps)
    assert (first.temperature, first.C, first.tau) == (cfg.temperature, cfg.prior_first, 1)
    assert (last.temperature, last.C, last.tau) == pytest.approx((1, cfg.prior, 0.2))
    assert (first.spread, air.schedule(cfg, cfg.spread_steps).spread, last.spread) == (0.4, 0, 0)
    assert (first.presence, last.presence) == (cfg.presence_first, cfg.presence_weight) == (0.3, 3)
    assert (first.lr, last.lr) == pytest.approx((cfg.lr, cfg.lr * cfg.lr_floor))
    ends = cfg.temperature_steps, cfg.prior_from, cfg.prior_to
    warm, before, arrived = (air.schedule(cfg, step) for step in ends)
    assert [warm.temperature, before.C, arrived.C] == [1, cfg.prior_first, cfg.prior]
    assert [before.presence, arrived.presence] == [0.3, 3]


def test_noise_depends_on_seed_and_step_only_and_processes_share_it():
    cfg = air.Config(**SMALL)
    whole, again = (vars(air.draw_noise(cfg, 8, 3, 5)) for _ in range(2))
    part = vars(air.draw_noise(cfg, 8, 3, 5, start=2, count=4))
    others = [vars(air.draw_noise(cfg, 8, *key)) for key in ((3, 6), (4, 5))]
    for name, a in whole.items():
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, again[name])
        np.testing.assert_array_equal(a[:, 2:6], part[name])
        assert not any((a == other[name]).any() for other in others)
    assert whole["uniform"].min() > 0 and whole["uniform"].max() < 1


def test_the_reduction_has_its_own_layers():
    """Trunk 1024-200-100, per step a head of 1 + 3 + 20 + 20, decoder 20-100-256."""
    p = Params(air.init(air.Config(**air.PRESETS["reduction"]), 0))
    shapes = [p[name].shape for name in p if name.endswith("W") and "baseline" not in name]
    assert shapes == [(1024, 200), (200, 100), (100, 3 * 44), (20, 100), (100, 256)]
    assert (p["decode.1.b"] == -2).all()


@pytest.mark.parametrize("model", MODELS)
def test_initial_weights_depend_on_the_seed_only(model):
    cfg = air.Config(**SMALL, model=model)
    one, again, other = (Params(air.init(cfg, seed)).flat for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("data", ["digits", "sprites"])
def test_scores_are_perfect_for_what_the_model_sees_and_the_same_in_parts(data):
    cfg, p, x, _, _ = setting(batch=7, data=data)
    p, x = Params(p.host()), (x * np.linspace(0, 1, 7)[:, None, None, None]).astype(np.float32)
    p["decode.2.b"][...] = 1.0                                      # bright enough for boxes
    p["head.W"][:, 0] *= 30                                         # sure of itself, and so that
    first = air.unroll(p, cfg, x, air.no_noise(cfg, 7))[0][0].logit     # counts differ
    p["head.b"][0] -= np.median(first)
    seen = air.infer_scenes(p, cfg, x)
    assert len({*seen.n}) > 1 and (seen.there.sum(1) == seen.n).all()
    for boxes in (seen.boxes, seen.windows):
        np.testing.assert_array_equal(~np.isnan(boxes[..., 0]), seen.there)
    own = air.score(p, cfg, [(x, seen.n, seen.boxes)])
    assert own["count_accuracy"] == 1 and own["mean_iou"] == pytest.approx(1)
    assert own["mse"] == pytest.approx(((seen.recon - x) ** 2).mean(), rel=1e-5)
    assert np.diag(own["count_confusion"]).sum() == 7

    counts, boxes = seen.n[::-1], seen.boxes[:, ::-1] + np.float32(1)
    whole = air.score(p, cfg, [(x, counts, boxes)])
    parts = air.score(p, cfg, [(x[k:k + 2], counts[k:k + 2], boxes[k:k + 2]) for k in (0, 2, 4, 6)])
    assert 0 < whole["mean_iou"] < 1 and whole["count_accuracy"] == (counts == seen.n).mean() < 1
    assert whole["count_confusion"] == parts["count_confusion"]
    for name in ("count_accuracy", "mse", "mean_iou"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_scene_files_are_scored_like_arrays_and_bad_counts_get_one_line(tmp_path):
    cfg, p, x, _, _ = setting(batch=5, data="sprites")
    x, counts, path = (x * 255).astype(np.uint8), np.array([0, 1, 2, 3, 1]), tmp_path / "scenes.npz"
    np.savez(path, images=np.moveaxis(x, 1, 3), counts=counts)
    want = air.score(Params(p.host()), cfg, [(x.astype(np.float32) / 255, counts, None)])
    assert air.evaluate(cfg, p.host(), path) == want
    for bad in (-counts, counts + 0.5):
        np.savez(path, images=np.moveaxis(x, 1, 3), counts=bad)
        with pytest.raises(Fail, match="counts must be whole numbers"):
            air.evaluate(cfg, p.host(), path)
