"""IODINE: every gradient against finite differences, those that the forward pass reads first."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest

import iodine_tetris as iodine
from common.errors import Fail
from common.gradcheck import coordinates, directional
from common.params import Params, fitting
from test_gradcheck import BOUND, EPS, pullback_error
from viz import slots
from viz.style import rgb, step_colour

SMALL = {"canvas": 9, "slots": 3, "iterations": 2, "latents": 4, "rank": 3, "decoder_units": 6,
         "patch": 4, "features": 3, "layers": 2, "kernel": 3, "refine_features": 4, "units": 5}
ONES = [1.0] * 4
GOLDEN = 3283.6099                                      # the first loss of seed 0
SETTINGS = {
    "default": {},
    "leaky, lstm, deeper": {"activation": "leaky", "lstm": True, "decoder_layers": 3},
    "broadcast, logistic, average": {"decoder": "broadcast", "components": "logistic",
                                     "pool": "average"},
    "patch": {"decoder": "patch", "decoder_layers": 2},
    "patch, round": {"decoder": "patch", "masks": "round"},
    "composite": {"components": "composite"},
}
settings = pytest.mark.parametrize("name", SETTINGS)
backprops = pytest.mark.parametrize("backprop", ["steps", "all"])


def setting(batch=2, seed=3, **changes):
    """A small model in float64 with weights large enough to matter, its scenes and noise."""
    cfg, rng = iodine.Config(**{**SMALL, **changes}), np.random.default_rng(seed)
    p = Params(iodine.init(cfg, seed), np.float64)
    p.flat[...] += 0.1 * rng.standard_normal(p.flat.size)
    x = rng.random((batch, iodine.channels(cfg), cfg.canvas, cfg.canvas))
    noise = iodine.draw_noise(cfg, batch, cfg.iterations, seed, 0).astype(float)
    weights = SimpleNamespace(sigma=0.6, iterations=[0.3, 0.6, 1.0])
    return cfg, p, x, noise, weights


def replayed(monkeypatch, name, run, freeze=lambda result: result):
    """From now on the function `name` returns what it did in `run`, call for call."""
    seen, original = [], getattr(iodine, name)
    monkeypatch.setattr(iodine, name, lambda *a: seen.append(freeze(original(*a))) or seen[-1])
    run()
    again = itertools.cycle(seen)
    monkeypatch.setattr(iodine, name, lambda *a: next(again))


# ---------------------------------------------------------------- the gradients that are read

@settings
def test_the_slopes_that_the_forward_pass_reads(name):
    """dL/dlambda, dL/dmu and dL/dl of each scene's bound, coordinate by coordinate."""
    cfg, p, x, noise, weights = setting(**SETTINGS[name])
    lam = 0.5 * np.random.default_rng(0).standard_normal((noise.shape[1], 2 * cfg.latents))

    def L():
        return iodine.bound(p, cfg, x, lam, noise[0], weights.sigma)[0].bound.sum()

    g = p.grads()
    found, _ = iodine.look(p, cfg, x, lam, noise[0], weights.sigma, 0.3, g)
    g.flush()
    assert coordinates(L, lam, found.dlam, EPS) < BOUND
    y = found.y.reshape(len(x), cfg.slots, *found.y.shape[1:])
    mixture = iodine.mixture

    def log_p():
        return mixture(x, y, weights.sigma, cfg.components).log_p.sum()

    assert coordinates(log_p, y, found.slope.reshape(y.shape), EPS) < BOUND


@settings
def test_what_looking_leaves_for_the_decoder(name, rng):
    cfg, p, x, noise, weights = setting(**SETTINGS[name])
    lam = 0.5 * rng.standard_normal((noise.shape[1], 2 * cfg.latents))
    g = p.grads()
    found, _ = iodine.look(p, cfg, x, lam, noise[0], weights.sigma, 0.3, g)
    g.flush()
    for key in p:
        if key.startswith("decode"):
            error = directional(lambda: iodine.bound(p, cfg, x, lam, noise[0], weights.sigma)[0]
                                .bound.sum(), p[key], g[key] / 0.3, rng, EPS)
            assert error < BOUND, (key, error)
        else:
            assert not g[key].any()


