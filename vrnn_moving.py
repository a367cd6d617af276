"""Variational RNN (Chung et al., 2015): what SQAIR is compared with, a video model without objects.

    python vrnn_moving.py           trains, scores on 2,000 fresh videos, draws figures and a GIF

One vector z_t for the whole frame, configured as in SQAIR's supplement D.3. The equations that tag
the lines below (forward and backward alike), o_t being what the LSTM puts out:

    eq.1   o_t = LSTM(look(x_{t-1}), code(z_{t-1}), o_{t-1})
    eq.2   p(z_t | x_<t, z_<t) = N(prior(o_t))
    eq.3   q(z_t | x_<=t, z_<t) = N(infer(o_t, look(x_t)))
    eq.4   p(x_t | x_<t, z_<=t) = N(decode(code(z_t), o_t), sigma^2)
    eq.5   log w_t = log p(x_t | ..) + log p(z_t | ..) - log q(z_t | ..)
    eq.6   v^n = product of w_t^n since the last resampling; when the effective sample size
           (sum v)^2 / sum v^2 of a video's N particles falls below N / 2, they are resampled
    eq.7   log p(x_1:T) >= E[ sum over resamplings, and the end, of log 1/N sum_n v^n ]

That is the FIVO bound (Maddison et al., 2017); without resampling it is the IWAE bound, and with
N = 1 the ELBO. As in the FIVO paper the gradient leaves out the score function of the resampling:
ancestors are taken as given, which is biased and has far less variance.

Dimension key: B videos, T frames, N particles, R = B N rows (a video's particles are neighbours),
S canvas side, H units of all layers, K dimensions of z.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

from common.backend import gemm, to_device, to_host, xp  # before NumPy: threads and BLAS kernels

import numpy as np

from common import cli, data, videos
from common.conv import conv, conv_transpose
from common.errors import Fail
from common.files import as_picture, read_scenes, read_video
from common.ops import (
    clamp, elu, gaussian_log_density, identity, linear, lstm, mlp, sigmoid, softmax,
)
from common.optim import Optimiser, cosine, norm
from common.params import Params, fitting
from common.probe import probe
from common.processes import is_root, share
from common.store import load_weights, save_weights

MAPS = (32, 32, 64, 64)                     # of `--net conv`, each at half the side of the last
VALIDATION, TEST = 1_000_001, 1_000_002     # seeds of the streams that no training run draws from


# ================================================================ configuration

@dataclass(frozen=True)
class Config:
    steps: int = cli.option(3200, "optimiser updates", low=1)
    batch_size: int = cli.option(32, "videos per update", low=1)
    net: str = cli.option("mlp", "encoder and decoder of frames", choices=("mlp", "conv"))
    objective: str = cli.option("fivo", "fivo: resample particles; iwae: never",
                                choices=("fivo", "iwae"))
    particles: int = cli.option(4, "N: samples of a video's latents (1: the ELBO)", low=1)
    particles_from: int = cli.option(2800, "update at which they begin to be N; one before", low=0)
    data: str = cli.option("digits", "what moves (digits: MNIST, or drawn without it)",
                           choices=("digits", "drawn"))
    motion: str = cli.option("paper", "how digits move", choices=("paper", "gentle", "fast"))
    counts: tuple[int, ...] = cli.option((0, 1, 2), "digits in a video", low=0, high=4)
    canvas: int = cli.option(50, "side of a frame in pixels", low=8)
    frames: int = cli.option(10, "frames of a test video", low=1)
    lengths: tuple[int, ...] = cli.option((3, 10), "frames of a training video: the curriculum",
                                          low=1)
    starts: tuple[int, ...] = cli.option((0, 1500), "update at which each of the lengths begins",
                                         low=0)
    latent: int = cli.option(165, "dimensions of z", low=1)
    hidden: int = cli.option(256, "units of the LSTM and of all layers", low=1)
    layers: int = cli.option(2, "hidden layers of each network", low=1)
    std: float = cli.option(0.3, "sigma of the likelihood", low=1e-3)
    lr: float = cli.option(1e-3, "peak learning rate (Adam)", low=0.0)
    lr_floor: float = cli.option(0.05, "share of lr that is left at the end", low=0.0, high=1.0)
    bound_particles: int = cli.option(0, "evaluate: particles for the tight bounds (0: leave them)",
                                      low=0)
    bound_videos: int = cli.option(100, "evaluate: videos for those bounds", low=1)
    addition: bool = cli.option(False, "evaluate: train a classifier that adds the digits")
    eval_every: int = cli.option(250, "updates between two lines of metrics", low=1)
    eval_videos: int = cli.option(100, "validation videos for each line of metrics", low=1)
    test_videos: int = cli.option(2000, "fresh test videos for the final score", low=1)


PRESETS = {
    "default": {},
    "conv": {"net": "conv", "steps": 1300, "starts": (0, 900), "particles_from": 1250},
    "quick": {"steps": 700, "starts": (0, 600), "particles_from": 660, "test_videos": 200},
}


ADJUSTABLE = ("data", "motion", "counts", "frames", "particles", "objective", "test_videos",
              "bound_particles", "bound_videos", "addition")


# ================================================================ parameters

def sides(cfg):
    """Sides of a frame and of the maps after each convolution."""
    return [-(-cfg.canvas // 2**i) for i in range(len(MAPS) + 1)]


def init(cfg, seed):
    """Normal weights scaled by the square root of the fan-in; the flat vector keeps this order."""
    rng = np.random.default_rng([seed, 0])
    H, K, P, GAIN, OUT = cfg.hidden, cfg.latent, cfg.canvas**2, 1.2, 0.3
    arrays, inner = {}, [H] * cfg.layers

    def layer(name, n_in, n_out, gain, bias=0.0):
        arrays[name + ".W"] = rng.standard_normal((n_in, n_out)) * (gain / np.sqrt(n_in))
        if bias is not None:
            arrays[name + ".b"] = np.broadcast_to(np.asarray(bias, float), n_out)

    def layers(name, *sizes, last=GAIN, bias=0.0):
        for i, (n_in, n_out) in enumerate(pairwise(sizes)):
            final = i == len(sizes) - 2
            layer(f"{name}.{i}", n_in, n_out, last if final else GAIN, bias if final else 0.0)

    def kernel(name, n_in, n_out, shape, gain=GAIN, bias=0.0):
        arrays[name + ".W"] = rng.standard_normal((*shape, 3, 3)) * (gain / np.sqrt(n_in))
        arrays[name + ".b"] = np.full(n_out, bias)

    if cfg.net == "conv":
        P = MAPS[-1] * sides(cfg)[-1]**2
        for i, (n, m) in enumerate(pairwise((1, *MAPS))):
            kernel(f"see.{i}", 9 * n, m, (m, n))
        for i, (m, n) in enumerate(pairwise((*MAPS[::-1], 1))):     # a quarter of the taps meet ink
            last = i == len(MAPS) - 1
            kernel(f"paint.{i}", 9 * m / 4, n, (m, n), *((OUT, -2.0) if last else ()))
        layers("look", P, H)
        layers("decode", 2 * H, H, P)
    else:
        layers("look", P, *inner)
        layers("decode", 2 * H, *inner, P, last=OUT, bias=-2.0)     # a dark frame to begin with
    layer("lstm.a", H, 4 * H, 1.0, np.repeat([0.0, 1.0, 0.0, 0.0], H))      # forget gate: 1
    layer("lstm.x", H, 4 * H, 1.0, None)
    layer("lstm.h", H, 4 * H, 1.0, None)
    layers("prior", H, *inner, 2 * K, last=OUT)
    layers("infer", 2 * H, *inner, 2 * K, last=OUT, bias=[0.0] * K + [-1.0] * K)
    layers("code", K, *inner)
    return arrays


# ================================================================ pieces of a step

def join(*pieces):
    return xp.concatenate(pieces, 1)


def see(p, x):
    """The convolutions of `--net conv`."""
    backs = []
    for i in range(len(MAPS)):
        x, back_i = conv(p, f"see.{i}", x, 2, want_dx=i > 0, act=elu)
        backs.append(back_i)

    def back(dx, g):
        for back_i in reversed(backs):
            dx = back_i(dx, g)

    return x, back


def paint(p, cfg, x):
    """The way from maps to a frame, each twice the side of the last or a pixel less."""
    backs = []
    for i, side in enumerate(sides(cfg)[-2::-1]):
        x, back_i = conv_transpose(p, f"paint.{i}", x, act=elu if i + 1 < len(MAPS) else identity)
        x, back_cut = cut(x, side)
        backs.append((back_i, back_cut))
    x, back_x = sigmoid(x)

    def back(dx, g):
        dx = back_x(dx)
        for back_i, back_cut in reversed(backs):
            dx = back_cut(dx)
            dx = back_i(dx, g)
        return dx

    return x, back


def cut(x, side):
    y = xp.ascontiguousarray(x[:, :, :side, :side])

    def back(dy):
        more = x.shape[2] - side
        return xp.pad(dy, ((0, 0), (0, 0), (0, more), (0, more)))

    return y, back


def look(p, cfg, x):
    """What frames show."""
    maps, back_maps = see(p, x) if cfg.net == "conv" else (x, None)
    f, back_f = mlp(p, "look", maps.reshape(len(x), -1), elu, last=elu)

    def back(df, g):
        dmaps = back_f(df, g).reshape(maps.shape)
        if cfg.net == "conv":
            back_maps(dmaps, g)

    return f, back


def decode(p, cfg, u):
    """The mean of a frame, in [0, 1]."""
    conv = cfg.net == "conv"
    y, back_y = mlp(p, "decode", u, elu, last=elu if conv else sigmoid)
    h = sides(cfg)[-1] if conv else cfg.canvas
    maps = y.reshape(len(y), -1, h, h)
    x, back_x = paint(p, cfg, maps) if conv else (maps, None)       # (R, 1, S, S)

    def back(dx, g):
        dmaps = back_x(dx, g) if conv else dx
        return back_y(dmaps.reshape(y.shape), g)

    return x, back


def normal(p, name, x):
    """Mean and log std of z."""
    y, back_y = mlp(p, name, x, elu)                                # (R, 2K)
    K = y.shape[1] // 2
    log_std, back_clamp = clamp(y[:, K:], -5, 2)                    # (R, K)

    def back(dmean, dlog_std, g):
        dlog_std = back_clamp(dlog_std)
        return back_y(join(dmean, dlog_std), g)

    return y[:, :K], log_std, back


def latent(mean, log_std, mean0, log_std0, eps):
    """z = mean + std eps, and log p(z) - log q(z) with the prior N(mean0, std0^2)."""
    noise, precision = xp.exp(log_std) * eps, xp.exp(-log_std0)     # (R, K), (R, K)
    z = mean + noise                                                # (R, K)
    away = (z - mean0) * precision                                  # (R, K)
    log_r = (0.5 * (eps * eps - away * away) + log_std - log_std0).sum(1)   # (R,)

    def back(dz, dlog_r):
        dlog_r = dlog_r[:, None]
        dmean0 = dlog_r * away * precision
        dz = dz - dmean0
        return dz, dlog_r + dz * noise, dmean0, dlog_r * (away * away - 1)

    return z, log_r, back


# ================================================================ one frame of all particles

def step(p, cfg, x, f, a, state, eps):
    """Predict, infer, explain. f is what the frame shows, a the last one's share of the LSTM."""
    o, c, u = state                                 # (R, H), (R, H), (R, H)
    o, c, back_o = lstm(p, "lstm", a, u, o, c)                      # (R, H), (R, H)  eq.1
    mean0, log_std0, back_prior = normal(p, "prior", o)             # (R, K), (R, K)  eq.2
    mean, log_std, back_infer = normal(p, "infer", join(o, f))      # (R, K), (R, K)  eq.3
    z, log_r, back_z = latent(mean, log_std, mean0, log_std0, eps)  # (R, K), (R,)  eq.3
    u, back_u = mlp(p, "code", z, elu, last=elu)                    # (R, H)  eq.4
    y, back_y = decode(p, cfg, join(u, o))                          # (R, 1, S, S)  eq.4
    log_p, back_p = gaussian_log_density(x, y, cfg.std)             # (R,)  eq.4
    log_w = log_p + log_r                                           # (R,)  eq.5
    trace = SimpleNamespace(mean=mean, log_std=log_std, mean0=mean0, log_std0=log_std0, y=y,
                            log_p=log_p, log_w=log_w)

    def back(dstate, dlog_w, g):
        do, dc, du = dstate
        dlog_p = dlog_r = dlog_w                                                    # eq.5
        dy = back_p(dlog_p)                                                         # eq.4
        du_y, do_y = xp.split(back_y(dy, g), 2, 1)                                  # eq.4
        dz = back_u(du + du_y, g)                                                   # eq.4
        dmean, dlog_std, dmean0, dlog_std0 = back_z(dz, dlog_r)                     # eq.3
        do_infer, df = xp.split(back_infer(dmean, dlog_std, g), 2, 1)               # eq.3
        do_prior = back_prior(dmean0, dlog_std0, g)                                 # eq.2
        da, du, do, dc = back_o(do + do_y + do_infer + do_prior, dc, g)             # eq.1
        return (do, dc, du), df, da

    return trace, (o, c, u), back


