"""Sequential Attend, Infer, Repeat (Kosiorek et al., 2018): discover, track and imagine objects.

    python sqair_moving.py          trains, scores on 2,000 fresh videos, draws figures and GIFs

Two recurrences: over the frames t of a video, and inside a frame over its objects i. Two phases in
each frame: PROPagation carries every object over from the last frame, DISCovery looks for new ones.
The equations that tag the lines below (forward and backward alike), with the paper's algorithms:

    eq.1   p(z_t^i | z_{t-1}^i) = N(z_where + velocity, ..) N(z_what + .., ..)           prior
           proposal = z_where + velocity + .1 W h_{t-1}^i        where to look first (Alg. 2, 6)
    eq.2   e^ = encoder(read(x_t, proposal))                                         (Alg. 2, 7-8)
    eq.3   r_i = RNN(e^, z_{t-1}^i, h_{t-1}^i, z_t^j, r_j)       relations           (Alg. 2, 9)
    eq.4   z_where_t^i ~ N(proposal + MLP(r_i, e^), ..)                              (Alg. 2, 10)
    eq.5   e = encoder(read(x_t, z_where))                                           (Alg. 2, 11-12)
    eq.6   h_t^i = GRU(e, z_where, r_i, h_{t-1}^i)               time                (Alg. 2, 13)
    eq.7   z_what_t^i ~ N((1 - g) z_what_{t-1} + g code(e) + add, ..)                (Alg. 2, 14)
    eq.8   z_pres_t^i ~ Bernoulli(sigmoid(MLP(h, e, z_what, z_where)))               (Alg. 2, 15)
    eq.9   l_t = sum_i MLP(z_what_t^i, z_where_t^i)              what is known  (Alg. 3, 4; Eq. 6)
    eq.10  d_i = RNN(x_t, l_t, z^{i-1}, d_{i-1}) -> z_pres, z_where                  (Alg. 3, 6-9)
    eq.11  z_what ~ N(code(encoder(read(x_t, z_where))))                             (Alg. 3, 11-13)
    eq.12  y_t = sum_i write(decoder(z_what^i), z_where^i)                           (Alg. 1)
    eq.13  log p(x_t | z_t) = log N(x_t; y_t, sigma^2)
    eq.14  the bound: `fast` (default) or `vimco` (the paper's), see there

As in AIR each discovery step is computed as if its object were there.

Dimension key: B videos, T frames, N slots for objects, D discovery steps, R videos that have an
object in slot i, M objects of all slots, S canvas side, G glimpse side, K appearance code,
U encoder units, H discovery RNN, Q relation RNN, F one object's latents and memories
(z_where 3, velocity 3, z_what K, h_t Q, prior's memory Q), J samples of a video.
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace

from common.backend import gemm, to_device, to_host, xp  # before NumPy: sets threads, BLAS

import numpy as np

from common import cli, data, videos
from common.conv import conv, sub_pixel
from common.errors import Fail
from common.files import as_picture, read_scenes, read_video
from common.metrics import ink_boxes
from common.ops import (
    clamp, elu, gaussian_log_density, gru, linear, log_logistic, logistic, mlp, relu, rnn, sigmoid,
)
from common.optim import Optimiser, cosine, norm, ramp
from common.params import Params, fitting
from common.probe import probe
from common.processes import is_root, share
from common.sampler import read, write
from common.store import load_weights, save_weights
from common.tracks import follow, summary

MAPS, STRIDES = (8, 16, 16, 32), (2, 2, 1, 1)       # the convolutions of `--net conv`
NEVER = -40.0       # logit of a presence that cannot be
INK = 0.1           # a drawn pixel brighter than this belongs to an object's box
VALIDATION, TEST = 1_000_001, 1_000_002     # seeds of the streams that no training run draws from


# ================================================================ configuration

@dataclass(frozen=True)
class Config:
    steps: int = cli.option(3600, "optimiser updates", low=1)
    batch_size: int = cli.option(32, "videos per update (twice as many when they are one frame)",
                                 low=1)
    model: str = cli.option("sqair", "sqair, or air: every frame on its own",
                            choices=("sqair", "air"))
    objective: str = cli.option("fast", "fast: presence marginalised, one sample; vimco: the "
                                "paper's", choices=("fast", "vimco"))
    particles: int = cli.option(5, "vimco: K, samples of a video's latents", low=2)
    vimco_from: int = cli.option(1, "vimco: shortest video that it trains on; fast below", low=1)
    through_time: bool = cli.option(False, "gradients flow from frame to frame")
    explain_away: bool = cli.option(True, "propagation sees the frame less the other objects")
    bounce: bool = cli.option(True, "imagined objects turn round where the middle of their ink "
                              "meets an edge")
    net: str = cli.option("mlp", "encoders and decoder", choices=("mlp", "conv"))
    data: str = cli.option("digits", "what moves (digits: MNIST, or drawn without it)",
                           choices=("digits", "drawn"))
    motion: str = cli.option("paper", "how digits move", choices=tuple(videos.MOTIONS))
    counts: tuple[int, ...] = cli.option((0, 1, 2), "digits in a video", low=0, high=4)
    canvas: int = cli.option(50, "side of a frame in pixels", low=8)
    frames: int = cli.option(10, "frames of a test video", low=1)
    lengths: tuple[int, ...] = cli.option((1, 5), "frames of a training video: the curriculum",
                                          low=1)
    starts: tuple[int, ...] = cli.option((0, 1600), "update at which each of the lengths begins",
                                         low=0)
    slots: int = cli.option(3, "N: most objects at a time", low=1)
    later: int = cli.option(1, "most discoveries in a frame after the first", low=1)
    glimpse: int = cli.option(20, "side of a glimpse", low=2)
    hidden: int = cli.option(256, "units of the discovery RNN", low=1)
    memory: int = cli.option(128, "units of the relation, temporal and prior RNNs", low=1)
    what: int = cli.option(50, "dimensions of z_what", low=1)
    units: int = cli.option(200, "hidden units of encoder and decoder", low=1)
    std: float = cli.option(0.3, "sigma of the likelihood", low=1e-3)
    lr: float = cli.option(1.5e-3, "peak learning rate (Adam)", low=0.0)
    lr_floor: float = cli.option(0.05, "share of lr that is left at the end", low=0.0, high=1.0)
    temperature: float = cli.option(100.0, "first weight of the discovered number's entropy",
                                    low=1.0)
    temperature_steps: int = cli.option(800, "updates until that weight is 1", low=0)
    first_begin: float = cli.option(5.0, "nats that an object of frame 1 must earn at the start of "
                                    "training", low=0.0, high=30.0)
    first: float = cli.option(10.0, "the same at the end", low=0.0, high=30.0)
    first_from: int = cli.option(800, "update at which these nats begin to move", low=0)
    first_to: int = cli.option(1200, "update at which they have arrived", low=0)
    newcomer: float = cli.option(10.0, "nats that an object found later must earn", low=0.0,
                                 high=30.0)
    stay: float = cli.option(10.0, "prior log-odds that an object stays", low=0.0, high=30.0)
    looks: int = cli.option(3, "times that a video's first frame is seen, except in training",
                            low=1)
    bound_particles: int = cli.option(0, "evaluate: samples for the tight bound (0: leave it)",
                                      low=0)
    bound_videos: int = cli.option(100, "evaluate: videos for that bound", low=1)
    addition: bool = cli.option(False, "evaluate: train a classifier that adds the digits")
    eval_every: int = cli.option(400, "updates between two lines of metrics", low=1)
    eval_videos: int = cli.option(250, "validation videos for each line of metrics", low=1)
    test_videos: int = cli.option(2000, "fresh test videos for the final score", low=1)


PRESETS = {
    "default": {},
    "quick": {"steps": 2000, "starts": (0, 1200), "test_videos": 500},
    "long": {"steps": 10_400, "lengths": (1, 5, 10), "starts": (0, 3200, 9200), "first": 20.0,
             "eval_every": 1000},
    "vimco": {"objective": "vimco", "through_time": True, "vimco_from": 2, "steps": 2600,
              "lr": 1e-3},
    "conv": {"net": "conv", "units": 128, "hidden": 128, "lr": 1e-3},
    "air": {"model": "air", "lengths": (1,), "starts": (0,)},
    "paper": {"objective": "vimco", "through_time": True, "explain_away": False, "steps": 1_000_000,
              "lengths": (3, 4, 5, 6, 7, 8, 9, 10), "starts": tuple(range(0, 800_000, 100_000)),
              "memory": 256, "units": 256, "later": 3, "lr": 1e-5, "lr_floor": 1.0,
              "temperature": 1.0, "temperature_steps": 0, "eval_every": 5000},
}


# ================================================================ parameters

def init(cfg, seed):
    """Normal weights scaled by the square root of the fan-in; the flat vector keeps this order."""
    rng = np.random.default_rng([seed, 0])
    G, H, Q, K, U = cfg.glimpse, cfg.hidden, cfg.memory, cfg.what, cfg.units
    P, Z, RELU, OUT, SMALL = (cfg.canvas // 2) ** 2, 3 + K, 1.4, 0.3, 0.1
    arrays, flat = {}, {"look": P, "encode": G * G}

    def layer(name, n_in, n_out, gain, bias=0.0):
        arrays[name + ".W"] = rng.standard_normal((n_in, n_out)) * (gain / np.sqrt(n_in))
        if bias is not None:
            arrays[name + ".b"] = np.broadcast_to(np.asarray(bias, float), n_out)

    def kernel(name, n_in, n_out, gain=RELU, bias=0.0):
        arrays[name + ".W"] = rng.standard_normal((n_out, n_in, 3, 3)) * (gain / np.sqrt(9 * n_in))
        arrays[name + ".b"] = np.full(n_out, bias)

    if cfg.net == "conv":
        for i, (n_in, n_out) in enumerate(pairwise((1, *MAPS))):
            kernel(f"cnn.{i}", n_in, n_out)                         # frames and glimpses
        flat = {name: MAPS[-1] * (-(-side // 4)) ** 2
                for name, side in (("look", cfg.canvas), ("encode", G))}
        layer("decode.0", K, 256, RELU)
        layer("decode.1", 256, 32 * (G // 4) ** 2, RELU)
        kernel("paint.0", 32, 32)
        kernel("paint.1", 32, 4 * 16)                               # 4 maps become 2 x 2 pixels
        kernel("paint.2", 16, 4 * 8)
        kernel("paint.3", 8, 1, OUT, -3.0)                          # a dark patch to begin with
    else:
        layer("decode.0", K, U, RELU)
        layer("decode.1", U, U, RELU)
        layer("decode.2", U, G * G, OUT, -3.0)
    layer("look.0", flat["look"], H, RELU)                          # the whole frame
    layer("encode.0", flat["encode"], U, RELU)                      # glimpses
    if cfg.net == "mlp":
        layer("encode.1", U, U, RELU)
    layer("code", U, 2 * K, OUT, [0.0] * K + [-1.0] * K)            # mean and log std of z_what
    layer("discover.x", H + 128, H, 1.0)
    layer("discover.h", H + 1 + Z, H, 1.0, None)
    layer("head", H, 7, SMALL, [2.0] + [0.0] * 3 + [-1.5] * 3)      # logit, mean, log std of where
    arrays["later.b"] = np.full(1, -6.0)                            # the logit after frame 1
    layer("known.0", Z, 128, RELU)
    layer("known.1", 128, 128, RELU)
    layer("prior.x", 7 + K, 3 * Q, 1.0)
    layer("prior.h", Q, 3 * Q, 1.0, None)
    layer("expect", Q, K + Z, SMALL, [0.0] * K + [-1.0] * 3 + [-0.5] * K)
    layer("propose", Q, 3, SMALL)
    layer("relate.x", U + Z + Q + Z, Q, 1.0)
    layer("relate.h", Q, Q, 1.0, None)
    layer("where.0", Q + U, Q, RELU)
    layer("where.1", Q, 6, SMALL, [0.0] * 3 + [-2.0] * 3)
    layer("time.x", U + 6 + Q, 3 * Q, 1.0)
    layer("time.h", Q, 3 * Q, 1.0, None)
    layer("gate", U + Q + Q, 3 * K, SMALL, [0.0] * 2 * K + [-1.0] * K)      # g, add, log std
    layer("stay.0", Q + U + Z, 64, RELU)
    layer("stay.1", 64, 1, SMALL, 5.0)
    return arrays


# ================================================================ pieces of a step

def split(x, *sizes):
    """Columns of x in pieces; concatenating their gradients is the way back."""
    return [x[:, end - size:end] for end, size in zip(accumulate(sizes), sizes, strict=True)]


def join(*pieces):
    return xp.concatenate(pieces, 1)


def pool(x):
    """Means of 2 x 2 pixels, flattened. Only frames are pooled: no gradient is needed."""
    half = x.shape[2] // 2 * 2
    rows = x[:, :, 0:half:2] + x[:, :, 1:half:2]                    # (..., 1, S/2, S)
    return ((rows[..., 0:half:2] + rows[..., 1:half:2]) * 0.25).reshape(len(x), -1)


def cnn(p, x, want_dx):
    """The maps that frames and glimpses share in `--net conv`."""
    backs = []
    for i, stride in enumerate(STRIDES):
        x, back_i = conv(p, f"cnn.{i}", x, stride, want_dx or i > 0, elu)
        backs.append(back_i)

    def back(dx, g):
        for back_i in reversed(backs):
            dx = back_i(dx, g)
        return dx

    return x, back


def features(p, cfg, name, x):
    """What frames (`look`) or glimpses (`encode`) show; frames need no gradient."""
    seen, want_dx = pool(x) if name == "look" else x, name == "encode"
    if cfg.net == "conv":
        seen, back_seen = cnn(p, x, want_dx)
    e, back_e = mlp(p, name, seen.reshape(len(x), math.prod(seen.shape[1:])), relu, relu,
                    want_dx or cfg.net == "conv")

    def back(de, g):
        dseen = back_e(de, g)
        if cfg.net == "conv":
            dseen = back_seen(dseen.reshape(seen.shape), g)
        return dseen.reshape(x.shape) if want_dx else None

    return e, back


def decode_mlp(p, cfg, what):
    """A patch in [0, 1]."""
    patch, back_patch = mlp(p, "decode", what, last=sigmoid)        # (..., G*G)

    def back(dpatch, g):
        return back_patch(dpatch.reshape(patch.shape), g)

    return patch.reshape(-1, 1, cfg.glimpse, cfg.glimpse), back


def decode_conv(p, cfg, what):
    """A patch in [0, 1] by sub-pixel convolutions: four maps become 2 x 2 pixels of one."""
    side = cfg.glimpse // 4
    u, back_u = mlp(p, "decode", what, elu, last=elu)
    x, back_x = conv(p, "paint.0", u.reshape(-1, 32, side, side), act=elu)
    backs = []
    for i in (1, 2):
        x, back_maps = conv(p, f"paint.{i}", x, act=elu)
        x, back_pixels = sub_pixel(x, 2)
        backs.append((back_maps, back_pixels))
    x, back_last = conv(p, "paint.3", x)
    patch, back_patch = sigmoid(x)                                  # (..., 1, G, G)

    def back(dpatch, g):
        dx = back_patch(dpatch)
        dx = back_last(dx, g)
        for back_maps, back_pixels in reversed(backs):
            dx = back_pixels(dx)
            dx = back_maps(dx, g)
        dx = back_x(dx, g)
        return back_u(dx.reshape(u.shape), g)

    return patch, back


DECODE = {"mlp": decode_mlp, "conv": decode_conv}


def window_of(where):
    """The prior N(0, 1) covers the canvas."""
    s = 0.5 * xp.exp(0.15 * where[:, :1])                           # (..., 1)
    window = join(s, 0.5 * where[:, 1:])                            # (..., 3)

    def back(dwindow):
        return join(0.15 * s * dwindow[:, :1], 0.5 * dwindow[:, 1:])

    return window, back


def latent(mean, log_std, eps, mean0, log_std0, sampled):
    """z = mean + std eps, and what it costs against the prior N(mean0, std0^2); all (rows, sizes).

    The cost is the KL divergence, or with `sampled` log q(z) - log p(z) of this very sample.
    """
    log_std, back_clamp = clamp(log_std, -5, 1)
    std, precision = xp.exp(log_std), xp.exp(-log_std0)
    z = mean + std * eps
    away = ((z if sampled else mean) - mean0) * precision
    ratio = std * precision
    spread = eps if sampled else ratio
    sign = -1.0 if sampled else 1.0
    cost = (0.5 * (away * away + sign * spread * spread - (not sampled))
            + log_std0 - log_std).sum(1)                            # (R,)

    def back(dz, dcost):
        dcost = dcost[:, None]
        daway = dcost * away
        dmean = daway * precision
        if sampled:
            dz = dz + dmean
            dlog_std, dlog_std0 = -dcost, dcost - daway * away
        else:
            dspread = dcost * ratio * ratio
            dlog_std, dlog_std0 = dspread - dcost, dcost - daway * away - dspread
        dmean0 = -dmean
        dlog_std = back_clamp(dlog_std + dz * std * eps)
        return (dz if sampled else dz + dmean), dlog_std, dmean0, dlog_std0

    return z, cost, back


def glimpse_of(p, cfg, x, where):
    """Read a window of the frame and encode it."""
    window, back_window = window_of(where)                          # (..., 3)
    glimpse, back_read = read(x, window, cfg.glimpse)               # (..., 1, G, G)
    e, back_e = features(p, cfg, "encode", glimpse)                 # (..., U)

    def back(de, g):
        dglimpse = back_e(de, g)
        _, dwindow = back_read(dglimpse)
        return back_window(dwindow)

    return e, back


def draw(p, cfg, what, where):
    """Alg. 1, lines 4 and 5: decode a patch and write it where the object is."""
    window, back_window = window_of(where)                          # (..., 3)
    patch, back_patch = DECODE[cfg.net](p, cfg, what)              # (..., 1, G, G)  eq.12
    drawn, back_write = write(patch, window, (cfg.canvas,) * 2)     # (..., 1, S, S)  eq.12

    def back(ddrawn, g):
        dpatch, dwindow = back_write(ddrawn)                                        # eq.12
        dwhat = back_patch(dpatch, g)                                               # eq.12
        return dwhat, back_window(dwindow)

    return drawn, back


def residual(x, y):
    """What is not explained by others; a fact for the object that looks, no gradient goes in."""
    return x - y


# ================================================================ propagation (Algorithm 2)

def expect(p, cfg, s, age):
    """Before the frame is seen: each object's prior, and where to look for it first.

    An object that was found in the last frame (age 0) has no velocity yet.
    """
    K, Q = cfg.what, cfg.memory
    where, velocity, what, h, memory = split(s, 3, 3, K, Q, Q)
    moving = (age > 0).astype(s.dtype)[:, None]                     # (M, 1)
    seen = join(where, moving * velocity, what, moving)             # (M, 7+K)
    memory, back_memory = gru(p, "prior", seen, memory)             # (M, Q)  eq.1
    y, back_y = linear(p, "expect", memory)                         # (M, 3+2K)  eq.1
    log_std, back_clamp = clamp(y[:, K:], -5, 2)                    # (M, 3+K)  eq.1
    push, back_push = linear(p, "propose", h)                       # (M, 3)  eq.1
    coasting = where + moving * velocity                            # (M, 3)  eq.1
    mean = join(coasting, what + y[:, :K])                          # (M, 3+K)  eq.1
    proposal = coasting + 0.1 * push                                # (M, 3)  eq.1

    def back(dproposal, dmean, dlog_std, dmemory, g):
        dh = back_push(0.1 * dproposal, g)                                          # eq.1
        dlog_std = back_clamp(dlog_std)                                             # eq.1
        dmemory = dmemory + back_y(join(dmean[:, 3:], dlog_std), g)                 # eq.1
        dseen, dmemory = back_memory(dmemory, g)                                    # eq.1
        dcoasting = dmean[:, :3] + dproposal
        dwhere, dvelocity, dwhat, _ = split(dseen, 3, 3, K, 1)
        return join(dwhere + dcoasting, moving * (dvelocity + dcoasting), dwhat + dmean[:, 3:],
                    dh, dmemory)

    return proposal, mean, log_std, memory, back


def newest_share(age, dtype):
    """How much of an object's velocity is its newest displacement; scale has no velocity."""
    return xp.where(age > 0, 0.6, 1.0).astype(dtype)[:, None] * xp.asarray([0, 1, 1], dtype)


