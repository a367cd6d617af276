"""IODINE (Greff et al., 2019): segment a scene into objects by refining a guess, without labels.

    python iodine_tetris.py           trains, scores on 320 fresh scenes, draws figures and a GIF

Each of K slots holds a guess of one object. The network that improves the guesses *reads* the
gradient of the loss with respect to them, so the forward pass below calls a pullback at every
iteration. The model, with the numbers that tag the lines (forward and backward alike):

    eq.1   q(z_k | x) = N(mean_k, std_k^2), lambda_k = (mean_k, log std_k); lambda^0 is learned
    eq.2   (mu_k, l_k) = decode(z_k), masks m_k = softmax_k(l_k)         what, and where
    eq.3   p(x | z) = prod_i sum_k m_ik N(x_i; mu_ik, sigma^2)           each pixel has one owner
    eq.4   L = sum_k KL(q(z_k | x) || N(0, 1)) - v log p(x | z)          minus the bound; v = 1
    eq.5   a_k = (x, mu_k, l_k, m_k, posterior of the mask, LN dL/dmu_k, LN dL/dl_k,
                  LN log p(x | z), LN log p(x | z without k), coordinates)
    eq.6   lambda_k <- lambda_k + refine(a_k, lambda_k, LN dL/dlambda_k)
    eq.7   loss = sum_t w_t L^t, t = 0..T                                late guesses count more

LN is layer normalisation. What bears an LN is a fact for the next iteration: no gradient goes into
it (it would need second derivatives, and the paper stops it too). With `--backprop steps` all that
the refinement reads is a fact, and lambda^t = lambda^0 + the sum of the steps is what is left to
differentiate: eq.2 and eq.3 then see a single backward pass, the one in the forward pass.

Departures from the paper, each a flag (`--preset paper` has none of them):
the decoder is separable, or a patch, not a broadcast decoder of convolutions; sigma begins large
and falls; the refinement's last image is flattened, not averaged; inputs are differentiated as in
`steps`; to score and draw, scenes are read with less noise than in training, and at last with none.
With `--geco` v is learned: it grows while log p is not what was asked for.
Always: gradients by the mask's logits instead of the mask, as the released code has it; two waves
along each axis beside the constant as coordinates; layer normalisation without gain and offset.

Dimension key: B batch, K slots, N = B K, T refinements, C channels, S canvas side, Z latents,
F features (broadcast decoder), G side of the patch, V hidden units of the others, R rank of the
separable decoder, M = 2 C + 6 maps that the refinement reads, Q features of its convolutions, s
their side after the first, U its hidden units.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from common.backend import gemm, to_device, to_host, xp  # before NumPy: sets threads, BLAS kernels

import numpy as np

from common import cli, shapes
from common.conv import broadcast_conv, conv, layer_norm
from common.errors import Fail
from common.files import as_picture, read_picture, read_scenes
from common.metrics import adjusted_rand_index
from common.mixture import KINDS, density, mixture
from common.ops import clamp, dense, elu, latent, leaky_relu, linear, lstm, mlp, softmax_back
from common.optim import Optimiser, cosine, norm, ramp
from common.params import Params, fitting
from common.processes import is_root, share
from common.store import load_weights, save_weights

FIXED = {"tetris": 35, "shapes": 28}        # canvases that cannot be chosen
VALIDATION, TEST = 1_000_001, 1_000_002     # seeds of the streams that no training run draws from
DOME = 5.0                  # how much more a new slot wants the middle of its patch (mask logits)
LONG, COMPARED = 15, 100    # refinements and scenes of the figures that compare
VECTORS = ("posterior", "posterior-gradient")
READERS = {                 # the inputs of eq.5 and eq.6, as the layers that read them find them
    "refine.image": ("image", "coordinates"),
    "refine.maps": ("means", "logits", "mask", "mask-posterior", "means-gradient",
                    "logits-gradient", "likelihood", "leave-one-out"),
    "refine.mix": VECTORS, "refine.step": VECTORS}
INPUTS = (*READERS["refine.image"], *READERS["refine.maps"], *VECTORS)


# ================================================================ configuration

@dataclass(frozen=True)
class Config:
    steps: int = cli.option(7500, "optimiser updates", low=1)
    batch_size: int = cli.option(16, "scenes per update", low=1)
    data: str = cli.option("tetris", "what the scenes show",
                           choices=("tetris", "dsprites", "binary", "shapes"))
    canvas: int = cli.option(35, "side of the scene in pixels (tetris: 35, shapes: 28)", low=8)
    ground: str = cli.option("black", "what is subtracted from images and added to what is drawn; "
                             "median: its median colour", choices=("black", "median"))
    objects: tuple[int, ...] = cli.option((3,), "object counts of a scene", low=1, high=15)
    slots: int = cli.option(4, "K: slots, one of them for the background", low=2, high=16)
    iterations: int = cli.option(4, "T: refinements while training", low=1, high=50)
    test_iterations: int = cli.option(12, "refinements when scoring and drawing", low=1, high=50)
    noise: tuple[float, float] = cli.option(
        (0.7, 0.0), "share of the posterior's standard deviations that is left when scoring and "
        "drawing, in the first three quarters of the refinements and in the last (1 1: as the "
        "paper, and as while training)", low=0.0, high=1.0)
    readings: int = cli.option(1, "how often a scene is read when scoring and drawing; the reading "
                               "with the largest ELBO counts", low=1, high=50)
    latents: int = cli.option(64, "dimensions of z_k", low=1)
    decoder: str = cli.option("separable", "separable: products of row and column profiles; "
                              "patch: a small picture at a place; broadcast: the paper's",
                              choices=("separable", "patch", "broadcast"))
    rank: int = cli.option(32, "separable: number of products", low=1)
    decoder_layers: int = cli.option(1, "separable, patch: hidden layers", low=1)
    decoder_units: int = cli.option(256, "separable, patch: their units", low=1)
    patch: int = cli.option(16, "patch: its side in pixels", low=2)
    masks: str = cli.option("free", "patch: how much of it a slot wants; round: domes of three "
                            "widths", choices=("free", "round"))
    features: int = cli.option(32, "broadcast: channels", low=1)
    layers: int = cli.option(4, "broadcast: convolutions before the last", low=1)
    kernel: int = cli.option(5, "broadcast: side of the kernels", choices=(3, 5))
    refine_features: int = cli.option(16, "channels of the refinement's convolutions", low=1)
    refine_kernel: int = cli.option(3, "side of their kernels", choices=(3, 5))
    pool: str = cli.option("flatten", "how the refinement's last image becomes a vector",
                           choices=("flatten", "average"))
    units: int = cli.option(128, "hidden units of the refinement", low=1)
    lstm: bool = cli.option(False, "the refinement remembers earlier iterations")
    activation: str = cli.option("elu", "of all layers", choices=("elu", "leaky"))
    components: str = cli.option("gaussian", "eq.3; composite: one Gaussian around sum_k m_k mu_k",
                                 choices=KINDS)
    sigma_first: float = cli.option(0.5, "sigma of eq.3 at the start", low=1e-3)
    sigma: float = cli.option(0.3, "sigma of eq.3 at the end, and when scoring", low=1e-3)
    sigma_from: float = cli.option(0.5, "share of the updates after which sigma begins to move",
                                   low=0.0, high=1.0)
    sigma_to: float = cli.option(0.95, "share of the updates after which it has arrived",
                                 low=0.0, high=1.0)
    geco: float = cli.option(0.0, "squared error of a pixel at which KL and likelihood weigh the "
                             "same; above it the likelihood gains weight, below it loses (0: off)",
                             low=0.0)
    backprop: str = cli.option("steps", "all: as the paper; steps: what the refinement reads is a "
                               "fact, only the sum of its steps is differentiated",
                               choices=("steps", "all"))
    without: tuple[str, ...] = cli.option((), "what the refinement does not read (eq.5, eq.6)",
                                          choices=INPUTS)
    lr: float = cli.option(1e-3, "peak learning rate (Adam)", low=0.0)
    lr_floor: float = cli.option(0.03, "share of lr that is left at the end", low=0.0, high=1.0)
    warmup: int = cli.option(100, "updates of linear warm-up", low=0)
    decoder_lr: float = cli.option(2.0, "learning rate of the decoder, as a multiple", low=0.0)
    clip: float = cli.option(5.0, "largest norm of the gradient", low=1e-9)
    eval_every: int = cli.option(250, "updates between two lines of metrics", low=1)
    eval_scenes: int = cli.option(80, "validation scenes for each line of metrics", low=1)
    test_scenes: int = cli.option(320, "fresh scenes for the final score", low=1)


PRESETS = {
    "default": {},
    "quick": {"steps": 600, "eval_every": 200},
    "long": {"steps": 20_000, "test_iterations": 20, "eval_every": 2000},
    "dsprites": {"steps": 3000, "data": "dsprites", "canvas": 32, "ground": "median",
                 "objects": (2, 3, 4, 5), "slots": 6, "test_iterations": 20, "decoder_layers": 3,
                 "sigma_first": 0.35, "sigma": 0.5, "sigma_from": 0.16, "sigma_to": 0.26,
                 "decoder_lr": 4.0},
    "binary": {"steps": 3000, "data": "binary", "canvas": 32, "objects": (2, 3),
               "test_iterations": 20, "decoder": "patch", "masks": "round", "sigma": 0.5,
               "geco": 0.03, "decoder_lr": 4.0},
    "shapes": {"steps": 7000, "data": "shapes", "canvas": 28, "slots": 6, "test_iterations": 20,
               "decoder": "patch", "patch": 14, "sigma": 0.5, "geco": 0.01, "decoder_lr": 4.0},
    "paper": {"steps": 1_000_000, "batch_size": 32, "iterations": 5, "test_iterations": 5,
              "noise": (1.0, 1.0), "decoder": "broadcast", "refine_features": 32,
              "refine_kernel": 5, "pool": "average", "sigma_first": 0.1, "sigma": 0.1,
              "backprop": "all", "lr": 3e-4, "lr_floor": 1.0, "warmup": 0, "decoder_lr": 1.0,
              "eval_every": 2000},
}
ADJUSTABLE = ("slots", "test_iterations", "noise", "readings", "objects", "sigma", "test_scenes")
ACTIVATIONS = {"elu": elu, "leaky": leaky_relu}


def channels(cfg):
    return 1 if cfg.data in ("binary", "shapes") else 3


# ================================================================ parameters

def init(cfg, seed):
    """Normal weights scaled by the square root of the fan-in; the flat vector keeps this order."""
    rng = np.random.default_rng([seed, 0])
    C, S, Z, U, Q, k = (channels(cfg), cfg.canvas, cfg.latents, cfg.units, cfg.refine_features,
                        cfg.refine_kernel)
    arrays = {}

    def weight(name, shape, fan_in, gain, bias):
        arrays[name + ".W"] = rng.standard_normal(shape) * (gain / np.sqrt(fan_in))
        if bias is not None:
            arrays[name + ".b"] = np.full(bias, 0.0)

    def layer(name, n_in, n_out, gain=1.0):
        weight(name, (n_in, n_out), n_in, gain, n_out)

    def kernel(name, n_in, n_out, k, gain=1.0, bias=True):
        weight(name, (n_out, n_in, k, k), n_in * k * k, gain, n_out if bias else None)

    if cfg.decoder != "broadcast":
        V, last = cfg.decoder_units, f"decode.{cfg.decoder_layers}"
        layer("decode.0", Z, V, 1.4)
        for i in range(1, cfg.decoder_layers):
            layer(f"decode.{i}", V, V, 1.2)
    if cfg.decoder == "separable":
        R, n = cfg.rank, 2 * cfg.rank * S                           # profiles, then colours
        layer(last, V, n + R * (C + 1))
        arrays[last + ".b"][n:] = rng.standard_normal(R * (C + 1))
    elif cfg.decoder == "patch":
        G = cfg.patch
        own = G * G if cfg.masks == "free" else 3                   # numbers that make the mask
        layer(last, V, 3 + C + C * G * G + own, 0.4)
        waves = np.cos(np.pi / 2 * np.outer(np.arange(4), np.linspace(0, 2, G)))
        forms = np.einsum("vcmn,mi,nj->vcij", rng.standard_normal((V, C + 1, 4, 4)), waves, waves)
        forms = (0.5 / V**0.5 * dome(G) * forms).reshape(V, -1)     # at first: smooth and round
        arrays[last + ".W"][:, C + 3:C + 3 + C * G * G] = forms[:, :C * G * G]
        if cfg.masks == "free":
            arrays[last + ".W"][:, -own:] = forms[:, C * G * G:]
            arrays[last + ".b"][-own:] = DOME * dome(G).ravel()
        else:
            arrays[last + ".b"][-1] = DOME                          # of the widest
    else:
        F, k_d = cfg.features, cfg.kernel
        for i in range(cfg.layers):
            kernel(f"decode.{i}", F if i else Z + 2, F, k_d)
        kernel(f"decode.{cfg.layers}", F, C + 1, k_d, 0.5)
    maps, fixed = 2 * C + 6, C + coordinates(S).shape[0]
    kernel("refine.image", fixed, Q, k)
    kernel("refine.maps", maps, Q, k, bias=False)
    kernel("refine.1", Q, Q, k)
    kernel("refine.2", Q, Q, k)
    seen = Q * (-(-S // 8)) ** 2 if cfg.pool == "flatten" else Q
    layer("refine.mix", seen + 4 * Z, U)
    if cfg.lstm:
        weight("refine.lstm.x", (U, 4 * U), U, 1.0, 4 * U)
        arrays["refine.lstm.x.b"][U:2 * U] = 1.0                    # forget gate
        weight("refine.lstm.h", (U, 4 * U), U, 1.0, None)
    layer("refine.step", U + 4 * Z, 2 * Z, 0.1)
    arrays["start.b"] = np.zeros(2 * Z)                             # lambda^0 begins as N(0, 1)
    if cfg.geco:
        arrays["geco.b"] = np.zeros(1)                              # log v of eq.4
    return unread(cfg, arrays)


def unread(cfg, arrays):
    """Zero in all weights, or gradients, that read one of the inputs `--without`."""
    C, Z = channels(cfg), cfg.latents
    widths = dict.fromkeys(INPUTS, 1) | dict.fromkeys(VECTORS, 2 * Z)
    widths |= {"image": C, "means": C, "means-gradient": C, "coordinates": len(coordinates(1))}
    for layer, names in READERS.items():
        W = arrays[layer + ".W"]
        W = W.swapaxes(0, 1) if W.ndim == 4 else W[-4 * Z:]         # inputs first; vectors are last
        for name in names:
            if name in cfg.without:
                W[:widths[name]] = 0
            W = W[widths[name]:]
    return arrays


def coordinates(size):
    """A constant and waves of two lengths along each axis: (9, S, S)."""
    u = np.linspace(-1, 1, size) * np.pi / 2
    waves = [f(n * u) for n in (1, 2) for f in (np.cos, np.sin)]
    rows = [np.broadcast_to(wave[:, None], (size, size)) for wave in waves]
    return np.stack([np.full((size, size), 0.5), *rows, *[row.T for row in rows]])


# ================================================================ decode: from a latent to a layer

def decode_separable(p, cfg, z):
    """Each layer is a sum of R products: a colour, a profile along the rows, one along the columns.

    A tetromino is the sum of a few such products, for its blocks lie in rows and columns.
    """
    N, R, S = len(z), cfg.rank, cfg.canvas
    a, back_a = mlp(p, "decode", z, ACTIVATIONS[cfg.activation])    # (N, (2*S+C+1)*R)
    rows = a[:, :S * R].reshape(N, 1, S, R) * (0.5 / R**0.5)        # (N, 1, S, R)
    columns = a[:, S * R:2 * S * R].reshape(N, R, S)                # (N, R, S)
    colours = a[:, 2 * S * R:].reshape(N, -1, 1, R)                 # (N, C+1, 1, R)
    left = (colours * rows).reshape(N, -1, R)                       # (N, (C+1)*S, R)
    y = gemm(left, columns).reshape(N, -1, S, S)                    # (N, C+1, S, S)

    def back(dy, g):
        dy = dy.reshape(N, -1, S)                                   # (N, (C+1)*S, S)
        dcolumns = gemm(left.swapaxes(1, 2), dy)                    # (N, R, S)
        dleft = gemm(dy, columns.swapaxes(1, 2)).reshape(N, -1, S, R)   # (N, C+1, S, R)
        drows = (colours * dleft).sum(1) * (0.5 / R**0.5)           # (N, S, R)
        dcolours = (rows * dleft).sum(2)                            # (N, C+1, R)
        da = xp.concatenate([d.reshape(N, -1) for d in (drows, dcolumns, dcolours)], 1)
        return back_a(da, g)

    return y, back


def decode_patch(p, cfg, z):
    """A small picture, laid around a place; further away a layer is flat.

    What an object looks like is so learned once for all places.
    """
    N, G, S, C = len(z), cfg.patch, cfg.canvas, channels(cfg)
    a, back_a = mlp(p, "decode", z, ACTIVATIONS[cfg.activation])    # (N, ...)
    patch = a[:, C + 3:]                                            # (N, ...)
    if cfg.masks == "round":
        domes = xp.asarray(three_domes(G), z.dtype)                 # (3, G*G)
        patch = xp.concatenate([patch[:, :-3], gemm(patch[:, -3:], domes)], 1)
    patch = patch.reshape(N, -1, G, G)                              # (N, C+1, G, G)
    columns, back_columns = tents(a[:, 1], S, G)                    # (N, 1, S, G)
    rows, back_rows = tents(a[:, 0], S, G)                          # (N, 1, S, G)
    wide = gemm(patch, columns.swapaxes(2, 3))                      # (N, C+1, G, S)
    y = gemm(rows, wide) + a[:, 2:C + 3, None, None]                # (N, C+1, S, S)

    def back(dy, g):
        dflat, dwide = dy.sum((2, 3)), gemm(rows.swapaxes(2, 3), dy)    # (N, C+1), (N, C+1, G, S)
        down = back_rows(gemm(dy, wide.swapaxes(2, 3)))             # (N, 1)
        across = back_columns(gemm(dwide.swapaxes(2, 3), patch))    # (N, 1)
        dpatch = gemm(dwide, columns).reshape(N, -1)                # (N, (C+1)*G*G)
        if cfg.masks == "round":
            dpatch = xp.concatenate([dpatch[:, :-G * G], gemm(dpatch[:, -G * G:], domes.T)], 1)
        return back_a(xp.concatenate([down, across, dflat, dpatch], 1), g)

    return y, back


def dome(side, width=1.0):
    """1 in the middle of a patch, 0 from `width` times half its side on: (side, side)."""
    line = np.linspace(-1, 1, side) / width
    return np.maximum(1 - line[:, None] ** 2 - line**2, 0)


def three_domes(side):
    """What a round mask is a sum of, from narrow to wide: (3, side * side)."""
    return np.stack([dome(side, width).ravel() for width in (0.4, 0.7, 1.0)])


def tents(place, S, G):
    """How much of each of G cells around a place (-1 to 1) each of S pixels shows: (N, 1, S, G)."""
    middle = (place[:, None, None, None] + 1) * ((S - 1) / 2) - (G - 1) / 2     # (N, 1, 1, 1)
    pixels = xp.arange(S, dtype=place.dtype)[:, None] - xp.arange(G, dtype=place.dtype)
    away = pixels - middle                                          # (N, 1, S, G)

    def back(d):
        """d: of what each channel reads, (N, C+1, S, G)."""
        slope = xp.sign(away) * (xp.abs(away) < 1)                  # (N, 1, S, G)
        return (d * slope).sum((1, 2, 3))[:, None] * ((S - 1) / 2)  # (N, 1)

    return xp.maximum(1 - xp.abs(away), 0), back


def decode_broadcast(p, cfg, z):
    """The paper's: the latent at every pixel, beside the pixel's coordinates; then convolutions."""
    act, last = ACTIVATIONS[cfg.activation], f"decode.{cfg.layers}"
    line = xp.linspace(-1, 1, cfg.canvas, dtype=z.dtype)
    place = xp.stack(xp.meshgrid(line, line, indexing="ij"))        # (2, S, S)
    y, back_0 = broadcast_conv(p, "decode.0", z, place, act)        # (N, F, S, S)
    backs = []
    for i in range(1, cfg.layers):
        y, back_i = conv(p, f"decode.{i}", y, act=act)              # (N, F, S, S)
        backs.append(back_i)
    y, back_last = conv(p, last, y)                                 # (N, C+1, S, S)

    def back(dy, g):
        dy = back_last(dy, g)
        for back_i in reversed(backs):
            dy = back_i(dy, g)
        return back_0(dy, g)

    return y, back


DECODERS = {"separable": decode_separable, "patch": decode_patch, "broadcast": decode_broadcast}


# ================================================================ the bound, and its pullback

def bound(p, cfg, x, lam, eps, sigma):
    """L of every scene (eq.4) for the guesses lam, and all that was decoded on the way."""
    B, Z = len(x), cfg.latents
    log_std, back_clamp = clamp(lam[:, Z:], -6, 2)                  # (N, Z)  eq.1
    z, kl, back_z = latent(lam[:, :Z], log_std, eps)                # (N, Z), (N,)  eq.1
    y, back_y = DECODERS[cfg.decoder](p, cfg, z)                    # (N, C+1, S, S)  eq.2
    pixels = mixture(x, y.reshape(B, -1, *y.shape[1:]), sigma, cfg.components)      # eq.3
    kl = kl.reshape(B, -1).sum(1)                                   # (B,)
    log_p = pixels.log_p.sum((1, 2))                                # (B,)
    slope, v = pixels.slope.reshape(y.shape), 1.0                   # (N, C+1, S, S)  eq.3
    if cfg.geco:
        v = xp.exp(p["geco.b"])                                     # eq.4
        slope = v * slope                                           # (N, C+1, S, S)  eq.3
    found = SimpleNamespace(bound=kl - v * log_p, elbo=log_p - kl, log_p=log_p, kl=kl, lam=lam, y=y,
                            slope=slope, pixels=pixels, sigma=sigma)    # eq.4

    def back(dbound, dy, g):
        """dbound: a number, of each scene's L; dy: what the decodes receive from being read."""
        if dy is None:                                              # they are read as facts
            return 0.0
        dkl = xp.full(len(z), dbound, z.dtype)                      # (N,)  eq.4
        dy = dy - dbound * slope                                    # (N, C+1, S, S)  eq.3
        dz = back_y(dy, g)                                          # (N, Z)  eq.2
        dmean, dlog_std = back_z(dz, dkl)                           # (N, Z), (N, Z)  eq.1
        dlog_std = back_clamp(dlog_std)                             # (N, Z)  eq.1
        return xp.concatenate([dmean, dlog_std], 1)

    return found, back


