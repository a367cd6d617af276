"""Factored depths: every gradient against finite differences, the promises of depth and scores."""

import json
from dataclasses import replace
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest

import depth_scene as depth
from common.errors import Fail
from common.gradcheck import directional
from common.ops import tanh
from common.params import Params
from common.run import Run
from test_gradcheck import BOUND, EPS, pullback_error

SMALL = {"canvas": 32, "patch": 9, "crop": 8, "what": 3, "trunk": (2, 3), "encoder": (3, 2),
         "units": 5, "decoder": (4, 6)}
PAPER = {"formulation": "paper", "patch": 16, "unet": (4, 4, 8), "maps": (3, 4, 4, 3),
         "stages": (4, 4, 4, 8, 4, 4)}
TURNS = {"formulation": "turns", "data": "sprites", "colours": "shaded", "reach": 0.5, "nudge": 0.3,
         "looks": 2}
WEIGHTS = SimpleNamespace(std=0.3, gamma=0.7)


def setting(batch=2, seed=3, **changes):
    """A small model in float64, scenes and noise."""
    cfg, rng = depth.Config(**{**SMALL, **changes}), np.random.default_rng(seed)
    p = Params(depth.init(cfg, seed), np.float64)
    p.flat[...] += 0.2 * rng.standard_normal(p.flat.size)
    x = depth.draw_scenes(cfg, seed, 0, batch).images.astype(float)
    noise = vars(depth.draw_noise(cfg, batch, seed, 0))
    noise = SimpleNamespace(**{name: a.astype(float) for name, a in noise.items()})
    return cfg, p, x, noise


# ---------------------------------------------------------------- every gradient

def check_objective(p, cfg, x, noise, weights, rng):
    g = p.grads()
    _, _, back = depth.objective(p, cfg, x, noise, weights)
    back(g)
    for name in p:
        if depth.is_prior(name):
            continue                                        # it is trained later
        if name == "logits.b":                              # a softmax does not see it
            assert np.abs(g[name]).max() < 1e-10
            continue
        assert g[name].any(), name
        eps = EPS / 10 if name.startswith("far") else EPS   # five normalisations curve more
        errors = [directional(lambda: depth.objective(p, cfg, x, noise, weights)[0], p[name],
                              g[name], rng, eps) for _ in range(2)]
        assert min(errors) < BOUND, (name, errors)          # one way may be nearly level


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_objective_gradients(objects, rng):
    cfg, p, x, noise = setting(objects=objects)
    check_objective(p, cfg, x, noise, WEIGHTS, rng)


@pytest.mark.parametrize("colours", ["flat", "shaded"])
@pytest.mark.parametrize("objects", [2, 3])
def test_turns_objective_gradients(objects, colours, rng, monkeypatch):
    """Where to look is chosen among cells, and a choice has no gradient."""
    monkeypatch.setattr(depth, "relu", tanh)
    cfg, p, x, noise = setting(**{**TURNS, "objects": objects, "colours": colours})
    x = np.random.default_rng(9).random(x.shape)
    check_objective(p, cfg, x, noise, SimpleNamespace(std=1.0, gamma=0.7), rng)


def test_paper_objective_gradients(rng, monkeypatch):
    """Without the kinks of ReLU (the twin keeps them), and with maps that are nowhere faint."""
    monkeypatch.setattr(depth, "relu", tanh)
    cfg, p, x, noise = setting(seed=5, temperature=3.0, **PAPER)
    x = np.random.default_rng(9).random(x.shape)
    check_objective(p, cfg, x, noise, SimpleNamespace(std=1.0, gamma=0.7), rng)


def test_attend_gradients():
    cfg, p, x, _ = setting()
    p = Params({k: v for k, v in p.items() if k.startswith(("trunk", "look", "where"))},
               np.float64)

    def attend():
        where, tint, back = depth.attend(p, cfg, x)
        return where, tint, lambda dwhere, dtint, g: back(dwhere, dtint, g) or ()

    assert pullback_error(attend, [], p) < BOUND


def test_inspect_gradients(rng):
    cfg, p, x, _ = setting()
    p = Params({k: v for k, v in p.items() if k.startswith(("crop", "read", "head"))}, np.float64)
    where, tint = 0.2 * rng.standard_normal((2, 2, 2)), rng.random((2, 2, 3))

    def inspect(where, tint):
        *outputs, back = depth.inspect(p, cfg, x, where, tint)
        return *outputs, back

    assert pullback_error(inspect, [where, tint], p) < BOUND