def look_all(p, cfg, xs):
    """What each frame shows, and what the LSTM hears of the frame before: x_0 shows nothing."""
    T, B = xs.shape[:2]
    f, back_f = look(p, cfg, xs.reshape(T * B, *xs.shape[2:]))      # (T*B, H)
    before = xp.concatenate([xp.zeros_like(f[:B]), f[:-B]])         # (T*B, H)
    a, back_a = linear(p, "lstm.a", before)                         # (T*B, 4H)  eq.1

    def back(df, da, g):
        dbefore = back_a(da, g)                                                     # eq.1
        back_f(df + xp.concatenate([dbefore[B:], xp.zeros_like(f[:B])]), g)

    return f.reshape(T, B, -1), a.reshape(T, B, -1), back


# ================================================================ particles

def log_mean_exp(a):
    """log of the mean of exp(a) over the last axis."""
    top = a.max(-1)
    return top + xp.log(xp.exp(a - top[..., None]).mean(-1))


def resample(cfg, share, uniform):
    """Which videos resample, and every row's ancestor; systematic, with one number a video."""
    B, N = share.shape
    tired = (cfg.objective == "fivo") & (1 / (share * share).sum(1) < N / 2)    # (B,)  eq.6
    at = (xp.arange(N) + uniform[:, None]) / N                      # (B, N)
    chosen = (xp.cumsum(share, 1)[:, None] < at[..., None]).sum(2).clip(0, N - 1)   # (B, N)
    ancestor = xp.where(tired[:, None], chosen, xp.arange(N))       # (B, N)  eq.6
    return tired, (ancestor + N * xp.arange(B)[:, None]).reshape(-1)


