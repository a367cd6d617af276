"""The shape comments are true; and the checker that says so can say no."""

import importlib.util
import itertools
import os
import textwrap
from dataclasses import replace

import numpy as np
import pytest

import air_multimnist as air
import depth_scene as depth
import iodine_tetris as iodine
import sqair_moving as sqair
import vae_scenes as vae
import vrnn_moving as vrnn
from common import (
    compose,
    conv,
    data,
    features,
    kernels,
    metrics,
    mixture,
    ops,
    probe,
    raycast,
    sampler,
    shapes,
    tracks,
)
from common.params import Params
from meta.shapes import check_shapes
from viz import scenes as drawing


def ones(*shape):
    return np.ones(shape, np.float32)


def weights(**shapes):
    return Params({name.replace("_", "."): ones(*shape) for name, shape in shapes.items()})


AIR = {"B": 11, "N": 4, "C": 3, "S": 12, "G": 8, "H": 22, "K": 9, "Z": 13, "P": 108, "L": 88,
       "count": 11}


def run_air():
    """All that the script computes, by each model and estimator. (L is 4H and N (4 + 2K) here.)"""
    images = np.random.default_rng(0).random((11, 3, 12, 12), np.float32)
    for model, estimator in [*itertools.product(air.ATTEND, air.ESTIMATORS), ("heads", "relaxed")]:
        cfg = air.Config(model=model, estimator=estimator, data="sprites", max_steps=4, canvas=12,
                         glimpse=8, hidden=22, what=9, units=10, rates=(0.5, 0.4, 0.3, 0.2))
        p = Params(air.init(cfg, 0))
        noise, numbers = air.draw_noise(cfg, 11, 0, 0), air.schedule(cfg, 0)
        _, back = air.objective(p, cfg, images, noise, numbers)
        back(p.grads())
    air.score(p, cfg, [(images, np.ones(11, int), None)])
    air.scanning_heat(p, cfg, images)
    air.prior_samples(p, cfg, 11, np.random.default_rng(0))


DEPTH = {"B": 17, "J": 4, "C": 3, "N": 64, "M": 40, "A": depth.A, "G": 12, "K": 9, "U": 11, "D": 10,
         "F": 448, "E": 126, "S": 24, "R": 68, "n": 8}


def run_depth():
    """All that the script computes, by its three formulations."""
    images = np.random.default_rng(0).random((17, 3, 64, 64), np.float32)
    for formulation, colours in (("paper", "flat"), ("fast", "flat"), ("turns", "shaded")):
        cfg = depth.Config(formulation=formulation, colours=colours, objects=4, patch=40, crop=12,
                           what=9, trunk=(6, 7), encoder=(6, 14), units=11, decoder=(10, 8),
                           background=10, unet=(4, 4), stages=(4,) * 6, maps=(4,) * 4,
                           refine=int(formulation == "turns"))
        p = Params(depth.init(cfg, 0))
        _, _, back = depth.objective(p, cfg, images, depth.draw_noise(cfg, 17, 0, 0),
                                     depth.schedule(cfg, 0))
        back(p.grads())
        found = depth.infer_scenes(p, cfg, images)
        depth.in_order(found)
        depth.walk(p, cfg, found, 17, ("where",))


IODINE = {"B": 14, "K": 4, "N": 56, "T": 5, "C": 3, "S": 15, "Z": 7, "F": 6, "R": 9, "M": 12,
          "U": 13, "Q": 10, "s": 8, "V": 11, "G": 17}


def run_iodine():
    """All decoders, with and without memory, differentiated through and not."""
    images = np.random.default_rng(0).random((14, 3, 15, 15), np.float32)
    for decoder, masks, backprop in (("separable", "free", "steps"), ("patch", "free", "steps"),
                                     ("patch", "round", "steps"), ("broadcast", "free", "all")):
        cfg = iodine.Config(canvas=15, slots=4, iterations=5, test_iterations=5, latents=7, rank=9,
                            decoder_units=11, patch=17, features=6, layers=2, kernel=3,
                            refine_features=10, units=13, decoder=decoder, masks=masks,
                            backprop=backprop, lstm=True, geco=0.01 * (decoder == "patch"))
        p = Params(iodine.init(cfg, 0))
        noise = iodine.draw_noise(cfg, 14, 5, 0, 0)
        _, back = iodine.objective(p, cfg, images, noise, iodine.schedule(cfg, 0))
        back(p.grads())
    iodine.score(p, cfg, [(images, np.zeros((14, 15, 15), int))])