def test_draw_gradients(rng):
    cfg, p, _, _ = setting()
    p = Params({k: v for k, v in p.items() if k.startswith(("draw", "colour", "alpha"))},
               np.float64)
    assert pullback_error(lambda z: depth.draw(p, cfg, z), [rng.standard_normal((3, 3))], p) < BOUND


def test_paper_piece_gradients(rng):
    alpha, depths = rng.random((2, 3, 4, 4)), rng.standard_normal((2, 3))
    assert pullback_error(lambda a, d: depth.soft_depths(a, d, 0.7), [alpha, depths]) < BOUND
    assert pullback_error(lambda q: depth.uneven(q, 2), [rng.random((2, 3, 16))]) < BOUND
    uniform = rng.random((2, 3, 16))
    assert pullback_error(lambda u: depth.positions(u, uniform, 0.3),
                          [rng.standard_normal((2, 3, 16))]) < BOUND


def test_scene_prior_gradients(rng):
    cfg = depth.Config(**SMALL)
    p = Params({k: a for k, a in depth.init(cfg, 0).items() if depth.is_prior(k)}, np.float64)
    v, eps, g = rng.standard_normal((3, 2 * (2 + 4))), rng.standard_normal((3, 16)), p.grads()
    _, back = depth.scene_prior(p, cfg, v, eps)
    back(g)
    for name in sorted(set(p) - {"prior.mean", "prior.std"}):
        error = directional(lambda: depth.scene_prior(p, cfg, v, eps)[0], p[name], g[name], rng,
                            EPS)
        assert g[name].any() and error < BOUND, (name, error)


@pytest.mark.parametrize("changes", [{}, TURNS, PAPER], ids=["fast", "turns", "paper"])
def test_scenes_are_imagined_within_the_picture(changes, rng):
    cfg = depth.Config(**{**SMALL, **changes})
    p = Params(depth.init(cfg, 0))
    pictures = depth.compose(depth.imagine(p, cfg, 5, rng))
    assert pictures.shape == (5, 3, 32, 32) and pictures.min() >= 0 and pictures.max() <= 1


@pytest.mark.parametrize("changes", [{}, TURNS], ids=["fast", "turns"])
def test_a_second_look_is_never_worse_and_changes_no_weight(changes, rng):
    cfg, p, x, _ = setting(std=0.3, kl_weight=0.1, **changes)
    before, weights = p.flat.copy(), depth.schedule(cfg, cfg.steps)
    first = depth.infer_scenes(p, cfg, x)

    def loss(found):
        v = Params({name: getattr(found, name) for name in ("where", "z", "depth")}, np.float64)
        return depth.reconsider(p, cfg, x, v, first.background, weights)[0]

    found = [depth.infer_scenes(p, replace(cfg, refine=n), x) for n in (5, 20)]
    assert loss(found[1]) < loss(found[0]) < loss(first)
    np.testing.assert_array_equal(p.flat, before)


def test_second_look_gradients(rng):
    cfg, p, x, _ = setting(**TURNS)
    found = depth.infer_scenes(p, cfg, x)
    v = Params({name: getattr(found, name) for name in ("where", "z", "depth")}, np.float64)
    weights, g = SimpleNamespace(std=0.3, gamma=0.7), v.grads()
    _, _, back = depth.reconsider(p, cfg, x, v, found.background, weights)
    back(g, p.grads())
    for name in v:
        error = directional(lambda: depth.reconsider(p, cfg, x, v, found.background, weights)[0],
                            v[name], g[name], rng, EPS)
        assert error < BOUND, (name, error)


def test_no_code_of_a_scene_throws_objects_away(rng):
    """Codes that no scene has get Gaussians hardly wider than that of all scenes."""
    cfg = depth.Config(**SMALL)
    p = Params(depth.init(cfg, 0))
    p["prior.where.3.b"][...] = 99
    log_std = depth.normal(p, "prior.where", np.full((2, 8), 20, np.float32))[1]
    assert log_std.shape == (2, 4) and (log_std == 0.5).all()


