"""SQAIR: every gradient against finite differences, both estimators against enumeration."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import sqair_moving as sqair
from common.errors import Fail
from common.gradcheck import directional
from common.ops import logistic
from common.params import Params
from test_gradcheck import BOUND, pullback_error

EPS = 1e-6          # many ReLUs and windows: a small step meets fewer kinks
SMALL = {"canvas": 10, "glimpse": 4, "hidden": 6, "memory": 5, "what": 4, "units": 7, "slots": 3}


def setting(batch=3, frames=3, seed=5, **changes):
    """A small model in float64 that finds, keeps and loses objects; its videos and noise."""
    cfg, rng = sqair.Config(**{**SMALL, **changes}), np.random.default_rng(seed)
    p = Params(sqair.init(cfg, seed), np.float64)
    p.flat[...] += 0.1 * rng.standard_normal(p.flat.size)
    p["later.b"][...] = p["stay.1.b"][...] = 0
    videos = rng.random((batch, frames, 1, cfg.canvas, cfg.canvas))
    noise = [SimpleNamespace(eps=n.eps.astype(float), uniform=n.uniform.astype(float))
             for n in sqair.draw_noise(cfg, frames, batch, seed, 0)]
    return cfg, p, videos, noise, SimpleNamespace(temperature=3.0)


def freeze_residuals(monkeypatch, run):
    """Explaining away takes what others draw as given: from now on it stays that of `run`."""
    seen, residual = [], sqair.residual
    monkeypatch.setattr(sqair, "residual", lambda x, y: seen.append(residual(x, y)) or seen[-1])
    result = run()
    again = itertools.cycle(seen)
    monkeypatch.setattr(sqair, "residual", lambda x, y: next(again))
    return result


# ---------------------------------------------------------------- every gradient

@pytest.mark.parametrize("sampled", [False, True])
def test_latent_gradients(sampled, rng):
    inputs = [0.5 * rng.standard_normal((5, 4)) for _ in range(4)]
    eps = rng.standard_normal((5, 4))

    def latent(mean, log_std, mean0, log_std0):
        z, cost, back = sqair.latent(mean, log_std, eps, mean0, log_std0, sampled)
        return z, cost, back

    assert pullback_error(latent, inputs) < BOUND


def test_costs_agree_on_average(rng):
    """The sampled cost estimates the KL divergence."""
    mean, log_std, mean0, log_std0 = (np.repeat(0.5 * rng.standard_normal((1, 3)), 200_000, 0)
                                      for _ in range(4))
    eps = rng.standard_normal(mean.shape)
    kl, sampled = (sqair.latent(mean, log_std, eps, mean0, log_std0, s)[1] for s in (False, True))
    assert abs(sampled.mean() - kl[0]) < 4 * sampled.std() / np.sqrt(len(sampled))


@pytest.mark.parametrize("changes", [{}, {"objective": "vimco", "particles": 2}, {"net": "conv"},
                                     {"explain_away": False, "later": 3}, {"model": "air"}],
                         ids=str)
def test_gradients_through_time(changes, monkeypatch, rng):
    """All that the bound reads, with any slopes, through all frames and objects."""
    cfg, p, videos, noise, _ = setting(through_time=True, **changes)
    rows = cfg.particles if cfg.objective == "vimco" else 1
    xs = list(np.repeat(videos, rows, 0).swapaxes(0, 1))
    traces, _, back = freeze_residuals(monkeypatch, lambda: sqair.unroll(p, cfg, xs, noise))
    if cfg.model == "sqair":
        z = np.concatenate([t.z for trace in traces for t in trace.kept])
        assert 0 < z.mean() < 1 and any(trace.n.any() for trace in traces[1:])
    slopes = [SimpleNamespace(
        found_logits=[rng.standard_normal(t.logit.shape) * t.possible for t in trace.found],
        found_costs=[rng.standard_normal(t.cost.shape) for t in trace.found],
        ys=[rng.standard_normal(y.shape) for y in trace.ys],
        kept_logits=[rng.standard_normal(t.logit.shape) for t in trace.kept],
        kept_costs=[rng.standard_normal(t.cost.shape) for t in trace.kept]) for trace in traces]
    g = p.grads()
    back(slopes, g)

    def read():
        total = 0.0
        for trace, s in zip(sqair.unroll(p, cfg, xs, noise)[0], slopes, strict=True):
            total += sum((d * t.logit).sum() + (e * t.cost).sum() for d, e, t in
                         zip(s.found_logits, s.found_costs, trace.found, strict=True))
            total += sum((d * t.logit).sum() + (e * t.cost).sum() for d, e, t in
                         zip(s.kept_logits, s.kept_costs, trace.kept, strict=True))
            total += sum((d * y).sum() for d, y in zip(s.ys, trace.ys, strict=True))
        return total

    for name in p:
        error = directional(read, p[name], g[name], rng, EPS)
        assert error < BOUND or np.abs(g[name]).max() < 1e-7, (name, error)
        if cfg.model == "sqair":
            assert g[name].any(), name


def test_fast_gradients(monkeypatch, rng):
    """The whole default loss, with the sampled presences and numbers held fixed.

    Its slope for a propagated presence is p (1 - p) gain: the derivative of -p gain, gain frozen
    but for the part that is the KL divergence's own.
    """
    cfg, p, videos, noise, weights = setting(through_time=True)
    xs = list(videos.swapaxes(0, 1))
    traces, _, back = freeze_residuals(monkeypatch, lambda: sqair.unroll(p, cfg, xs, noise))
    _, slopes = sqair.fast(cfg, xs, traces, weights)
    g = p.grads()
    back(slopes, g)
    B = len(videos)
    gains = [[-d * B / (q * (1 - q)) - cfg.stay + t.logit
              for d, t in zip(s.kept_logits, trace.kept, strict=True)
              for q in [logistic(t.logit)]] for s, trace in zip(slopes, traces, strict=True)]

    def loss():
        again = sqair.unroll(p, cfg, xs, noise)[0]
        value = sqair.fast(cfg, xs, again, weights)[0]
        return value - sum((logistic(t.logit) * gain).sum() / B for trace, of in
                           zip(again, gains, strict=True)
                           for t, gain in zip(trace.kept, of, strict=True))

    for name in p:
        assert g[name].any(), name
        error = directional(loss, p[name], g[name], rng, EPS)
        assert error < BOUND, (name, error)


def test_detached_state_stops_the_past(rng):
    """Without `through_time` a frame's loss moves no weight by way of the frame before it."""
    cfg, p, videos, noise, weights = setting(through_time=False)
    g = p.grads()
    _, back = sqair.objective(p, cfg, videos, noise, weights)
    back(g)
    each = np.zeros_like(g.flat)
    xs, states = list(videos.swapaxes(0, 1)), [sqair.nothing(cfg, len(videos), float)]
    states += sqair.unroll(p, cfg, xs, noise)[1]
    for t, x in enumerate(xs):
        e, back_e = sqair.features(p, cfg, "look", x)
        trace, _, back_t = sqair.frame(p, cfg, x, e, states[t], noise[t], t == 0)
        alone = p.grads()
        slope = sqair.fast(cfg, [x], [trace], weights)[1][0]
        back_e(back_t(slope, np.zeros_like(states[t].s), alone)[0], alone)
        alone.flush()
        each += alone.flat
    np.testing.assert_allclose(each, g.flat, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- both estimators

def one_frame(z_logits, drawn, x, std, cost, stay):
    """Mean over all z of a frame's bound: likelihood, costs, and the number prior of z."""
    total = 0.0
    for z in itertools.product((0, 1), repeat=len(z_logits)):
        q = np.prod([logistic(l) if b else 1 - logistic(l) for l, b in
                     zip(z_logits, z, strict=True)])
        y = sum(b * d for b, d in zip(z, drawn, strict=True))
        value = -((x - y)**2).sum() / (2 * std**2) - sum(b * c for b, c in
                                                        zip(z, cost, strict=True))
        for l, b in zip(z_logits, z, strict=True):
            r, s = logistic(l), logistic(stay)
            value += np.log(s / r) if b else np.log((1 - s) / (1 - r))
        total += q * value
    return total


def test_fast_presence_is_unbiased(rng):
    """Averaged over all z, the slopes of presence are those of the frame's mean bound."""
    n, cfg = 3, sqair.Config(std=0.7, stay=2.0)
    x, logits, cost = rng.random((1, 1, 6, 6)), rng.standard_normal(n), rng.random(n)
    drawn = [rng.random((1, 1, 6, 6)) for _ in range(n)]
    exact = np.empty(n)
    for i in range(n):
        step = np.eye(n)[i] * 1e-5
        exact[i] = (one_frame(logits + step, drawn, x, 0.7, cost, 2.0)
                    - one_frame(logits - step, drawn, x, 0.7, cost, 2.0)) / 2e-5
    mean = np.zeros(n)
    for z in itertools.product((0.0, 1.0), repeat=n):
        q = np.prod([logistic(l) if b else 1 - logistic(l) for l, b in zip(logits, z, strict=True)])
        kept = [SimpleNamespace(rows=np.array([0]), logit=logits[i:i + 1], cost=cost[i:i + 1],
                                z=np.array([z[i]]), drawn=drawn[i]) for i in range(n)]
        y = sum(b * d for b, d in zip(z, drawn, strict=True))
        never = SimpleNamespace(logit=np.array([sqair.NEVER]), cost=np.zeros(1))
        trace = SimpleNamespace(first=False, kept=kept, found=[never], ys=[y, y],
                                free=np.zeros(1), log_q=np.array([[0.0], [sqair.NEVER]]))
        _, slopes = sqair.fast(cfg, [x], [trace], SimpleNamespace(temperature=1.0))
        mean -= q * np.concatenate(slopes[0].kept_logits)
    np.testing.assert_allclose(mean, exact, rtol=1e-6)


def outcomes(cfg, p, xs, eps, frames):
    """All discrete outcomes of one row, as uniforms that force them, and their probability.

    One slot: found or not in frame 1; kept or lost in frame 2, and found there if free.
    """
    low, high = 1e-12, 1 - 1e-12
    seen = {}
    for u in itertools.product((low, high), repeat=2 * frames):
        noise = [SimpleNamespace(eps=eps[t], uniform=np.array(u[2 * t:2 * t + 2])[:, None])
                 for t in range(frames)]
        traces, _, _ = sqair.unroll(p, cfg, xs, noise)
        key, log_q = [], 0.0
        for trace in traces:
            for t in trace.kept:
                key.append(("kept", int(t.z[0])))
                log_q += np.log(logistic(t.logit[0]) if t.z[0] else 1 - logistic(t.logit[0]))
            key.append(("found", int(trace.n[0])))
            log_q += trace.log_q[int(trace.n[0]), 0]
        seen.setdefault(tuple(key), (u, log_q))
    return list(seen.values())


def test_vimco_is_unbiased(rng):
    """Averaged over all discrete outcomes of two samples, the slope is that of the mean bound."""
    cfg, p, videos, _, weights = setting(batch=1, frames=2, seed=5, slots=1, objective="vimco",
                                         particles=2, through_time=True, stay=1.0, first=1.0,
                                         newcomer=1.0, std=2.0, explain_away=False)
    eps = rng.standard_normal((2, 2, 2, 3 + cfg.what))              # frame, slot or step, row
    xs = list(videos.swapaxes(0, 1))
    v = rng.standard_normal(p.flat.size)

    def all_pairs():
        rows = [outcomes(cfg, p, xs, eps[:, :, k:k + 1], 2) for k in range(2)]
        assert len(rows[0]) == 5                        # no/no, no/yes, kept, lost/no, lost/yes
        assert abs(sum(np.exp(q) for _, q in rows[0]) - 1) < 1e-6
        for (u, q), (w, r) in itertools.product(*rows):
            uniform = np.stack([u, w], 1).reshape(2, 2, 2)
            yield [SimpleNamespace(eps=eps[t], uniform=uniform[t]) for t in range(2)], np.exp(q + r)

    estimate, g = 0.0, p.grads()
    for noise, probability in all_pairs():
        g.zero()
        _, back = sqair.objective(p, cfg, videos, noise, weights)
        back(g)
        estimate += probability * (g.flat @ v)

    def mean_loss():
        return sum(q * sqair.objective(p, cfg, videos, noise, weights)[0]
                   for noise, q in all_pairs())

    kept = p.flat.copy()
    values = []
    for sign in (1, -1):
        p.flat[...] = kept + sign * 1e-5 * v
        values.append(mean_loss())
    p.flat[...] = kept
    exact = (values[0] - values[1]) / 2e-5
    assert abs(estimate - exact) < 1e-5 * abs(exact), (estimate, exact)


# ---------------------------------------------------------------- the two phases

def test_more_particles_tighten_the_bound():
    cfg, p, videos, _, _ = setting(batch=2, frames=2)
    p = Params({k: np.asarray(a, np.float32) for k, a in p.items()})
    parts = [(videos[i:i + 1].astype(np.float32), None, None) for i in range(2)]
    few, many = (sqair.tight_bound(p, replace(cfg, bound_particles=k), parts) for k in (1, 300))
    assert many > few


def test_slots_are_filled_and_names_are_kept():
    """Objects keep their slot and name; a lost object's slot is taken by a new name."""
    cfg, p, videos, noise, _ = setting(batch=12, frames=6, later=2)
    _, states, _ = sqair.unroll(p, cfg, list(videos.swapaxes(0, 1)), noise)
    changed = 0
    for before, after in itertools.pairwise(states):
        both = (before.there > 0) & (after.there > 0) & (after.age > 0)
        assert (before.name[both] == after.name[both]).all()
        assert (after.age[both] == before.age[both] + 1).all()
        new = (after.there > 0) & (after.age == 0)
        assert (after.name[new] >= before.named[np.nonzero(new)[0]]).all()
        assert (after.name[after.there == 0] == -1).all() and not after.s[after.there == 0].any()
        changed += (new & (before.there > 0)).sum()
    assert changed > 0
    assert (states[-1].named >= states[-1].there.sum(1)).all()


def test_more_looks_are_frames_in_which_nothing_moves():
    cfg, p, videos, noise, _ = setting(batch=12, frames=2)
    first, second = videos.swapaxes(0, 1)
    _, (at_rest, moved), _ = sqair.unroll(p, cfg, [first, second], noise, looks=2)
    _, (_, repeated), _ = sqair.unroll(p, cfg, [first, first], noise[:1] * 2)
    np.testing.assert_array_equal(at_rest.s, repeated.s)
    assert at_rest.there.any() and not at_rest.age.any()
    stays = (moved.age > 0)[..., None]              # its velocity is what it has just moved
    np.testing.assert_allclose((stays * moved.s)[..., 4:6],
                               (stays * (moved.s - at_rest.s))[..., 1:3])


def test_full_slots_find_nothing_more():
    cfg, p, videos, noise, _ = setting(batch=8, frames=4, slots=1)
    traces, states, _ = sqair.unroll(p, cfg, list(videos.swapaxes(0, 1)), noise)
    for trace, state in zip(traces, states, strict=True):
        assert (state.there.sum(1) <= 1).all() and (trace.n <= trace.free).all()


def test_hindsight_finds_places_and_velocities(rng):
    """Objects that move on evenly, and are first seen beside their places."""
    cfg = sqair.Config(**{**SMALL, "canvas": 24, "glimpse": 8})
    p = Params(sqair.init(cfg, 0), np.float64)
    p["decode.2.W"][...] *= 10
    T, rows = 3, np.array([0, 0, 1])
    what, where, velocity = (rng.standard_normal((3, k)) for k in (cfg.what, 3, 2))
    where[:, 1:] = [[-0.8, -0.8], [0.8, 0.8], [0.1, 0.1]]
    velocity *= 0.05
    xs, states = [], []
    for t in range(T):
        at = where + t * np.pad(velocity, ((0, 0), (1, 0)))
        drawn, _ = sqair.draw(p, cfg, what, at)
        xs.append(np.stack([drawn[:2].sum(0), drawn[2]]))
        state = sqair.nothing(cfg, 2, float)
        i = (rows, [0, 1, 0])
        state.there[i], state.name[i], state.s[i + (slice(6, 10),)] = 1, [0, 1, 0], what
        state.s[i + (slice(3),)] = at + 0.1 * np.pad(rng.uniform(-1, 1, (3, 2)), ((0, 0), (1, 0)))
        states.append(state)
    states[0].name[1] = -1                          # found in frame 2
    s = sqair.in_hindsight(p, cfg, xs, states).s[i]
    np.testing.assert_allclose(s[:, :3], at, atol=3e-3)
    np.testing.assert_allclose(s[:, 4:6], velocity, atol=3e-3)


def test_hindsight_fits_the_line_through_the_first_place(monkeypatch, rng):
    """Least squares over four measured places that lie on no line; a second object begins late."""
    cfg, T = sqair.Config(**SMALL, bounce=False), 4
    p, places, states = Params(sqair.init(cfg, 0), np.float64), rng.standard_normal((T, 2, 3)), []
    places[:, :, 0] = 0.3                           # scales do not move
    for t in range(T):
        state = sqair.nothing(cfg, 1, float)
        state.there[0, :2], state.name[0, :2] = 1, [0, 1 if t else -1]
        state.s[0, :2, 0] = 0.3
        states.append(state)
    measured = iter(places)
    monkeypatch.setattr(sqair, "settled", lambda *args: next(measured))
    s = sqair.in_hindsight(p, cfg, [None] * T, states).s[0]
    for k, first in enumerate((0, 1)):
        start, rest = places[first, k], places[first + 1:, k]
        steps = np.arange(1, len(rest) + 1)[:, None]
        velocity = np.linalg.lstsq(steps, rest - start, rcond=None)[0][0]
        np.testing.assert_allclose(s[k, 3:6], velocity, atol=1e-12)
        np.testing.assert_allclose(s[k, :3], start + len(rest) * velocity, atol=1e-12)


def test_bounces_are_straight_lines_in_the_mirror():
    cfg = sqair.Config(**SMALL)
    p = Params(sqair.init(cfg, 0), np.float64)
    p["decode.2.W"][...] = 0
    p["decode.2.b"].reshape(4, 4)[:, 1:3] = 3       # ink in the two columns in the middle
    s = np.zeros((3, 6 + cfg.what + 2 * cfg.memory))
    s[:, 1:3], s[:, 4:6] = [[1.9, 0], [1.9, -1.8], [-1.9, 2.1]], [[0.3, 0.3], [-0.3, -0.3],
                                                                  [0.1, -0.2]]
    past = sqair.mirrored(p, cfg, s)
    np.testing.assert_allclose(past[:, 1:3] + past[:, 4:6], [[1.8, 0.3], [1.6, -1.9], [-1.8, 1.9]])
    np.testing.assert_allclose(past[:, 4:6], [[-0.3, 0.3], [-0.3, 0.3], [0.1, -0.2]])
    p["decode.2.b"].reshape(4, 4)[:, 1] = -3        # ink right of the middle, by a quarter
    past = sqair.mirrored(p, cfg, s)                # so it turns round by 2 x .5 x .25 x 2 earlier
    np.testing.assert_allclose(past[0, 1:3] + past[0, 4:6], [1.3, 0.3])


def test_priors_of_the_number_are_normalised():
    cfg = sqair.Config(first=0.7)
    trace = SimpleNamespace(ys=[None] * 4, first=True, free=np.array([0, 1, 2, 3]),
                            log_q=np.zeros((4, 4)))
    prior = np.exp(sqair.log_prior(cfg, trace))                     # (n, room)
    possible = np.arange(4)[:, None] <= trace.free
    np.testing.assert_allclose((prior * possible).sum(0), 1)


def test_air_forgets():
    """With --model air a frame's objects do not depend on the frames before it."""
    cfg, p, videos, noise, _ = setting(model="air")
    xs = list(videos.swapaxes(0, 1))
    last = sqair.unroll(p, cfg, xs, noise)[1][-1]
    alone = sqair.unroll(p, cfg, xs[-1:], noise[-1:])[1][-1]
    np.testing.assert_array_equal(last.s, alone.s)


def test_curriculum():
    cfg = sqair.Config(lengths=(1, 3, 5), starts=(0, 10, 20), batch_size=8)
    assert [sqair.stage(cfg, k) for k in (0, 9, 10, 19, 20, 99)] == [
        (1, 16), (1, 16), (3, 8), (3, 8), (5, 8), (5, 8)]


@pytest.mark.parametrize("changes", [{"starts": (0,)}, {"starts": (5, 10)}, {"counts": (4,)},
                                     {"net": "conv", "glimpse": 21}], ids=str)
def test_impossible_configs_say_so(changes):
    with pytest.raises(Fail):
        sqair.check(replace(sqair.Config(), **changes))