def run_mixture():
    for kind in mixture.KINDS:
        mixture.mixture_reference(ones(5, 3, 6, 8), ones(5, 2, 4, 6, 8), 0.5, kind)


def run_compose():
    x, alpha, colour = ones(5, 3, 6, 8), ones(5, 2, 6, 8), ones(5, 2, 3, 1, 1)
    arrays, orders = (x, alpha, colour, ones(5, 3, 1, 1)), np.array([[0, 1]])
    compose.order_errors_back_reference(compose.order_errors_reference(*arrays, orders), *arrays,
                                        orders)
    canvas, theta = ones(7, 3, 4, 4), ones(7, 6, 8)
    compose.match_reference(compose.cut_reference(compose.place_reference(canvas, theta), theta, 4),
                            ones(7, 3, 6, 8))


SQAIR = {"B": 10, "T": 4, "N": 3, "D": 3, "R": 10, "M": 30, "S": 12, "G": 8, "K": 9, "U": 14,
         "H": 22, "Q": 16, "F": 47, "J": 2, "videos": 5, "count": 10}


def run_sqair():
    """Both objectives and nets, with an object in each of the three slots from the beginning."""
    full = sqair.nothing

    def nothing(cfg, B, dtype):
        state = full(cfg, B, dtype)
        state.there[...], state.name[...] = 1, np.arange(3)
        return state

    sqair.nothing = nothing
    try:
        for objective, net, B in (("fast", "conv", 10), ("vimco", "mlp", 5)):
            cfg = sqair.Config(objective=objective, net=net, canvas=12, glimpse=8, hidden=22,
                               memory=16, what=9, units=14, particles=2, later=3, data="drawn")
            p = Params(sqair.init(cfg, 0))
            videos = np.random.default_rng(0).random((B, 4, 1, 12, 12), np.float32)
            noise = sqair.draw_noise(cfg, 4, B, 0, 0)
            for frame in noise:
                frame.uniform[:-1] = 0                              # all stay
            _, back = sqair.objective(p, cfg, videos, noise, sqair.schedule(cfg, 0))
            back(p.grads())
        videos = np.concatenate([videos, videos])
        sqair.infer_videos(p, cfg, videos)
        sqair.continued(p, cfg, videos)
        sqair.tight_bound(p, replace(cfg, bound_particles=10), [(videos[:1], None, None)])
        sqair.nothing = full
        sqair.prior_samples(p, replace(cfg, counts=(3,)), 10, 4, np.random.default_rng(0))
    finally:
        sqair.nothing = full


def run_sampler():
    window = ones(11, 3)
    glimpse, _ = sampler.read(ones(11, 2, 9, 7), window, 5)
    sampler.write(glimpse, window, (9, 7))


def run_broadcast_conv():
    p = weights(a_W=(3, 8, 5, 5), a_b=(3,))
    conv.broadcast_conv(p, "a", ones(7, 6), ones(2, 9, 4))


def run_metrics():
    true, order = np.ones((5, 2, 6, 8), bool), np.zeros((5, 2), int)
    iou = metrics.mask_iou(metrics.visible_masks(true, order), np.ones((5, 3, 6, 8), bool))
    metrics.depth_pairs(true, order, metrics.partners(iou), np.zeros((5, 3), int))
    metrics.matched_iou(metrics.ink_boxes(ones(5, 2, 3, 6, 8)), np.zeros((5, 4, 4)))


def run_tracks():
    boxes = np.broadcast_to([2.0, 3, 9, 9], (5, 6, 3, 4))
    tracks.follow(boxes[:, :, :2], boxes, np.broadcast_to(np.arange(3), (5, 6, 3)))