def test_priors_differ_in_what_they_know(rng):
    """With one value for every latent that was seen, only `none` draws anything else."""
    cfg = depth.Config(**SMALL)
    p = Params(depth.init(cfg, 0))
    p["prior.mean"][...], p["prior.std"][...] = 0.25, 0
    for prior in ("scene", "independent"):
        v = depth.latents_of_scenes(p, replace(cfg, prior=prior), 50, rng)
        np.testing.assert_array_equal(v, np.full((50, 2 * (2 + 4)), 0.25))
    p["prior.std"][...] = 2
    v = depth.latents_of_scenes(p, replace(cfg, prior="independent"), 5000, rng)
    np.testing.assert_allclose(np.cov(v.T), 4 * np.eye(12), atol=0.4)
    anywhere = depth.imagine(p, replace(cfg, prior="none"), 500, rng)
    assert anywhere.alpha[:, :, :4].max() > 0.1 and anywhere.alpha.shape == (500, 2, 32, 32)


def test_generated_scenes_are_compared(monkeypatch):
    """A model that draws fresh scenes is as near to them as they are to each other."""
    cfg = depth.Config(generated=60)

    def fresh(p, cfg, count, rng):
        s = depth.draw_scenes(cfg, 9, 0, count)
        colour = s.colours[..., None, None]
        return SimpleNamespace(alpha=s.amodal.astype(np.float32), colour=colour, depth=s.order,
                               background=np.zeros((count, 3, 1, 1), np.float32))

    monkeypatch.setattr(depth, "imagine", fresh)
    told = depth.generation(None, cfg)
    assert told["frechet"] < 2 * told["frechet_floor"]
    assert told["frechet_object"] < 2 * told["frechet_floor"]
    monkeypatch.setattr(depth, "compose", lambda found: np.zeros((60, 3, 64, 64), np.float32))
    assert depth.generation(None, cfg)["frechet"] > 3 * told["frechet"]


def test_what_is_inferred_is_what_is_rendered(rng):
    """The generative model alone, given the latents of a scene, paints its reconstruction."""
    for changes in ({}, TURNS, PAPER):
        cfg = depth.Config(**{**SMALL, **changes})
        p = Params(depth.init(cfg, 0))
        found = depth.infer_scenes(p, cfg, rng.random((3, 3, 32, 32), np.float32))
        again = depth.render(p, cfg, found.where, found.z, found.depth)
        np.testing.assert_allclose(again.alpha, found.alpha, atol=1e-5)
        np.testing.assert_allclose(np.broadcast_to(again.colour, found.colour.shape),
                                   found.colour, atol=1e-5)


def test_piece_gradients(rng):
    a = rng.standard_normal((2, 3, 4))
    crop, tint = rng.random((2, 3, 3, 4, 4)), rng.random((2, 3, 3))
    assert pullback_error(depth.softmax, [a]) < BOUND
    assert pullback_error(depth.likeness, [crop, tint]) < BOUND
    for J in (1, 2, 3, 4):
        depths = rng.standard_normal((2, J))
        assert pullback_error(lambda d: depth.order_posterior(d, 0.7), [depths]) < BOUND


# ---------------------------------------------------------------- where to look next

def test_looks_at_what_is_unexplained(rng):
    """Where most is unlike the background, or by chance as often; never at what is taken."""
    x, background = np.zeros((500, 3, 32, 32)), np.zeros((500, 3, 32, 32))
    left = np.ones((500, 1, 32, 32))
    x[:, :, 4, 6], x[:, 1, 20:22, 30], x[:, 1, 20, 31] = 0.8, 0.9, 0.9  # 1 and 3 pixels of 4
    unlike = 1 - depth.alike(x, background)[0]
    where, tint = depth.unexplained(x, unlike, None, 1.0)
    np.testing.assert_allclose(where, [[15.5 / 8 - 1, 10.5 / 8 - 1]] * 500)
    np.testing.assert_allclose(tint, [[0, 0.675, 0]] * 500)
    left[:, :, 20:22] = 0
    _, tint = depth.unexplained(x, left * unlike, None, 1.0)
    np.testing.assert_allclose(tint, [[0.2, 0.2, 0.2]] * 500)
    uniform = rng.random((500, depth.A**2))
    for sharp, share in ((1.0, 0.75), (2.0, 0.9)):
        _, tint = depth.unexplained(x, unlike, uniform, sharp)
        assert abs((tint[:, 0] == 0).mean() - share) < 0.06


# ---------------------------------------------------------------- who is in front