def propagate(p, cfg, x, s, age, ahead, relation, eps):
    """One object: look where it should be, relate it to the others, find it, look again, update it.

    `ahead` is what `expect` says of it; `relation` holds r_j and z_t^j of the object before it.
    """
    K, Q, U = cfg.what, cfg.memory, cfg.units
    proposal, mean0, log_std0, memory = ahead       # (R, 3), (R, 3+K), (R, 3+K), (R, Q)
    where0, velocity, what0, h0, _ = split(s, 3, 3, K, Q, Q)
    sampled = cfg.objective == "vimco"
    e0, back_e0 = glimpse_of(p, cfg, x, proposal)                   # (R, U)  eq.2
    seen = join(e0, what0, where0, h0, relation[:, Q:])             # (R, U+K+3+Q+3+K)
    r, back_r = rnn(p, "relate", seen, relation[:, :Q], elu)        # (R, Q)  eq.3
    delta, back_delta = mlp(p, "where", join(r, e0))                # (R, 6)  eq.4
    where, cost_where, back_where = latent(
        proposal + delta[:, :3], delta[:, 3:], eps[:, :3],
        mean0[:, :3], log_std0[:, :3], sampled)                     # (R, 3), (R,)  eq.4
    e, back_e = glimpse_of(p, cfg, x, where)                        # (R, U)  eq.5
    moved = where - where0                                          # (R, 3)
    h, back_h = gru(p, "time", join(e, where, moved, r), h0)        # (R, Q)  eq.6
    code, back_code = linear(p, "code", e)                          # (R, 2K)  eq.7
    gate, back_gate = linear(p, "gate", join(e, h, r))              # (R, 3K)  eq.7
    mix = logistic(gate[:, :K])                                     # (R, K)  eq.7
    what, cost_what, back_what = latent(
        what0 + mix * (code[:, :K] - what0) + gate[:, K:2 * K], gate[:, 2 * K:], eps[:, 3:],
        mean0[:, 3:], log_std0[:, 3:], sampled)                     # (R, K), (R,)  eq.7
    logit, back_logit = mlp(p, "stay", join(h, e, what, where))     # (R, 1)  eq.8
    drawn, back_drawn = draw(p, cfg, what, where)                   # (R, 1, S, S)  eq.12
    newest = newest_share(age, s.dtype)                             # (R, 3)
    velocity = velocity + newest * (moved - velocity)               # (R, 3)
    s = join(where, velocity, what, h, memory)                      # (R, F)
    trace = SimpleNamespace(logit=logit[:, 0], cost=cost_where + cost_what, drawn=drawn)

    def back(dlogit, dcost, ddrawn, ds, drelation, g):
        dwhere, dvelocity, dwhat, dh, dmemory = split(ds, 3, 3, K, Q, Q)
        dr, dwhere_next, dwhat_next = split(drelation, Q, 3, K)
        dmoved = newest * dvelocity
        dwhat_drawn, dwhere_drawn = back_drawn(ddrawn, g)                           # eq.12
        dh_stay, de_stay, dwhat_stay, dwhere_stay = split(
            back_logit(dlogit[:, None], g), Q, U, K, 3)                             # eq.8
        dwhat = dwhat + dwhat_next + dwhat_drawn + dwhat_stay
        dmix_what, dlog_std, dmean0_what, dlog_std0_what = back_what(dwhat, dcost)  # eq.7
        dmix = dmix_what * (code[:, :K] - what0) * mix * (1 - mix)                  # eq.7
        de_gate, dh_gate, dr_gate = split(
            back_gate(join(dmix, dmix_what, dlog_std), g), U, Q, Q)                 # eq.7
        de_code = back_code(join(mix * dmix_what, xp.zeros_like(mix)), g)           # eq.7
        dtime, dh0 = back_h(dh + dh_stay + dh_gate, g)                              # eq.6
        de_time, dwhere_time, dmoved_time, dr_time = split(dtime, U, 3, 3, Q)
        dmoved = dmoved + dmoved_time
        dwhere_seen = back_e(de_stay + de_gate + de_code + de_time, g)              # eq.5
        dwhere = (dwhere + dwhere_next + dwhere_drawn + dwhere_stay + dwhere_time + dmoved
                  + dwhere_seen)
        dmean, dlog_std, dmean0_where, dlog_std0_where = back_where(dwhere, dcost)  # eq.4
        dr_where, de0_where = split(back_delta(join(dmean, dlog_std), g), Q, U)     # eq.4
        dseen, dr_before = back_r(dr + dr_gate + dr_time + dr_where, g)             # eq.3
        de0, dwhat0, dwhere0, dh0_seen, dz_before = split(dseen, U, K, 3, Q, 3 + K)
        dproposal = dmean + back_e0(de0 + de0_where, g)                             # eq.2
        ds = join(dwhere0 - dmoved, (1 - newest) * dvelocity, dwhat0 + (1 - mix) * dmix_what,
                  dh0 + dh0_seen, xp.zeros_like(dmemory))
        dahead = (dproposal, join(dmean0_where, dmean0_what),
                  join(dlog_std0_where, dlog_std0_what), dmemory)
        return ds, dahead, join(dr_before, dz_before)

    return trace, s, join(r, where, what), back


