"""Object-centric generation with factored depths, locations and appearances (Anciukevicius,
Lampert and Henderson, 2020): who stands in front, and what is hidden.

    python depth_scene.py             trains, scores on 1,000 fresh scenes, draws figures and a GIF

The fast formulation, with the numbers that tag the lines below:

    eq.1   a_j = softmax(W_j f(x)) over A x A cells, where_j = sum a_j cell    where is object j?
    eq.2   tint_j = sum a_j x(cell)                                            what colour is there?
    eq.3   crop_j = read(x, where_j), and how like tint_j, and the other tints, its pixels are
    eq.4   q(z_j | x) = N(mean, std^2), depth_j and a correction of where_j from crop_j and tints
    eq.5   alpha_j, colour_j = decoder(z_j)                                    M x M, and one colour
    eq.6   alpha*_j = write(alpha_j, where_j)                                  on the whole canvas
    eq.7   q(s) = prod_k exp(-depth_{s_k} / gamma) / sum_{l>=k} exp(-depth_{s_l} / gamma)
           over all orders s = (nearest, .., farthest)
    eq.8   y_s = alpha_{s_1} colour_{s_1} + (1 - alpha_{s_1}) (alpha_{s_2} colour_{s_2} + ..)
    eq.9   loss = sum_s q(s) w |x - y_s|^2 / (2 sigma^2)
                  + v sum_j ( KL(q(z_j) || N(0, 1)) + depth_j^2 / 2 )

The paper softens the order of depths so that it can be learned; here all orders are painted and
their errors averaged (eq.7 and 9), which is exact: dloss/dq(s) is the error of order s. When gamma
is large all orders count alike, and the objects come apart before their order is decided. The
prior of depths, N(0, 1), keeps q(s) from being so sure that a wrong order is never corrected.

Scattered objects over a background, of unknown number, are found one after the other (the presets
`sprites` and `clevr`); an object that is not there is drawn with no alpha, as in the paper:

    eq.21  left_1 = 1, left_{j+1} = left_j (1 - alpha*_j)                  what is unexplained yet
    eq.22  theta_j ~ Categorical(e_j^sharp), e_j = mean over a cell of left_j times how unlike x_bg
           x is; where_j = the cell's middle, tint_j = its colour;  x_bg as in eq.13
    eq.23  crop_j = read(x, where_j), how like tint_j its pixels are, read(left_j, where_j)
    eq.24  colour_j(pixel) = sigmoid(tint + shade(pixel)), both from z_j  (`--colours shaded`)

looked at once more from the corrected where_j (`--looks 2`), and drawn, ordered and scored by eq.4
to 9, with x_bg behind them all.

The paper's own formulation (--preset paper; `paper-small` is the same with narrow networks):

    eq.11  q(theta_j | x) = softmax(U-Net_j(x)) over N x N pixels; a Gumbel-softmax sample of it
    eq.12  crop_j = x cross-correlated with theta_j; q(z_j, depth_j | theta_j, x) = N(.., ..)
    eq.13  x_j, alpha_j = decoder(z_j), M x M; q(background code | x) = N(.., ..), x_bg = decoder
    eq.14  x*_j, alpha*_j = x_j, alpha_j convolved with theta_j
    eq.15  v_j ~ alpha*_j prod_{k != j} (1 - alpha*_k sigmoid((depth_j - depth_k) / gamma)),
           v_bg ~ prod_k (1 - alpha*_k), all divided by their sum:  y = sum_j v_j x*_j + v_bg x_bg
    eq.16  loss = |x - y|^2 / (2 sigma^2) + v KLs + w |mean_x,j q(theta_j | x) - uniform|_1

All then learn, with all else fixed, which objects go together (the paper's second stage):

    eq.17  y ~ N(0, 1), in two halves; q(y | all where, z, depth) = N(.., ..)
    eq.18  where ~ N(zeta(y_1)), then z, depth ~ N(xi(y_2, where)), for all objects at once
    eq.19  loss = -log p(where, z, depth | y) + u KL(q(y) || N(0, 1))

Dimension key: B images, J objects, C channels, N canvas side, M side of an object's own canvas,
A attention cells a side, G crop side, K appearance code, F features of the whole image,
E features of a crop, S orders, R = B J objects of all images.
"""

from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from pathlib import Path
from types import SimpleNamespace

from common.backend import gemm, to_device, to_host, xp  # before NumPy: sets threads, BLAS kernels

import numpy as np

from common import cli, features, raycast, shapes
from common.compose import cut, order_errors, place
from common.conv import conv, conv_transpose, group_norm, max_pool, upsample
from common.errors import Fail
from common.files import as_picture, read_picture, read_scenes
from common.metrics import (
    depth_pairs, ink_boxes, mask_iou, partners, taken, visible_masks,
)
from common.ops import (
    clamp, dense, elu, latent, leaky_relu, linear, logistic, mlp, relu, sigmoid,
    softmax,
)
from common.optim import Optimiser, cosine, norm, ramp
from common.params import Params, fitting
from common.processes import is_root, share
from common.sampler import read, write
from common.store import load_weights, save_weights, whole_file

SEEN = 0.3              # a pixel belongs to an object where its alpha is above this (the paper's)
OVERLAPS = tuple(range(0, 151, 10))     # pixels of 64 x 64 that depth accuracy is told for
A = 16                  # attention cells a side
VALIDATION, TEST = 1_000_001, 1_000_002     # seeds of the streams that no training run draws from


# ================================================================ configuration

SCENES = {
    "polygons": lambda cfg, *key: shapes.polygons(*key, cfg.canvas, cfg.objects),
    "sprites": lambda cfg, *key: shapes.dsprites(*key, cfg.canvas, range(2, cfg.objects + 1)),
    "clevr": lambda cfg, *key: raycast.clevr(*key, cfg.canvas, "3"),
}


@dataclass(frozen=True)
class Config:
    steps: int = cli.option(10_000, "optimiser updates", low=1)
    batch_size: int = cli.option(32, "scenes per update", low=1)
    formulation: str = cli.option("fast", "whose equations", choices=("fast", "turns", "paper"))
    data: str = cli.option("polygons", "what the scenes show", choices=tuple(SCENES))
    canvas: int = cli.option(64, "N: side of the scene in pixels", choices=(32, 64))
    objects: int = cli.option(2, "J: objects that can be found", low=1, high=4)
    patch: int = cli.option(30, "M: side of an object's own canvas", low=4)
    crop: int = cli.option(20, "G: side of the crop that an object is read from", low=8)
    reach: float = cli.option(0.625, "what a crop covers, as a share of the scene's side", low=0.1)
    what: int = cli.option(8, "K: dimensions of z", low=1)
    trunk: tuple[int, ...] = cli.option((24, 48, 64), "channels that look at the scene", low=1)
    encoder: tuple[int, ...] = cli.option((24, 48), "channels that look at a crop", low=1)
    units: int = cli.option(256, "hidden units", low=1)
    decoder: tuple[int, ...] = cli.option((256, 512), "hidden units that draw a shape", low=1)
    unet: tuple[int, ...] = cli.option((48, 64, 96, 128, 128), "paper: channels of the U-Net",
                                       low=4)
    stages: tuple[int, ...] = cli.option((32, 64, 64, 128, 256, 256), "paper: channels that look "
                                         "at a crop, two for each halving", low=4)
    maps: tuple[int, ...] = cli.option((30, 128, 64, 32), "paper: channels that draw an object",
                                       low=1)
    background: int = cli.option(2, "dimensions of the background's code", low=1)
    colours: str = cli.option("flat", "turns: of an object", choices=("flat", "shaded"))
    looks: int = cli.option(1, "turns: times that an object is looked at", low=1)
    sharp: float = cli.option(2.0, "turns: power of what is unexplained, where to look", low=0.0)
    temperature: float = cli.option(0.3, "paper: of the Gumbel-softmax", low=0.01)
    l1_weight: float = cli.option(10.0, "paper: weight of the positions' L1 term", low=0.0)
    l1_cell: int = cli.option(8, "paper: side of the cells that this term compares", low=1)
    scene: int = cli.option(16, "dimensions of the scene code y", low=2)
    scene_kl: float = cli.option(1.0, "weight of its KL (the paper: 0.01)", low=0.0)
    scene_steps: int = cli.option(2000, "updates of the scene prior, at the end", low=1)
    spread: float = cli.option(0.19, "std of the first guess of where, in half canvases", low=0.01)
    apart: float = cli.option(0.1, "distance of these first guesses from the middle", low=0.0)
    nudge: float = cli.option(0.1, "scale of the correction of where", low=0.0)
    std_first: float = cli.option(0.07, "sigma of the likelihood at the start", low=1e-3)
    std: float = cli.option(0.03, "sigma at the end", low=1e-3)
    kl_weight: float = cli.option(1.0, "weight of the codes' KL", low=0.0)
    gamma_first: float = cli.option(50.0, "softness of the depth order at the start", low=1e-3)
    gamma: float = cli.option(0.2, "softness at the end", low=1e-3)
    gamma_from: int = cli.option(500, "update at which gamma begins to fall", low=0)
    gamma_to: int = cli.option(1500, "update at which gamma has arrived", low=0)
    lr: float = cli.option(2e-3, "peak learning rate (Adam)", low=0.0)
    lr_floor: float = cli.option(0.01, "share of lr that is left at the end", low=0.0, high=1.0)
    lr_from: float = cli.option(0.5, "share of the updates before lr falls", low=0.0, high=1.0)
    warmup: int = cli.option(100, "updates of linear warm-up", low=0)
    clip: float = cli.option(200.0, "largest norm of a gradient", low=0.0)
    eval_every: int = cli.option(1000, "updates between two lines of metrics", low=1)
    eval_scenes: int = cli.option(500, "validation scenes for each line of metrics", low=1)
    refine: int = cli.option(0, "gradient steps on each scene's latents when it is read", low=0)
    test_scenes: int = cli.option(1000, "fresh scenes for the final score", low=1)
    generated: int = cli.option(0, "evaluate: scenes to generate, compared with fresh ones", low=0)
    prior: str = cli.option("scene", "evaluate: what those come from: the scene prior; a Gaussian "
                            "for each latent; or N(0, 1) and any place",
                            choices=("scene", "independent", "none"))