def gather(state, ancestor):
    """Rows of the state's arrays; a row that has several heirs gets all their gradients."""
    def back(dstate):
        heirs = (ancestor == xp.arange(len(ancestor))[:, None]).astype(state[0].dtype)  # (R, R)
        return tuple(gemm(heirs, d) for d in dstate)

    return tuple(s[ancestor] for s in state), back


def unroll(p, cfg, videos, noise):
    """All frames: traces, each video's bound, the state at the end. videos (B, T, 1, S, S)"""
    (B, T), N = videos.shape[:2], cfg.particles
    xs = videos.swapaxes(0, 1)
    f, a, back_look = look_all(p, cfg, xs)                          # (T, B, H), (T, B, 4H)
    state = tuple(xp.zeros((B * N, cfg.hidden), videos.dtype) for _ in range(3))
    log_v, bound, traces, backs = xp.zeros((B, N), videos.dtype), 0.0, [], []
    for t in range(T):
        x_t, f_t, a_t = (xp.repeat(d[t], N, 0) for d in (xs, f, a))
        trace, state, back_t = step(p, cfg, x_t, f_t, a_t, state, noise.eps[t])
        log_v = log_v + trace.log_w.reshape(B, N)                   # (B, N)  eq.6
        trace.share = softmax(log_v)[0]                             # (B, N)
        tired, ancestor = resample(cfg, trace.share, noise.uniform[t])      # (B,), (R,)  eq.6
        state, back_state = gather(state, ancestor)
        trace.closed = tired | (t == T - 1)                         # (B,)  eq.7
        bound = bound + trace.closed * log_mean_exp(log_v)          # (B,)  eq.7
        log_v = log_v * ~tired[:, None]                             # (B, N)
        traces.append(trace)
        backs.append((back_t, back_state))

    def back(dbound, g):
        dstate, dlog_v, dfs, das = tuple(xp.zeros_like(s) for s in state), 0.0, [], []
        for (back_t, back_state), trace in reversed(list(zip(backs, traces, strict=True))):
            dlog_v = xp.where(trace.closed[:, None], dbound[:, None] * trace.share, dlog_v) # eq.7
            dstate = back_state(dstate)                                             # eq.6
            dstate, df, da = back_t(dstate, dlog_v.reshape(-1), g)
            dfs.append(df.reshape(B, N, -1).sum(1))
            das.append(da.reshape(B, N, -1).sum(1))
        back_look(xp.concatenate(dfs[::-1]), xp.concatenate(das[::-1]), g)
        g.flush()

    return traces, bound, state, back