def run_warp():
    src, a = ones(11, 2, 9, 7), ones(11, 2)
    out = kernels.warp_reference(src, a, a, (5, 6))
    kernels.warp_back_reference(out, src, a, a)


def run_gates():
    h, c, gates = kernels.lstm_gates_reference(ones(5, 16), ones(5, 4))
    kernels.lstm_gates_back_reference(h, c, c, gates)


def run_vrnn():
    videos = np.random.default_rng(0).random((5, 3, 1, 9, 9), np.float32)
    for net in ("mlp", "conv"):
        cfg = vrnn.Config(net=net, canvas=9, hidden=7, latent=4, particles=2)
        p = Params(vrnn.init(cfg, 0))
        _, back = vrnn.objective(p, cfg, videos, vrnn.draw_noise(cfg, 3, 5, 0, 0))
        back(p.grads())


def run_vrnn_imagine():
    cfg = vrnn.Config(canvas=9, hidden=7, latent=4)
    vrnn.imagine(Params(vrnn.init(cfg, 0)), cfg, ones(5, 2, 1, 9, 9), 3)


VRNN = {"B": 5, "T": 3, "N": 2, "R": 10, "S": 9, "H": 7, "K": 4}


def run_vae():
    cfg = vae.Config(canvas=32, latent=7, halvings=(4, 8, 4, 12), mixings=(8, 4, 4), seeds=9,
                     widths=(4, 3, 6))
    p = Params(vae.init(cfg, 0))
    _, _, _, back = vae.objective(p, cfg, ones(5, 3, 32, 32), vae.draw_noise(cfg, 5, 0, 0), 0.1)
    back(p.grads())


def run_features():
    s = shapes.polygons(0, 0, 5, 32)
    kinds, numbers = features.truth(s.images, s.amodal, s.order, s.kinds)
    features.lesson(Params(features.init(32, 2, 0)), s.images, kinds, numbers)


def run_probe():
    p, x = probe.init((4, 7, 5), 0), ones(6, 2, 4)
    x[3, 1] = 0
    q, back_q = probe.add(p, x)
    _, back_loss = probe.surprise(q, np.arange(6) % 5)
    back_q(back_loss(1.0), p.grads())