# ---------------------------------------------------------------- the whole loss

@backprops
@settings
def test_objective_gradients(name, backprop, monkeypatch, rng):
    """All weights, with the stopped quantities held at their values."""
    cfg, p, x, noise, weights = setting(backprop=backprop, **SETTINGS[name])
    g = p.grads()
    _, back = iodine.objective(p, cfg, x, noise, weights)
    back(g)
    if backprop == "all":
        replayed(monkeypatch, "facts", lambda: iodine.objective(p, cfg, x, noise, weights))
    else:
        refine, lams = iodine.refine, []
        monkeypatch.setattr(iodine, "refine", lambda *a: lams.append(a[4]) or refine(*a))
        replayed(monkeypatch, "inputs", lambda: iodine.objective(p, cfg, x, noise, weights))
        again = itertools.cycle(lams)
        monkeypatch.setattr(iodine, "refine", lambda *a: refine(*a[:4], next(again), *a[5:]))
    for key in p:
        assert g[key].any(), key
        error = directional(lambda: iodine.objective(p, cfg, x, noise, weights)[0], p[key], g[key],
                            rng, EPS)
        assert error < BOUND, (key, error)


def test_geco_weighs_the_likelihood_until_it_is_enough():
    """v log p counts in L and in its slopes; log v grows where the error is above what is asked."""
    cfg, p, x, noise, weights = setting()
    _, back = iodine.objective(p, cfg, x, noise, weights)
    plain = p.grads()
    back(plain)
    for geco, v in ((1e-9, 1.0), (1e9, 1.0), (1e-9, 2.0)):
        free = replace(cfg, geco=geco)
        q = Params(dict(p) | {"geco.b": np.log([v])}, np.float64)
        g = q.grads()
        traces, back = iodine.unroll(q, free, x, noise, weights.sigma, weights.iterations)
        back(g)
        np.testing.assert_allclose(traces[0].bound, traces[0].kl - v * traces[0].log_p)
        np.testing.assert_allclose(traces[0].slope, v * traces[0].pixels.slope.reshape(
            traces[0].slope.shape))
        if geco < 1:
            perfect = -np.log(0.6 * (2 * np.pi)**0.5) * x[0].size
            assert g["geco.b"] == pytest.approx(traces[-1].log_p.mean() - perfect)
        assert (g["geco.b"] > 0) == (geco > 1)
        if v == 1:
            np.testing.assert_allclose(g.flat[:-1], len(x) * plain.flat)


def test_both_ways_back_agree_where_nothing_is_read_twice(rng):
    """With one refinement and a first decode that hardly counts: refine's weights do not differ."""
    grads = {}
    for backprop in ("steps", "all"):
        cfg, p, x, noise, weights = setting(backprop=backprop, iterations=1)
        weights.iterations = [1e-9, 1.0]
        grads[backprop] = p.grads()
        iodine.objective(p, cfg, x, noise, weights)[1](grads[backprop])
    for key in grads["all"]:
        same = np.allclose(grads["all"][key], grads["steps"][key], rtol=1e-6, atol=1e-6)
        assert same == key.startswith("refine"), key


# ---------------------------------------------------------------- the pieces

@pytest.mark.parametrize(("decoder", "masks"), [*((d, "free") for d in iodine.DECODERS),
                                                ("patch", "round")])
def test_decoder_gradients(decoder, masks, rng):
    cfg, p, _, _, _ = setting(decoder=decoder, masks=masks)
    z = rng.standard_normal((3, cfg.latents))
    own = Params({key: a for key, a in p.items() if key.startswith("decode")}, np.float64)
    assert pullback_error(lambda z: iodine.DECODERS[decoder](own, cfg, z), [z], own) < BOUND