def objective(p, cfg, videos, noise):
    """What training minimises, and its pullback to all parameters."""
    _, bound, _, back_unroll = unroll(p, cfg, videos, noise)
    B = len(bound)

    def back(g):
        back_unroll(xp.full_like(bound, -1 / B), g)

    return -bound.sum() / B, back


def stage(cfg, step):
    """Frames of an update's videos, and the config with its number of particles."""
    T = max(pair for pair in zip(cfg.starts, cfg.lengths, strict=True) if pair[0] <= step)[1]
    return T, cfg if step >= cfg.particles_from else replace(cfg, particles=1)


def draw_noise(cfg, T, batch, seed, step, start=0, count=None):
    """All randomness of one update, keyed by (seed, step); a process takes its own videos."""
    rng, N, count = np.random.default_rng([seed, 1, step]), cfg.particles, count or batch
    eps = rng.standard_normal((T, batch * N, cfg.latent), np.float32)
    uniform = rng.random((T, batch), np.float32)
    return SimpleNamespace(eps=to_device(eps[:, start * N:(start + count) * N]),
                           uniform=to_device(uniform[:, start:start + count]))


def no_noise(cfg, T, rows):
    """Every latent at its mean."""
    return SimpleNamespace(eps=xp.zeros((T, rows, cfg.latent), xp.float32),
                           uniform=xp.zeros((T, rows), xp.float32))


