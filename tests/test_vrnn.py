"""VRNN: every gradient against finite differences, the bounds against what they must be."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import vrnn_moving as vrnn
from common import cli
from common.data import Glyphs
from common.errors import Fail
from common.gradcheck import directional
from common.params import Params, fitting
from test_gradcheck import BOUND, EPS, pullback_error

SMALL = {"canvas": 10, "hidden": 5, "latent": 3, "particles": 3}


def setting(batch=3, frames=4, seed=0, **changes):
    """A small model in float64, its videos and noise."""
    cfg, rng = vrnn.Config(**{**SMALL, **changes}), np.random.default_rng(seed)
    p = Params(vrnn.init(cfg, seed), np.float64)
    p.flat[...] += 0.1 * rng.standard_normal(p.flat.size)
    videos = rng.random((batch, frames, 1, cfg.canvas, cfg.canvas))
    return cfg, p, videos, noise_of(cfg, frames, batch, seed)


@pytest.fixture(autouse=True)
def few_maps(monkeypatch):
    monkeypatch.setattr(vrnn, "MAPS", (2, 3))


def noise_of(cfg, frames, batch, seed=0):
    noise = vrnn.draw_noise(cfg, frames, batch, seed, 0)
    return SimpleNamespace(eps=noise.eps.astype(float), uniform=noise.uniform.astype(float))


# ---------------------------------------------------------------- every gradient

@pytest.mark.parametrize("changes", [{}, {"net": "conv"}, {"objective": "iwae"}, {"particles": 1}],
                         ids=str)
def test_objective_gradients(changes, rng):
    """Through all frames; finite differences see the same ancestors, for the noise is the same."""
    cfg, p, videos, noise = setting(**changes)
    traces = vrnn.unroll(p, cfg, videos, noise)[0]
    resampled = np.stack([t.closed for t in traces[:-1]])
    assert resampled.any() == (cfg.objective == "fivo" and cfg.particles > 1)
    assert not resampled.all()
    g = p.grads()
    _, back = vrnn.objective(p, cfg, videos, noise)
    back(g)
    for name in p:
        assert g[name].any(), name
        error = directional(lambda: vrnn.objective(p, cfg, videos, noise)[0], p[name], g[name],
                            rng, EPS)
        assert error < BOUND, (name, error)


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_step_gradients(net, rng):
    cfg, p, videos, noise = setting(net=net)
    H, x = cfg.hidden, np.repeat(videos[:, 0], 3, 0)

    def step(f, a, *state):
        trace, state, back = vrnn.step(p, cfg, x, f, a, state, noise.eps[0])

        def pull(dlog_w, do, dc, du, g):
            dstate, df, da = back((do, dc, du), dlog_w, g)
            return df, da, *dstate

        return trace.log_w, *state, pull

    inputs = [rng.standard_normal((9, n)) for n in (H, 4 * H, H, H, H)]
    assert pullback_error(step, inputs, p) < BOUND


def test_gradients_of_the_pieces(rng):
    cfg, p, _, _ = setting(net="conv")
    maps, o = rng.standard_normal((2, 3, 3, 3)), rng.standard_normal((2, 5))
    assert pullback_error(lambda x: vrnn.cut(x, 3), [rng.standard_normal((2, 3, 4, 4))]) < BOUND
    some = part(p, "paint")
    assert pullback_error(lambda x: vrnn.paint(some, cfg, x), [maps], some) < BOUND
    some = part(p, "prior")
    assert pullback_error(lambda x: vrnn.normal(some, "prior", x), [o], some) < BOUND
    latents = 0.5 * rng.standard_normal((4, 5, 3))
    eps = rng.standard_normal((5, 3))
    assert pullback_error(lambda *x: vrnn.latent(*x, eps), [*latents]) < BOUND
    heirs = np.array([0, 0, 2, 1, 1])
    state = rng.standard_normal((2, 5, 3))
    assert pullback_error(lambda a, b: flat(*vrnn.gather((a, b), heirs)), [*state]) < BOUND


def part(p, prefix):
    return Params({k: a for k, a in p.items() if k.startswith(prefix)}, np.float64)


def flat(state, back):
    return *state, lambda *d: back(d)


# ---------------------------------------------------------------- the bounds

def test_one_particle_is_the_elbo():
    """Its sampled cost estimates the KL divergence; both objectives are the same."""
    cfg, p, videos, _ = setting(particles=1, batch=1, frames=1)
    many = np.repeat(videos, 4000, 0)
    noise = noise_of(cfg, 1, len(many))
    (trace,), bound, _, _ = vrnn.unroll(p, cfg, many, noise)
    difference = bound - (trace.log_p - vrnn.divergence(trace))
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(many))
    iwae = vrnn.unroll(p, replace(cfg, objective="iwae"), many, noise)[1]
    np.testing.assert_array_equal(bound, iwae)


@pytest.mark.parametrize("objective", ["fivo", "iwae"])
def test_likelihood_estimates_agree(objective):
    """exp(bound) is an unbiased estimate of p(x_1:T), resampled or not, of any N."""
    cfg, p, videos, noise = setting(batch=1, frames=3, latent=2, std=4.0, objective=objective)
    p["infer.2.b"][2:] = 0.5                        # q wider than the prior: no heavy tails
    estimates, typical = [], vrnn.unroll(p, cfg, videos, noise)[1]
    for N, count in ((1, 10_000), (4, 3_000)):
        many = np.repeat(videos, count, 0)
        one = replace(cfg, particles=N)
        traces, bound, _, _ = vrnn.unroll(p, one, many, noise_of(one, 3, count, N))
        if N > 1 and objective == "fivo":
            assert 0.05 < np.stack([t.closed for t in traces[:-1]]).mean() < 0.95
        estimates.append(np.exp(bound - typical))
    error = [e.std() / np.sqrt(len(e)) for e in estimates]
    assert abs(estimates[0].mean() - estimates[1].mean()) < 4 * np.hypot(*error)
    print(estimates[0].mean(), estimates[1].mean(), error, [e.std() for e in estimates])
    assert np.hypot(*error) < 0.05 * estimates[0].mean()


def test_resampling_follows_the_weights():
    """Ancestors are as many as the weights say, to within one; level videos keep their own."""
    cfg = vrnn.Config()
    share = np.array([[0.9, 0.1, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]])
    for u in (0.01, 0.5, 0.99):
        tired, ancestor = vrnn.resample(cfg, share, np.full(3, u))
        assert tired.tolist() == [True, False, True]
        counts = np.stack([np.bincount(a - 4 * b, minlength=4)
                           for b, a in enumerate(ancestor.reshape(3, 4))])
        assert (abs(counts - 4 * share) < 1).all()
        assert ancestor[4:8].tolist() == [4, 5, 6, 7]
    never = replace(cfg, objective="iwae")
    assert not vrnn.resample(never, share, np.full(3, 0.5))[0].any()


def test_nothing_of_a_frame_reaches_the_prediction_of_it():
    """p(z_t | ..) and the frames before do not change with x_t."""
    cfg, p, videos, noise = setting(particles=1)
    other = videos.copy()
    other[:, 2] = 1 - other[:, 2]
    a, b = (vrnn.unroll(p, cfg, v, noise)[0] for v in (videos, other))
    np.testing.assert_array_equal(a[1].y, b[1].y)
    np.testing.assert_array_equal(a[2].mean0, b[2].mean0)
    assert (a[2].mean != b[2].mean).any() and (a[3].mean0 != b[3].mean0).any()


# ---------------------------------------------------------------- the rest of the script

def test_imagined_videos_continue_where_the_filter_is():
    """A frame imagined from its past is what the filter draws if it takes the prior's latents."""
    cfg, p, videos, _ = setting(particles=1, frames=2)
    for name in p:
        if name.startswith("infer"):
            p[name][...] = 0                            # q is N(0, 1), and so is the prior
        if name.startswith("prior"):
            p[name][...] = 0
    for T in (0, 2):
        frames = vrnn.imagine(p, cfg, videos[:, :T], 2)
        longer = np.concatenate([videos[:, :T], frames], 1)
        drawn = vrnn.infer_videos(p, cfg, longer)[1]
        np.testing.assert_allclose(frames, drawn[:, T:], atol=1e-12)
    dreams = [vrnn.imagine(p, cfg, videos[:, :0], 2, np.random.default_rng(k)) for k in (0, 1)]
    assert dreams[0].shape == (3, 2, 1, 10, 10) and (dreams[0] != dreams[1]).all()