@pytest.mark.parametrize("components", ["gaussian", "logistic"])
def test_input_gradients(components, monkeypatch, rng):
    """Means, logits, masks and posteriors are differentiated; what bears an LN is not."""
    cfg, p, x, noise, weights = setting(components=components)
    y = rng.standard_normal((2 * cfg.slots, 4, cfg.canvas, cfg.canvas))

    def found_of(y):
        pixels = iodine.mixture(x, y.reshape(2, cfg.slots, *y.shape[1:]), 0.6, components)
        return SimpleNamespace(y=y, pixels=pixels, slope=pixels.slope.reshape(y.shape), sigma=0.6,
                               dlam=np.ones((2 * cfg.slots, 2 * cfg.latents)))

    def maps(y):
        maps, _, back = iodine.inputs(cfg, x, found_of(y))
        return maps, back

    replayed(monkeypatch, "facts", lambda: maps(y))
    assert pullback_error(maps, [y]) < BOUND


def test_facts_are_normalised_slot_by_slot(rng):
    cfg, p, x, noise, weights = setting()
    traces, _ = iodine.unroll(p, cfg, x, noise, weights.sigma, ONES)
    images, dlam = iodine.facts(x, traces[0])
    for part in (images[:, :3], images[:, 3], images[:, 4], images[:, 5], dlam):
        part = part.reshape(len(part), -1)
        np.testing.assert_allclose(part.mean(1), 0, atol=1e-9)
        np.testing.assert_allclose(part.std(1), 1, rtol=1e-2)


def test_slots_differ_only_by_their_noise():
    """Without noise all slots stay one; permuted noise permutes slots."""
    cfg, p, x, noise, weights = setting(iterations=3)
    traces, _ = iodine.unroll(p, cfg, x, 0 * noise, weights.sigma, ONES)
    masks = traces[-1].pixels.mask
    np.testing.assert_allclose(masks, 1 / cfg.slots, rtol=1e-9)
    order = np.array([2, 0, 1])
    by_slot = noise.reshape(len(noise), 2, cfg.slots, -1)
    one = iodine.unroll(p, cfg, x, noise, weights.sigma, ONES)[0][-1].pixels.mask
    permuted = by_slot[:, :, order].reshape(noise.shape)
    two = iodine.unroll(p, cfg, x, permuted, weights.sigma, ONES)[0]
    np.testing.assert_allclose(two[-1].pixels.mask, one[:, order], rtol=1e-9, atol=1e-12)
    assert np.abs(one - 1 / cfg.slots).max() > 0.01


def test_scenes_do_not_see_each_other():
    cfg, p, x, noise, weights = setting()
    together = iodine.unroll(p, cfg, x, noise, weights.sigma, ONES)[0][-1].bound
    alone = iodine.unroll(p, cfg, x[1:], noise[:, cfg.slots:], weights.sigma, ONES)[0][-1].bound
    np.testing.assert_allclose(together[1:], alone, rtol=1e-10)


@pytest.mark.parametrize("name", iodine.INPUTS)
def test_an_input_is_left_unread(name):
    """The weights that `--without` zeroes are those that meet this input, and no others."""
    cfg, p, x, noise, weights = setting()
    found, _ = iodine.look(p, cfg, x, noise[0, :, :1] + np.zeros(8), noise[0], 0.6, 1.0, p.grads())
    maps, dlam, _ = iodine.inputs(cfg, x, found)
    C, N, images = 3, len(maps), iodine.facts(x, found)[0]
    own = {"means": found.y[:, :C], "logits": found.y[:, C:], "mask": found.pixels.mask,
           "mask-posterior": found.pixels.posterior, "means-gradient": images[:, :C],
           "logits-gradient": images[:, C:C + 1], "likelihood": images[:, C + 1:C + 2],
           "leave-one-out": images[:, C + 2:]}
    zeroed = {key: ~a.any((0, 2, 3)) if a.ndim == 4 else ~a.any(1)
              for key, a in iodine.unread(replace(cfg, without=(name,)), p).items()
              if key.endswith(".W")}
    Z, still = cfg.latents, zeroed["refine.image.W"]
    np.testing.assert_array_equal(still, [name == "image"] * C + [name == "coordinates"] * 9)
    for layer in ("refine.mix.W", "refine.step.W"):
        rest = len(zeroed[layer]) - 4 * Z
        np.testing.assert_array_equal(zeroed[layer], [False] * rest + [name == "posterior"] * 2 * Z
                                      + [name == "posterior-gradient"] * 2 * Z)
    if name in own:
        np.testing.assert_array_equal(maps[:, zeroed["refine.maps.W"]],
                                      own[name].reshape(N, -1, 9, 9))
    else:
        assert not zeroed["refine.maps.W"].any()