def propagate_all(p, cfg, x, state, noise):
    """All objects of the last frame, slot after slot; k are those of slot i."""
    B, K, Q = len(x), cfg.what, cfg.memory
    slots, rows = xp.nonzero(state.there.T)         # (M,), (M,)
    s0, age = state.s[rows, slots], state.age[rows, slots]          # (M, F), (M,)
    ends = [0, *np.cumsum(to_host(state.there.sum(0)).astype(int)).tolist()]
    taken = [(i, slice(*k)) for i, k in enumerate(pairwise(ends)) if k[0] < k[1]]
    proposal, mean0, log_std0, memory, back_expect = expect(p, cfg, s0, age)
    relation, y = xp.zeros((B, Q + 3 + K), x.dtype), xp.zeros_like(x)
    others = xp.zeros_like(x)                       # what the objects still to come will draw
    if cfg.explain_away and len(taken) > 1:
        sketch, _ = draw(p, cfg, s0[:, 6:6 + K], proposal)
        for _, k in taken[1:]:
            others[rows[k]] += sketch[k]
    traces, new, backs = [], [xp.zeros_like(s0[:0])], []
    for i, k in taken:
        r = rows[k]                                 # (R,)
        if cfg.explain_away and new[1:]:
            others[r] -= sketch[k]
        seen = residual(x[r], y[r] + others[r]) if cfg.explain_away else x[r]
        trace, s, relation_k, back_k = propagate(
            p, cfg, seen, s0[k], age[k], (proposal[k], mean0[k], log_std0[k], memory[k]),
            relation[r], noise.eps[i][r])
        trace.rows = r
        trace.z = (noise.uniform[i][r] < logistic(trace.logit)).astype(x.dtype)
        relation[r] = relation_k
        y[r] += trace.z[:, None, None, None] * trace.drawn          # (R, 1, S, S)  eq.12
        traces.append(trace)
        new.append(s)
        backs.append(back_k)

    def back(dlogits, dcosts, dy, ds, g):
        drelation, ds0 = xp.zeros_like(relation), xp.zeros_like(s0)
        dahead = [xp.zeros_like(a) for a in (proposal, mean0, log_std0, memory)]
        for back_k, (_, k), trace, dlogit, dcost in reversed(
                list(zip(backs, taken, traces, dlogits, dcosts, strict=True))):
            r = trace.rows
            ddrawn = trace.z[:, None, None, None] * dy[r]                           # eq.12
            ds0[k], dahead_k, drelation[r] = back_k(dlogit, dcost, ddrawn, ds[k], drelation[r], g)
            for d, d_k in zip(dahead, dahead_k, strict=True):
                d[k] = d_k
        dstate = xp.zeros_like(state.s)
        dstate[rows, slots] = ds0 + back_expect(*dahead, g)
        return dstate

    return traces, xp.concatenate(new), (rows, slots), y, back