def test_order_posterior_is_a_distribution_and_sharpens(rng):
    for J in (1, 2, 3, 4):
        depths = rng.standard_normal((5, J))
        for gamma in (50.0, 1.0, 1e-3):
            log_q, _ = depth.order_posterior(depths, gamma)
            np.testing.assert_allclose(np.exp(log_q).sum(1), 1)
        orders = depth.depth_orders(J)                      # gamma is 1e-3: the depths decide
        np.testing.assert_array_equal(orders[log_q.argmax(1)], depths.argsort(1))
        assert np.exp(log_q).max(1).min() > 0.9
    log_q, _ = depth.order_posterior(depths[:, :2], 0.5)    # two objects: a logistic choice
    want = 1 / (1 + np.exp((depths[:, 0] - depths[:, 1]) / 0.5))
    np.testing.assert_allclose(np.exp(log_q[:, 0]), want)


def pairs(rng, B=3, N=8):
    return SimpleNamespace(alpha=rng.random((B, 2, N, N)), colour=rng.random((B, 2, 3, 1, 1)),
                           depth=rng.standard_normal((B, 2)), background=np.zeros((B, 3, N, N)))


def test_painting_in_the_order_of_depths_is_what_training_becomes(rng):
    """As gamma goes to 0 the expected error is that of the hard picture."""
    found, x = pairs(rng), rng.random((3, 3, 8, 8))
    hard = ((depth.compose(found) - x) ** 2).sum((1, 2, 3))
    errors, _ = depth.order_errors(x, found.alpha, found.colour,
                                   found.background, depth.depth_orders(2))
    soft = [(np.exp(depth.order_posterior(found.depth, gamma)[0]) * errors).sum(1)
            for gamma in (50, 1, 0.001)]
    away = [np.abs(s - hard).max() for s in soft]
    assert away[0] > away[1] > away[2] and away[2] < 1e-6


def test_soft_depths_sum_to_one_and_harden(rng):
    """As gamma goes to 0 the paper's soft order is painting from the farthest to the nearest."""
    found = pairs(rng)
    for gamma in (1.0, 1e-3):
        seen, _ = depth.soft_depths(found.alpha, found.depth, gamma)
        np.testing.assert_allclose(seen.sum(1), 1)
    colours = np.concatenate([found.colour, np.zeros((3, 1, 3, 1, 1))], 1)
    np.testing.assert_allclose((seen[:, :, None] * colours).sum(1), depth.compose(found), atol=1e-6)


def test_depths_swapped_swap_the_picture(rng):
    found = pairs(rng)
    a, b = found.alpha[:, 0, None], found.alpha[:, 1, None]
    first, second = found.colour[:, 0], found.colour[:, 1]
    found.depth = np.tile([0.0, 1.0], (3, 1))       # 0 is nearer
    np.testing.assert_allclose(depth.compose(found), a * first + (1 - a) * b * second)
    found.depth = found.depth[:, ::-1]
    np.testing.assert_allclose(depth.compose(found), b * second + (1 - b) * a * first)


def test_each_object_is_nearest_first_in_figures(rng):
    found = pairs(rng)
    found.order = np.array([[0, 1], [1, 0], [0, 1]])
    found.modal = found.alpha > 0.5
    layers, modal = depth.in_order(found)
    for b, (near, far) in enumerate([(0, 1), (1, 0), (0, 1)]):
        np.testing.assert_array_equal(layers[b, :, 3], found.alpha[b, [near, far]])
        np.testing.assert_array_equal(layers[b, 0, :3, 2, 5], found.colour[b, near, :, 0, 0])
        np.testing.assert_array_equal(modal[b], found.modal[b, [near, far]])


# ---------------------------------------------------------------- scores

def scene_file(tmp_path, n=3, **changes):
    s = depth.draw_scenes(depth.Config(**SMALL), 5, 0, n)
    arrays = {"images": np.moveaxis(s.images, 1, 3), "amodal": s.amodal, "order": s.order}
    path = tmp_path / "scenes.npz"
    np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return path