# One line a run: (what it proves: modules and functions, sizes of the dimensions, what to run).
# A commented line of a listed module or function that no run executes fails, so list only what
# the run covers, and give every dimension a size of its own.
CASES = {
    "air": ([air], AIR, run_air),
    "sqair": ([sqair], SQAIR, run_sqair),
    "iodine": ([iodine], IODINE, run_iodine),
    "mixture": ([mixture.density, mixture.mixture_reference],
                {"B": 5, "K": 2, "C": 3, "H": 6, "W": 8}, run_mixture),
    "vae": ([vae], {"B": 5, "C": 3, "N": 32, "K": 7, "W": 6, "seeds": 9}, run_vae),
    "features": ([features], {"B": 5, "K": 2, "N": 32, "F": 64, "KINDS": 8, "NUMBERS": 6},
                 run_features),
    "vrnn": ([vrnn.normal, vrnn.latent, vrnn.decode, vrnn.step, vrnn.look_all, vrnn.resample,
              vrnn.gather, vrnn.unroll], VRNN, run_vrnn),
    "vrnn.imagine": ([vrnn.imagine], VRNN, run_vrnn_imagine),
    "linear, dense": ([ops.linear, ops.dense], {"B": 5, "I": 3, "O": 4}, lambda: ops.dense(
        weights(a_W=(3, 4), a_b=(4,)), "a", ones(5, 3), ops.relu)),
    "rnn": ([ops.rnn], {"B": 5, "H": 4}, lambda: ops.rnn(
        weights(a_x_W=(3, 4), a_h_W=(4, 4), a_h_b=(4,)), "a", ones(5, 3), ones(5, 4))),
    "gru": ([ops.gru], {"B": 5, "H": 4}, lambda: ops.gru(
        weights(a_x_W=(3, 12), a_h_W=(4, 12)), "a", ones(5, 3), ones(5, 4))),
    "lstm": ([ops.lstm], {"B": 5, "H": 4}, lambda: ops.lstm(
        weights(a_x_W=(3, 16), a_h_W=(4, 16)), "a", ones(5, 16), ones(5, 3), *ones(2, 5, 4))),
    "latent": ([ops.gaussian, ops.gaussian_kl, ops.latent], {"B": 5, "K": 3},
               lambda: ops.latent(*ones(3, 5, 3))),
    "density": ([ops.gaussian_log_density], {"B": 5, "D": 24},
                lambda: ops.gaussian_log_density(ones(5, 2, 3, 4), 0.0, 1.0)),
    "conv": ([conv.conv], {"B": 5, "C": 2, "O": 6, "k": 4, "h": 3, "w": 7}, lambda: conv.conv(
        weights(a_W=(6, 2, 4, 4), a_b=(6,)), "a", ones(5, 2, 7, 15), 2)),
    "conv_transpose": ([conv.conv_transpose], {"C": 2, "O": 6, "k": 4}, lambda: conv.conv_transpose(
        weights(a_W=(2, 6, 4, 4), a_b=(6,)), "a", ones(5, 2, 7, 15))),
    "broadcast_conv": ([conv.broadcast_conv],
                       {"B": 7, "K": 6, "C": 2, "O": 3, "k": 5, "H": 9, "W": 4, "a": 5, "e": 4},
                       run_broadcast_conv),
    "pooled": ([conv.max_pool], {"B": 5, "C": 2, "h": 3, "w": 4},
               lambda: conv.max_pool(ones(5, 2, 7, 9))),
    "upsampled": ([conv.upsample], {"B": 5, "C": 2, "H": 3, "W": 4},
                  lambda: conv.upsample(ones(5, 2, 3, 4))),
    "sampler": ([sampler], {"B": 11, "C": 2, "H": 9, "W": 7, "G": 5}, run_sampler),
    "probe": ([probe.plus, probe.add, probe.surprise],
              {"B": 6, "N": 2, "O": 5, "M": 11}, run_probe),
    "metrics": ([metrics], {"B": 5, "K": 2, "H": 6, "W": 8, "size": 4, "J": 3, "most": 3,
                            "ways": 6}, run_metrics),
    "compose": ([compose], {"B": 5, "K": 2, "C": 3, "S": 1, "H": 6, "W": 8, "R": 7, "M": 4},
                run_compose),
    "depth": ([depth], DEPTH, run_depth),
    "hat_weights": ([kernels.hat_weights], {"B": 11, "n_out": 5, "n_in": 9},
                    lambda: kernels.hat_weights(ones(11), ones(11), 5, 9)),
    "warp": ([kernels.warp_reference, kernels.warp_back_reference],
             {"B": 11, "C": 2, "h": 9, "w": 7, "H": 5, "W": 6}, run_warp),
    "gates": ([kernels.lstm_gates_reference, kernels.lstm_gates_back_reference], {"B": 5, "H": 4},
              run_gates),
    "layers": ([shapes.blank], {"B": 5, "C": 3, "K": 2, "H": 32},
               lambda: shapes.polygons(0, 0, 5, 32)),
    "tracks": ([tracks], {"B": 5, "T": 6, "K": 2, "N": 3}, run_tracks),
    "clevr": ([raycast.blank], {"B": 2, "K": 5, "H": 32},
              lambda: raycast.clevr(0, 0, 2, 32, "5")),
    "shrink": ([data.shrink], {"size": 50}, lambda: data.shrink(np.ones((2, 105, 105), bool))),
    "scanning": ([drawing.scanning], {"R": 2, "N": 4, "H": 9, "W": 7},
                 lambda: drawing.scanning(os.devnull, np.ones((2, 4, 9, 7)), "ab")),
}