def test_noise_is_shared_out():
    """Processes take neighbouring videos of the same numbers."""
    cfg = vrnn.Config(**SMALL)
    whole = vrnn.draw_noise(cfg, 2, 4, 0, 5)
    part = vrnn.draw_noise(cfg, 2, 4, 0, 5, 1, 2)
    np.testing.assert_array_equal(whole.eps[:, 3:9], part.eps)
    np.testing.assert_array_equal(whole.uniform[:, 1:3], part.uniform)


def test_training_improves_the_bound(rng):
    """Fifty updates on one batch of white squares."""
    cfg = vrnn.Config(canvas=8, hidden=16, latent=4, particles=2)
    p = Params(vrnn.init(cfg, 0))
    g, adam = p.grads(), vrnn.Optimiser(p)
    videos = np.zeros((4, 3, 1, 8, 8), np.float32)
    for b, t in np.ndindex(4, 3):
        videos[b, t, 0, b:b + 3, t:t + 3] = 1
    losses = []
    for step in range(50):
        loss, back = vrnn.objective(p, cfg, videos, vrnn.draw_noise(cfg, 3, 4, 0, step))
        g.zero()
        back(g)
        adam.update(g, 3e-3, step + 1)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < losses[0] - 50
    metrics = vrnn.score(p, cfg, [videos])
    assert metrics["mse"] < 0.1
    assert metrics["elbo"] == pytest.approx(metrics["log_likelihood"] - metrics["kl"])