# ---------------------------------------------------------------- schedules, noise, scenes

def test_sigma_holds_then_falls_and_stays():
    cfg = iodine.Config(steps=100, sigma_first=0.5, sigma=0.2, sigma_from=0.4, sigma_to=0.8)
    sigmas = [iodine.schedule(cfg, step).sigma for step in (0, 40, 60, 80, 99)]
    np.testing.assert_allclose(sigmas, [0.5, 0.5, 0.1**0.5, 0.2, 0.2])
    assert iodine.schedule(cfg, 0).iterations[-1] == 1


def test_processes_share_one_batch_of_noise():
    cfg = iodine.Config(**SMALL)
    whole = iodine.draw_noise(cfg, 4, 2, 0, 7)
    parts = [iodine.draw_noise(cfg, 4, 2, 0, 7, start, 2) for start in (0, 2)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)
    assert not np.array_equal(whole, iodine.draw_noise(cfg, 4, 2, 0, 8))


@pytest.mark.parametrize(("data", "canvas", "shape"), [
    ("tetris", 35, (2, 3, 35, 35)), ("shapes", 28, (2, 1, 28, 28)),
    ("dsprites", 32, (2, 3, 32, 32)), ("binary", 32, (2, 1, 32, 32))])
def test_scenes_fit_the_model(data, canvas, shape):
    cfg = iodine.Config(data=data, canvas=canvas, **{k: v for k, v in SMALL.items()
                                                     if k != "canvas"})
    (images, masks), = iodine.stream(cfg, 0, 2)
    assert images.shape == shape and masks.shape == (2, *shape[2:])
    found = iodine.score(Params(iodine.init(cfg, 0)), cfg, [(images, masks)])
    assert all(len(v) == cfg.test_iterations + 1 and np.isfinite(v).all() for v in found.values())


def test_of_several_readings_each_scene_keeps_the_best():
    cfg = iodine.Config(**{**SMALL, "canvas": 35}, test_iterations=2)
    p, images = Params(iodine.init(cfg, 0)), iodine.draw_scenes(cfg, 0, 0, 6).images
    single = [iodine.read_once(p, cfg, images, 0, n) for n in range(3)]
    kept = iodine.infer_scenes(p, replace(cfg, readings=3), images)
    best = np.argmax([guess.elbo[-1] for guess in single], 0)
    assert len(set(best)) > 1                           # or nothing would be chosen here
    for b, n in enumerate(best):
        for name, values in vars(kept).items():
            np.testing.assert_array_equal(values[:, b], getattr(single[n], name)[:, b])


def test_readings_grow_calm():
    cfg = iodine.Config(**{**SMALL, "canvas": 35}, test_iterations=8, noise=(0.7, 0.2))
    np.testing.assert_allclose(iodine.calm(cfg).ravel(), [0.7] * 6 + [0.2] * 3)
    p, images = Params(iodine.init(cfg, 0)), iodine.draw_scenes(cfg, 0, 0, 2).images
    differs = {noise: [not np.array_equal(a, b) for a, b in zip(
        *(iodine.read_once(p, replace(cfg, noise=noise), images, 0, n).recon for n in range(2)),
        strict=True)] for noise in ((0.7, 0.0), (0.0, 0.7), (0.0, 0.0))}
    assert differs == {(0.7, 0.0): [True] * 9, (0.0, 0.7): [False] * 6 + [True] * 3,
                       (0.0, 0.0): [False] * 9}


def test_a_median_ground_counts_as_black():
    """A scene on grey is found as on black, and drawn on its grey."""
    cfg = iodine.Config(**{**SMALL, "canvas": 35}, test_iterations=2, ground="median")
    p, images = Params(iodine.init(cfg, 0)), iodine.draw_scenes(cfg, 0, 0, 2).images
    black, grey = (iodine.infer_scenes(p, cfg, a) for a in (images, images + np.float32(0.25)))
    np.testing.assert_allclose(grey.masks, black.masks, atol=1e-4)
    np.testing.assert_allclose(grey.recon, black.recon + 0.25, atol=1e-4)
    np.testing.assert_allclose(iodine.ground(cfg, images + np.float32(0.25)), 0.25)
    assert not iodine.ground(replace(cfg, ground="black"), images + 1).any()