# ================================================================ videos

def load_glyphs(cfg, split, data_dir):
    return data.digits(split, data_dir, drawn=cfg.data == "drawn")


def draw_videos(cfg, glyphs, seed, start, count, frames):
    """Videos start .. start + count - 1 of the endless stream `seed`."""
    return videos.moving_digits(glyphs, seed, start, count, frames, cfg.canvas, cfg.counts,
                                cfg.motion)


def stream(cfg, glyphs, seed, total, part=50):
    """The images of `total` videos of a stream, a part at a time."""
    for start in range(0, total, part):
        yield draw_videos(cfg, glyphs, seed, start, min(part, total - start), cfg.frames).images


def file_parts(cfg, path, part=50):
    """The videos of an npz file, checked, a part at a time."""
    S = cfg.canvas
    file = read_scenes(path, {"videos": ("N", "T", S, S)})
    images = as_picture(file["videos"], f"{path}: videos")[:, :, None]
    for k in range(0, len(images), part):
        yield images[k:k + part]


# ================================================================ reading videos, scoring

def infer_videos(p, cfg, images):
    """Means of z and reconstructions, every latent at its mean. Host arrays (B, T, ..)."""
    B, T = images.shape[:2]
    one = replace(cfg, particles=1)
    traces, _, _, _ = unroll(p, one, to_device(images), no_noise(one, T, B))
    return tuple(np.stack([to_host(getattr(t, name)) for t in traces], 1) for name in ("mean", "y"))


def divergence(t):
    """KL(q || p) of a frame, for each row."""
    away, ratio = (t.mean - t.mean0) * xp.exp(-t.log_std0), xp.exp(t.log_std - t.log_std0)
    return (0.5 * (away * away + ratio * ratio - 1) + t.log_std0 - t.log_std).sum(1)


def score(p, cfg, parts):
    """The paper's metrics of a video, and the error of a pixel. `fivo` has N particles."""
    one, total, pixels, sums = replace(cfg, particles=1), 0, 0, np.zeros(4)
    for images in parts:
        x, (B, T) = to_device(images), images.shape[:2]
        noise, noise_one = (draw_noise(c, T, B, TEST, total) for c in (cfg, one))
        bound = unroll(p, cfg, x, noise)[1]
        traces = unroll(p, one, x, noise_one)[0]
        error = ((infer_videos(p, cfg, images)[1] - images) ** 2).sum()
        sums += [float(bound.sum()), sum(float(t.log_p.sum()) for t in traces),
                 sum(float(divergence(t).sum()) for t in traces), float(error)]
        total, pixels = total + B, pixels + images.size
    bound, log_p, kl = (sums[:3] / total).tolist()
    return {cfg.objective: bound, "elbo": log_p - kl, "log_likelihood": log_p, "kl": kl,
            "mse": sums[3] / pixels}