def look(p, cfg, x, lam, eps, sigma, weight, g):
    """Where do the guesses stand, and which way is down? The forward pass calls a pullback.

    It is asked for `weight` times the gradient, so that g receives what this look's share in the
    loss (eq.7) owes to the decoder's weights: training needs no second pass through eq.2 and eq.3.
    """
    found, back_bound = bound(p, cfg, x, lam, eps, sigma)
    found.dlam = back_bound(weight, 0.0, g) / weight                # (N, 2*Z)
    return found, back_bound


# ================================================================ refine: from gradients to a step

def normal(a):
    """Layer normalisation of each slot's facts; a learned gain is the next layer's business."""
    return layer_norm({}, "", a, tuple(range(1, a.ndim)))[0]


def facts(x, found):
    """The inputs that bear an LN, of eq.5 and eq.6. No gradient goes into them."""
    N, C, S = len(found.y), x.shape[1], x.shape[2]
    log_p = normal(found.pixels.log_p[:, None])                     # (B, 1, S, S)
    images = [normal(-found.slope[:, :C]), normal(-found.slope[:, C:]),
              xp.repeat(log_p, N // len(x), 0), normal(found.pixels.without.reshape(N, 1, S, S))]
    return xp.concatenate(images, 1), normal(found.dlam)            # (N, C+3, S, S), (N, 2*Z)


def inputs(cfg, x, found):
    """The images that the refinement reads about each slot (eq.5), and LN dL/dlambda."""
    N, C, pixels = len(found.y), x.shape[1], found.pixels
    noted, dlam = facts(x, found)                                   # (N, C+3, S, S), (N, 2*Z)
    owners = xp.stack([pixels.mask, pixels.posterior], 2)           # (B, K, 2, S, S)
    maps = xp.concatenate([found.y, owners.reshape(N, 2, *x.shape[2:]), noted], 1)  # (N, M, S, S)

    def back(dmaps):
        if dmaps is None:
            return None
        dmaps = dmaps.reshape(len(x), -1, *dmaps.shape[1:])         # (B, K, M, S, S)
        dy = dmaps[:, :, :C + 1].copy()                             # (B, K, C+1, S, S)
        dmask, dposterior = dmaps[:, :, C + 1], dmaps[:, :, C + 2]  # (B, K, S, S), (B, K, S, S)
        y = found.y.reshape(dy.shape)                               # (B, K, C+1, S, S)
        _, de_dmean = density(x, y[:, :, :C], found.sigma, cfg.components)
        dy[:, :, C] += softmax_back(dmask, pixels.mask, 1)
        dy[:, :, :C] += softmax_back(dposterior, pixels.posterior, 1)[:, :, None] * de_dmean
        return dy.reshape(found.y.shape)

    return maps, dlam, back


def refine(p, cfg, still, maps, lam, dlam, state):
    """A step for every slot's lambda (eq.6), from its images and from the gradient."""
    B, N, act = len(still), len(lam), ACTIVATIONS[cfg.activation]
    u, back_maps = conv(p, "refine.maps", maps, 2, want_dx=cfg.backprop == "all")   # (N, Q, s, s)
    u = (u.reshape(B, -1, *u.shape[1:]) + still[:, None]).reshape(u.shape)      # (N, Q, s, s)
    v, back_v = act(u)                                              # (N, Q, s, s)
    v, back_1 = conv(p, "refine.1", v, 2, act=act)                  # (N, Q, ...)
    v, back_2 = conv(p, "refine.2", v, 2, act=act)                  # (N, Q, ...)
    w = v.reshape(N, -1) if cfg.pool == "flatten" else v.mean((2, 3))   # (N, ...)
    vectors = xp.concatenate([lam, dlam], 1)                        # (N, 4*Z)
    h, back_h = dense(p, "refine.mix", xp.concatenate([w, vectors], 1), act)    # (N, U)
    if cfg.lstm:
        h, c, back_lstm = lstm(p, "refine.lstm", 0.0, h, *state)    # (N, U), (N, U)
        state = h, c
    step, back_step = linear(p, "refine.step", xp.concatenate([h, vectors], 1))     # (N, 2*Z)

    def back(dstep, dstate, g):
        U, Q = h.shape[1], w.shape[1]
        d = back_step(dstep, g)                                     # (N, U+4*Z)
        dh, dvectors = d[:, :U], d[:, U:]                           # (N, U), (N, 4*Z)
        if cfg.lstm:
            _, dh, *dstate = back_lstm(dh + dstate[0], dstate[1], g)
        d = back_h(dh, g)                                           # (N, ...)
        dw, dvectors = d[:, :Q], dvectors + d[:, Q:]                # (N, ...), (N, 4*Z)
        if cfg.pool == "flatten":
            dv = dw.reshape(v.shape)                                # (N, Q, ...)
        else:
            pixels = v.shape[2] * v.shape[3]
            dv = xp.broadcast_to(dw[:, :, None, None] / pixels, v.shape)
        dv = back_2(dv, g)                                          # (N, Q, ...)
        dv = back_1(dv, g)                                          # (N, Q, s, s)
        du = back_v(dv)                                             # (N, Q, s, s)
        dmaps = back_maps(du, g)
        dstill = du.reshape(B, -1, *du.shape[1:]).sum(1)            # (B, Q, s, s)
        return dstill, dmaps, dvectors[:, :lam.shape[1]], dstate

    return step, state, back


# ================================================================ iterate

def iteration(p, cfg, x, still, lam, state, eps, sigma, weight, noted):
    """Look (eq.1 to 4, and the gradient), take note (eq.5), take a step (eq.6)."""
    found, back_found = look(p, cfg, x, lam, eps, sigma, weight, noted)     # eq.4
    maps, dlam, back_maps = inputs(cfg, x, found)                   # (N, M, S, S), (N, 2*Z)  eq.5
    step, state, back_step = refine(p, cfg, still, maps, lam, dlam, state)  # eq.6
    better = lam + step                                             # (N, 2*Z)  eq.6

    def back(dbetter, dstate, g):
        dstill, dmaps, dlam, dstate = back_step(dbetter, dstate, g)     # eq.6
        dy = back_maps(dmaps)                                       # eq.5
        dread = back_found(0.0, dy, g)                              # eq.4
        if cfg.backprop == "all":
            dbetter = dbetter + dlam + dread
        return dstill, dbetter, dstate

    return found, better, state, back


def unroll(p, cfg, x, noise, sigma, weights):
    """T refinements from lambda^0, and what was found at t = 0..T.

    noise (T+1, N, Z); weights are those of eq.7, above zero, for each scene.
    """
    N, U, T = noise.shape[1], cfg.units, len(noise) - 1
    noted = p.grads()                               # of the decoder, as the loss will weigh it
    fixed = xp.asarray(coordinates(x.shape[2]), x.dtype)
    fixed = xp.concatenate([x, xp.broadcast_to(fixed, (len(x), *fixed.shape))], 1)
    still, back_still = conv(p, "refine.image", fixed, 2, want_dx=False)    # (B, Q, s, s)  eq.5
    lam = xp.repeat(p["start.b"][None], N, 0)                       # (N, 2*Z)  eq.1
    state = xp.zeros((N, U), x.dtype), xp.zeros((N, U), x.dtype)    # (N, U), (N, U)
    traces, backs = [], []
    for t in range(T):
        found, lam, state, back_t = iteration(p, cfg, x, still, lam, state, noise[t], sigma,
                                              weights[t], noted)
        traces.append(found)
        backs.append(back_t)
    traces.append(look(p, cfg, x, lam, noise[T], sigma, weights[T], noted)[0])

    def back(g):
        """Each lambda^t receives from its own L^t, and from lambda^{t+1}."""
        dstill, dstate = 0.0, [xp.zeros_like(s) for s in state]
        dlam = weights[T] * traces[T].dlam
        for back_t, w, found in reversed(list(zip(backs, weights[:T], traces[:T], strict=True))):
            dstill_t, dlam, dstate = back_t(dlam, dstate, g)
            dlam, dstill = dlam + w * found.dlam, dstill + dstill_t
        g["start.b"][...] += dlam.sum(0)                                            # eq.1
        back_still(dstill, g)                                                       # eq.5
        if cfg.geco:                                                # the other way: v grows
            g["geco.b"][...] += (traces[T].log_p - enough(cfg, x, sigma)).mean()
        g.flush()
        noted.flush()
        g.flat += noted.flat

    return traces, back


def enough(cfg, x, sigma):
    """GECO: log p of a scene whose pixels have the squared error that is asked for."""
    one = cfg.geco / (2 * sigma**2) + np.log(sigma) + 0.5 * np.log(2 * np.pi)
    return -one * (x.size // len(x))


def objective(p, cfg, x, noise, weights):
    """What training minimises, the mean over scenes of sum_t w_t L^t, and its pullback."""
    traces, back_unroll = unroll(p, cfg, x, noise, weights.sigma,
                                 [w / len(x) for w in weights.iterations])
    loss = sum(w * found.bound.mean() for w, found in zip(weights.iterations, traces, strict=True))
    return loss, back_unroll


# ================================================================ schedules, noise, scenes

def schedule(cfg, step):
    """Numbers that move while training, and the weights of eq.7 (little for the first guess)."""
    moved = ramp(step, cfg.sigma_from * cfg.steps, cfg.sigma_to * cfg.steps, 0.0, 1.0)
    sigma = cfg.sigma_first * (cfg.sigma / cfg.sigma_first) ** moved
    weights = np.linspace(0.01, 1, cfg.iterations + 1).tolist()
    return SimpleNamespace(sigma=sigma, iterations=weights,
                           lr=cfg.lr * cosine(step, cfg.steps, cfg.lr_floor, cfg.warmup))


def draw_noise(cfg, batch, iterations, seed, step, start=0, count=None):
    """All randomness of one update (T+1, N, Z), keyed by (seed, step); a process takes its own."""
    rng = np.random.default_rng([seed, 1, step])
    noise = rng.standard_normal((iterations + 1, batch, cfg.slots, cfg.latents), np.float32)
    own = noise[:, start:start + (count or batch)]
    return to_device(own.reshape(iterations + 1, -1, cfg.latents))


def draw_scenes(cfg, seed, start, count):
    """Scenes start .. start + count - 1 of the endless stream `seed`."""
    if cfg.data == "tetris":
        return shapes.tetris(seed, start, count, max(cfg.objects))
    if cfg.data == "shapes":
        return shapes.shapes(seed, start, count, max(cfg.objects))
    return shapes.dsprites(seed, start, count, cfg.canvas, cfg.objects, cfg.data == "dsprites")


def ground(cfg, images):
    """The colour that counts as black in each scene (B, C, 1, 1)."""
    colour = np.median(images, (2, 3), keepdims=True)
    return colour if cfg.ground == "median" else np.zeros_like(colour)


# ================================================================ reading scenes, scoring

def infer_scenes(p, cfg, images, key=0):
    """What the slots have become after each refinement. Host arrays in and out.

    Where inference ends depends on its noise; of several readings, each scene keeps the best.
    """
    found = [read_once(p, cfg, images, key, n) for n in range(cfg.readings)]
    best = np.argmax([guess.elbo[-1] for guess in found], 0)        # (B,)
    return SimpleNamespace(**{name: np.stack([getattr(found[n], name)[:, b]
                                              for b, n in enumerate(best)], 1)
                              for name in vars(found[0])})


def calm(cfg):
    """How much of the noise is left at each refinement (T+1, 1, 1)."""
    early = np.arange(cfg.test_iterations + 1) < 0.75 * cfg.test_iterations
    return np.where(early, *cfg.noise).astype(np.float32)[:, None, None]


def read_once(p, cfg, images, key, number):
    """One reading: other noise for each number."""
    noise = draw_noise(cfg, len(images), cfg.test_iterations, TEST + number, key)
    noise *= to_device(calm(cfg))
    black = ground(cfg, images)
    traces, _ = unroll(p, cfg, to_device(images - black), noise, cfg.sigma, [1.0] * len(noise))
    C, shape = images.shape[1], (len(images), cfg.slots)
    y = np.stack([to_host(t.y).reshape(*shape, *t.y.shape[1:]) for t in traces])
    masks = np.stack([to_host(t.pixels.mask) for t in traces])      # (T+1, B, K, S, S)
    lam = np.stack([to_host(t.lam).reshape(*shape, -1) for t in traces])    # (T+1, B, K, 2*Z)
    means = y[:, :, :, :C] + black[:, None]                         # (T+1, B, K, C, S, S)
    recon = (masks[:, :, :, None] * means).sum(2)                   # (T+1, B, C, S, S)
    elbo, kl = (np.stack([to_host(getattr(t, name)) for t in traces]) for name in ("elbo", "kl"))
    return SimpleNamespace(lam=lam, masks=masks, means=means, recon=recon, elbo=elbo, kl=kl,
                           owners=masks.argmax(2))


def score(p, cfg, parts):
    """The paper's metrics after each refinement, over scenes in parts (images, masks): (T+1,)."""
    rows, total = 0.0, 0
    for images, masks in parts:
        guess = infer_scenes(p, cfg, images, total)
        ari = np.stack([adjusted_rand_index(masks, owners) for owners in guess.owners])
        mse = ((guess.recon - images) ** 2).mean((2, 3, 4))         # (T+1, B)
        rows = rows + np.stack([ari, mse, guess.elbo, guess.kl]).sum(2)
        total += len(images)
    return dict(zip(("ari_foreground", "mse", "elbo", "kl"), rows / total, strict=True))


def final(curves):
    """The scores after the last refinement, as plain numbers."""
    return {name: float(values[-1]) for name, values in curves.items()}


def stream(cfg, seed, total, part=20):
    """`total` scenes of a stream, a part at a time, for `score`."""
    for start in range(0, total, part):
        drawn = draw_scenes(cfg, seed, start, min(part, total - start))
        yield drawn.images, drawn.masks


def evaluate(cfg, weights, path=None, data_dir=None):
    """Score weights on a scene file, or without one on fresh test scenes."""
    p = fitting(weights, init(cfg, 0))
    parts = stream(cfg, TEST, cfg.test_scenes) if path is None else file_parts(cfg, path)
    return final(score(p, cfg, parts))


def file_parts(cfg, path, part=20):
    """The scenes of an npz file, checked, a part at a time."""
    C, S = channels(cfg), cfg.canvas
    axes = ("N", S, S) if C == 1 else ("N", S, S, C)
    file = read_scenes(path, {"images": axes, "masks": ("N", S, S)})
    images, masks = as_picture(file["images"], f"{path}: images"), file["masks"]
    images = images[:, None] if C == 1 else np.ascontiguousarray(np.moveaxis(images, 3, 1))
    if not np.isin(masks, np.arange(-1, 256)).all():
        raise Fail(f"{path}: masks must be whole numbers from 0 (background) to 255; -1: unknown")
    for k in range(0, len(images), part):
        yield images[k:k + part], masks[k:k + part].astype(np.int64)


def infer(cfg, weights, files, out):
    """The objects of each picture, in its own pixels, and pictures that show them."""
    from viz.slots import decomposition

    p, results = fitting(weights, init(cfg, 0)), []
    for path in files:
        image, to_picture = read_picture(path, cfg.canvas, channels(cfg))
        guess = infer_scenes(p, cfg, image[None])
        overlay = Path(out) / f"{Path(path).name}.objects.png"
        decomposition(overlay, image[None], guess.recon[-1], guess.masks[-1], guess.means[-1])
        results.append({"file": str(path), "overlay": str(overlay),
                        "objects": objects(guess.owners[-1, 0], cfg.slots, to_picture)})
    return {"pictures": results}


def objects(owners, slots, to_picture):
    """Slot, box and area of each object; the slot that holds most of the border is the scene's."""
    border = np.concatenate([owners[0], owners[-1], owners[:, 0], owners[:, -1]])
    ground = np.bincount(border, minlength=slots).argmax()
    found = []
    for k in range(slots):
        rows, columns = np.nonzero(owners == k)
        if k != ground and len(rows):
            box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            x0, y0, x1, y1 = to_picture(box)
            pixel = (x1 - x0) * (y1 - y0) / ((box[2] - box[0]) * (box[3] - box[1]))
            found.append({"slot": k, "box": [x0, y0, x1, y1], "area": round(len(rows) * pixel, 1)})
    return found


# ================================================================ training

def learn(cfg, run):
    """The loop: scenes in, one update out. Everything is keyed by (seed, step)."""
    if cfg.data in FIXED and cfg.canvas != FIXED[cfg.data]:
        raise Fail(f"--data {cfg.data} is drawn on --canvas {FIXED[cfg.data]}")
    if cfg.sigma_from > cfg.sigma_to:
        raise Fail("--sigma-from must not come after --sigma-to")
    p = Params(init(cfg, run.seed))
    g = p.grads()
    adam = Optimiser(p, groups={"decode": cfg.decoder_lr}, clip=cfg.clip)
    watched = list(stream(cfg, VALIDATION, cfg.eval_scenes))
    for step in run.steps(cfg.steps, {"params": p.flat, "m": adam.m, "v": adam.v}):
        start, count = share(cfg.batch_size)
        images = draw_scenes(cfg, run.seed, step * cfg.batch_size + start, count).images
        noise = draw_noise(cfg, cfg.batch_size, cfg.iterations, run.seed, step, start, count)
        weights = schedule(cfg, step)
        x = to_device(images - ground(cfg, images))
        loss, back = objective(p, cfg, x, noise, weights)
        g.zero()
        back(g)
        unread(cfg, g)
        g.average()
        seen = run.watch(loss=float(loss), gradient=norm(g.flat))
        adam.update(g, weights.lr, step + 1)
        if run.due(step + 1, cfg.eval_every) or step + 1 == cfg.steps:
            now = replace(cfg, sigma=weights.sigma)
            run.log(step + 1, **seen, **final(score(p, now, watched)))
    return p


def train(cfg, run):
    """Learn, score on fresh scenes, keep the weights, draw figures."""
    p = learn(cfg, run)
    metrics = final(score(p, cfg, stream(cfg, TEST, cfg.test_scenes)))
    if is_root():
        save_weights(run.folder / "weights.npz", p.host(), cfg, about=cfg.data)
        figures([run.folder], run.data_dir)
    return metrics


# ================================================================ figures

def against_slots(p, cfg, counts):
    """Final scores with other numbers of slots, on scenes like the training's and fuller ones."""
    curves = {}
    for objects in (max(cfg.objects), max(cfg.objects) + 1):
        watched = list(stream(replace(cfg, objects=(objects,)), TEST, COMPARED))
        scores = [final(score(p, replace(cfg, slots=K), watched)) for K in counts]
        curves[f"{objects} objects"] = {name: [s[name] for s in scores] for name in scores[0]}
    return curves


def figures(folders, data_dir=None):
    """Draw all that run folders hold: scenes of the first, curves of them all."""
    from viz import curves, slots

    runs = [load_run(folder) for folder in folders]                 # config and weights of each
    folder, (cfg, p) = folders[0], runs[0]
    images = draw_scenes(cfg, TEST, 0, 8).images
    guess = infer_scenes(p, cfg, images)
    slots.decomposition(folder / "slots.png", images, guess.recon[-1], guess.masks[-1],
                        guess.means[-1])
    few = slice(0, 5)
    slots.negotiation(folder / "negotiation.gif", images[few], guess.recon[:, few],
                      guess.masks[:, few], guess.means[:, few])
    panels = [("ari_foreground", "foreground ARI"), ("mse", "squared error per pixel"),
              ("kl", "KL (nats)")]
    longer = {f.name: score(q, replace(c, test_iterations=LONG), stream(c, TEST, COMPARED))
              for f, (c, q) in zip(folders, runs, strict=True)}
    slots.against(folder / "iterations.png", longer, panels, range(LONG + 1), "refinements",
                  cfg.iterations)
    counts = range(max(2, cfg.slots - 1), cfg.slots + 4)
    slots.against(folder / "counts.png", against_slots(p, cfg, counts), panels, counts, "slots",
                  cfg.slots)
    curves.curves(folder / "curves.png", {f.name: f / "metrics.jsonl" for f in folders},
                  [("ari_foreground", "foreground ARI"), ("elbo", "ELBO (nats)"),
                   ("mse", "squared error per pixel")])


def load_run(folder):
    """Config and weights of a run folder."""
    config, weights, _ = load_weights(folder / "weights.npz")
    cfg = cli.from_dict(Config, config, folder / "weights.npz")
    return cfg, fitting(weights, init(cfg, 0))


if __name__ == "__main__":
    cli.main(__doc__, Config, PRESETS, train=train, evaluate=evaluate, infer=infer, figures=figures,
             adjustable=ADJUSTABLE)