def test_objects_are_told_from_the_ground():
    owners = np.full((6, 8), 2)
    owners[1:3, 2:5] = 0
    owners[4, 6] = 1
    found = iodine.objects(owners, 4, lambda box: [2 * float(v) for v in box])
    assert found == [{"slot": 0, "box": [4, 2, 10, 6], "area": 24},
                     {"slot": 1, "box": [12, 8, 14, 10], "area": 4}]


# ---------------------------------------------------------------- training, and the four verbs

TINY = """--latents 4 --rank 3 --decoder-units 6 --refine-features 4 --units 5 --batch-size 2
          --iterations 2 --test-iterations 2 --eval-every 2 --eval-scenes 2
          --test-scenes 2""".split()
FIGURES = {"slots.png", "negotiation.gif", "iterations.png", "counts.png", "curves.png"}


@pytest.fixture
def shell(capsys, monkeypatch):
    """The script's main in this process: status, stdout, stderr."""
    monkeypatch.setattr(iodine, "LONG", 2)
    monkeypatch.setattr(iodine, "COMPARED", 2)

    def call(*words):
        status = 0
        try:
            iodine.cli.main(iodine.__doc__, iodine.Config, iodine.PRESETS, train=iodine.train,
                            evaluate=iodine.evaluate, infer=iodine.infer, figures=iodine.figures,
                            adjustable=iodine.ADJUSTABLE, argv=[*map(str, words)])
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return call


def test_the_four_verbs(shell, tmp_path):
    run = tmp_path / "run"
    status, out, _ = shell(*TINY, "--steps", 4, "--out", run)
    last = json.loads(out.splitlines()[-1])
    assert status == 0 and {"ari_foreground", "mse", "elbo", "kl"} <= last.keys()
    assert {path.name for path in run.iterdir()} >= FIGURES
    weights = ["--weights", run / "weights.npz"]
    scenes = iodine.draw_scenes(iodine.Config(), iodine.TEST, 0, 2)
    images = (np.moveaxis(scenes.images, 1, 3) * 255).astype(np.uint8)
    np.savez(tmp_path / "scenes.npz", images=images, masks=scenes.masks)
    status, out, _ = shell("evaluate", "--scenes", tmp_path / "scenes.npz", *weights)
    there = json.loads(out)
    assert status == 0
    for name in ("ari_foreground", "mse", "elbo"):      # the same scenes, from a file
        assert there[name] == pytest.approx(last[name], rel=1e-2, abs=1e-2)
    imageio.imwrite(tmp_path / "picture.png", images[0])
    status, out, _ = shell("infer", tmp_path / "picture.png", "--slots", 5, "--out",
                           tmp_path / "found", *weights)
    picture, = json.loads(out)["pictures"]
    assert status == 0 and Path(picture["overlay"]).stat().st_size > 1000
    assert all({"slot", "box", "area"} == found.keys() for found in picture["objects"])