def test_weights_of_another_config_are_refused():
    cfg = vrnn.Config(**SMALL)
    weights = {k: a.astype(np.float32) for k, a in vrnn.init(cfg, 0).items()}
    fitting(weights, vrnn.init(cfg, 0))
    with pytest.raises(Fail, match="do not fit"):
        fitting(weights, vrnn.init(replace(cfg, hidden=7), 0))


@pytest.fixture
def command(monkeypatch, capsys):
    """The script's command line with squares for digits; returns the last line on stdout."""
    images = np.zeros((20, 28, 28), np.uint8)
    images[:, 10:16, 10:16] = 255
    squares = Glyphs(images, np.arange(20, dtype=np.uint8) % 10, "squares")
    monkeypatch.setattr(vrnn, "load_glyphs", lambda *args: squares)
    monkeypatch.setattr(vrnn, "addition", partial(vrnn.addition, count=(100, 100)))
    monkeypatch.setattr(vrnn, "probe", partial(vrnn.probe, steps=3))
    figures = vrnn.figures
    monkeypatch.setattr(vrnn, "figures", lambda *args: None)    # drawn once is enough
    about = (vrnn.__doc__, vrnn.Config, vrnn.PRESETS)

    def run(*words):
        cli.main(*about, train=vrnn.train, evaluate=vrnn.evaluate, infer=vrnn.infer,
                 figures=figures, adjustable=vrnn.ADJUSTABLE, argv=[*map(str, words)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_the_four_verbs(command, tmp_path):
    out = tmp_path / "run"
    trained = command("--out", out, "--net", "conv", "--steps", 3, "--batch-size", 2, "--lengths",
                      2, 3, "--starts", 0, 1, "--particles-from", 2, "--canvas", 30, "--hidden", 8,
                      "--latent", 5, "--frames", 4, "--eval-videos", 3, "--test-videos", 5)
    weights = ("--weights", out / "weights.npz")
    fresh = command("evaluate", *weights, "--addition", "--bound-particles", 20,
                    "--bound-videos", 2)
    assert fresh["elbo"] == pytest.approx(trained["elbo"], rel=0.01)     # half precision
    assert {"bound", "bound_fivo", "addition", "prediction_mse"} < fresh.keys()
    np.savez(tmp_path / "file.npz", videos=np.zeros((2, 4, 30, 30), np.uint8))
    dark = command("evaluate", *weights, "--scenes", tmp_path / "file.npz")
    assert dark["log_likelihood"] > fresh["log_likelihood"]
    with pytest.raises(SystemExit, match="2"):
        command("--out", tmp_path / "no", "--starts", 5, 6)
    assert "samples.png" in command("figures", "--run", out)["figures"]
    seen = command("infer", *weights, out / "reconstructions.gif", "--out", tmp_path)
    assert seen["videos"][0]["frames"] == 4
    assert (tmp_path / "reconstructions.gif.recon.gif").stat().st_size > 100