def test_the_truth_scores_one(monkeypatch, tmp_path):
    cfg = depth.Config(**SMALL)
    truth = depth.draw_scenes(cfg, 5, 0, 3)
    swapped = truth.order[:, ::-1]

    def know(p, cfg, images):
        return SimpleNamespace(amodal=truth.amodal[:, ::-1], recon=images, order=swapped,
                               modal=depth.visible_masks(truth.amodal, truth.order)[:, ::-1])

    monkeypatch.setattr(depth, "infer_scenes", know)
    rows = depth.score(None, cfg, [(truth.images, truth.amodal, truth.order)],
                       depth.OVERLAPS)["depth_by_overlap"]
    shared = (truth.amodal[:, 0] & truth.amodal[:, 1]).sum((1, 2))
    for overlap, right, right_modal, pairs in rows:
        assert right == right_modal == 1 and pairs == (shared >= overlap / 4).sum()
    metrics = depth.evaluate(cfg, depth.init(cfg, 0), scene_file(tmp_path))
    assert metrics == {"modal_iou": 1, "amodal_iou": 1, "depth_accuracy": 1,
                       "depth_accuracy_modal": 1, "mse": 0}
    swapped = truth.order
    assert depth.evaluate(cfg, depth.init(cfg, 0), scene_file(tmp_path))["depth_accuracy"] == 0


@pytest.mark.parametrize(("changes", "words"), [
    ({"order": None}, "no array 'order'"),
    ({"amodal": np.full((3, 2, 32, 32), 2)}, "must be booleans"),
    ({"order": np.full((3, 2), 0.5)}, "whole numbers"),
    ({"images": np.zeros((3, 32, 32))}, "expected"),
    ({"images": np.full((3, 32, 32, 3), 7.0)}, "expected 0 to 1"),
    ({"amodal": np.zeros((3, 7, 32, 32)), "order": np.zeros((3, 7))}, "at most 6"),
])
def test_bad_scene_files_are_told(changes, words, tmp_path):
    cfg = depth.Config(**SMALL)
    with pytest.raises(Fail, match=words):
        depth.evaluate(cfg, depth.init(cfg, 0), scene_file(tmp_path, **changes))


@pytest.mark.parametrize(("changes", "words"), [
    ({"crop": 8, "encoder": (4, 4, 4, 4)}, "too small"),
    ({"canvas": 32, "trunk": (4,) * 5}, "too often"),
    ({**PAPER, "patch": 20}, "cannot be halved"),
    ({**PAPER, "maps": (4, 4)}, "4"),
    ({**PAPER, "unet": (4,) * 6}, "6 levels"),
    ({**PAPER, "unet": (4, 6, 8)}, "multiples of 4"),
    ({**PAPER, "l1_cell": 7}, "does not divide"),
    ({**PAPER, "refine": 3}, "not for the paper"),
])
def test_impossible_configs_are_told(changes, words, tmp_path):
    cfg = depth.Config(**{**SMALL, **changes})
    with pytest.raises(Fail, match=words):
        depth.train(cfg, Run(tmp_path / "run", cfg, 0))


# ---------------------------------------------------------------- runs

TINY = {**SMALL, "steps": 4, "batch_size": 3, "eval_every": 2, "eval_scenes": 4, "test_scenes": 4,
        "scene_steps": 2}


def test_train_resume_infer(tmp_path, monkeypatch):
    """Stopped and resumed is the same bit for bit; figures are drawn; pictures are read."""
    cfg = depth.Config(**TINY)
    whole = depth.train(cfg, Run(tmp_path / "whole", cfg, 1))
    drawn = {f.name for f in (tmp_path / "whole").glob("*.*")}
    assert {"decomposition.png", "interpolations.png", "samples.png", "apart.gif",
            "curves.png"} <= drawn

    monkeypatch.setattr(depth, "figures", lambda *a: None)
    depth.train(cfg, Run(tmp_path / "parts", cfg, 1, save_every=2))
    (tmp_path / "parts" / "checkpoint.npz").unlink()        # now the newest is that of step 2
    again = depth.train(cfg, Run(tmp_path / "parts", cfg, 1, resume=True))
    assert again == whole
    weights = [(tmp_path / name / "weights.npz").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]

    picture = tmp_path / "picture.png"
    imageio.imwrite(picture, np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    cfg, p = depth.load_run(tmp_path / "whole")
    result = depth.infer(cfg, dict(p), [picture], tmp_path)
    found = json.loads(json.dumps(result))["pictures"][0]
    assert (tmp_path / "picture.png.objects.png").exists()
    for k, thing in enumerate(found["objects"]):
        assert thing["depth_rank"] == k and len(thing["position"]) == 2 and len(thing["box"]) == 4
        assert imageio.imread(thing["appearance"]).shape == (32, 32, 4)