# ================================================================ discovery (Algorithm 3)

def known(p, cfg, new, z, rows, B):
    """What propagation explains, as a sum over the objects that stay."""
    K = cfg.what
    latents = join(new[:, 6:6 + K], new[:, :3])                     # (M, K+3)
    code, back_code = mlp(p, "known", latents, last=relu)           # (M, 128)  eq.9
    weight = (rows == xp.arange(B)[:, None]) * z                    # (B, M)
    l = gemm(weight, code)                                          # (B, 128)  eq.9

    def back(dl, g):
        dcode = gemm(weight.T, dl)                                                  # eq.9
        dwhat, dwhere = split(back_code(dcode, g), K, 3)                            # eq.9
        return dwhere, dwhat

    return l, back


def discover(p, cfg, x, a, d, z, later, eps):
    """One step of AIR: attend, infer, draw; as if its object were there."""
    sampled, zero = cfg.objective == "vimco", xp.zeros((1, 1), x.dtype)
    d, back_d = rnn(p, "discover", a, join(d, z), elu)              # (B, H)  eq.10
    head, back_head = linear(p, "head", d)                          # (B, 7)  eq.10
    logit = head[:, 0] + (p["later.b"] if later else 0)             # (B,)  eq.10
    where, cost_where, back_where = latent(head[:, 1:4], head[:, 4:], eps[:, :3], zero, zero,
                                           sampled)                 # (B, 3), (B,)  eq.10
    e, back_e = glimpse_of(p, cfg, x, where)                        # (B, U)  eq.11
    code, back_code = linear(p, "code", e)                          # (B, 2K)  eq.11
    what, cost_what, back_what = latent(code[:, :cfg.what], code[:, cfg.what:], eps[:, 3:], zero,
                                        zero, sampled)              # (B, K), (B,)  eq.11
    drawn, back_drawn = draw(p, cfg, what, where)                   # (B, 1, S, S)  eq.12
    z = join(xp.ones_like(where[:, :1]), where, what)               # (B, 4+K)
    trace = SimpleNamespace(logit=logit, cost=cost_where + cost_what, drawn=drawn)

    def back(dlogit, dcost, ddrawn, dd, dz, g):
        _, dwhere, dwhat = split(dz, 1, 3, cfg.what)
        dwhat_drawn, dwhere_drawn = back_drawn(ddrawn, g)                           # eq.12
        dcode, dlog_std, _, _ = back_what(dwhat + dwhat_drawn, dcost)               # eq.11
        de = back_code(join(dcode, dlog_std), g)                                    # eq.11
        dwhere_seen = back_e(de, g)                                                 # eq.11
        dmean, dlog_std, _, _ = back_where(dwhere + dwhere_drawn + dwhere_seen, dcost)  # eq.10
        if later:
            g["later.b"][...] += dlogit.sum()                                       # eq.10
        dd_head = back_head(join(dlogit[:, None], dmean, dlog_std), g)              # eq.10
        da, dh = back_d(dd + dd_head, g)                                            # eq.10
        dd, dz = split(dh, cfg.hidden, 4 + cfg.what)
        return da, dd, dz

    return trace, d, z, back


def discover_all(p, cfg, x, e, l, y, free, later, noise):
    """D steps; step i is possible in videos with at least i free slots."""
    B, D = len(x), cfg.later if later else cfg.slots
    a = join(e, l)                                                  # (B, H+128)
    d, z = xp.zeros((B, cfg.hidden), x.dtype), xp.zeros((B, 4 + cfg.what), x.dtype)
    traces, zs, ys, backs = [], [], [y], []
    for i in range(D):
        trace, d, z, back_i = discover(p, cfg, x, a, d, z, later, noise.eps[cfg.slots + i])
        trace.possible = free > i                                   # (B,)
        trace.logit = xp.where(trace.possible, trace.logit, NEVER).astype(x.dtype)  # (B,)
        y = y + trace.drawn                                         # (B, 1, S, S)  eq.12
        traces.append(trace)
        zs.append(z[:, 1:])
        ys.append(y)
        backs.append(back_i)

    def back(dlogits, dcosts, dys, dzs, g):
        dd, dz, da, dy = xp.zeros_like(d), xp.zeros_like(z), xp.zeros_like(a), dys[D]
        for back_i, trace, dlogit, dcost, dy_before, dz_kept in reversed(
                list(zip(backs, traces, dlogits, dcosts, dys[:D], dzs, strict=True))):
            dz = dz + join(xp.zeros_like(dz[:, :1]), dz_kept)
            da_i, dd, dz = back_i(dlogit * trace.possible, dcost, dy, dd, dz, g)
            da = da + da_i
            dy = dy + dy_before                                                     # eq.12
        de, dl = split(da, cfg.hidden, 128)
        return de, dl, dy

    return traces, zs, ys, back


# ================================================================ one frame: PROP, then DISC

def nothing(cfg, B, dtype):
    """No objects: the state before the first frame."""
    N = cfg.slots
    return SimpleNamespace(s=xp.zeros((B, N, 6 + cfg.what + 2 * cfg.memory), dtype),
                           there=xp.zeros((B, N), dtype), age=xp.zeros((B, N), dtype),
                           name=xp.full((B, N), -1), named=xp.zeros(B, int))


def log_posterior(logits):
    """log q(n): n times yes, then no (or D times yes)."""
    yes, no = log_logistic(logits), log_logistic(-logits)           # (D, B), (D, B)
    nothing = xp.zeros_like(yes[:1])                                # (1, B)
    return (xp.concatenate([nothing, xp.cumsum(yes, 0)])
            + xp.concatenate([no, nothing]))                        # (D+1, B)