@pytest.mark.parametrize("name", CASES)
def test_shape_comments_are_true(name):
    under_test, dims, run = CASES[name]
    found = check_shapes(under_test, dims, run)
    assert not found, "\n" + "\n".join(found)


DIMS = {"B": 5, "H": 4, "K": 3, "N": 2}
STEP = """
import numpy as np

def step(x, branch=True):
    y = np.ones((5, 16))                    # (B, 4H)  eq.2 the gates
    a, b, back, _ = np.ones((5, 3)), np.ones((5, N + 1)), abs, x        # (B, K), (B, N+1)
    scale, total = 2.0, x.sum()             # ()
    half = np.split(y, 2, 1)                # (B, 2*H), (B, 2H)
    low, high = np.split(x, 2, 1)           # ..., (B, H/2)
    z = np.stack(
        [x * t for t in range(3)],
        axis=1)                             # (B, K, H)
    w = np.ones((5, 7, 2))                  # (B, ..., N)
    u = {}
    u["a"] = x                              # (B, H)
    u["a"] += 1                             # (B, H)
    for t in range(2):
        v = np.ones((t, 5))[:0]             # (0, B)
    if branch:
        c = x[:, 0]                         # (B,)
    d = x  # (see the paper)

    def back(dy):
        dx = 2 * dy                         # (B, H)
        return dx                           # (B, H)

    return back(x)

N = 2
"""


@pytest.fixture
def module(tmp_path):
    """Imports source text as a module of its own."""
    numbers = itertools.count()

    def load(source):
        file = tmp_path / f"step{next(numbers)}.py"
        file.write_text(textwrap.dedent(source), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def check(m, *args):
    return check_shapes([m], DIMS, lambda: m.step(np.ones((5, 4)), *args))


def test_true_comments_pass(module):
    assert check(module(STEP)) == []


@pytest.mark.parametrize(("old", "new", "words"), [
    ("# (B, 4H)", "# (B, 5H)", "y is (5, 16), not (B, 5 * H)"),
    ("# (B, 4H)", "# (4H, B)", "y is"),
    ("# (B, K), (B, N+1)", "# (B, K), (B, N)", "b is"),
    ("# (B, K), (B, N+1)", "# (B, K)", "1 shapes for 2 arrays"),
    ("# (B, 2*H), (B, 2H)", "# (B, 2*H), (B, H)", "half[1] is"),
    ("# (B, K, H)", "# (B, H, K)", "z is"),
    ("# (B, ..., N)", "# (B, ..., K)", "w is"),
    ("# ()", "# (B,)", "total"),
    ("# (0, B)", "# (1, B)", "v is"),
    ("dx = 2 * dy                         # (B, H)", "dx = 2 * dy  # (B, K)", "dx is"),
    ("return dx                           # (B, H)", "return dx  # (B, K)", "result is"),
    ("# (see the paper)", "# (B, Q)", "unknown dimension Q"),
    ("for t in range(2):", "for t in range(2):  # (B, H)", "assigns nothing"),
])
def test_false_comments_are_caught(module, old, new, words):
    assert old in STEP
    found = check(module(STEP.replace(old, new)))
    assert len(found) == 1 and words in found[0], found
    line = next(k for k, text in enumerate(STEP.splitlines(), 1) if old in text)
    assert f":{line}: " in found[0]


def test_unexecuted_comment_is_caught(module):
    found = check(module(STEP), False)
    assert len(found) == 1 and "no run has executed" in found[0]


def test_a_line_that_raises_proves_nothing(module):
    m = module("""
        def step(x):
            try:
                y = x
                y = x @ x       # (B, H)
            except ValueError:
                pass
        """)
    assert "no run has executed" in check(m)[0]


def test_one_function_alone(module):
    m = module("""
        def f(x):
            y = x           # (B, H)
            return y

        def g(x):
            y = x           # (B, K)
            return y
        """)
    assert check_shapes([m.f], DIMS, lambda: m.f(np.ones((5, 4)))) == []
    assert "(B, K)" in check_shapes([m.g], DIMS, lambda: m.g(np.ones((5, 4))))[0]
