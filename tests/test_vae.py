"""Convolutional VAE: every gradient against finite differences, and the rest of the script."""

import json

import numpy as np
import pytest

import vae_scenes as vae
from common import cli
from common.gradcheck import directional
from common.params import Params
from test_gradcheck import BOUND, EPS, pullback_error

SMALL = {"canvas": 32, "latent": 3, "halvings": (4, 8, 4, 4), "mixings": (8, 4, 4), "seeds": 3,
         "widths": (4, 3, 2)}


def setting(batch=3, seed=0, dtype=np.float64, **changes):
    """A small model, some pictures and noise."""
    cfg, rng = vae.Config(**{**SMALL, **changes}), np.random.default_rng(seed)
    p = Params(vae.init(cfg, seed), dtype)
    p.flat[...] += 0.1 * rng.standard_normal(p.flat.size)
    images = rng.random((batch, 3, cfg.canvas, cfg.canvas)).astype(dtype)
    return cfg, p, images, vae.draw_noise(cfg, batch, seed, 0).astype(dtype)


def test_objective_gradients(rng):
    cfg, p, images, eps = setting(kl_weight=3.0)
    g = p.grads()
    _, _, _, back = vae.objective(p, cfg, images, eps, 0.3)
    back(g)
    for name in p:
        assert g[name].any(), name
        error = directional(lambda: vae.objective(p, cfg, images, eps, 0.3)[0], p[name], g[name],
                            rng, EPS)
        assert error < BOUND, (name, error)


def test_gradients_of_the_pieces(rng):
    cfg, p, _, _ = setting()
    some = Params({k: a for k, a in p.items() if k.startswith(("see.1", "grow.0.more"))},
                  np.float64)
    maps = rng.standard_normal((2, 8, 6, 6))
    assert pullback_error(lambda x: vae.halve(some, "see.1", x, False), [maps], some) < BOUND
    assert pullback_error(lambda x: vae.residuals(some, "grow.0.more", x), [maps[:, :4]],
                          some) < BOUND
    some = Params({k: a for k, a in p.items() if not k.startswith(("see", "code"))}, np.float64)
    z = rng.standard_normal((2, 3))
    assert pullback_error(lambda z: vae.decode(some, cfg, z), [z], some) < BOUND


def test_the_bound_is_the_elbo():
    """The loss is -log p(x, z) + log q(z | x) on average, but for the constant of p(x | z)."""
    cfg, p, images, _ = setting(batch=1)
    many, rng = np.repeat(images, 600, 0), np.random.default_rng(3)
    eps = rng.standard_normal((600, 3))
    loss = vae.objective(p, cfg, many, eps, 0.5)[0]
    mean, log_std, _ = vae.encode(p, cfg, images)
    z = mean + np.exp(log_std) * eps
    y, _ = vae.decode(p, cfg, z)
    log_joint = -((y - images) ** 2).sum((1, 2, 3)) / (2 * 0.5**2) - 0.5 * (z * z).sum(1)
    each = -0.5 * (eps * eps).sum(1) - log_std.sum() - log_joint
    assert loss == pytest.approx(each.mean(), abs=4 * each.std() / 600**0.5)


def test_noise_is_shared_out():
    cfg = vae.Config(**SMALL)
    np.testing.assert_array_equal(vae.draw_noise(cfg, 6, 0, 5)[2:5],
                                  vae.draw_noise(cfg, 6, 0, 5, 2, 3))


def test_training_improves_the_bound():
    """Fifty updates on one batch of scenes."""
    cfg = vae.Config(**SMALL)
    p = Params(vae.init(cfg, 0))
    g, adam = p.grads(), vae.Optimiser(p)
    images, losses = next(vae.stream(cfg, 0, 8)), []
    for step in range(50):
        loss, _, _, back = vae.objective(p, cfg, images, vae.draw_noise(cfg, 8, 0, step), 0.3)
        g.zero()
        back(g)
        adam.update(g, 1e-2, step + 1)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_generated_parts_are_those_of_one_stream():
    cfg, p, _, _ = setting(dtype=np.float32)
    whole, = vae.imagine(p, cfg, 7)
    parts = np.concatenate([*vae.imagine(p, cfg, 7, part=3)])
    np.testing.assert_allclose(whole, parts, atol=1e-6)
    assert whole.shape == (7, 3, 32, 32) and whole.std(0).mean() > 0


@pytest.fixture
def command(capsys):
    """The script's command line; returns the last line on stdout."""
    about = (vae.__doc__, vae.Config, vae.PRESETS)

    def run(*words):
        cli.main(*about, train=vae.train, evaluate=vae.evaluate, infer=vae.infer,
                 figures=vae.figures, adjustable=vae.ADJUSTABLE, argv=[*map(str, words)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_the_four_verbs(command, tmp_path):
    out = tmp_path / "run"
    trained = command("--out", out, "--steps", 3, "--batch-size", 2, "--halvings", 4, 4, 4, 4,
                      "--mixings", 4, 4, 4, "--seeds", 2, "--widths", 4, 4, 4, "--eval-scenes", 3,
                      "--test-scenes", 5, "--data", "dsprites")
    weights = ("--weights", out / "weights.npz")
    fresh = command("evaluate", *weights)
    assert fresh["mse"] == pytest.approx(trained["mse"], rel=0.01)      # half precision
    np.savez(tmp_path / "file.npz", images=np.zeros((2, 64, 64, 3), np.uint8))
    assert command("evaluate", *weights, "--scenes", tmp_path / "file.npz")["mse"] > 0
    assert {"samples.png", "reconstructions.png"} <= {*command("figures", "--run", out)["figures"]}
    seen = command("infer", *weights, out / "samples.png", "--out", tmp_path)
    assert seen["pictures"][0]["kl"] > 0
    assert (tmp_path / "samples.png.recon.png").stat().st_size > 100


@pytest.mark.parametrize("words", [("--widths", 4, 4), ("--mixings", 4, 4), ("--mixings", 4, 6, 4),
                                   ("--canvas", 40)])
def test_impossible_configs_end_with_one_line(command, words, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        command("--out", tmp_path / "no", *words)