def evaluate(cfg, weights, path=None, data_dir=None):
    """Score weights on a scene file, or without one on fresh test videos."""
    p = fitting(weights, init(cfg, 0))
    if path is not None:
        return score(p, cfg, file_parts(cfg, path))
    glyphs = load_glyphs(cfg, "test", data_dir)
    metrics = {"scenes": glyphs.source, **score(p, cfg, stream(cfg, glyphs, TEST, cfg.test_videos))}
    if cfg.frames > 3:
        parts = stream(cfg, glyphs, TEST, cfg.test_videos)
        metrics["prediction_mse"] = prediction(p, cfg, parts)
    if cfg.bound_particles:
        for name, objective in (("bound", "iwae"), ("bound_fivo", "fivo")):
            parts = stream(cfg, glyphs, TEST, cfg.bound_videos, 1)
            metrics[name] = tight_bound(p, replace(cfg, objective=objective), parts)
    if cfg.addition:
        metrics |= addition(p, cfg, load_glyphs(cfg, "train", data_dir), glyphs)
    return metrics


def tight_bound(p, cfg, parts):
    """log p(x_1:T) from below with many particles, a mean over videos that come one by one."""
    cfg, bounds = replace(cfg, particles=cfg.bound_particles), []
    for k, images in enumerate(parts):
        noise = draw_noise(cfg, images.shape[1], 1, TEST, k)
        bounds.append(float(unroll(p, cfg, to_device(images), noise)[1][0]))
    return float(np.mean(bounds))


def addition(p, cfg, *glyphs, count=(50_000, 2000)):
    """Accuracies of a classifier that adds the digits of a video from its means of z (D.4)."""
    sets = []
    for split, n, seed in zip(glyphs, count, (VALIDATION, TEST), strict=True):
        features, sums = [], []
        for start in range(0, n, 100):
            some = draw_videos(cfg, split, seed, start, 100, cfg.frames)
            mean, _ = infer_videos(p, cfg, some.images)
            features.append(mean[:, :, None].astype(np.float16))
            sums.append(np.maximum(some.labels, 0).sum(1))
        sets.append((np.concatenate(features), np.concatenate(sums)))
    return probe(*sets, classes=9 * max(cfg.counts) + 1)


# ================================================================ imagining: the prior alone

def imagine(p, cfg, seen, count, rng=None):
    """`count` frames after those seen (B, T, 1, S, S), T may be 0; no rng: prior means."""
    (B, T), one = seen.shape[:2], replace(cfg, particles=1)
    if T:
        _, _, state, _ = unroll(p, one, seen, no_noise(cfg, T, B))
        f, _ = look(p, cfg, seen[:, -1])                            # (B, H)
    else:
        f, *state = (xp.zeros((B, cfg.hidden), seen.dtype) for _ in range(4))
    frames, (o, c, u) = [], state                   # (B, H), (B, H), (B, H)
    for _ in range(count):
        a, _ = linear(p, "lstm.a", f)                               # (B, 4H)  eq.1
        o, c, _ = lstm(p, "lstm", a, u, o, c)                       # (B, H), (B, H)  eq.1
        z, log_std, _ = normal(p, "prior", o)                       # (B, K), (B, K)  eq.2
        if rng is not None:
            z = z + xp.exp(log_std) * to_device(rng.standard_normal(z.shape, np.float32))
        u, _ = mlp(p, "code", z, elu, last=elu)                     # (B, H)  eq.4
        y, _ = decode(p, cfg, join(u, o))                           # (B, 1, S, S)  eq.4
        f, _ = look(p, cfg, y)                                      # (B, H)
        frames.append(to_host(y))
    return np.stack(frames, 1)


def prediction(p, cfg, parts, given=3):
    """Squared error per pixel of the frames after the first three, from the prior's means."""
    errors = [((imagine(p, cfg, to_device(images[:, :given]), images.shape[1] - given)
                - images[:, given:]) ** 2).mean((1, 2, 3, 4)) for images in parts]
    return float(np.concatenate(errors).mean())