def frame(p, cfg, x, e, state, noise, first):
    """Carry objects over, find new ones, and sort both into slots. e (B, H) is what x shows."""
    B, F = len(x), state.s.shape[2]
    kept, new, at, y, back_kept = propagate_all(p, cfg, x, state, noise)
    z = xp.concatenate([xp.zeros_like(x[:0, 0, 0, 0]), *(t.z for t in kept)])       # (M,)
    l, back_l = known(p, cfg, new, z, at[0], B)                     # (B, 128)  eq.9
    there, s, age = xp.zeros_like(state.there), xp.zeros_like(state.s), xp.zeros_like(state.age)
    there[at] = z
    s[at] = z[:, None] * new                                        # (M, F)
    age[at] = z * (state.age[at] + 1)
    name, named = xp.where(there > 0, state.name, -1), state.named
    free = cfg.slots - there.sum(1)                                 # (B,)
    found, zs, ys, back_found = discover_all(p, cfg, x, e, l, y, free, not first, noise)
    log_q = log_posterior(xp.stack([t.logit for t in found]))       # (D+1, B)
    n = (xp.cumsum(xp.exp(log_q[:-1]), 0) < noise.uniform[-1]).sum(0)   # (B,)  n ~ q
    empty = xp.argsort(there * cfg.slots + xp.arange(cfg.slots), 1)     # (B, N)  free slots first
    places = []
    for i, z_i in enumerate(zs):
        r = xp.nonzero(n > i)[0]                    # the videos that find one more
        k = empty[r, i]
        there[r, k], age[r, k], name[r, k] = 1, 0, named[r]
        s[r, k] = placed(cfg, z_i[r], F)
        named = named + (n > i)
        places.append((r, k))
    after = SimpleNamespace(s=s, there=there, age=age, name=name, named=named)
    trace = SimpleNamespace(kept=kept, found=found, ys=ys, n=n, log_q=log_q, free=free,
                            first=first)

    def back(slope, ds, g):
        dzs = []
        for r, k in reversed(places):
            dzs.append(latents_of(cfg, ds, r, k))
        de, dl, dy = back_found(slope.found_logits, slope.found_costs, slope.ys, dzs[::-1], g)
        dwhere, dwhat = back_l(dl, g)                                               # eq.9
        dnew = z[:, None] * ds[at]
        dnew[:, :3] += dwhere
        dnew[:, 6:6 + cfg.what] += dwhat
        return de, back_kept(slope.kept_logits, slope.kept_costs, dy, dnew, g)

    return trace, after, back


def latents_of(cfg, ds, r, k):
    """The way back of `placed`, with a row for every video."""
    dz = xp.zeros((len(ds), 3 + cfg.what), ds.dtype)
    dz[r] = join(ds[r, k, :3], ds[r, k, 6:6 + cfg.what])
    return dz


def placed(cfg, z, F):
    """A new object's latents among all that a slot holds: no velocity, no memories."""
    s = xp.zeros((len(z), F), z.dtype)
    s[:, :3], s[:, 6:6 + cfg.what] = z[:, :3], z[:, 3:]
    return s


# ================================================================ the bound, two ways

def log_prior(cfg, trace):
    """log p(n new objects | free slots), n = 0..D: geometric, cut at what there is room for."""
    n = np.arange(len(trace.ys))
    log_p = -(cfg.first if trace.first else cfg.newcomer) * n
    sums = np.log(np.cumsum(np.exp(log_p)))         # by the largest number possible
    room = xp.minimum(trace.free, n[-1]).astype(int)                # (B,)
    dtype = trace.log_q.dtype
    return xp.asarray(log_p, dtype)[:, None] - xp.asarray(sums, dtype)[room]    # (D+1, B)


def likelihoods(cfg, x, ys):
    """log p(x_t | n), n = 0..D, of the canvases with n new objects.  eq.13"""
    lls, backs = [], []
    for y in ys:
        ll, back_ll = gaussian_log_density(x, y, cfg.std)           # (B,)  eq.13
        lls.append(ll)
        backs.append(back_ll)

    def back(dlls):
        dys = []
        for back_ll, dll in reversed(list(zip(backs, dlls, strict=True))):
            dys.append(back_ll(dll))                                                # eq.13
        return dys[::-1]

    return xp.stack(lls), back


def from_first(d):
    """Sums over axis 0 from each entry to the last."""
    return d[::-1].cumsum(0)[::-1]


def fast(cfg, xs, traces, weights):
    """One sample of each video, KL divergences in closed form, no score function.

    Discovery as in AIR: the number of new objects is marginalised, with
    E_n = log p(x | y_n) - sum_{i<=n} KL_i + log p(n), A_n = q(n) (E_n - T log q(n)) and
    dbound/dl_i = (1 - p_i) sum_{n>=i} A_n - p_i A_{i-1}; then the video goes on with n ~ q(n).

    Propagation: z_pres is sampled, and with all else held fixed the two values of each object's
    are compared. The frame's bound differs by
    gain_i = log p(x | with i) - log p(x | without i) - KL_i + (prior's log-odds - l_i), hence
    dbound/dl_i = p_i (1 - p_i) gain_i, without noise from its own sampling. log p(x | y) is
    quadratic in y: with dy the slope of its mean over n at the canvas y that was drawn,
    log p(with) - log p(without) = <dy, Y_i> + (z_i - 1/2) |Y_i|^2 / sigma^2.
    What z_pres changes in later frames is left out, and so is the discovery's knowledge l_t of it:
    the slope is exact for the bound of one frame whose discovery is held fixed.
    """
    B, variance, loss, slopes = len(xs[0]), cfg.std**2, 0.0, []
    for x, trace in zip(xs, traces, strict=True):
        T = weights.temperature if trace.first else 1.0
        yes = logistic(xp.stack([t.logit for t in trace.found]))    # (D, B)
        cost = xp.stack([t.cost for t in trace.found])              # (D, B)
        ll, back_ll = likelihoods(cfg, x, trace.ys)                 # (D+1, B)  eq.13
        q = xp.exp(trace.log_q)                                     # (D+1, B)
        E = ll + log_prior(cfg, trace)                              # (D+1, B)  eq.14
        E[1:] -= xp.cumsum(cost, 0)
        A = q * (E - T * trace.log_q)                               # (D+1, B)  eq.14
        dys = back_ll(-q / B)
        dy, kept_logits, kept_costs = sum(dys), [], []
        loss -= A.sum()
        for t in trace.kept:
            p = logistic(t.logit)                                   # (R,)
            slope = -B * xp.einsum("rchw,rchw->r", dy[t.rows], t.drawn)
            size = xp.einsum("rchw,rchw->r", t.drawn, t.drawn) / variance
            gain = slope + (t.z - 0.5) * size - t.cost + cfg.stay - t.logit     # (R,)
            kept_logits.append(-p * (1 - p) * gain / B)
            kept_costs.append(t.z / B)
            kl = p * (t.logit - cfg.stay) + log_logistic(-t.logit) - np.log1p(-logistic(cfg.stay))
            loss += (t.z * t.cost + kl).sum()
        slopes.append(SimpleNamespace(
            found_logits=(yes * A[:-1] - (1 - yes) * from_first(A[1:])) / B,
            found_costs=from_first(q[1:]) / B, ys=dys,
            kept_logits=kept_logits, kept_costs=kept_costs))
    return loss / B, slopes


def log_weights(cfg, xs, traces):
    """log p(x_1:T, z_1:T) - log q(z_1:T | x_1:T) of what was sampled, a number for each row."""
    log_w, noes = 0.0, np.log1p(-logistic(cfg.stay))
    for x, trace in zip(xs, traces, strict=True):
        chosen = (trace.n == xp.arange(len(trace.ys))[:, None]).astype(x.dtype)    # (D+1, B)
        ll, _ = likelihoods(cfg, x, trace.ys)                       # (D+1, B)  eq.13
        log_w = log_w + (chosen * (ll + log_prior(cfg, trace) - trace.log_q)).sum(0)
        log_w = log_w - (from_first(chosen[1:]) * xp.stack([t.cost for t in trace.found])).sum(0)
        for t in trace.kept:
            log_w[t.rows] += t.z * (cfg.stay - t.logit - t.cost) + noes - log_logistic(-t.logit)
    return log_w


def log_mean_exp(a):
    """log of the mean of exp(a) over the last axis."""
    top = a.max(-1)
    return top + xp.log(xp.exp(a - top[..., None]).mean(-1))