def test_what_is_not_read_stays_so(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(iodine, "figures", lambda *a: None)
    words = "--without", "image", "posterior-gradient"
    assert shell(*TINY, "--steps", 3, "--out", tmp_path / "run", *words)[0] == 0
    cfg, p = iodine.load_run(tmp_path / "run")
    assert not p["refine.image.W"][:, :3].any() and p["refine.image.W"][:, 3:].any()
    assert not p["refine.step.W"][-8:].any() and p["refine.step.W"][:-8].any()


def test_resuming_is_exact(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(iodine, "figures", lambda *a: None)
    words = [*TINY, "--steps", 6, "--save-every", 3]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    shell(*words, "--out", whole)
    shell(*words, "--out", halved)
    (halved / "checkpoint.npz").unlink()                # the one before it is of step 3
    (halved / "weights.npz").unlink()
    status, _, err = shell(*words, "--out", halved, "--resume")
    assert status == 0 and "continuing at step 3" in err
    with np.load(whole / "weights.npz") as a, np.load(halved / "weights.npz") as b:
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


def test_first_losses_stay_what_they_were():
    cfg = iodine.Config(**{k: v for k, v in SMALL.items() if k != "canvas"})
    p = Params(iodine.init(cfg, 0))
    images = iodine.draw_scenes(cfg, 0, 0, 2).images
    loss, _ = iodine.objective(p, cfg, images, iodine.draw_noise(cfg, 2, 2, 0, 0),
                               iodine.schedule(cfg, 0))
    assert float(loss) == pytest.approx(GOLDEN, rel=1e-4)


SIDE = np.zeros((2, 35, 35, 3), np.uint8), np.zeros((2, 35, 35), np.int64)


@pytest.mark.parametrize(("change", "words"), [
    ({"images": SIDE[0][..., :1]}, "expected (N, 35, 35, 3)"),
    ({"images": SIDE[0][:, :34]}, "expected (N, 35, 35, 3)"),
    ({"masks": SIDE[1][:1]}, "with N = 2"),
    ({"masks": SIDE[1] + 0.5}, "whole numbers"),
    ({"masks": SIDE[1] - 2}, "whole numbers"),
    ({"images": SIDE[0] + 2.0}, "expected 0 to 1"),
])
def test_bad_scene_files(tmp_path, change, words):
    np.savez(tmp_path / "s.npz", **{"images": SIDE[0], "masks": SIDE[1]} | change)
    with pytest.raises(Fail, match=re.escape(words)):
        list(iodine.file_parts(iodine.Config(), tmp_path / "s.npz"))


@pytest.mark.parametrize(("words", "complaint"), [
    (["--slots", "1"], "1 is below 2"),
    (["--iterations", "0"], "0 is below 1"),
    (["--canvas", "40"], "--data tetris is drawn on --canvas 35"),
    (["--sigma-from", "0.9", "--sigma-to", "0.1"], "--sigma-from"),
    (["--data", "dsprites", "--canvas", "64", "--objects", "4", "16"], "above 15"),
])
def test_impossible_configs(shell, tmp_path, words, complaint):
    status, _, err = shell(*TINY, "--out", tmp_path / "run", *words)
    assert status == 2 and complaint in err and err.count("\n") <= 2


def test_weights_of_another_model_are_refused(tmp_path):
    cfg = iodine.Config(**SMALL)
    with pytest.raises(Fail, match="do not fit"):
        fitting(iodine.init(cfg, 0), iodine.init(replace(cfg, latents=5), 0))


# ---------------------------------------------------------------- figures

def sure_slots(T=3, B=2, K=4, H=6, W=8):
    """Every pixel of column j belongs to slot j modulo K; slot k is as bright as k / K."""
    masks = np.zeros((T, B, K, H, W))
    for j in range(W):
        masks[:, :, j % K, :, j] = 1
    means = np.broadcast_to(np.arange(K)[:, None, None, None] / K, (T, B, K, 3, H, W))
    return np.zeros((B, 3, H, W)), np.zeros((T, B, 3, H, W)), masks, means


def test_slots_keep_their_colours():
    _, _, masks, means = sure_slots()
    owners = slots.segmentation(masks[0])
    for j in range(8):
        np.testing.assert_allclose(owners[0, :, 2, j], rgb(step_colour(j % 4)))
    parts = slots.masked(masks[0], means[0])
    np.testing.assert_allclose(parts[1, 2, :, 0, 2], 0.5)           # its own pixel
    np.testing.assert_allclose(parts[1, 2, :, 0, 3], slots.PAPER)   # another's


def test_the_negotiation_has_a_frame_for_each_refinement(tmp_path):
    slots.negotiation(tmp_path / "n.gif", *sure_slots(T=3))
    assert imageio.imread(tmp_path / "n.gif", index=None).shape[0] == 3
    with pytest.raises(Fail, match="no frames"):
        slots.negotiation(tmp_path / "n.gif", *sure_slots(T=0))