PAPER = {"formulation": "paper", "patch": 24, "what": 6, "std_first": 0.01 / 3**0.5,
         "std": 0.01 / 5**0.5, "lr": 5e-4, "lr_floor": 1.0, "warmup": 0, "units": 128,
         "gamma_first": 0.1, "gamma": 0.1, "gamma_from": 0, "gamma_to": 0, "spread": 0.06}
TURNS = {"formulation": "turns", "nudge": 0.25, "reach": 0.75, "crop": 32, "patch": 32,
         "encoder": (16, 32, 48), "gamma_from": 300, "gamma_to": 1000, "eval_every": 500,
         "eval_scenes": 250}
PRESETS = {
    "default": {},
    "quick": {"steps": 2000, "eval_every": 500, "test_scenes": 500},
    "long": {"steps": 20_000, "eval_every": 4000, "eval_scenes": 100, "refine": 100},
    "sprites": {**TURNS, "data": "sprites", "objects": 4, "steps": 6000, "looks": 2,
                "batch_size": 16},
    "clevr": {**TURNS, "data": "clevr", "objects": 3, "colours": "shaded", "steps": 4000,
              "sharp": 4.0, "batch_size": 16},
    "paper": {**PAPER, "steps": 450_000, "batch_size": 100, "eval_every": 900},
    "paper-small": {**PAPER, "steps": 15_000, "batch_size": 16, "canvas": 32, "patch": 12,
                    "l1_cell": 4, "unet": (8, 16, 24, 24), "maps": (16, 32, 16, 8),
                    "stages": (16, 32, 32, 48), "std_first": 0.1, "std": 0.03, "lr": 1e-3,
                    "lr_floor": 0.03, "lr_from": 0.6, "eval_scenes": 250},
}
C, GROUPS = 3, 4        # colours; groups of channels that are normalised together