def vimco(cfg, xs, traces, weights):
    """The paper's bound: log 1/J sum_k w_k of J samples, w = p(x, z) / q(z | x).  (Eq. 5)

    Mnih and Rezende (2016): with v_k = w_k / sum_j w_j,
    dbound = sum_k v_k dlog w_k + (bound - bound without k) dlog q(discrete z of k),
    where `without k` puts the geometric mean of the others' weights in place of w_k.
    """
    J = cfg.particles
    log_w = log_weights(cfg, xs, traces).reshape(-1, J)             # (videos, J)
    B = len(log_w)
    bound = log_mean_exp(log_w)                                     # (videos,)  eq.14
    others = (log_w.sum(1, keepdims=True) - log_w) / (J - 1)        # (videos, J)
    without = xp.where(xp.eye(J, dtype=bool), others[:, None], log_w[:, None])  # (videos, J, J)
    signal = bound[:, None] - log_mean_exp(without)                 # (videos, J)
    dlog_w = -xp.exp(log_w - bound[:, None]).reshape(-1) / (J * B)  # every row's
    dlog_q = (-signal / B).reshape(-1) - dlog_w                     # log q is in log w, too
    slopes = []
    for x, trace in zip(xs, traces, strict=True):
        chosen = (trace.n == xp.arange(len(trace.ys))[:, None]).astype(x.dtype)    # (D+1, B)
        yes = logistic(xp.stack([t.logit for t in trace.found]))    # (D, B)
        there = from_first(chosen[1:])                              # (D, B)
        asked = from_first(chosen)[:-1]                             # (D, B)
        _, back_ll = likelihoods(cfg, x, trace.ys)                  # eq.13
        slopes.append(SimpleNamespace(
            found_logits=dlog_q * (there - asked * yes), found_costs=-dlog_w * there,
            ys=back_ll(dlog_w * chosen),
            kept_logits=[dlog_q[t.rows] * (t.z - logistic(t.logit)) for t in trace.kept],
            kept_costs=[-dlog_w[t.rows] * t.z for t in trace.kept]))
    return -bound.mean(), slopes


OBJECTIVES = {"fast": fast, "vimco": vimco}


def unroll(p, cfg, xs, noise, looks=1):
    """All frames: traces, states after each frame, pullbacks.

    With more `looks` what was found in the first frame is propagated on it before anything moves.
    """
    B = len(xs[0])
    state = nothing(cfg, B, xs[0].dtype)
    e, back_e = features(p, cfg, "look", xp.concatenate(xs))        # (..., H)  eq.10
    traces, states, backs = [], [], []
    for t, x in enumerate(xs):
        if cfg.model == "air":
            state = nothing(cfg, B, x.dtype)
        trace, state, back_t = frame(p, cfg, x, e[t * B:(t + 1) * B], state, noise[t],
                                     t == 0 or cfg.model == "air")
        for _ in range(looks - 1 if t == 0 and cfg.model == "sqair" else 0):
            _, state, _ = frame(p, cfg, x, e[:B], state, noise[t], False)
            state.age[...] = 0
        traces.append(trace)
        states.append(state)
        backs.append(back_t)

    def back(slopes, g):
        ds, des = xp.zeros_like(state.s), []
        for back_t, slope in reversed(list(zip(backs, slopes, strict=True))):
            de, ds = back_t(slope, ds, g)
            des.append(de)
            if not cfg.through_time:
                ds = xp.zeros_like(ds)              # the past is taken as it is
        back_e(xp.concatenate(des[::-1]), g)                                        # eq.10
        g.flush()

    return traces, states, back


def objective(p, cfg, videos, noise, weights):
    """What training minimises, and its pullback to all parameters. videos (B, T, 1, S, S)"""
    if cfg.objective == "vimco":
        videos = xp.repeat(videos, cfg.particles, 0)
    xs = list(videos.swapaxes(0, 1))
    traces, _, back_unroll = unroll(p, cfg, xs, noise)
    loss, slopes = OBJECTIVES[cfg.objective](cfg, xs, traces, weights)

    def back(g):
        back_unroll(slopes, g)

    return loss, back


# ================================================================ schedules and noise

def stage(cfg, step):
    """Frames and videos of an update: the curriculum."""
    T = max((start, T) for start, T in zip(cfg.starts, cfg.lengths, strict=True)
            if start <= step)[1]
    return T, cfg.batch_size * (2 if T == 1 else 1)


def schedule(cfg, step):
    """Weights that move while training."""
    return SimpleNamespace(
        temperature=ramp(step, 0, cfg.temperature_steps, cfg.temperature, 1.0),
        first=ramp(step, cfg.first_from, cfg.first_to, cfg.first_begin, cfg.first),
        lr=cfg.lr * cosine(step, cfg.steps, cfg.lr_floor))


def draw_noise(cfg, T, batch, seed, step, start=0, count=None):
    """All randomness of one update, keyed by (seed, step): a list of frames' noise.

    eps: slots, then discovery steps; uniform: each slot's presence, then the number found. With
    `vimco` a video has K neighbouring rows. A process takes its own videos.
    """
    rng, N = np.random.default_rng([seed, 1, step]), cfg.slots
    K = cfg.particles if cfg.objective == "vimco" else 1
    own = slice(start * K, (start + (count or batch)) * K)
    eps = rng.standard_normal((T, 2 * N, batch * K, 3 + cfg.what), np.float32)[:, :, own]
    uniform = rng.random((T, N + 1, batch * K), np.float32)[:, :, own]
    return [SimpleNamespace(eps=e, uniform=u)
            for e, u in zip(to_device(eps), to_device(uniform), strict=True)]


def no_noise(cfg, T, rows, dtype=np.float32):
    """Every latent at its mean; an object is there if that is likelier than not."""
    eps = xp.zeros((2 * cfg.slots, rows, 3 + cfg.what), dtype)
    return [SimpleNamespace(eps=eps, uniform=xp.full((cfg.slots + 1, rows), 0.5, dtype))] * T


# ================================================================ videos

def load_glyphs(cfg, split, data_dir):
    return data.digits(split, data_dir, drawn=cfg.data == "drawn")


def draw_videos(cfg, glyphs, seed, start, count, frames):
    """Videos start .. start + count - 1 of the endless stream `seed`."""
    return videos.moving_digits(glyphs, seed, start, count, frames, cfg.canvas, cfg.counts,
                                cfg.motion)


# ================================================================ reading videos, scoring

def inferred(p, cfg, images):
    """All slots in each frame, whether they are taken, by whom; every latent at its mean."""
    B, T = images.shape[:2]
    xs = list(to_device(images).swapaxes(0, 1))
    _, states, _ = unroll(p, cfg, xs, no_noise(cfg, T, B), cfg.looks)
    return tuple(xp.stack([getattr(a, k) for a in states], 1) for k in
                 ("s", "there", "name"))            # (B, T, N, F), (B, T, N), (B, T, N)


def infer_videos(p, cfg, images):
    """Who is where in each frame. Host arrays (B, T, ..) in and out."""
    B, T, N, S = *images.shape[:2], cfg.slots, cfg.canvas
    s, there, name = inferred(p, cfg, images)       # (B, T, N, F), (B, T, N), (B, T, N)
    objects = s[there > 0]
    drawn = xp.zeros((B, T, N, 1, S, S), images.dtype)
    drawn[there > 0], _ = draw(p, cfg, objects[:, 6:6 + cfg.what], objects[:, :3])
    drawn, there, name = map(to_host, (drawn, there > 0, name))
    return SimpleNamespace(there=there, name=name, drawn=drawn, recon=drawn.sum(2),
                           boxes=ink_boxes(drawn, INK))


def bound(p, cfg, images, noise):
    """Per video: the bound of `fast` with one sample, and the log likelihood in it."""
    xs = list(to_device(images).swapaxes(0, 1))
    traces, _, _ = unroll(p, cfg, xs, noise)
    elbo = -fast(cfg, xs, traces, SimpleNamespace(temperature=1.0))[0]
    log_p = sum((xp.exp(t.log_q) * likelihoods(cfg, x, t.ys)[0]).sum(0).mean()
                for x, t in zip(xs, traces, strict=True))
    return float(elbo), float(log_p)


def score(p, cfg, parts):
    """The paper's metrics over videos that come in parts (images, counts, boxes or None)."""
    total, error, pixels, elbo, log_p = 0, 0.0, 0, 0.0, 0.0
    right, tracks, fast_cfg = [], [], replace(cfg, objective="fast")
    for images, counts, boxes in parts:
        B, T = images.shape[:2]
        guess = infer_videos(p, cfg, images)
        error += float(((guess.recon - images) ** 2).sum())
        pixels += images.size
        e, l = bound(p, fast_cfg, images, draw_noise(fast_cfg, T, B, TEST, total))
        elbo, log_p, total = elbo + e * B, log_p + l * B, total + B
        right.append((guess.there.sum(2) == counts).ravel())
        if boxes is not None:
            tracks.append(follow(boxes, guess.boxes, guess.name))
    metrics = {"count_accuracy": float(np.concatenate(right).mean()), "mse": error / pixels,
               "elbo": elbo / total, "log_likelihood": log_p / total,
               "kl": (log_p - elbo) / total}
    return metrics | (summary(tracks) if tracks else {})


def stream(cfg, glyphs, seed, total, part=50):
    """`total` videos of a stream, a part at a time."""
    for start in range(0, total, part):
        yield draw_videos(cfg, glyphs, seed, start, min(part, total - start), cfg.frames)[:3]