def infer(cfg, weights, files, out):
    """What the model sees in videos: each a GIF of its frames above and reconstructions below."""
    from viz.tracks import track_gif

    p, results = fitting(weights, init(cfg, 0)), []
    for path in files:
        images = read_video(path, cfg.canvas)[1][None]
        recon = infer_videos(p, cfg, images)[1]
        overlay = Path(out) / f"{Path(path).name}.recon.gif"
        track_gif(overlay, images, recon, *no_boxes(images))
        results.append({"file": str(path), "overlay": str(overlay), "frames": images.shape[1],
                        "mse": float(((recon - images) ** 2).mean())})
    return {"videos": results}


# ================================================================ training

def train(cfg, run):
    """The loop: videos in, one update out. Everything is keyed by (seed, step)."""
    if len(cfg.starts) != len(cfg.lengths) or cfg.starts[0] or sorted(cfg.starts) != [*cfg.starts]:
        raise Fail("--starts must rise from 0 and give one update for each of --lengths")
    glyphs, test_glyphs = (load_glyphs(cfg, split, run.data_dir) for split in ("train", "test"))
    p = Params(init(cfg, run.seed))
    g = p.grads()
    adam = Optimiser(p)
    watched = list(stream(cfg, glyphs, VALIDATION, cfg.eval_videos))
    for step in run.steps(cfg.steps, {"params": p.flat, "m": adam.m, "v": adam.v}):
        start, count = share(cfg.batch_size)
        T, now = stage(cfg, step)
        batch = draw_videos(cfg, glyphs, run.seed, step * cfg.batch_size + start, count, T)
        noise = draw_noise(now, T, cfg.batch_size, run.seed, step, start, count)
        loss, back = objective(p, now, to_device(batch.images), noise)
        g.zero()
        back(g)
        g.average()
        seen = run.watch(loss=float(loss) / T, gradient=norm(g.flat))
        adam.update(g, cfg.lr * cosine(step, cfg.steps, cfg.lr_floor), step + 1)
        if run.due(step + 1, cfg.eval_every) or step + 1 == cfg.steps:
            run.log(step + 1, **seen, frames=T, particles=now.particles, **score(p, cfg, watched))

    metrics = {"trained_on": glyphs.source,
               **score(p, cfg, stream(cfg, test_glyphs, TEST, cfg.test_videos))}
    if is_root():
        save_weights(run.folder / "weights.npz", p.host(), cfg, about=glyphs.source)
        figures([run.folder], run.data_dir)
    return metrics


# ================================================================ figures

def figures(folders, data_dir=None):
    """Draw all that the first run folder holds; curves compare them all."""
    from viz import curves, tracks

    folder, (cfg, p) = folders[0], load_run(folders[0])
    glyphs, rng = load_glyphs(cfg, "test", data_dir), np.random.default_rng(0)
    images = draw_videos(cfg, glyphs, TEST, 0, 60, cfg.frames).images
    images = images[np.argsort(-images.sum((1, 2, 3, 4)))[:24:4]]   # of those with most ink
    recon = infer_videos(p, cfg, images)[1]
    tracks.sheet(folder / "reconstructions.png", images, {"VRNN": (recon, *no_boxes(images))})
    tracks.track_gif(folder / "reconstructions.gif", images, recon, *no_boxes(images))
    dreams = imagine(p, cfg, to_device(images[:, :0]), cfg.frames, rng)
    tracks.generation(folder / "samples.png", None, dreams, given=0)
    if cfg.frames > 3:
        later = imagine(p, cfg, to_device(images[:, :3]), cfg.frames - 3, rng)
        tracks.generation(folder / "prediction.png", images,
                          np.concatenate([recon[:, :3], later], 1), given=3)
    curves.curves(folder / "curves.png", {f.name: f / "metrics.jsonl" for f in folders},
                  [("elbo", "ELBO (nats per video)"), ("kl", "KL divergence"),
                   ("mse", "squared error per pixel")])


def no_boxes(images):
    """Boxes and names of no objects, for figures that could show them."""
    shape = (*images.shape[:2], 0)
    return np.zeros((*shape, 4)), np.zeros(shape, int)


def load_run(folder):
    """Config and weights of a run folder."""
    config, weights, _ = load_weights(folder / "weights.npz")
    cfg = cli.from_dict(Config, config, folder / "weights.npz")
    return cfg, fitting(weights, init(cfg, 0))


if __name__ == "__main__":
    cli.main(__doc__, Config, PRESETS, train=train, evaluate=evaluate, infer=infer, figures=figures,
             adjustable=ADJUSTABLE)