def check(cfg):
    """What no single flag can see."""
    if cfg.refine and cfg.formulation == "paper":
        raise Fail("--refine is not for the paper's own formulation")
    if cfg.formulation != "paper":
        if cfg.crop < 2**len(cfg.encoder):
            raise Fail(f"--crop {cfg.crop} is too small to be halved {len(cfg.encoder)} times")
        if cfg.formulation == "fast" and cfg.canvas // 2 < 2**len(cfg.trunk):
            raise Fail(f"--trunk halves a scene of {cfg.canvas} pixels too often")
        return
    if len(cfg.stages) % 2 or len(cfg.maps) != 4:
        raise Fail("--stages needs two numbers for each halving, --maps 4")
    if cfg.patch % 4 or cfg.patch % 2**(len(cfg.stages) // 2):
        raise Fail(f"--patch {cfg.patch} cannot be halved twice, and once for two of --stages")
    if len(cfg.unet) < 2 or cfg.canvas < 2**len(cfg.unet):
        raise Fail(f"--unet cannot have {len(cfg.unet)} levels")
    if any(n % GROUPS for n in (*cfg.unet[:-1], *cfg.stages[1::2])):
        raise Fail(f"--unet and --stages must be multiples of {GROUPS} where they are normalised")
    if cfg.canvas % cfg.l1_cell:
        raise Fail(f"--l1-cell {cfg.l1_cell} does not divide {cfg.canvas}")


# ================================================================ parameters

def init(cfg, seed):
    """Normal weights scaled by the square root of the fan-in; the flat vector keeps this order."""
    arrays, rng = {}, np.random.default_rng([seed, 0])
    first = {"fast": init_fast, "turns": init_turns, "paper": init_paper}[cfg.formulation]
    first(cfg, arrays, rng)
    init_prior(cfg, arrays, rng)
    return arrays


def is_prior(name):
    return name.startswith("prior.")


def init_prior(cfg, arrays, rng):
    """Networks of one hidden layer and two residual ones; `prior.mean` and `prior.std` scale."""
    J, K, Y, U = cfg.objects, cfg.what + 1, cfg.scene, 128         # K: code and depth
    sizes = {"scene": (J * (2 + K), 2 * Y), "where": (Y // 2, 4 * J),
             "what": (Y - Y // 2 + 2 * J, 2 * J * K)}
    for name, (n_in, n_out) in sizes.items():
        for k, (a, b, gain) in enumerate([(n_in, U, RELU), (U, U, OUT), (U, U, OUT),
                                          (U, n_out, OUT)]):
            add_layer(arrays, rng, f"prior.{name}.{k}", a, b, gain)
    arrays["prior.mean"], arrays["prior.std"] = np.zeros(J * (2 + K)), np.ones(J * (2 + K))


RELU, OUT = 1.4, 0.3    # gains of weights before a ReLU, and before what must begin small


def add_layer(arrays, rng, name, n_in, n_out, gain=RELU, bias=0.0):
    arrays[name + ".W"] = rng.standard_normal((n_in, n_out)) * (gain / np.sqrt(n_in))
    arrays[name + ".b"] = np.broadcast_to(np.asarray(bias, float), n_out)


def add_conv(arrays, rng, name, n_in, n_out, k, gain=RELU, normed=False):
    """A k x k convolution, and the scale and offset of the normalisation behind it."""
    W = rng.standard_normal((n_out, n_in, k, k))
    arrays[name + ".W"] = W * (gain / np.sqrt(n_in * k * k))
    arrays[name + ".b"] = np.zeros(n_out)
    if normed:
        arrays[name + ".norm.gain"] = np.ones((n_out, 1, 1))
        arrays[name + ".norm.b"] = np.zeros((n_out, 1, 1))


def add_halvings(arrays, rng, name, channels, side):
    """4 x 4 convolutions of stride 2; how many features they end in."""
    for k, (n_in, n_out) in enumerate(pairwise(channels)):
        add_conv(arrays, rng, f"{name}.{k}", n_in, n_out, 4)
        side //= 2
    return channels[-1] * side * side


def init_fast(cfg, arrays, rng):
    F = add_halvings(arrays, rng, "trunk", (C, *cfg.trunk), cfg.canvas // 2)
    add_layer(arrays, rng, "look", F, cfg.units)
    guess = first_guess(cfg, A).ravel()
    add_layer(arrays, rng, "where", cfg.units, cfg.objects * A * A, OUT, guess)
    init_object(cfg, arrays, rng, 2 * C)


def init_turns(cfg, arrays, rng):
    init_object(cfg, arrays, rng, C + 2)
    init_background(cfg, arrays, rng)


def init_object(cfg, arrays, rng, known):
    """What reads an object from its crop and `known` numbers more, and what draws it."""
    K, U = cfg.what, cfg.units
    E = add_halvings(arrays, rng, "crop", (C + 2, *cfg.encoder), cfg.crop)
    add_layer(arrays, rng, "read", E + known, U)
    add_layer(arrays, rng, "head", U, 2 * K + 3, OUT, [0.0] * K + [-1.0] * K + [0.0] * 3)
    for k, (n_in, n_out) in enumerate(pairwise((K, *cfg.decoder))):
        add_layer(arrays, rng, f"draw.{k}", n_in, n_out)
    add_layer(arrays, rng, "colour", cfg.decoder[0], C, OUT)
    add_layer(arrays, rng, "alpha", cfg.decoder[-1], cfg.patch**2, OUT, -1.0)
    if cfg.colours == "shaded":
        add_layer(arrays, rng, "shade", cfg.decoder[-1], cfg.patch**2, OUT)


def init_paper(cfg, arrays, rng):
    """The networks of the paper's Table 5, with group normalisation in place of batch's."""
    J, K, N, M, U = cfg.objects, cfg.what + 1, cfg.canvas, cfg.patch, cfg.units
    widths, side = (C, *cfg.unet), cfg.patch // 2**(len(cfg.stages) // 2)

    def add(name, n_in, n_out, k, gain=RELU, normed=False):
        add_conv(arrays, rng, name, n_in, n_out, k, gain, normed)

    for k, (n_in, n_out) in enumerate(pairwise(widths[:-1])):
        add(f"down.{k}", n_in, n_out, 3, normed=True)
    add("middle", *widths[-2:], 3)
    for k in reversed(range(1, len(cfg.unet))):
        add(f"up.{k - 1}", widths[k + 1] + widths[k], widths[k], 3, normed=k > 1)
    add("logits", widths[1], J, 1, OUT)
    arrays["guess"] = first_guess(cfg, N).reshape(J, N, N)
    inputs = (C, *cfg.stages[1::2])
    for k, (n_in, n_mid, n_out) in enumerate(zip(inputs, cfg.stages[::2], inputs[1:],
                                                 strict=False)):
        add(f"stage.{k}.halve", n_in, n_mid, 3)
        add(f"stage.{k}.mix", n_mid, n_out, 1)
        add(f"stage.{k}.more", n_out, n_out, 1, normed=True)
    E = inputs[-1] * side * side
    add_layer(arrays, rng, "head", E, 2 * K, OUT, [0.0] * K + [-1.0] * K)
    add_layer(arrays, rng, "object.0", cfg.what, U)
    add_layer(arrays, rng, "object.1", U, cfg.maps[0] * (M // 4) ** 2)
    for k, (n_in, n_out) in enumerate(pairwise(cfg.maps[:3])):
        W = rng.standard_normal((n_in, n_out, 3, 3))    # transposed: a pixel hears of 9/4 others
        arrays[f"grow.{k}.W"] = W * (RELU / np.sqrt(n_in * 9 / 4))
        arrays[f"grow.{k}.b"] = np.zeros(n_out)
    add("smooth", *cfg.maps[2:], 5)
    add("canvas", cfg.maps[3], C + 1, 1, OUT)
    arrays["canvas.b"][...] = [1.5] * C + [-1.0]    # bright and thin: what is black loses its alpha
    init_background(cfg, arrays, rng)


def init_background(cfg, arrays, rng):
    """What encodes a background and what draws it, as in Table 5."""
    D, N = cfg.background, cfg.canvas
    for k, (n_in, n_out) in enumerate(pairwise((C, 16, 32, 48, 64, 96))):
        add_conv(arrays, rng, f"far.{k}", n_in, n_out, 3, normed=True)
    add_layer(arrays, rng, "far.code.0", 96 * (N // 32) ** 2, 128)
    add_layer(arrays, rng, "far.code.1", 128, 2 * D, OUT, [0.0] * D + [-1.0] * D)
    add_layer(arrays, rng, "sky", D, 16 * (N // 32) ** 2)
    add_conv(arrays, rng, "sky.0", 16, 3, 3)
    add_conv(arrays, rng, "sky.1", 3, 3, 3)
    add_conv(arrays, rng, "sky.2", 3, C, 1, OUT)


def first_guess(cfg, side):
    """Logits (J, side^2) of bumps a little off the middle: this tells the objects apart."""
    turn = 2 * np.pi * np.arange(cfg.objects) / cfg.objects
    middle = -cfg.apart * np.stack([np.cos(turn), np.sin(turn)], 1)     # (J, 2)
    away = cells(side) - middle[:, None]                                # (J, ..., 2)
    return -0.5 * (away**2).sum(2) / cfg.spread**2


def cells(side):
    """x and y (side^2, 2) of the middles of side x side cells, in [-1, 1]."""
    u = (2 * np.arange(side) + 1) / side - 1
    return np.stack([np.tile(u, side), np.repeat(u, side)], 1)


# ================================================================ pieces

def leaky(x):
    return leaky_relu(x, 0.1)


def shrink(x, factor):
    """Means of factor x factor pixels. Only images are shrunk: no gradient is needed."""
    B, channels, H, W = x.shape
    return x.reshape(B, channels, H // factor, factor, W // factor, factor).mean((3, 5))


def halvings(p, name, x, want_dx=True):
    """`name.0`, `name.1`, ...: convolutions that halve the picture, as many as p has; flattened."""
    backs, layer, first = [], 0, want_dx
    while f"{name}.{layer}.W" in p:
        x, back_conv = conv(p, f"{name}.{layer}", x, stride=2, want_dx=first or layer > 0)
        x, back_act = leaky(x)
        backs.append((back_conv, back_act))
        layer += 1
    shape = x.shape

    def back(dx, g):
        dx = dx.reshape(shape)
        for back_conv, back_act in reversed(backs):
            dx = back_act(dx)
            dx = back_conv(dx, g)
        return dx

    return x.reshape(len(x), -1), back


# ================================================================ where things are, and their tints

def attend(p, cfg, x):
    """An attention map for each object, its mean position and its mean colour."""
    B, J, N = len(x), cfg.objects, cfg.canvas
    pixels = shrink(x, N // A).reshape(B, C, A * A).swapaxes(1, 2)  # (B, A*A, C)
    grid = xp.asarray(cells(A), x.dtype)                            # (A*A, 2)
    f, back_f = halvings(p, "trunk", shrink(x, 2), want_dx=False)   # (B, F)  eq.1
    h, back_h = dense(p, "look", f, leaky)                          # (B, U)  eq.1
    u, back_u = linear(p, "where", h)                               # (B, J*A*A)  eq.1
    a, back_a = softmax(u.reshape(B, J, A * A))                     # (B, J, A*A)  eq.1
    where = gemm(a, grid)                                           # (B, J, 2)  eq.1
    tint = gemm(a, pixels)                                          # (B, J, C)  eq.2

    def back(dwhere, dtint, g):
        da = gemm(dtint, pixels.swapaxes(1, 2))                                     # eq.2
        da = da + gemm(dwhere, grid.T)                                              # eq.1
        du = back_a(da).reshape(u.shape)                                            # eq.1
        dh = back_u(du, g)                                                          # eq.1
        df = back_h(dh, g)                                                          # eq.1
        back_f(df, g)                                                               # eq.1

    return where, tint, back


LIKE = 0.15             # how far colours lie apart that are still alike


def likeness(crop, tint):
    """How like a colour each pixel is: exp(-|crop - tint|^2 / (2 LIKE^2)).

    For each object two maps: its own tint's, and the sum of those of all others.
    """
    away = crop[:, :, None] - tint[:, None, :, :, None, None]       # (B, J, J, C, G, G)
    like = xp.exp((away * away).sum(3) * (-0.5 / LIKE**2))          # (B, J, J, G, G)
    own = xp.eye(tint.shape[1], dtype=crop.dtype)[:, :, None, None]     # (J, J, 1, 1)
    maps = xp.stack([(like * own).sum(2), (like * (1 - own)).sum(2)], 2)    # (B, J, 2, G, G)

    def back(dmaps):
        dlike = dmaps[:, :, :1] * own + dmaps[:, :, 1:] * (1 - own)     # (B, J, J, G, G)
        daway = (dlike * like * (-1 / LIKE**2))[:, :, :, None] * away  # (B, J, J, C, G, G)
        return daway.sum(2), -daway.sum((1, 4, 5))

    return maps, back


# ================================================================ one object: read and draw

def window_at(where, scale):
    """The windows (R, 3) of a given scale around positions (R, 2)."""
    return xp.concatenate([xp.full_like(where[:, :1], scale), where], 1)


def inspect(p, cfg, x, where, tint):
    """What a crop around `where` tells: code, depth and a better `where`, for all objects."""
    B, J, K = len(x), cfg.objects, cfg.what
    R, G = B * J, cfg.crop
    window = window_at(where.reshape(R, 2), cfg.reach)              # (R, 3)  eq.3
    image = xp.repeat(x, J, 0)                                      # (R, C, N, N)
    crop, back_crop = read(image, window, G)                        # (R, C, G, G)  eq.3
    crops = crop.reshape(B, J, C, G, G)
    maps, back_maps = likeness(crops, tint)                         # (B, J, 2, G, G)  eq.3
    seen = xp.concatenate([crops, maps], 2).reshape(R, C + 2, G, G)     # (R, C+2, G, G)
    e, back_e = halvings(p, "crop", seen)                           # (R, E)  eq.4
    others = tint.sum(1, keepdims=True) - tint                      # (B, J, C)  eq.4
    tints = xp.concatenate([tint, others], 2).reshape(R, 2 * C)     # (R, 2C)  eq.4
    h, back_h = dense(p, "read", xp.concatenate([e, tints], 1), leaky)  # (R, U)  eq.4
    u, back_u = linear(p, "head", h)                                # (R, 2K+3)  eq.4
    log_std, back_clamp = clamp(u[:, K:2 * K], -5, 1)               # (R, K)  eq.4
    depth = u[:, 2 * K].reshape(B, J)                               # (B, J)  eq.4
    where = where + cfg.nudge * u[:, 2 * K + 1:].reshape(B, J, 2)   # (B, J, 2)  eq.4

    def back(dmean, dlog_std, ddepth, dwhere, g):
        dnudge = cfg.nudge * dwhere.reshape(R, 2)                                   # eq.4
        ddepth = ddepth.reshape(R, 1)                                               # eq.4
        dlog_std = back_clamp(dlog_std)                                             # eq.4
        du = xp.concatenate([dmean, dlog_std, ddepth, dnudge], 1)                   # eq.4
        dh = back_u(du, g)                                                          # eq.4
        de = back_h(dh, g)                                                          # eq.4
        dtints = de[:, -2 * C:].reshape(B, J, 2 * C)                                # eq.4
        dothers = dtints[..., C:]                                                   # eq.4
        dtint = dtints[..., :C] + dothers.sum(1, keepdims=True) - dothers           # eq.4
        dseen = back_e(de[:, :-2 * C], g).reshape(B, J, C + 2, G, G)                # eq.4
        dcrops, dtint_maps = back_maps(dseen[:, :, C:])                             # eq.3
        dcrop = (dseen[:, :, :C] + dcrops).reshape(R, C, G, G)                      # eq.3
        _, dwindow = back_crop(dcrop)                                               # eq.3
        return dwhere + dwindow[:, 1:].reshape(B, J, 2), dtint + dtint_maps         # eq.3

    return u[:, :K], log_std, depth, where, back


def draw(p, cfg, z):
    """A shape on a canvas of its own, and its one colour, or that of every pixel."""
    R, M = len(z), cfg.patch
    shaded = cfg.colours == "shaded"
    h, back_h = dense(p, "draw.0", z, leaky)                        # (..., D)  eq.5
    t, back_t = linear(p, "colour", h)                              # (..., C)  eq.5
    k, backs = h, []
    for layer in range(1, len(cfg.decoder)):
        k, back_k = dense(p, f"draw.{layer}", k, leaky)             # eq.5
        backs.append(back_k)
    alpha, back_alpha = dense(p, "alpha", k, sigmoid)               # (..., M*M)  eq.5
    tint = t[:, :, None, None]                                      # (..., C, 1, 1)
    if shaded:
        shade, back_shade = linear(p, "shade", k)                   # (..., M*M)  eq.24
        tint = tint + shade.reshape(R, 1, M, M)                     # (..., C, M, M)  eq.24
    colour, back_colour = sigmoid(tint)                             # eq.5

    def back(dalpha, dcolour, g):
        dtint = back_colour(dcolour)                                                # eq.5
        dk = 0
        if shaded:
            dk = back_shade(dtint.sum(1).reshape(R, M * M), g)                      # eq.24
            dtint = dtint.sum((2, 3))                                               # eq.24
        dk = dk + back_alpha(dalpha.reshape(R, M * M), g)                           # eq.5
        for back_k in reversed(backs):
            dk = back_k(dk, g)                                                      # eq.5
        dh = dk + back_t(dtint.reshape(R, C), g)                                    # eq.5
        return back_h(dh, g)                                                        # eq.5

    return alpha.reshape(R, 1, M, M), colour, back


def paint(p, cfg, z, where):
    """An object's shape on the whole canvas, and its colour, flat or there too."""
    N = cfg.canvas
    alpha, colour, back_draw = draw(p, cfg, z)                      # eq.5
    flat = colour.shape[-1] == 1
    layer = alpha if flat else xp.concatenate([alpha, colour], 1)
    window = window_at(where, cfg.patch / N)                        # (..., 3)  eq.6
    placed, back_write = write(layer, window, (N, N))               # eq.6

    def back(dalpha, dcolour, g):
        dplaced = dalpha if flat else xp.concatenate([dalpha, dcolour], 1)
        dlayer, dwindow = back_write(dplaced)                                       # eq.6
        dz = back_draw(dlayer[:, :1], dcolour if flat else dlayer[:, 1:], g)        # eq.5
        return dz, dwindow[:, 1:]

    return placed[:, :1], colour if flat else placed[:, 1:], back


# ================================================================ who is in front

def depth_orders(J):
    """All orders (S, J), nearest first."""
    return np.array([*permutations(range(J))], np.int32)


def order_posterior(depth, gamma):
    """log q(s) of all orders: the nearest is drawn first, then the nearest of the rest, ..."""
    B, J = depth.shape
    orders = xp.asarray(depth_orders(J))                            # (S, J)
    picked = xp.eye(J, dtype=depth.dtype)[orders].reshape(-1, J)    # (S*J, J)
    rest = xp.asarray(np.where(np.tri(J), 0.0, -np.inf).T, depth.dtype)     # (J, J)
    u = gemm(depth, picked.T).reshape(B, -1, J) / -gamma            # (B, S, J)
    left = u[:, :, None] + rest                                     # (B, S, J, J)
    top = left.max(3)                                               # (B, S, J)
    total = top + xp.log(xp.exp(left - top[..., None]).sum(3))      # (B, S, J)
    log_q = (u - total).sum(2)                                      # (B, S)

    def back(dlog_q):
        share = xp.exp(left - total[..., None])                     # (B, S, J, J)
        du = dlog_q[..., None] * (1 - share.sum(2))                 # (B, S, J)
        return gemm(du.reshape(B, -1), picked) / -gamma

    return log_q, back


def expected_error(x, found, gamma):
    """Squared error of each image (B,), averaged over q(s), and its way back into the layers."""
    log_q, back_order = order_posterior(found.depth, gamma)         # (B, S)  eq.7
    errors, back_errors = order_errors(                             # (B, S)  eq.8
        x, found.alpha, found.colour, found.background, depth_orders(found.depth.shape[1]))
    q = xp.exp(log_q)                                               # (B, S)
    mean = (q * errors).sum(1)                                      # (B,)  eq.9

    def back(d):
        # q sums to 1, so that a constant less in all errors changes nothing (but rounding)
        dlog_q = q * (errors - mean[:, None]) * d                                   # eq.9
        dalpha, dcolour, dbackground = back_errors(q * d)                           # eq.8
        return dalpha, dcolour, dbackground, back_order(dlog_q)                     # eq.7

    return mean, back


# ================================================================ the loss

def fast(p, cfg, x, noise, weights):
    """Eq. 9, per image, and its pullback into g; what was found comes along."""
    B, J, N, R = len(x), cfg.objects, cfg.canvas, len(x) * cfg.objects
    guess, tint, back_attend = attend(p, cfg, x)                    # (B, J, 2), (B, J, C)  eq.1
    mean, log_std, depth, where, back_inspect = inspect(p, cfg, x, guess, tint)     # eq.3, eq.4
    z, kl, back_z = latent(mean, log_std, noise.what.reshape(R, -1))    # (R, K), (R,)  eq.4
    alpha, colour, back_paint = paint(p, cfg, z, where.reshape(R, 2))   # eq.5, eq.6
    found = SimpleNamespace(
        alpha=alpha.reshape(B, J, N, N), colour=colour.reshape(B, J, *colour.shape[1:]),
        depth=depth, where=where, z=z.reshape(B, J, -1), background=xp.zeros((B, C, 1, 1), x.dtype))
    error, back_error = expected_error(x, found, weights.gamma)     # (B,)  eq.9
    prior = kl.sum() + 0.5 * (depth * depth).sum()
    loss = (error_weight(cfg, weights) * error.sum() + cfg.kl_weight * prior) / B

    def back(g):
        scale, v = error_weight(cfg, weights) / B, cfg.kl_weight / B
        dalpha, dcolour, _, ddepth = back_error(scale)                              # eq.9
        ddepth = ddepth + v * depth
        dalpha, dcolour = dalpha.reshape(alpha.shape), dcolour.reshape(colour.shape)
        dz, dwhere = back_paint(dalpha, dcolour, g)                                 # eq.6, eq.5
        dmean, dlog_std = back_z(dz, xp.full(R, v, x.dtype))                        # eq.4
        dwhere = dwhere.reshape(B, J, 2)
        dguess, dtint = back_inspect(dmean, dlog_std, ddepth, dwhere, g)            # eq.4, eq.3
        back_attend(dguess, dtint, g)                                               # eq.1
        g.flush()

    return loss, found, back


def error_weight(cfg, weights):
    """1 / (2 sigma^2), as if all scenes had 32 x 32 pixels."""
    return (32 / cfg.canvas)**2 / (2 * weights.std**2)


# ================================================================ one object after the other

def alike(x, y):
    """How like each other the colours of two pictures are; y is only looked at."""
    away = x - y
    like = xp.exp((away * away).sum(1, keepdims=True) * (-0.5 / LIKE**2))

    def back(dlike):
        return dlike * like * away * (-1 / LIKE**2)

    return like, back


def unexplained(x, unlike, uniform, sharp):
    """Eq. 22: where to look next, and the colour there; uniform=None: the likeliest cell.

    Chosen, not computed: no gradient passes.
    """
    B, n = len(x), x.shape[2] // A
    error = shrink(unlike, n).reshape(B, A * A)                     # (B, A*A)  eq.22
    logits = sharp * xp.log(error + 1e-6)                           # (B, A*A)  eq.22
    if uniform is not None:
        logits = logits - xp.log(-xp.log(uniform))
    cell, rows = logits.argmax(1), xp.arange(B)                     # (B,), (B,)  eq.22
    there = x.reshape(B, C, A, n, A, n)[rows, :, cell // A, :, cell % A]
    return xp.asarray(cells(A), x.dtype)[cell], there.mean((2, 3))


def examine(p, cfg, x, left, where, tint):
    """What a crop around `where` tells of one object: code, depth and a better `where`."""
    K, G = cfg.what, cfg.crop
    window = window_at(where, cfg.reach)                            # (B, 3)  eq.23
    crop, back_crop = read(x, window, G)                            # (B, C, G, G)  eq.23
    like, back_like = alike(crop, tint[:, :, None, None])           # (B, 1, G, G)  eq.23
    free, back_free = read(left, window, G, want_image=True)        # (B, 1, G, G)  eq.23
    seen = xp.concatenate([crop, like, free], 1)                    # (B, C+2, G, G)
    e, back_e = halvings(p, "crop", seen)                           # (B, E)  eq.4
    known = xp.concatenate([e, tint, where], 1)
    h, back_h = dense(p, "read", known, leaky)                      # (B, U)  eq.4
    u, back_u = linear(p, "head", h)                                # (B, 2K+3)  eq.4
    log_std, back_clamp = clamp(u[:, K:2 * K], -5, 1)               # (B, K)  eq.4
    where = where + cfg.nudge * u[:, 2 * K + 1:]                    # (B, 2)  eq.4

    def back(dmean, dlog_std, ddepth, dwhere, g):
        dnudge = cfg.nudge * dwhere                                                 # eq.4
        dlog_std = back_clamp(dlog_std)                                             # eq.4
        du = xp.concatenate([dmean, dlog_std, ddepth[:, None], dnudge], 1)          # eq.4
        dh = back_u(du, g)                                                          # eq.4
        dknown = back_h(dh, g)                                                      # eq.4
        dseen = back_e(dknown[:, :-C - 2], g)                                       # eq.4
        dleft, dwindow = back_free(dseen[:, -1:])                                   # eq.23
        dcrop = dseen[:, :C] + back_like(dseen[:, C:-1])                            # eq.23
        _, dwindow_crop = back_crop(dcrop)                                          # eq.23
        dwindow = dwindow + dwindow_crop                                            # eq.23
        return dleft, dwhere + dknown[:, -2:] + dwindow[:, 1:]

    return u[:, :K], log_std, u[:, 2 * K], where, back


def turn(p, cfg, x, left, where, tint, eps):
    """One object: looked at, again from where it seems to be; coded, drawn on the whole canvas."""
    backs = []
    for _ in range(cfg.looks):
        mean, log_std, depth, where, back_examine = examine(p, cfg, x, left, where, tint)
        backs.append(back_examine)
    z, kl, back_z = latent(mean, log_std, eps)                      # (B, K), (B,)  eq.4
    alpha, colour, back_paint = paint(p, cfg, z, where)             # (B, 1, N, N), ...  eq.5, eq.6

    def back(dalpha, dcolour, ddepth, dkl, g):
        dz, dwhere = back_paint(dalpha, dcolour, g)                                 # eq.6, eq.5
        dmean, dlog_std = back_z(dz, dkl)                                           # eq.4
        dleft = 0
        for back_examine in reversed(backs):
            dbefore, dwhere = back_examine(dmean, dlog_std, ddepth, dwhere, g)
            dleft = dleft + dbefore
            dmean, dlog_std, ddepth = map(xp.zeros_like, (dmean, dlog_std, ddepth))
        return dleft

    return alpha, colour, depth, where, z, kl, back


def turns(p, cfg, x, noise, weights):
    """Eq. 9 with a background, for objects that are found one after the other."""
    B = len(x)
    far, far_log_std, back_far = look_behind(p, cfg, x)             # (B, D), (B, D)  eq.13
    z_bg, kl_bg, back_z_bg = latent(far, far_log_std, noise.far)    # (B, D), (B,)  eq.13
    background, back_sky = draw_background(p, cfg, z_bg)            # (B, C, N, N)  eq.13
    unlike = 1 - alike(x, background)[0]                            # (B, 1, N, N)
    left, found, backs = xp.ones_like(unlike), [], []
    for j in range(cfg.objects):
        uniform = None if noise.uniform is None else noise.uniform[:, j]
        guess, tint = unexplained(x, left * unlike, uniform, cfg.sharp)     # (B, 2), (B, C)
        *one, back_turn = turn(p, cfg, x, left, guess, tint, noise.what[:, j])
        found.append(one)
        backs.append((left, one[0], back_turn))
        left = left * (1 - one[0])                                  # (B, 1, N, N)  eq.21
    alpha, colour, depth, where, z, kl = (xp.stack(a, 1) for a in zip(*found, strict=True))
    found = SimpleNamespace(alpha=alpha[:, :, 0], colour=colour, depth=depth, where=where, z=z,
                            background=background)
    error, back_error = expected_error(x, found, weights.gamma)     # (B,)  eq.9
    prior, v = kl.sum() + kl_bg.sum() + 0.5 * (depth * depth).sum(), cfg.kl_weight / B
    loss = error_weight(cfg, weights) * error.sum() / B + v * prior

    def back(g):
        scale = error_weight(cfg, weights) / B
        dalpha, dcolour, dbackground, ddepth = back_error(scale)                    # eq.9
        ddepth = ddepth + v * depth
        dleft, each = xp.zeros_like(left), xp.full(B, v, x.dtype)
        for j, (before, own, back_turn) in reversed(list(enumerate(backs))):
            down = dalpha[:, j, None] - dleft * before                              # eq.21
            dleft = dleft * (1 - own)                                               # eq.21
            dleft = dleft + back_turn(down, dcolour[:, j], ddepth[:, j], each, g)
        dz_bg = back_sky(dbackground, g)                                            # eq.13
        dfar, dfar_log_std = back_z_bg(dz_bg, each)                                 # eq.13
        back_far(dfar, dfar_log_std, g)                                             # eq.13
        g.flush()

    return loss, found, back


# ================================================================ the paper's own: networks

def block(p, name, x, act, stride=1):
    """Convolution, activation, and normalisation where p has it."""
    x, back_conv = conv(p, name, x, stride=stride)
    x, back_act = act(x)
    normed = name + ".norm.gain" in p
    if normed:
        x, back_norm = group_norm(p, name + ".norm", x, GROUPS)

    def back(dx, g):
        if normed:
            dx = back_norm(dx, g)
        return back_conv(back_act(dx), g)

    return x, back


def u_net(p, cfg, x):
    """Position logits (B, J, N*N): down to the whole, up to the pixels, with bridges across."""
    B, levels = len(x), len(cfg.unet) - 1
    h, bridges, backs_down, backs_up = x, [], [], []
    for k in range(levels):
        h, back_b = block(p, f"down.{k}", h, relu)
        bridges.append(h)
        h, back_m = max_pool(h)
        backs_down.append((back_b, back_m))
    h, back_middle = block(p, "middle", h, relu)
    for k in reversed(range(levels)):
        h, back_h = upsample(h)
        h, back_b = block(p, f"up.{k}", xp.concatenate([h, bridges[k]], 1), relu)
        backs_up.append((back_h, back_b))
    y, back_y = conv(p, "logits", h)                                # (B, J, N, N)  eq.11
    logits = y + p["guess"]                                         # (B, J, N, N)  eq.11

    def back(dlogits, g):
        own = g["guess"]
        own += dlogits.sum(0)                                                       # eq.11
        dh, dbridges = back_y(dlogits, g), []                                       # eq.11
        for back_h, back_b in reversed(backs_up):
            dh = back_b(dh, g)
            width = cfg.unet[len(dbridges)]
            dbridges.append(dh[:, -width:])
            dh = back_h(dh[:, :-width])
        dh = back_middle(dh, g)
        for (back_b, back_m), dbridge in reversed(list(zip(backs_down, dbridges, strict=True))):
            dh = back_b(back_m(dh) + dbridge, g)

    return logits.reshape(B, cfg.objects, -1), back


def stage(p, name, x):
    """Half the side; colours mixed; mixed once more, as a residual."""
    x, back_halve = block(p, name + ".halve", x, elu, 2)
    x, back_mix = block(p, name + ".mix", x, elu)
    y, back_conv = conv(p, name + ".more", x)
    y, back_act = elu(y)
    y, back_norm = group_norm(p, name + ".more.norm", x + y, GROUPS)

    def back(dy, g):
        dy = back_norm(dy, g)
        dx = dy + back_conv(back_act(dy), g)
        dx = back_mix(dx, g)
        return back_halve(dx, g)

    return y, back


def recognise(p, cfg, crop):
    """Mean and log std of z and depth, from the object's crop alone: all objects are read alike."""
    R, K = len(crop), cfg.what + 1
    h, backs = crop, []
    for k in range(len(cfg.stages) // 2):
        h, back_h = stage(p, f"stage.{k}", h)                       # eq.12
        backs.append(back_h)
    shape = h.shape
    u, back_u = linear(p, "head", h.reshape(R, -1))                 # (R, 2K+2)  eq.12
    log_std, back_clamp = clamp(u[:, K:], -5, 1)                    # (R, K+1)  eq.12

    def back(dmean, dlog_std, g):
        dlog_std = back_clamp(dlog_std)                                             # eq.12
        dh = back_u(xp.concatenate([dmean, dlog_std], 1), g).reshape(shape)         # eq.12
        for back_h in reversed(backs):
            dh = back_h(dh, g)                                                      # eq.12
        return dh

    return u[:, :K], log_std, back


def draw_canvas(p, cfg, z):
    """Colours and alpha (R, C+1, M, M) of objects."""
    R, side = len(z), cfg.patch // 4
    h, back_0 = dense(p, "object.0", z, elu)                        # (R, U)  eq.13
    h, back_1 = dense(p, "object.1", h, elu)                        # eq.13
    h, backs = h.reshape(R, -1, side, side), []
    for k in range(2):
        h, back_grow = conv_transpose(p, f"grow.{k}", h)            # eq.13
        h, back_act = elu(h)                                        # eq.13
        backs.append((back_grow, back_act))
    h, back_smooth = block(p, "smooth", h, elu)                     # eq.13
    y, back_y = block(p, "canvas", h, sigmoid)                      # (R, C+1, M, M)  eq.13

    def back(dy, g):
        dh = back_y(dy, g)                                                          # eq.13
        dh = back_smooth(dh, g)                                                     # eq.13
        for back_grow, back_act in reversed(backs):
            dh = back_act(dh)                                                       # eq.13
            dh = back_grow(dh, g)                                                   # eq.13
        dh = back_1(dh.reshape(R, -1), g)                                           # eq.13
        return back_0(dh, g)                                                        # eq.13

    return y, back


def look_behind(p, cfg, x):
    """Mean and log std of the background's code."""
    h, backs, D = x, [], cfg.background
    for k in range(5):
        h, back_h = block(p, f"far.{k}", h, relu, 2)                # eq.13
        backs.append(back_h)
    shape = h.shape
    u, back_u = mlp(p, "far.code", h.reshape(len(x), -1))           # (B, 2D)  eq.13
    log_std, back_clamp = clamp(u[:, D:], -5, 1)                    # (B, D)  eq.13

    def back(dmean, dlog_std, g):
        dlog_std = back_clamp(dlog_std)                                             # eq.13
        dh = back_u(xp.concatenate([dmean, dlog_std], 1), g).reshape(shape)         # eq.13
        for back_h in reversed(backs):
            dh = back_h(dh, g)                                                      # eq.13

    return u[:, :D], log_std, back


def draw_background(p, cfg, z):
    """Colours (B, C, N, N) behind all objects: 2 x 2 features, enlarged 2, 4 and 4 times."""
    B, side = len(z), cfg.canvas // 32
    h, back_z = dense(p, "sky", z, elu)                             # eq.13
    h, backs = h.reshape(B, 16, side, side), []
    for k, doublings in enumerate((1, 2, 2)):
        backs_up = []
        for _ in range(doublings):
            h, back_up = upsample(h)                                # eq.13
            backs_up.append(back_up)
        h, back_h = block(p, f"sky.{k}", h, sigmoid if k == 2 else elu)     # eq.13
        backs.append((backs_up, back_h))

    def back(dh, g):
        for backs_up, back_h in reversed(backs):
            dh = back_h(dh, g)                                                      # eq.13
            for back_up in reversed(backs_up):
                dh = back_up(dh)                                                    # eq.13
        return back_z(dh.reshape(B, -1), g)                                         # eq.13

    return h, back


# ================================================================ the paper's own: scene and loss

def positions(logits, uniform, temperature):
    """Gumbel-softmax samples of maps (B, J, N*N); uniform=None: the likeliest pixel alone."""
    if uniform is None:
        return (logits == logits.max(2, keepdims=True)).astype(logits.dtype), None
    gumbel = -xp.log(-xp.log(uniform))
    theta, back_theta = softmax((logits + gumbel) / temperature)    # eq.11

    def back(dtheta):
        return back_theta(dtheta) / temperature                                     # eq.11

    return theta, back


def soft_depths(alpha, depth, gamma):
    """Who is how visible: (B, J+1, N, N), the background last; sums to 1.

    The product over k != j is over hide[j, k] = 1 - alpha_k sigmoid((depth_j - depth_k) / gamma).
    """
    J = alpha.shape[1]
    others = 1 - xp.eye(J, dtype=alpha.dtype)[..., None, None]      # (J, J, 1, 1)
    nearer = logistic((depth[:, :, None] - depth[:, None]) / gamma)     # (B, J, J)
    soft = nearer[..., None, None] * others                         # (B, J, J, 1, 1)
    hide = 1 - alpha[:, None] * soft                                # (B, J, J, N, N)  eq.15
    free = 1 - alpha                                                # (B, J, N, N)  eq.15
    left = hide.prod(2)                                             # (B, J, N, N)  eq.15
    raw = xp.concatenate([alpha * left, free.prod(1)[:, None]], 1)  # (B, J+1, N, N)  eq.15
    total = raw.sum(1, keepdims=True)                               # (B, 1, N, N)
    v = raw / total                                                 # (B, J+1, N, N)  eq.15

    def back(dv):
        draw = (dv - (dv * v).sum(1, keepdims=True)) / total                        # eq.15
        dleft = draw[:, :-1] * alpha                                                # eq.15
        dalpha = draw[:, :-1] * left - draw[:, -1:] * without(free, 1)              # eq.15
        dhide = dleft[:, :, None] * without(hide, 2)                                # eq.15
        dalpha = dalpha - (dhide * soft).sum(1)                                     # eq.15
        dsoft = -(dhide * alpha[:, None]).sum((3, 4)) * others[..., 0, 0]           # eq.15
        dgap = dsoft * nearer * (1 - nearer) / gamma                                # eq.15
        return dalpha, dgap.sum(2) - dgap.sum(1)

    return v, back


def without(a, axis):
    """Products along an axis of all entries but one, for each one."""
    a = xp.moveaxis(a, axis, 0)
    parts = [xp.concatenate([a[:k], a[k + 1:]]).prod(0) for k in range(len(a))]
    return xp.moveaxis(xp.stack(parts), 0, axis)


def uneven(q, cell):
    """Eq. 16's last term: how far the mean position posterior is from uniform, cell by cell."""
    B, J, NN = q.shape
    N = int(NN**0.5)
    n = N // cell
    mean = q.mean((0, 1)).reshape(n, cell, n, cell).sum((1, 3))     # (n, n)  eq.16
    away = mean - 1 / n**2                                          # (n, n)  eq.16

    def back(dterm):
        dmean = xp.sign(away)[:, None, :, None] * dterm / (B * J)                   # eq.16
        dmap = xp.broadcast_to(dmean, (n, cell, n, cell)).reshape(NN)               # eq.16
        return xp.broadcast_to(dmap, q.shape)

    return xp.abs(away).sum(), back


def paper(p, cfg, x, noise, weights):
    """Eq. 16, per image, and its pullback into g; noise.uniform=None reads a scene, hard."""
    B, J, N, M, K = len(x), cfg.objects, cfg.canvas, cfg.patch, cfg.what
    R, v = B * J, cfg.kl_weight / B
    logits, back_logits = u_net(p, cfg, x)                          # (B, J, N*N)  eq.11
    theta, back_theta = positions(logits, noise.uniform, cfg.temperature)   # (B, J, N*N)  eq.11
    q, back_q = softmax(logits)                                     # (B, J, N*N)  eq.11
    where_map = theta.reshape(R, N, N)
    crop, back_crop = cut(xp.repeat(x, J, 0), where_map, M)         # (R, C, M, M)  eq.12
    mean, log_std, back_code = recognise(p, cfg, crop)              # (R, K+1), (R, K+1)  eq.12
    z, kl, back_z = latent(mean, log_std, noise.what.reshape(R, -1))    # (R, K+1), (R,)  eq.12
    far, far_log_std, back_far = look_behind(p, cfg, x)             # (B, D), (B, D)  eq.13
    z_bg, kl_bg, back_z_bg = latent(far, far_log_std, noise.far)    # (B, D), (B,)  eq.13
    canvas, back_canvas = draw_canvas(p, cfg, z[:, :K])             # (R, C+1, M, M)  eq.13
    background, back_sky = draw_background(p, cfg, z_bg)            # (B, C, N, N)  eq.13
    placed, back_place = place(canvas, where_map)                   # (R, C+1, N, N)  eq.14
    layers = placed.reshape(B, J, C + 1, N, N)
    colour, alpha = layers[:, :, :C], layers[:, :, C]               # ..., (B, J, N, N)
    depth, back_depth = sigmoid(z[:, K].reshape(B, J))              # (B, J)  eq.15
    seen, back_seen = soft_depths(alpha, depth, weights.gamma)      # (B, J+1, N, N)  eq.15
    share = seen[:, :, None]
    y = (share[:, :-1] * colour).sum(1) + share[:, -1] * background     # (B, C, N, N)  eq.15
    term, back_term = uneven(q, cfg.l1_cell)                        # eq.16
    away = y - x                                                    # (B, C, N, N)  eq.16
    loss = ((away * away).sum() / (2 * weights.std**2 * B) + v * (kl.sum() + kl_bg.sum())
            + cfg.l1_weight * term)
    grid = xp.asarray(cells(N), x.dtype)                            # (N*N, 2)
    found = SimpleNamespace(alpha=alpha, colour=colour, depth=z[:, K].reshape(B, J),
                            where=gemm(theta, grid), z=z[:, :K].reshape(B, J, K),
                            background=background)

    def back(g):
        dy = away / (weights.std**2 * B)                                            # eq.16
        dq = back_term(cfg.l1_weight)                                               # eq.16
        dseen = xp.concatenate([(dy[:, None] * colour).sum(2),                      # eq.15
                                (dy * background).sum(1)[:, None]], 1)
        dalpha, ddepth = back_seen(dseen)                                           # eq.15
        dz_depth = back_depth(ddepth).reshape(R, 1)                                 # eq.15
        dlayers = xp.concatenate([dy[:, None] * share[:, :-1], dalpha[:, :, None]], 2)
        dcanvas, dmap = back_place(dlayers.reshape(R, C + 1, N, N))                 # eq.14
        dz_bg = back_sky(dy * share[:, -1], g)                                      # eq.13
        dz = back_canvas(dcanvas, g)                                                # eq.13
        dfar, dfar_log_std = back_z_bg(dz_bg, xp.full(B, v, x.dtype))               # eq.13
        back_far(dfar, dfar_log_std, g)                                             # eq.13
        dmean, dlog_std = back_z(xp.concatenate([dz, dz_depth], 1),                 # eq.12
                                 xp.full(R, v, x.dtype))
        dcrop = back_code(dmean, dlog_std, g)                                       # eq.12
        dmap = dmap + back_crop(dcrop)                                              # eq.12
        dlogits = back_q(dq)                                                        # eq.11
        dlogits = dlogits + back_theta(dmap.reshape(theta.shape))                   # eq.11
        back_logits(dlogits.reshape(B, J, N, N), g)                                 # eq.11
        g.flush()

    return loss, found, back


OBJECTIVES = {"fast": fast, "turns": turns, "paper": paper}


def objective(p, cfg, x, noise, weights):
    """The loss, what was found, and the pullback into g."""
    return OBJECTIVES[cfg.formulation](p, cfg, x, noise, weights)


# ================================================================ a second look

def reconsider(p, cfg, x, v, background, weights):
    """Eq. 9 for given latents v, summed over scenes: loss, layers and the pullback into g.

    Gradients of weights go into `unused`.
    """
    B, J, N = len(x), cfg.objects, cfg.canvas
    where, z = v["where"].reshape(B * J, 2), v["z"].reshape(B * J, -1)
    alpha, colour, back_paint = paint(p, cfg, z, where)             # eq.5, eq.6
    found = SimpleNamespace(
        alpha=alpha.reshape(B, J, N, N), colour=colour.reshape(B, J, *colour.shape[1:]),
        background=background, **{name: a.copy() for name, a in v.items()})
    error, back_error = expected_error(x, found, weights.gamma)     # (B,)  eq.9
    scale = error_weight(cfg, weights)
    prior = 0.5 * (z * z).sum() + 0.5 * (found.depth * found.depth).sum()

    def back(g, unused):
        dalpha, dcolour, _, ddepth = back_error(scale)                              # eq.9
        dalpha, dcolour = dalpha.reshape(alpha.shape), dcolour.reshape(colour.shape)
        dz, dwhere = back_paint(dalpha, dcolour, unused)                            # eq.6, eq.5
        dz = dz + cfg.kl_weight * z
        ddepth = ddepth + cfg.kl_weight * found.depth
        for name, d in (("where", dwhere), ("z", dz), ("depth", ddepth)):
            g[name][...] = d.reshape(v[name].shape)

    return scale * error.sum() + cfg.kl_weight * prior, found, back


def refine(p, cfg, x, found, weights):
    """What eq. 9 likes better than the encoder's word: Adam on where, z and depth of each scene.

    No weight is changed. Places move a tenth as fast.
    """
    v = Params({name: to_host(getattr(found, name)) for name in ("where", "z", "depth")}, x.dtype)
    g, unused, adam = v.grads(), p.grads(), Optimiser(v, groups={"where": 0.1}, beta2=0.99)
    for step in range(cfg.refine):
        _, _, slope = reconsider(p, cfg, x, v, found.background, weights)
        g.zero()
        unused.zero()
        slope(g, unused)
        adam.update(g, 0.03, step + 1)
    return reconsider(p, cfg, x, v, found.background, weights)[1]


# ================================================================ which objects go together

def residual_mlp(p, name, x):
    """A hidden layer, two that add to it, and a linear one."""
    h, back_0 = dense(p, name + ".0", x, elu)
    a, back_1 = dense(p, name + ".1", h, elu)
    b, back_2 = dense(p, name + ".2", h + a, elu)
    y, back_3 = linear(p, name + ".3", h + a + b)

    def back(dy, g):
        dsum = back_3(dy, g)
        dh = dsum + back_2(dsum, g)
        dh = dh + back_1(dh, g)
        return back_0(dh, g)

    return y, back


def normal(p, name, x):
    """Mean and log std of a Gaussian, by a network. No std is far above that of all scenes, 1: for
    a scene code that no scene has, the network might ask for one that throws objects away."""
    u, back_u = residual_mlp(p, name, x)
    n = u.shape[1] // 2
    log_std, back_clamp = clamp(u[:, n:], -4, 0.5)

    def back(dmean, dlog_std, g):
        dlog_std = back_clamp(dlog_std)
        return back_u(xp.concatenate([dmean, dlog_std], 1), g)

    return u[:, :n], log_std, back


def surprise(v, mean, log_std):
    """-log N(v; mean, std^2) without its constant, summed over the last axis."""
    away = (v - mean) * xp.exp(-log_std)

    def back(d):
        d = d[:, None]
        return -d * away * xp.exp(-log_std), d * (1 - away * away)

    return (0.5 * away * away + log_std).sum(1), back


def scene_prior(p, cfg, v, eps):
    """Eq. 19, per scene, for standardised latents v: all places first, then all else."""
    B, P, half = len(v), 2 * cfg.objects, cfg.scene // 2
    where, what = v[:, :P], v[:, P:]
    mean, log_std, back_q = normal(p, "prior.scene", v)             # eq.17
    y, kl, back_y = latent(mean, log_std, eps)                      # eq.17
    m_1, s_1, back_zeta = normal(p, "prior.where", y[:, :half])     # eq.18
    m_2, s_2, back_xi = normal(p, "prior.what", xp.concatenate([y[:, half:], where], 1))    # eq.18
    nll_1, back_1 = surprise(where, m_1, s_1)                       # eq.19
    nll_2, back_2 = surprise(what, m_2, s_2)                        # eq.19
    loss = (nll_1 + nll_2 + cfg.scene_kl * kl).sum() / B            # eq.19

    def back(g):
        each = xp.full(B, 1 / B, v.dtype)                                           # eq.19
        dm_2, ds_2 = back_2(each)                                                   # eq.19
        dm_1, ds_1 = back_1(each)                                                   # eq.19
        dy_2 = back_xi(dm_2, ds_2, g)[:, :cfg.scene - half]                         # eq.18
        dy_1 = back_zeta(dm_1, ds_1, g)                                             # eq.18
        dmean, dlog_std = back_y(xp.concatenate([dy_1, dy_2], 1), cfg.scene_kl * each)  # eq.17
        back_q(dmean, dlog_std, g)                                                  # eq.17
        g.flush()

    return loss, back


def as_vectors(found):
    """Latents of scenes as rows: all places, then all codes and depths."""
    B = len(found.depth)
    return np.concatenate([found.where.reshape(B, -1), found.z.reshape(B, -1), found.depth], 1)


def imagine(p, cfg, count, rng):
    """Scenes from the generative model, as layers: with the scene prior (eq.17, 18) or without."""
    J = cfg.objects
    if cfg.prior == "none":
        where = rng.uniform(-1, 1, (count, J, 2)).astype(np.float32)
        v = rng.standard_normal((count, J, cfg.what + 1), np.float32)
        z, depth = v[..., :-1], v[..., -1]
    else:
        v = latents_of_scenes(p, cfg, count, rng)
        where, z = v[:, :2 * J].reshape(count, J, 2), v[:, 2 * J:-J].reshape(count, J, -1)
        depth = v[:, -J:]
    far = None if cfg.formulation == "fast" else rng.standard_normal((count, cfg.background),
                                                                     np.float32)
    return render(p, cfg, where, z, depth, far)


def latents_of_scenes(p, cfg, count, rng):
    """Rows as those of `as_vectors`, from the scene prior, or each number by itself."""
    half = cfg.scene // 2
    mean, std = to_host(p["prior.mean"]), to_host(p["prior.std"])

    def drawn(name, x):
        m, log_std, _ = normal(p, name, to_device(x))
        return to_host(m) + np.exp(to_host(log_std)) * rng.standard_normal(m.shape, np.float32)

    if cfg.prior == "independent":
        return mean + std * rng.standard_normal((count, len(mean)), np.float32)
    y = rng.standard_normal((count, cfg.scene), np.float32)
    where = drawn("prior.where", y[:, :half])
    what = drawn("prior.what", np.concatenate([y[:, half:], where], 1))
    return mean + std * np.concatenate([where, what], 1)


def generation(p, cfg, part=250):
    """Tables 1 and 2: generated scenes, and their objects alone over black, beside fresh ones.

    Two sets of fresh scenes are apart, too (`_floor`): no model can do better.
    """
    net, rng, n = features.load(cfg.data, cfg.canvas), np.random.default_rng(0), cfg.generated
    scenes, alone = [], []
    for start in range(0, n, part):
        found = imagine(p, cfg, min(part, n - start), rng)
        rows = np.arange(len(found.alpha))
        one = rows, rows % cfg.objects
        scenes.append(features.of(net, [compose(found)]))
        alone.append(features.of(net, [found.alpha[one][:, None] * found.colour[one]]))

    def fresh(seed, objects):
        images = (part for part, _, _ in stream(replace(cfg, objects=objects), seed, n))
        return features.of(net, images)

    real = fresh(TEST, cfg.objects)
    return {**features.compare(np.concatenate(scenes), real),
            **features.compare(np.concatenate(alone), fresh(TEST, 1), "_object"),
            **features.compare(fresh(TEST + 1, cfg.objects), real, "_floor")}


def train_prior(p, cfg, seed, batch=128, scenes=8000):
    """The second stage: latents of many scenes are inferred once, then learned from."""
    prior = Params({name: a for name, a in init(cfg, seed).items() if is_prior(name)})
    v = np.concatenate([as_vectors(infer_scenes(p, cfg, images))
                        for images, _, _ in stream(cfg, seed, scenes)])
    prior["prior.mean"][...] = to_device(v.mean(0))
    prior["prior.std"][...] = to_device(v.std(0) + 1e-3)
    v = (to_device(v) - prior["prior.mean"]) / prior["prior.std"]
    g, adam = prior.grads(), Optimiser(prior)
    for step in range(cfg.scene_steps):
        rng = np.random.default_rng([seed, 2, step])
        rows = to_device(rng.integers(0, len(v), batch))
        eps = to_device(rng.standard_normal((batch, cfg.scene), np.float32))
        _, back = scene_prior(prior, cfg, v[rows], eps)
        g.zero()
        back(g)
        adam.update(g, 1e-3 * cosine(step, cfg.scene_steps, 0.05), step + 1)
    return prior


# ================================================================ schedules, noise, scenes

def schedule(cfg, step):
    """Numbers that move while training: sigma and gamma fall by ratio, lr at the end."""
    late = max(step - cfg.lr_from * cfg.steps, 0)
    return SimpleNamespace(
        std=float(np.exp(ramp(step, 0, cfg.steps, np.log(cfg.std_first), np.log(cfg.std)))),
        gamma=float(np.exp(ramp(step, cfg.gamma_from, cfg.gamma_to, np.log(cfg.gamma_first),
                                np.log(cfg.gamma)))),
        lr=cfg.lr * min(1.0, (step + 1) / (cfg.warmup + 1))
        * cosine(late, (1 - cfg.lr_from) * cfg.steps, cfg.lr_floor))


def draw_noise(cfg, batch, seed, step, start=0, count=None):
    """All randomness of one update, keyed by (seed, step); a process takes its own rows."""
    rng = np.random.default_rng([seed, 1, step])
    own = slice(start, start + (count or batch))
    if cfg.formulation == "fast":
        what = rng.standard_normal((batch, cfg.objects, cfg.what), np.float32)
        return SimpleNamespace(what=to_device(what[own]))
    what = rng.standard_normal((batch, cfg.objects, codes(cfg)), np.float32)
    far = rng.standard_normal((batch, cfg.background), np.float32)
    places = cfg.canvas**2 if cfg.formulation == "paper" else A * A
    uniform = rng.random((batch, cfg.objects, places), np.float32).clip(1e-6, 1 - 1e-6)
    return SimpleNamespace(what=to_device(what[own]), far=to_device(far[own]),
                           uniform=to_device(uniform[own]))


def codes(cfg):
    """Dimensions of an object's code; the paper's holds its depth."""
    return cfg.what + (cfg.formulation == "paper")


def no_noise(cfg, batch):
    """Every code at its mean, every position at its likeliest pixel."""
    what = xp.zeros((batch, cfg.objects, codes(cfg)), xp.float32)
    return SimpleNamespace(what=what, far=xp.zeros((batch, cfg.background), xp.float32),
                           uniform=None)


def draw_scenes(cfg, seed, start, count):
    """Scenes start .. start + count - 1 of the endless stream `seed`."""
    return SCENES[cfg.data](cfg, seed, start, count)


# ================================================================ reading scenes, scoring

def infer_scenes(p, cfg, images):
    """Every latent at its mean, or refined, and the order of depths. Host arrays in and out."""
    x = to_device(images)
    weights = schedule(cfg, cfg.steps)
    _, found, _ = objective(p, cfg, x, no_noise(cfg, len(x)), weights)
    if cfg.refine:
        found = refine(p, cfg, x, found, weights)
    found = SimpleNamespace(**{name: to_host(a) for name, a in vars(found).items()})
    found.order = found.depth.argsort(1).argsort(1)                 # (B, J)  0 is the nearest
    found.amodal = found.alpha > SEEN                               # (B, J, N, N)
    found.modal = visible_masks(found.amodal, found.order)          # (B, J, N, N)
    found.recon = compose(found)                                    # (B, C, N, N)
    return found


def compose(found):
    """The scene painted from the farthest object to the nearest (eq.8)."""
    y, rows = found.background, np.arange(len(found.depth))
    for k in (-found.depth).argsort(1).T:
        alpha = found.alpha[rows, k][:, None]                       # (B, 1, N, N)
        y = y + alpha * (found.colour[rows, k] - y)                 # (B, C, N, N)
    return y


def in_order(found):
    """Colour and alpha (B, J, 4, N, N) and visible masks (B, J, N, N), the nearest object first."""
    B, J, N, _ = found.alpha.shape
    nearest = found.order.argsort(1)                                # (B, J)
    colour = np.broadcast_to(found.colour, (B, J, C, N, N))
    layers = np.concatenate([colour, found.alpha[:, :, None]], 2)   # (B, J, C+1, N, N)
    rows = np.arange(B)[:, None]
    return layers[rows, nearest], found.modal[rows, nearest]


def score(p, cfg, parts, overlaps=()):
    """The paper's metrics over scenes that come in parts (images, amodal, order).

    mIOU counts objects that show a pixel, aIOU all that are there; DPA pairs that overlap by 30
    pixels of 64 x 64, who is who being decided by amodal masks or (`.._modal`) by modal ones. With
    `overlaps` also the paper's Fig. 6: [so many pixels at least, DPA, DPA by modal masks, pairs].
    """
    total = dict.fromkeys(("modal", "visible", "amodal", "there", "right", "right_modal", "pairs",
                           "error", "pixels"), 0.0)
    pixel, ordered = (cfg.canvas / 64) ** 2, np.zeros((len(overlaps), 3))
    for images, amodal, order in parts:
        found = infer_scenes(p, cfg, images)
        modal, there = visible_masks(amodal, order), order >= 0
        seen = modal.any((2, 3))
        iou_modal, iou_amodal = mask_iou(modal, found.modal), mask_iou(amodal, found.amodal)
        by_modal, by_amodal = partners(iou_modal), partners(iou_amodal)
        matched = amodal, order, (by_amodal, by_modal), found.order
        right, right_modal, pairs = pairs_in_order(*matched, 30 * pixel)
        for k, overlap in enumerate(overlaps):
            ordered[k] += pairs_in_order(*matched, overlap * pixel)
        part = {"modal": taken(iou_modal, by_modal)[seen].sum(), "visible": seen.sum(),
                "amodal": taken(iou_amodal, by_amodal)[there].sum(), "there": there.sum(),
                "right": right, "pairs": pairs, "right_modal": right_modal,
                "error": ((found.recon - images) ** 2).sum(), "pixels": images.size}
        for name, x in part.items():
            total[name] += float(x)
    shares = {"modal_iou": ("modal", "visible"), "amodal_iou": ("amodal", "there"),
              "depth_accuracy": ("right", "pairs"),
              "depth_accuracy_modal": ("right_modal", "pairs"), "mse": ("error", "pixels")}
    metrics = {name: total[a] / total[b] if total[b] else None for name, (a, b) in shares.items()}
    if overlaps:
        metrics["depth_by_overlap"] = [[overlap, a / n, b / n, int(n)] for overlap, (a, b, n)
                                       in zip(overlaps, ordered.tolist(), strict=True) if n]
    return metrics


def pairs_in_order(amodal, order, matchings, found_order, overlap):
    """Of pairs that overlap so much, how many are in order with each matching; and how many."""
    counts = [depth_pairs(amodal, order, who, found_order, overlap) for who in matchings]
    return *[right for right, _ in counts], counts[0][1]


def stream(cfg, seed, total, part=250):
    """`total` scenes of a stream, a part at a time, for `score`."""
    for start in range(0, total, part):
        s = draw_scenes(cfg, seed, start, min(part, total - start))
        yield s.images, s.amodal, s.order


def evaluate(cfg, weights, path=None, data_dir=None):
    """Score weights on a scene file, or without one on fresh test scenes."""
    check(cfg)
    p = fitting(weights, init(cfg, 0))
    if path is None:
        parts = stream(cfg, TEST, cfg.test_scenes)
        metrics = {"scenes": cfg.data, **score(p, cfg, parts, OVERLAPS)}
        return metrics | (generation(p, cfg) if cfg.generated else {})
    return score(p, cfg, file_parts(cfg, path))


def file_parts(cfg, path, part=250):
    """The scenes of an npz file, checked, a part at a time."""
    N = cfg.canvas
    file = read_scenes(path, {"images": ("N", N, N, C), "amodal": ("N", "K", N, N),
                              "order": ("N", "K")})
    images = np.ascontiguousarray(np.moveaxis(as_picture(file["images"], f"{path}: images"), 3, 1))
    amodal, order = file["amodal"], file["order"]
    if amodal.shape[1] > 6:
        raise Fail(f"{path}: amodal has room for {amodal.shape[1]} objects a scene, at most 6 are "
                   "matched")
    if not np.isin(amodal, (0, 1)).all():
        raise Fail(f"{path}: amodal must be booleans")
    if not np.isin(order, np.arange(-1, amodal.shape[1])).all():
        raise Fail(f"{path}: order must be whole numbers, 0 the nearest, -1 where absent")
    for k in range(0, len(images), part):
        yield (images[k:k + part], amodal[k:k + part].astype(bool),
               order[k:k + part].astype(np.int64))


# ================================================================ training

def train(cfg, run):
    """The loop: scenes in, one update out. Everything is keyed by (seed, step)."""
    check(cfg)
    p = Params({name: a for name, a in init(cfg, run.seed).items() if not is_prior(name)})
    g = p.grads()
    adam = Optimiser(p, clip=cfg.clip, beta2=0.99)
    watched = list(stream(cfg, VALIDATION, cfg.eval_scenes))
    for step in run.steps(cfg.steps, {"params": p.flat, "m": adam.m, "v": adam.v}):
        start, count = share(cfg.batch_size)
        batch = draw_scenes(cfg, run.seed, step * cfg.batch_size + start, count)
        noise = draw_noise(cfg, cfg.batch_size, run.seed, step, start, count)
        weights = schedule(cfg, step)
        loss, _, back = objective(p, cfg, to_device(batch.images), noise, weights)
        g.zero()
        back(g)
        g.average()
        seen = run.watch(loss=float(loss), gradient=norm(g.flat))
        adam.update(g, weights.lr, step + 1)
        if run.due(step + 1, cfg.eval_every) or step + 1 == cfg.steps:
            run.log(step + 1, **seen, **score(p, cfg, watched))

    metrics = {"trained_on": cfg.data, **score(p, cfg, stream(cfg, TEST, cfg.test_scenes))}
    if is_root():
        prior = train_prior(p, cfg, run.seed)
        save_weights(run.folder / "weights.npz", p.host() | prior.host(), cfg, about=cfg.data)
        figures([run.folder], run.data_dir)
    return metrics


def load_run(folder):
    """Config and weights of a run folder."""
    config, weights, _ = load_weights(folder / "weights.npz")
    cfg = cli.from_dict(Config, config, folder / "weights.npz")
    return cfg, fitting(weights, init(cfg, 0))


def walk(p, cfg, found, steps, moving):
    """Pictures (steps, C, N, N) from scene 0 of `found` to scene 1; `moving` names what changes."""
    t, mixed = np.linspace(0, 1, steps, dtype=np.float32), {}
    for name in ("where", "z", "depth"):
        a, b = getattr(found, name)[:2]
        part = t.reshape(-1, *[1] * a.ndim)
        mixed[name] = a + (part if name in moving else 0 * part) * (b - a)
    return compose(render(p, cfg, **mixed))


def render(p, cfg, where, z, depth, far=None):
    """The generative model alone: latents (B, J, ..) to layers. Host arrays in and out.

    `far` are codes of backgrounds (B, D), by default their prior's mean.
    """
    B, J, N = *depth.shape, cfg.canvas
    z, where = to_device(z.reshape(B * J, -1)), where.reshape(B * J, 2)
    background = xp.zeros((B, C, 1, 1), z.dtype)
    if cfg.formulation != "fast":
        far = np.zeros((B, cfg.background), np.float32) if far is None else far
        background, _ = draw_background(p, cfg, to_device(far))
    if cfg.formulation != "paper":
        alpha, colour, _ = paint(p, cfg, z, to_device(where))
        colour = colour.reshape(B, J, *colour.shape[1:])
    else:
        j, i = ((where + 1) * N / 2).astype(int).clip(0, N - 1).T
        theta = np.zeros((B * J, N, N), np.float32)
        theta[np.arange(B * J), i, j] = 1
        placed, _ = place(draw_canvas(p, cfg, z)[0], to_device(theta))
        alpha, colour = placed[:, C], placed[:, :C].reshape(B, J, C, N, N)
    return SimpleNamespace(alpha=to_host(alpha).reshape(B, J, N, N), colour=to_host(colour),
                           depth=depth, background=to_host(background))


def figures(folders, data_dir=None):
    """Draw all that run folders hold: scenes of the first, curves of them all."""
    from viz import curves, depth
    from viz.scenes import samples

    runs = [load_run(folder) for folder in folders]                 # config and weights of each
    folder, (cfg, p) = folders[0], runs[0]
    images = draw_scenes(cfg, TEST, 0, 8).images
    found = infer_scenes(p, cfg, images)
    layers, modal = in_order(found)
    background = np.broadcast_to(found.background, images.shape)
    depth.decomposition(folder / "decomposition.png", images, found.recon, modal, layers,
                        background)
    depth.apart_gif(folder / "apart.gif", layers[:4], background[:4])
    pair = infer_scenes(p, cfg, images[:2])
    depth.interpolations(folder / "interpolations.png", [
        ("where", walk(p, cfg, pair, 9, ("where",))),
        ("what", walk(p, cfg, pair, 9, ("z", "depth"))),
        ("both", walk(p, cfg, pair, 9, ("where", "z", "depth")))])
    samples(folder / "samples.png", compose(imagine(p, cfg, 40, np.random.default_rng(0))))
    depth.overlap_curves(folder / "overlap.png", {
        f.name: score(q, c, stream(c, TEST, c.test_scenes), OVERLAPS)["depth_by_overlap"]
        for f, (c, q) in zip(folders, runs, strict=True)})
    curves.curves(folder / "curves.png", {f.name: f / "metrics.jsonl" for f in folders},
                  [("modal_iou", "mIOU"), ("amodal_iou", "aIOU"), ("depth_accuracy", "DPA")])


def infer(cfg, weights, files, out):
    """The objects of each picture, the nearest first, in its own pixels; each complete as a PNG."""
    import imageio.v3 as imageio

    from viz.depth import overlay

    check(cfg)
    p, results = fitting(weights, init(cfg, 0)), []
    for path in files:
        image, to_picture = read_picture(path, cfg.canvas, C)
        found = infer_scenes(p, cfg, image[None])
        layers, modal = in_order(found)
        name, half, objects = Path(path).name, cfg.canvas / 2, []
        overlay(Path(out) / f"{name}.objects.png", image, modal[0], layers[0])
        for rank, j in enumerate(found.order[0].argsort()):
            box = ink_boxes(found.alpha[0, j, None], SEEN)
            if np.isnan(box).any():
                continue                                            # nothing is drawn: not there
            x, y = (found.where[0, j] + 1) * half
            appearance = Path(out) / f"{name}.object{rank + 1}.png"
            with whole_file(appearance) as file:
                imageio.imwrite(file, to_bytes(np.moveaxis(layers[0, rank], 0, 2)),
                                extension=".png")
            objects.append({"depth_rank": rank, "position": to_picture([x, y, x, y])[:2],
                            "box": to_picture(box), "depth": round(float(found.depth[0, j]), 3),
                            "appearance": str(appearance)})
        results.append({"file": str(path), "overlay": str(Path(out) / f"{name}.objects.png"),
                        "objects": objects})
    return {"pictures": results}


def to_bytes(images):
    return (images * 255).round().clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    cli.main(__doc__, Config, PRESETS, train=train, evaluate=evaluate, infer=infer, figures=figures,
             adjustable=("data", "test_scenes", "refine", "generated", "prior"))