def evaluate(cfg, weights, path=None, data_dir=None):
    """Score weights on a scene file, or without one on fresh test videos."""
    p = fitting(weights, init(cfg, 0))
    if path is not None:
        return score(p, cfg, file_parts(cfg, path))
    glyphs = load_glyphs(cfg, "test", data_dir)
    metrics = {"scenes": glyphs.source,
               **score(p, cfg, stream(cfg, glyphs, TEST, cfg.test_videos)),
               **prediction(p, cfg, stream(cfg, glyphs, TEST, cfg.test_videos))}
    if cfg.bound_particles:
        metrics["bound"] = tight_bound(p, cfg, stream(cfg, glyphs, TEST, cfg.bound_videos, 1))
    if cfg.addition:
        metrics |= addition(p, cfg, load_glyphs(cfg, "train", data_dir), glyphs)
    return metrics


def file_parts(cfg, path, part=25):
    """The videos of an npz file, checked, a part at a time."""
    S = cfg.canvas
    axes = {"videos": ("N", "T", S, S), "counts": ("N", "T"), "boxes": ("N", "T", "K", 4)}
    file = read_scenes(path, axes, ("boxes",))
    images = as_picture(file["videos"], f"{path}: videos")[:, :, None]
    counts, boxes = file["counts"], file.get("boxes")
    if not np.isin(counts, np.arange(100)).all():
        raise Fail(f"{path}: counts must be whole numbers from 0 to 99")
    for k in range(0, len(images), part):
        some = None if boxes is None else boxes[k:k + part]
        yield images[k:k + part], counts[k:k + part].astype(np.int64), some


def tight_bound(p, cfg, parts):
    """log 1/K sum_k w_k per video with many samples: how the paper measures log p(x_1:T)."""
    K, total, count = cfg.bound_particles, 0.0, 0
    cfg = replace(cfg, objective="vimco", particles=K)              # costs of the samples
    for images, _, _ in parts:
        T = images.shape[1]
        xs = [xp.repeat(x, K, 0) for x in to_device(images).swapaxes(0, 1)]
        traces, _, _ = unroll(p, cfg, xs, draw_noise(cfg, T, 1, TEST, count))
        log_w = log_weights(cfg, xs, traces)
        total += float(log_mean_exp(log_w))
        count += 1
    return total / count


def addition(p, cfg, *glyphs, count=(50_000, 2000)):
    """Accuracies of a classifier that adds a video's digits from its z_what (supplement D.4)."""
    sets = []
    for split, n, seed in zip(glyphs, count, (VALIDATION, TEST), strict=True):
        features, sums = [], []
        for start in range(0, n, 100):
            some = draw_videos(cfg, split, seed, start, 100, cfg.frames)
            objects, there, _ = inferred(p, cfg, some.images)
            what = objects[..., 6:6 + cfg.what] * there[..., None]
            features.append(to_host(what).astype(np.float16))
            sums.append(np.maximum(some.labels, 0).sum(1))
        sets.append((np.concatenate(features), np.concatenate(sums)))
    return probe(*sets, classes=9 * max(cfg.counts) + 1)


# ================================================================ imagining: the prior alone

def mirrored(p, cfg, s):
    """The past of objects about to bounce, seen in the edge: a bounce is a straight line.

    Nothing of this is learned: an object turns round where the middle of its ink meets the edge.
    """
    if not cfg.bounce:
        return s
    where, velocity = s[:, 1:3], s[:, 4:6]          # (M, 2), (M, 2)
    patch, _ = DECODE[cfg.net](p, cfg, s[:, 6:6 + cfg.what])        # (M, 1, G, G)
    box = np.nan_to_num(ink_boxes(to_host(patch), INK), nan=cfg.glimpse / 2)    # (M, 4)
    middle = to_device(((box[:, :2] + box[:, 2:]) / cfg.glimpse - 1).astype(np.float32))
    away = 2 * window_of(s[:, :3])[0][:, :1] * middle               # (M, 2)
    below = (where + velocity < -2 - away) & (velocity < 0)         # (M, 2)
    above = (where + velocity > 2 - away) & (velocity > 0)          # (M, 2)
    turn = xp.where(below | above, -1, 1).astype(s.dtype)           # (M, 2)
    edge = 4.0 * above - 4.0 * below - 2 * (below | above) * away   # (M, 2)
    past = s.copy()                                 # (M, F)
    past[:, 1:3], past[:, 4:6] = turn * where + edge, turn * velocity
    return past


def imagine(p, cfg, state, noise):
    """Algorithm 1 with objects that move on by eq. 1; none comes or goes. (B, T, 1, S, S)"""
    K, Q = cfg.what, cfg.memory
    rows, slots = xp.nonzero(state.there)           # (M,), (M,)
    s, age = state.s[rows, slots], state.age[rows, slots]           # (M, F), (M,)
    videos = xp.zeros((len(state.s), len(noise), 1, cfg.canvas, cfg.canvas), s.dtype)
    for t, eps in enumerate(noise):
        s = mirrored(p, cfg, s)                     # (M, F)
        _, mean, log_std, memory, _ = expect(p, cfg, s, age)        # (M, 3+K), (M, 3+K), (M, Q)
        z = mean + xp.exp(log_std) * eps[slots, rows]               # (M, 3+K)
        where0, velocity, _, h, _ = split(s, 3, 3, K, Q, Q)
        velocity = velocity + newest_share(age, s.dtype) * (z[:, :3] - where0 - velocity)
        s, age = join(z[:, :3], velocity, z[:, 3:], h, memory), age + 1
        drawn, _ = draw(p, cfg, z[:, 3:], z[:, :3])                 # (M, 1, S, S)  eq.12
        for i in range(cfg.slots):
            videos[rows[slots == i], t] += drawn[slots == i]
    return to_host(videos)


def eps_of(cfg, T, B, rng):
    """Noise of T imagined frames; without rng the most probable video."""
    shape = (T, cfg.slots, B, 3 + cfg.what)
    return to_device(np.zeros(shape, np.float32) if rng is None
                     else rng.standard_normal(shape, np.float32))


def settled(p, cfg, x, rows, what, where, own, steps=4, h=0.04):
    """Where objects whose appearance is known fit a frame best: Gauss-Newton, all at once."""
    one = own[:, None, None, None]                  # (M, 1, 1, 1)  which are in the frame at all
    for _ in range(steps):
        drawn, _ = draw(p, cfg, what, where)                        # (M, 1, S, S)
        member = (rows == xp.arange(len(x))[:, None]).astype(x.dtype)       # (B, M)
        y = gemm(member, (one * drawn).reshape(len(rows), -1)).reshape(x.shape)
        left = (x - y)[rows]                                        # (M, 1, S, S)
        right, down = ((draw(p, cfg, what, where + d)[0] - draw(p, cfg, what, where - d)[0])
                       / (2 * h) for d in h * xp.eye(3, dtype=x.dtype)[1:])
        (a, b, d), (u, v) = (
            [xp.einsum("mchw,mchw->m", *pair) for pair in pairs] for pairs in (
                ((right, right), (right, down), (down, down)), ((right, left), (down, left))))
        a, d = a + 0.1, d + 0.1
        step = xp.stack([d * u - b * v, a * v - b * u], 1) / (a * d - b * b)[:, None]
        where = join(where[:, :1], where[:, 1:] + xp.clip(step, -0.15, 0.15))
    return where


def in_hindsight(p, cfg, xs, states):
    """The last state, its objects' places and velocities once more from all frames.

    An object looks best known in the last frame, and worst in the first, when it was discovered.
    Its path is the line through its first place that fits the others best (least squares, a frame
    at a time): places are whole pixels, but only later ones had to be rounded.
    """
    last, K = states[-1], cfg.what
    rows, slots = xp.nonzero(last.there)            # (M,), (M,)
    s = last.s[rows, slots].copy()                  # (M, F)
    what, now, k = s[:, 6:6 + K], s.copy(), xp.zeros((len(s), 1), s.dtype)
    now[:, 3:6] = 0
    for x, state in zip(xs, states, strict=True):
        own = (state.name[rows, slots] == last.name[rows, slots]).astype(s.dtype)   # (M,)
        first = join(s[:, :1], state.s[rows, slots][:, 1:3])        # (M, 3)
        where = settled(p, cfg, x, rows, what, first, own)          # (M, 3)
        now = mirrored(p, cfg, now)                 # (M, F)
        away = own[:, None] * (where - now[:, :3] - now[:, 3:6])    # (M, 3)
        share = 6 / ((k + 1) * (2 * k + 1))         # (M, 1)  k / sum_{j=1..k} j^2
        moved = xp.where(k > 0, k * share, 1) * away                # (M, 3)
        velocity = now[:, 3:6] + (k > 0) * share * away             # (M, 3)
        now = join(now[:, :3] + now[:, 3:6] + moved, velocity, s[:, 6:])
        k += own[:, None]
    known = last.s.copy()
    known[rows, slots] = now
    return SimpleNamespace(**{**vars(last), "s": known})


def continued(p, cfg, images, given=3, rng=None):
    """What the model expects after the first `given` frames. Host arrays (B, T, 1, S, S)."""
    B, T = images.shape[:2]
    xs = list(to_device(images[:, :given]).swapaxes(0, 1))
    _, states, _ = unroll(p, cfg, xs, no_noise(cfg, given, B), cfg.looks)
    last = in_hindsight(p, cfg, xs, states)
    return imagine(p, cfg, last, eps_of(cfg, T - given, B, rng))


def prediction(p, cfg, parts, given=3):
    """Squared errors per pixel of the frames after the first three: ours, and two simple ways."""
    if cfg.model == "air" or cfg.frames <= given:
        return {}
    errors, count = np.zeros(3), 0
    for images, _, _ in parts:
        future, last = images[:, given:], images[:, given - 1:given]
        for k, guess in enumerate((continued(p, cfg, images, given), last, 0.0)):
            errors[k] += ((future - guess) ** 2).mean() * len(images)
        count += len(images)
    names = ("prediction_mse", "prediction_mse_of_last_frame", "prediction_mse_of_blank")
    return dict(zip(names, (errors / count).tolist(), strict=True))


def prior_samples(p, cfg, count, T, rng):
    """Videos from nothing: objects of frame 1 from N(0, 1), then as `imagine` has it."""
    state = nothing(cfg, count, np.float32)
    n = rng.choice([c for c in cfg.counts if c] or [1], count)      # (count,)
    there = np.arange(cfg.slots) < n[:, None]
    state.there[...] = to_device(there.astype(np.float32))
    z = rng.standard_normal((int(there.sum()), 3 + cfg.what)).astype(np.float32)
    state.s[to_device(there)] = placed(cfg, to_device(z), state.s.shape[2])
    first = xp.zeros((count, 1, cfg.canvas, cfg.canvas), np.float32)
    for i in range(cfg.slots):
        r = to_device(np.flatnonzero(there[:, i]))
        s = state.s[r, i]
        first[r] += draw(p, cfg, s[:, 6:6 + cfg.what], s[:, :3])[0]
    later = imagine(p, cfg, state, eps_of(cfg, T - 1, count, rng))
    return np.concatenate([to_host(first)[:, None], later], 1)


def infer(cfg, weights, files, out):
    """The tracks of each video, in its own pixels, and an overlay GIF that shows them."""
    from viz.tracks import overlay_gif

    p, results = fitting(weights, init(cfg, 0)), []
    for path in files:
        frames, images, to_video = read_video(path, cfg.canvas)
        guess = infer_videos(p, cfg, images[None])
        boxes, names = to_video(guess.boxes[0]), guess.name[0]
        overlay = Path(out) / f"{Path(path).name}.tracks.gif"
        overlay_gif(overlay, frames, boxes, names)
        tracks = [{"identity": int(m), "boxes": {
            int(t): boxes[t, n].round(2).tolist() for t, n in zip(*np.nonzero(names == m),
                                                                 strict=True)}}
            for m in np.unique(names[names >= 0])]
        results.append({"file": str(path), "overlay": str(overlay), "frames": len(frames),
                        "counts": guess.there[0].sum(1).tolist(), "tracks": tracks})
    return {"videos": results}


# ================================================================ training

def train(cfg, run):
    """The loop: videos in, one update out. Everything is keyed by (seed, step)."""
    check(cfg)
    glyphs, test_glyphs = (load_glyphs(cfg, split, run.data_dir) for split in ("train", "test"))
    p = Params(init(cfg, run.seed))
    g = p.grads()
    adam = Optimiser(p)
    watched = list(stream(cfg, glyphs, VALIDATION, cfg.eval_videos))
    most = cfg.batch_size * 2
    for step in run.steps(cfg.steps, {"params": p.flat, "m": adam.m, "v": adam.v}):
        T, B = stage(cfg, step)
        start, count = share(B)
        weights = schedule(cfg, step)
        now = replace(cfg, first=weights.first,
                      objective=cfg.objective if cfg.vimco_from <= T else "fast")
        batch = draw_videos(cfg, glyphs, run.seed, step * most + start, count, T)
        noise = draw_noise(now, T, B, run.seed, step, start, count)
        loss, back = objective(p, now, to_device(batch.images), noise, weights)
        g.zero()
        back(g)
        g.average()
        seen = run.watch(loss=float(loss) / T, gradient=norm(g.flat))
        adam.update(g, weights.lr, step + 1)
        if run.due(step + 1, cfg.eval_every) or step + 1 == cfg.steps:
            run.log(step + 1, **seen, frames=T, **score(p, cfg, watched))

    metrics = {"trained_on": glyphs.source,
               **score(p, cfg, stream(cfg, test_glyphs, TEST, cfg.test_videos)),
               **prediction(p, cfg, stream(cfg, test_glyphs, TEST, cfg.test_videos))}
    if is_root():
        save_weights(run.folder / "weights.npz", p.host(), cfg, about=glyphs.source)
        figures([run.folder], run.data_dir)
    return metrics


def check(cfg):
    """What single flags cannot know."""
    if len(cfg.starts) != len(cfg.lengths) or cfg.starts[0] or sorted(cfg.starts) != [*cfg.starts]:
        raise Fail("--starts must rise from 0 and give one update for each of --lengths")
    if max(cfg.counts) > cfg.slots:
        raise Fail(f"--counts asks for {max(cfg.counts)} digits, but there are --slots {cfg.slots}")
    if cfg.net == "conv" and cfg.glimpse % 4:
        raise Fail("--net conv needs a --glimpse that is a multiple of 4")


# ================================================================ figures

def figures(folders, data_dir=None):
    """Draw all that run folders hold: videos of the first, curves of them all."""
    from viz import curves, tracks

    runs = [load_run(folder) for folder in folders]
    folder, (cfg, p) = folders[0], runs[0]
    glyphs = load_glyphs(cfg, "test", data_dir)
    fresh = draw_videos(cfg, glyphs, TEST, 0, 60, cfg.frames)
    guess = infer_videos(p, cfg, fresh.images)
    pick = varied(fresh, guess)
    recon, boxes, name = (a[pick] for a in (guess.recon, guess.boxes, guess.name))
    label = "SQAIR" if cfg.model == "sqair" else "AIR"
    tracks.sheet(folder / "tracks.png", fresh.images[pick], {label: (recon, boxes, name)})
    tracks.track_gif(folder / "tracks.gif", fresh.images[pick], recon, boxes, name)
    tracks.glimpses(folder / "glimpses.png", fresh.images[pick[:3]], guess.drawn[pick[:3]],
                    name[:3])
    if cfg.model == "sqair":
        expected = np.concatenate([guess.recon[pick, :3], continued(p, cfg, fresh.images[pick])], 1)
        tracks.generation(folder / "prediction.png", fresh.images[pick], expected, given=3)
        dreams = prior_samples(p, cfg, 8, cfg.frames, np.random.default_rng(0))
        tracks.generation(folder / "samples.png", None, dreams, given=0)
    wrong = np.flatnonzero((guess.there.sum(2) != fresh.counts).any(1))[:4]
    if len(wrong):
        tracks.sheet(folder / "failures.png", fresh.images[wrong], {
            label: (guess.recon[wrong], guess.boxes[wrong], guess.name[wrong])})
    curves.curves(folder / "curves.png", {f.name: f / "metrics.jsonl" for f in folders},
                  [("count_accuracy", "count accuracy"), ("identity_accuracy", "identity kept"),
                   ("elbo", "ELBO (nats per video)")])


def varied(fresh, guess, most=6):
    """Videos to show: those with most digits, and among them those that overlap most."""
    n = fresh.counts[:, 0]
    crowded = [(-n[b], -(fresh.images[b].sum((1, 2, 3)).min()), b) for b in range(len(n))]
    return np.array([b for *_, b in sorted(crowded)][:most])


def load_run(folder):
    """Config and weights of a run folder."""
    config, weights, _ = load_weights(folder / "weights.npz")
    cfg = cli.from_dict(Config, config, folder / "weights.npz")
    return cfg, fitting(weights, init(cfg, 0))


if __name__ == "__main__":
    cli.main(__doc__, Config, PRESETS, train=train, evaluate=evaluate, infer=infer, figures=figures,
             adjustable=("motion", "data", "counts", "frames", "test_videos", "bound_particles",
                         "bound_videos", "addition", "bounce", "looks"))
