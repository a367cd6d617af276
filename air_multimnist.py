"""Attend, Infer, Repeat (Eslami et al., 2016): count, locate and identify digits without labels.

    python air_multimnist.py          trains, scores on 10,000 fresh scenes, draws figures and a GIF

The model, with the numbers that tag the lines below (forward and backward alike):

    eq.1   p(n) ~ exp(-C n), n = 0..N                            how many objects
    eq.2   h_i = LSTM(x, z_{i-1}, h_{i-1})                       attend: what is not explained yet?
           DAIR: h_i = MLP(x - y_{i-1})
    eq.3   q(z_pres_i | ..) = Bernoulli(sigmoid(l_i)), q(z_where_i | ..) = N(mean, std^2)
    eq.4   window_i = (s, t): s = 0.5 exp(0.15 w_0), t = 0.5 (w_1, w_2), where w = z_where_i
    eq.5   q(z_what_i | ..) = N(encoder(read(x, window_i)))      infer; DAIR reads x - y_{i-1}
    eq.6   y_i = y_{i-1} + write(decoder(z_what_i), window_i)    repeat
    eq.7   log p(x | n, z) = log N(x; y_n, sigma^2)
    eq.8   log p(x) >= E_q[ log p(x | n, z) + log p(n) - log q(n) - sum_{i<=n} KL_i ]

Every step is computed as if its object were there (that is the only case that matters later), so
y_0..y_N are the canvases of all possible counts; the three estimators differ in what they do then.

Dimension key: B batch, N steps, C channels, S canvas side, G glimpse side, H hidden units,
K appearance code, Z = 1 + 3 + K one object's latents (z_pres, z_where, z_what), P pixels of the
pooled image, L what `look` gives: 4H for AIR's LSTM, N (4 + 2K) for the heads.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from common.backend import to_device, to_host, xp  # before NumPy: sets threads and BLAS kernels

import numpy as np

from common import cli, data, scenes
from common.errors import Fail
from common.files import as_picture, read_picture, read_scenes
from common.metrics import confusion, ink_boxes, matched_iou
from common.ops import (
    bernoulli_kl, clamp, gaussian_log_density, latent, linear, log_logistic, logistic, lstm,
    lstm_cell, mlp, relu, sigmoid,
)
from common.optim import Optimiser, cosine, norm, ramp
from common.params import Params, fitting
from common.processes import is_root, share
from common.sampler import read, window_boxes, write
from common.store import load_weights, save_weights, whole_file

INK = 0.1      # a drawn pixel brighter than this belongs to an object's box
VALIDATION, TEST = 1_000_001, 1_000_002     # seeds of the streams that no training run draws from


# ================================================================ configuration

@dataclass(frozen=True)
class Config:
    steps: int = cli.option(2300, "optimiser updates", low=1)
    batch_size: int = cli.option(64, "scenes per update", low=1)
    model: str = cli.option("air", "air: LSTM; dair: sees the residual; heads: the NumPy reduction",
                            choices=("air", "dair", "heads"))
    estimator: str = cli.option("exact", "how presence is learned",
                                choices=("exact", "nvil", "relaxed"))
    data: str = cli.option("digits", "what the scenes show (digits: MNIST, or drawn without it)",
                           choices=("digits", "drawn", "omniglot", "sprites"))
    layout: str = cli.option("disjoint", "how the ink boxes of digits may lie",
                             choices=("disjoint", "separated", "overlap"))
    counts: tuple[int, ...] = cli.option((0, 1, 2), "object counts of a scene", low=0, high=8)
    canvas: int = cli.option(50, "side of the scene in pixels", low=8)
    digit_low: int = cli.option(20, "smallest side of a digit's frame, in pixels", low=4)
    digit_high: int = cli.option(28, "largest side of a digit's frame", low=4)
    max_steps: int = cli.option(3, "N: most objects that can be found", low=1)
    glimpse: int = cli.option(28, "side of the attention window's glimpse", low=2)
    hidden: int = cli.option(256, "LSTM units", low=1)
    what: int = cli.option(50, "dimensions of z_what", low=1)
    units: int = cli.option(200, "hidden units of encoder, decoder and baseline", low=1)
    std: float = cli.option(0.3, "sigma of the likelihood", low=1e-3)
    lr: float = cli.option(2e-3, "peak learning rate (Adam)", low=0.0)
    lr_floor: float = cli.option(0.05, "share of lr that is left at the end", low=0.0, high=1.0)
    warmup: int = cli.option(0, "updates of linear warm-up", low=0)
    baseline_lr: float = cli.option(5.0, "learning rate of nvil's baseline, as a multiple", low=0.0)
    kl_weight: float = cli.option(1.0, "relaxed: weight of the latents' KL", low=0.0)
    presence_first: float = cli.option(1.0, "relaxed: first weight of presence's KL", low=0.0)
    presence_weight: float = cli.option(1.0, "relaxed: its last; it moves when C does", low=0.0)
    rates: tuple[float, ...] = cli.option((0.5, 0.4, 0.2), "relaxed: prior presence of each step",
                                          low=1e-6, high=0.999)
    temperature: float = cli.option(40.0, "first weight of q(n)'s entropy; falls to 1", low=1.0)
    temperature_steps: int = cli.option(600, "updates until that weight is 1", low=0)
    spread: float = cli.option(0.0, "exact: weight at the start of all counts being likely, S",
                               low=0.0)
    spread_steps: int = cli.option(1500, "updates until S is 0", low=0)
    prior_first: float = cli.option(5.0, "C of eq.1 at the start", low=0.0, high=100.0)
    prior: float = cli.option(10.0, "C of eq.1 at the end: nats that an object must earn",
                              low=0.0, high=100.0)
    prior_from: int = cli.option(500, "update at which C begins to move", low=0)
    prior_to: int = cli.option(800, "update at which C has arrived", low=0)
    eval_every: int = cli.option(250, "updates between two lines of metrics", low=1)
    eval_scenes: int = cli.option(1000, "validation scenes for each line of metrics", low=1)
    test_scenes: int = cli.option(10_000, "fresh scenes for the final score", low=1)


PRESETS = {
    "default": {"steps": 2000, "spread": 0.1},
    "quick": {"steps": 1000, "spread": 0.1, "spread_steps": 700, "test_scenes": 2000},
    "long": {"steps": 16_000, "spread": 0.1, "eval_every": 1000},
    "dair": {"model": "dair", "steps": 8000, "prior": 25.0, "prior_to": 1500, "eval_every": 500},
    "sprites": {"data": "sprites", "steps": 6000, "temperature": 100.0, "temperature_steps": 1000,
                "prior": 5.0, "eval_every": 1000},
    "omniglot": {"data": "omniglot", "max_steps": 4, "counts": (1,), "eval_every": 250},
    "paper": {"estimator": "nvil", "steps": 200_000, "lr": 1e-4, "lr_floor": 1.0,
              "baseline_lr": 10.0, "temperature": 1.0, "temperature_steps": 0,
              "prior_first": 5.0, "prior": 5.0, "eval_every": 2000},
    "air32": {"layout": "overlap", "canvas": 32, "digit_low": 12, "digit_high": 18, "glimpse": 16,
              "prior_first": 2.0, "prior": 3.0},
    "reduction": {"model": "heads", "estimator": "relaxed", "layout": "overlap", "canvas": 32,
                  "digit_low": 12, "digit_high": 18, "glimpse": 16, "hidden": 100, "what": 20,
                  "std": 0.5**0.5, "kl_weight": 0.05, "presence_first": 0.3, "presence_weight": 2.5,
                  "prior_from": 900, "prior_to": 2100, "batch_size": 32, "steps": 3000},
}


def channels(cfg):
    return 3 if cfg.data == "sprites" else 1


# ================================================================ parameters

def init(cfg, seed):
    """Normal weights scaled by the square root of the fan-in; the flat vector keeps this order."""
    rng = np.random.default_rng([seed, 0])
    C, G, H, K = channels(cfg), cfg.glimpse, cfg.hidden, cfg.what
    Z, U, RELU, OUT = 1 + 3 + K, cfg.units, 1.4, 0.3
    arrays = {}

    def layer(name, n_in, n_out, gain, bias=0.0):
        arrays[name + ".W"] = rng.standard_normal((n_in, n_out)) * (gain / np.sqrt(n_in))
        if bias is not None:
            arrays[name + ".b"] = np.broadcast_to(np.asarray(bias, float), n_out)

    P, heads = C * (cfg.canvas // 2) ** 2, cfg.model == "heads"
    if cfg.model == "air":
        layer("look.0", P, H, RELU)
        layer("look.1", H, 4 * H, 1.0, np.repeat([0.0, 1.0, 0.0, 0.0], H))      # forget gate: 1
        layer("lstm.x", Z, 4 * H, 1.0, None)
        layer("lstm.h", H, 4 * H, 1.0, None)
    elif cfg.model == "dair":
        layer("look.0", P, 2 * H, RELU)
        layer("look.1", 2 * H, H, RELU)
    else:
        layer("look.0", C * cfg.canvas**2, U, RELU)
        layer("look.1", U, H, RELU)
        layer("look.2", H, cfg.max_steps * (4 + 2 * K), 0.1)
    if not heads:
        layer("head", H, 7, 0.1, [2.0] + [0.0] * 3 + [-1.5] * 3)    # l, mean, log std of where
        layer("encode.0", C * G * G, U, RELU)
        layer("encode.1", U, U, RELU)
        layer("encode.2", U, 2 * K, OUT, [0.0] * K + [-1.0] * K)    # mean and log std of what
    for i, n in enumerate([H] if heads else [U, U]):
        layer(f"decode.{i}", n if i else K, n, RELU)
    layer(f"decode.{i + 1}", n, C * G * G, OUT, -2.0 if heads else -3.0)    # dark to begin with
    layer("baseline.0", H, U, RELU)
    layer("baseline.1", U, 1, 0.0)
    return arrays


# ================================================================ one step: find an object; draw it

def pool(x):
    """Means of 2 x 2 pixels, flattened. Only images are pooled: no gradient is needed."""
    half = x.shape[2] // 2 * 2
    rows = x[:, :, 0:half:2] + x[:, :, 1:half:2]                    # (B, C, S/2, S)
    return ((rows[..., 0:half:2] + rows[..., 1:half:2]) * 0.25).reshape(len(x), -1)


def head(p, h):
    """Presence logit, mean and log std of z_where."""
    y, back_y = linear(p, "head", h)                                # (B, 7)
    log_std, back_clamp = clamp(y[:, 4:], -5, 1)                    # (B, 3)

    def back(dlogit, dmean, dlog_std, g):
        dlog_std = back_clamp(dlog_std)
        return back_y(xp.concatenate([dlogit[:, None], dmean, dlog_std], 1), g)

    return y[:, 0], y[:, 1:4], log_std, back


def window_of(where):
    """The prior N(0, 1) covers the canvas."""
    s = 0.5 * xp.exp(0.15 * where[:, :1])                           # (B, 1)
    window = xp.concatenate([s, 0.5 * where[:, 1:]], 1)             # (B, 3)

    def back(dwindow):
        return xp.concatenate([0.15 * s * dwindow[:, :1], 0.5 * dwindow[:, 1:]], 1)

    return window, back


def encode(p, glimpse):
    """Mean and log std of z_what."""
    B, K = len(glimpse), p["decode.0.W"].shape[0]
    y, back_y = mlp(p, "encode", glimpse.reshape(B, -1))            # (B, 2K)
    log_std, back_clamp = clamp(y[:, K:], -5, 1)                    # (B, K)

    def back(dmean, dlog_std, g):
        dlog_std = back_clamp(dlog_std)
        return back_y(xp.concatenate([dmean, dlog_std], 1), g).reshape(glimpse.shape)

    return y[:, :K], log_std, back


def decode(p, what, shape):
    """A patch in [0, 1]."""
    y, back_y = mlp(p, "decode", what, last=sigmoid)                # (..., C*G*G)

    def back(dpatch, g):
        return back_y(dpatch.reshape(y.shape), g)

    return y.reshape(shape), back


def residual(x, y):
    """What the canvas has not explained yet; a fact for the next step, no gradient goes into it."""
    return x - y


def attend_air(p, seen, a, z, h, c):
    """The LSTM remembers what it has found; a (B, 4H) is the image's share of its input."""
    h, c, back_lstm = lstm(p, "lstm", a, z, h, c)                   # (B, H), (B, H)  eq.2

    def back(dh, dc, g):
        da, dz, dh, dc = back_lstm(dh, dc, g)                                       # eq.2
        return da, dz, dh, dc

    return h, c, back


def attend_first(p, seen, a, z, h, c):
    """AIR's step 1: nothing is remembered and nothing was found, the image is all there is."""
    h, c, back_cell = lstm_cell(a, c)                               # (B, H), (B, H)  eq.2

    def back(dh, dc, g):
        da, dc = back_cell(dh, dc)                                                  # eq.2
        return da, None, None, dc

    return h, c, back


def attend_dair(p, seen, a, z, h, c):
    """No memory: the canvas has it."""
    pooled = pool(seen)                                             # (B, P)
    h_new, back_h = mlp(p, "look", pooled, last=relu, want_dx=False)    # (B, H)  eq.2

    def back(dh, dc, g):
        back_h(dh, g)                                                               # eq.2
        return 0.0, xp.zeros_like(z), xp.zeros_like(h), dc

    return h_new, c, back


ATTEND = {"air": attend_air, "dair": attend_dair}


def find(p, cfg, seen, a, state, eps_where, eps_what):
    """Object i: attend (eq.2 to 4), infer what it is (eq.5)."""
    # z (B, Z) is object i-1: 1 (it is there, or step i would not matter), z_where, z_what.
    # At AIR's step 1 there is none, and no memory h (B, H).
    h, c, z = state
    attend = attend_first if z is None else ATTEND[cfg.model]
    h, c, back_h = attend(p, seen, a, z, h, c)                      # (B, H), (B, H)  eq.2
    logit, mean, log_std, back_head = head(p, h)                    # (B,), (B, 3), (B, 3)  eq.3
    where, kl_where, back_where = latent(mean, log_std, eps_where)  # (B, 3), (B,)  eq.3
    window, back_window = window_of(where)                          # (B, 3)  eq.4
    glimpse, back_read = read(seen, window, cfg.glimpse)            # (B, C, G, G)  eq.5
    code, code_log_std, back_encode = encode(p, glimpse)            # (B, K), (B, K)  eq.5
    what, kl_what, back_what = latent(code, code_log_std, eps_what)  # (B, K), (B,)  eq.5
    z = xp.concatenate([xp.ones_like(where[:, :1]), where, what], 1)    # (B, Z)
    trace = SimpleNamespace(logit=logit, kl=kl_where + kl_what, h=h, window=window, what=what)

    def back(dstate, dlogit, dkl, dwindow, dwhat, g):
        dh, dc, dz = dstate
        dcode, dcode_log_std = back_what(dwhat + dz[:, 4:], dkl)                    # eq.5
        dglimpse = back_encode(dcode, dcode_log_std, g)                             # eq.5
        _, dwindow_read = back_read(dglimpse)                                       # eq.5
        dwhere = back_window(dwindow + dwindow_read)                                # eq.4
        dmean, dlog_std = back_where(dwhere + dz[:, 1:4], dkl)                      # eq.3
        dh_head = back_head(dlogit, dmean, dlog_std, g)                             # eq.3
        da, dz, dh, dc = back_h(dh + dh_head, dc, g)                                # eq.2
        return da, (dh, dc, dz)

    return trace, (h, c, z), back


def find_heads(p, cfg, seen, a, state, eps_where, eps_what):
    """The NumPy reduction: no memory and no attention; a (B, 4+2K) is this step's own head."""
    K = cfg.what
    logit, where, code = a[:, 0], a[:, 1:4], a[:, 4:4 + K]          # (B,), (B, 3), (B, K)
    code_log_std, back_clamp = clamp(a[:, 4 + K:], -5, 1)           # (B, K)
    window, back_window = window_of(where)                          # (B, 3)  eq.4
    what, kl, back_what = latent(code, code_log_std, eps_what)      # (B, K), (B,)  eq.5
    trace = SimpleNamespace(logit=logit, kl=kl, h=state[0], window=window, what=what)

    def back(dstate, dlogit, dkl, dwindow, dwhat, g):
        dcode, dcode_log_std = back_what(dwhat, dkl)                                # eq.5
        dwhere = back_window(dwindow)                                               # eq.4
        da = [dlogit[:, None], dwhere, dcode, back_clamp(dcode_log_std)]
        return xp.concatenate(da, 1), dstate

    return trace, state, back


FIND = {"air": find, "dair": find, "heads": find_heads}


def draw(p, what, window, shape, size):
    """Eq. 6, for objects in rows: what each looks like, and a canvas with it alone."""
    patch, back_patch = decode(p, what, (len(what), shape[1], size, size))  # (..., C, G, G)  eq.6
    drawn, back_drawn = write(patch, window, shape[2:])             # (..., C, S, S)  eq.6

    def back(ddrawn, g):
        dpatch, dwindow = back_drawn(ddrawn)                                        # eq.6
        dwhat = back_patch(dpatch, g)                                               # eq.6
        return dwhat, dwindow

    return patch, drawn, back


def look(p, cfg, x):
    """What a step gets of the whole image, for all steps at once: (N, B, ..)."""
    N, B = cfg.max_steps, len(x)
    own = cfg.model == "heads"              # they see every pixel, each step has a part of y
    seen = x.reshape(B, -1) if own else pool(x)
    y, back_y = mlp(p, "look", seen, want_dx=False)                 # (B, L)  eq.2

    def back(das, g):
        dy = xp.stack(das, 1).reshape(y.shape) if own else sum(das)
        back_y(dy, g)                                                               # eq.2

    return (y.reshape(B, N, -1).swapaxes(0, 1) if own else [y] * N), back


def nothing(cfg, x):
    """Before step 1: no memory, no object."""
    h, c, z = (xp.zeros((len(x), n), x.dtype) for n in (cfg.hidden, cfg.hidden, 4 + cfg.what))
    return (None, c, None) if cfg.model == "air" else (h, c, z)


def unroll(p, cfg, x, noise):
    """All N steps as if every object were there: traces of step 1..N."""
    return (unroll_dair if cfg.model == "dair" else unroll_air)(p, cfg, x, noise)


def unroll_air(p, cfg, x, noise):
    """AIR finds all objects in the image as it is; then they are drawn, all at once."""
    N, B, G = cfg.max_steps, len(x), cfg.glimpse
    a, back_look = look(p, cfg, x)                                  # N times (B, ..)
    state, traces, backs = nothing(cfg, x), [], []
    for i in range(N):
        trace, state, back_i = FIND[cfg.model](p, cfg, x, a[i], state, noise.where[i],
                                               noise.what[i])
        traces.append(trace)
        backs.append(back_i)
    what = xp.concatenate([t.what for t in traces])                 # (N*B, K)
    window = xp.concatenate([t.window for t in traces])             # (N*B, 3)
    patch, drawn, back_draw = draw(p, what, window, x.shape, G)     # .., (N*B, C, S, S)  eq.6
    patches, each = patch.reshape(N, B, -1, G, G), drawn.reshape(N, *x.shape)
    y = xp.zeros_like(x)
    for i in range(N):
        y = y + each[i]                                             # (B, C, S, S)  eq.6
        traces[i].y, traces[i].patch = y, patches[i]

    def back(dlogits, dkls, dys, g):
        ddrawn, dy = xp.empty_like(each), xp.zeros_like(x)
        for i in reversed(range(N)):
            dy = xp.add(dy, dys[i], out=ddrawn[i])                                  # eq.6
        dwhat, dwindow = back_draw(ddrawn.reshape(drawn.shape), g)                  # eq.6
        dstate, das = tuple(xp.zeros_like(s) for s in state), []
        for back_i, *above in reversed(list(zip(
                backs, dlogits, dkls, dwindow.reshape(N, B, -1), dwhat.reshape(N, B, -1),
                strict=True))):
            da, dstate = back_i(dstate, *above, g)
            das.append(da)
        back_look(das[::-1], g)

    return traces, back


def unroll_dair(p, cfg, x, noise):
    """DAIR draws each object before it looks for the next one in what is left of the image."""
    state, y, traces, backs, backs_drawn = nothing(cfg, x), xp.zeros_like(x), [], [], []
    for i in range(cfg.max_steps):
        trace, state, back_i = find(p, cfg, residual(x, y), None, state, noise.where[i],
                                    noise.what[i])
        trace.patch, drawn, back_drawn_i = draw(p, trace.what, trace.window, x.shape,
                                                cfg.glimpse)        # .., (B, C, S, S)  eq.6
        y = y + drawn                                               # (B, C, S, S)  eq.6
        trace.y = y
        traces.append(trace)
        backs.append(back_i)
        backs_drawn.append(back_drawn_i)

    def back(dlogits, dkls, dys, g):
        dstate, dy = tuple(xp.zeros_like(s) for s in state), xp.zeros_like(x)
        for back_i, back_drawn_i, dlogit, dkl, dy_i in reversed(
                list(zip(backs, backs_drawn, dlogits, dkls, dys, strict=True))):
            dy = dy + dy_i                                                          # eq.6
            dwhat, dwindow = back_drawn_i(dy, g)                                    # eq.6
            _, dstate = back_i(dstate, dlogit, dkl, dwindow, dwhat, g)

    return traces, back


# ================================================================ the bound, three ways

def log_prior(cfg, C):
    """log p(n), n = 0..N: a geometric distribution cut at N.  eq.1"""
    log_p = -C * np.arange(cfg.max_steps + 1)
    return log_p - np.log(np.exp(log_p).sum())


def log_posterior(logits):
    """log q(n): n times yes, then no (or N times yes)."""
    yes, no = log_logistic(logits), log_logistic(-logits)           # (N, B), (N, B)
    nothing = xp.zeros_like(yes[:1])                                # (1, B)
    return (xp.concatenate([nothing, xp.cumsum(yes, 0)])
            + xp.concatenate([no, nothing]))                        # (N+1, B)


def from_first(d):
    """Sums over axis 0 from each entry to the last."""
    return d[::-1].cumsum(0)[::-1]


def one_hot_count(there):
    """Where the chain of yes ends: n = 0..N as one-hot columns."""
    ones, zeros = xp.ones_like(there[:1]), xp.zeros_like(there[:1])
    return xp.concatenate([ones, there]) - xp.concatenate([there, zeros])       # (N+1, B)


def likelihoods(cfg, x, ys):
    """log p(x | n), n = 0..N, of the canvases y_0 = 0, y_1 .. y_N.  eq.7"""
    lls, backs = [gaussian_log_density(x, 0.0, cfg.std)[0]], []
    for y in ys:
        ll, back_ll = gaussian_log_density(x, y, cfg.std)           # (B,)  eq.7
        lls.append(ll)
        backs.append(back_ll)

    def back(dlls):
        dys = []
        for back_ll, dll in reversed(list(zip(backs, dlls[1:], strict=True))):
            dys.append(back_ll(dll))                                                # eq.7
        return dys[::-1]

    return xp.stack(lls), back


def exact(p, cfg, x, traces, noise, weights):
    """Eq. 8 with the expectation over n written out.

    E_n = log p(x | n) - sum_{i<=n} KL_i + log p(n);  bound = sum_n q(n) (E_n - T log q(n)).
    With p_i = sigmoid(l_i), A_n = q(n) (E_n - T log q(n)), and since dq(n)/dl_i is q(n) (1 - p_i)
    for n >= i, -q(n) p_i for n = i - 1, and 0 below:
    dbound/dl_i = (1 - p_i) sum_{n>=i} A_n - p_i A_{i-1}  (the derivative of log q itself adds
    -T sum_n dq(n)/dl_i = 0). No z_pres is sampled, so no score function is needed; z_where and
    z_what of step i are drawn given that i objects are there, which is the case in all terms
    n >= i, the only ones where they appear: the estimate is unbiased.

    Early in training S / (N + 1) sum_n E_n is added: each count learns to explain the scene, also
    the one that q has given up. Else a lone digit where only step 2 looks stays two objects.
    """
    B, T, S = len(x), weights.temperature, weights.spread / (cfg.max_steps + 1)
    logits = xp.stack([t.logit for t in traces])                    # (N, B)
    kl = xp.stack([t.kl for t in traces])                           # (N, B)
    ll, back_ll = likelihoods(cfg, x, [t.y for t in traces])        # (N+1, B)  eq.7
    log_q = log_posterior(logits)                                   # (N+1, B)
    q = xp.exp(log_q)                                               # (N+1, B)
    E = ll + xp.asarray(log_prior(cfg, weights.C), x.dtype)[:, None]    # (N+1, B)  eq.8
    E[1:] -= xp.cumsum(kl, 0)
    A = q * (E - T * log_q)                                         # (N+1, B)  eq.8
    loss = -(A + S * E).sum() / B

    def back(g):
        yes = logistic(logits)                                      # (N, B)
        dlogits = (yes * A[:-1] - (1 - yes) * from_first(A[1:])) / B                # eq.8
        dkl = from_first(q[1:] + S) / B                                             # eq.8
        dys = back_ll(-(q + S) / B)                                                 # eq.7
        return dlogits, dkl, dys

    return loss, back


def nvil(p, cfg, x, traces, noise, weights):
    """Eq. 8 with n sampled (Mnih and Gregor, 2014): the paper's estimator.

    n is the number of leading z_i = 1. Decision i (there are n + 1 of them, at most N) changes
    only what follows, so that  dbound/dl_i = (z_i - p_i) (R_i - b_i)  in expectation, with
    R_i = log p(x | n) + sum_{j>=i} ( log p(z_j) - T log q(z_j) - [j <= n] KL_j ).
    The baseline b_i may depend on x and z_{<i}: the canvas so far, scored, plus what a small
    network adds from h_i (times 100: rewards are hundreds of nats; it begins at 0). It is fitted to
    R_i by least squares, which adds to the gradient but not to the loss that is returned.
    """
    B, N, T = len(x), cfg.max_steps, weights.temperature
    logits = xp.stack([t.logit for t in traces])                    # (N, B)
    kl = xp.stack([t.kl for t in traces])                           # (N, B)
    ll, back_ll = likelihoods(cfg, x, [t.y for t in traces])        # (N+1, B)  eq.7
    yes = logistic(logits)                                          # (N, B)
    z = noise.uniform < yes                                         # (N, B)
    there = xp.cumprod(z, 0).astype(x.dtype)                        # (N, B)  object i is there
    asked = xp.concatenate([xp.ones_like(there[:1]), there[:-1]])   # (N, B)  decision i is made
    chosen = one_hot_count(there)                                  # (N+1, B)  one-hot n
    log_p = log_prior(cfg, weights.C)                               # (N+1,)
    F = ll + xp.asarray(log_p, x.dtype)[:, None] - T * log_posterior(logits)    # (N+1, B)  eq.8
    F[1:] -= xp.cumsum(kl, 0)
    passed = T * log_logistic(logits) + kl                          # (N, B)  what a yes has cost
    reached = np.log(from_first(np.exp(log_p))[:-1])                # (N,)  log p(step i is asked)
    R = (chosen * F).sum(0) - xp.asarray(reached, x.dtype)[:, None]     # (N, B)
    R[1:] += xp.cumsum(passed, 0)[:-1]
    b, back_b = mlp(p, "baseline", xp.concatenate([t.h for t in traces]))       # (N*B, 1)
    miss = asked * (R - ll[:-1] - 100 * b.reshape(N, B))            # (N, B)
    loss = -(chosen * F).sum() / B

    def back(g):
        back_b(-100 * miss.reshape(b.shape) / B, g)
        dlogits = -(z - yes) * miss / B                                             # eq.8
        dkl = there / B                                                             # eq.8
        dys = back_ll(-chosen / B)                                                  # eq.7
        return dlogits, dkl, dys

    return loss, back


def relaxed(p, cfg, x, traces, noise, weights):
    """Presence as a number between 0 and 1 (the NumPy reduction): not a bound on log p(x).

    z_i = sigmoid((l_i + logistic noise) / tau), c_i = z_1 .. z_i fades object i in; minimises
    -log N(x; sum_i c_i drawn_i) + w_kl sum_i KL_i + w_pres sum_i KL(Bernoulli(l_i) || rate_i).
    """
    B, tau = len(x), weights.tau
    logits = xp.stack([t.logit for t in traces])                    # (N, B)
    kl = xp.stack([t.kl for t in traces])                           # (N, B)
    ys = xp.stack([t.y for t in traces])                            # (N, B, C, S, S)
    u = noise.uniform                                               # (N, B)
    z = logistic((logits + xp.log(u) - xp.log1p(-u)) / tau)         # (N, B)
    c = xp.cumprod(z, 0)                                            # (N, B)
    drawn = xp.concatenate([ys[:1], ys[1:] - ys[:-1]])              # (N, B, C, S, S)
    y = (c[:, :, None, None, None] * drawn).sum(0)                  # (B, C, S, S)
    ll, back_ll = gaussian_log_density(x, y, cfg.std)               # (B,)  eq.7
    rates = xp.asarray(cfg.rates, x.dtype)[:, None]                 # (N, 1)
    kl_pres, back_kl_pres = bernoulli_kl(logits, rates)             # (N, B)
    loss = (-ll.sum() + cfg.kl_weight * kl.sum() + weights.presence * kl_pres.sum()) / B

    def back(g):
        dlogits = back_kl_pres(xp.full_like(kl_pres, weights.presence / B))
        dy = back_ll(xp.full_like(ll, -1 / B))                                      # eq.7
        dc = (drawn * dy).sum((2, 3, 4))                            # (N, B)
        dlogits = dlogits + from_first(dc * c) * (1 - z) / tau      # dc_i/dz_j = c_i / z_j, i >= j
        dkl = xp.full_like(kl, cfg.kl_weight / B)
        weight = xp.concatenate([c[:-1] - c[1:], c[-1:]])           # (N, B)  y_i draws 1..i
        return dlogits, dkl, weight[:, :, None, None, None] * dy

    return loss, back


ESTIMATORS = {"exact": exact, "nvil": nvil, "relaxed": relaxed}


def objective(p, cfg, x, noise, weights):
    """What training minimises, and its pullback to all parameters."""
    traces, back_unroll = unroll(p, cfg, x, noise)
    loss, back_estimator = ESTIMATORS[cfg.estimator](p, cfg, x, traces, noise, weights)

    def back(g):
        dlogits, dkl, dys = back_estimator(g)
        back_unroll(dlogits, dkl, dys, g)
        g.flush()

    return loss, back


# ================================================================ schedules, noise, scenes

def schedule(cfg, step):
    """Weights that move while training."""
    return SimpleNamespace(
        temperature=ramp(step, 0, cfg.temperature_steps, cfg.temperature, 1.0),
        spread=ramp(step, 0, cfg.spread_steps, cfg.spread, 0.0),
        C=ramp(step, cfg.prior_from, cfg.prior_to, cfg.prior_first, cfg.prior),
        presence=ramp(step, cfg.prior_from, cfg.prior_to, cfg.presence_first, cfg.presence_weight),
        tau=ramp(step, 0, cfg.steps, 1.0, 0.2),
        lr=cfg.lr * cosine(step, cfg.steps, cfg.lr_floor, cfg.warmup))


def draw_noise(cfg, batch, seed, step, start=0, count=None):
    """All randomness of one update, keyed by (seed, step); a process takes its own columns."""
    rng = np.random.default_rng([seed, 1, step])
    own = slice(start, start + (count or batch))
    where = rng.standard_normal((cfg.max_steps, batch, 3), np.float32)[:, own]
    what = rng.standard_normal((cfg.max_steps, batch, cfg.what), np.float32)[:, own]
    uniform = rng.random((cfg.max_steps, batch), np.float32)[:, own].clip(1e-6, 1 - 1e-6)
    return SimpleNamespace(where=to_device(where), what=to_device(what), uniform=to_device(uniform))


def no_noise(cfg, batch):
    """Every latent at its mean."""
    return SimpleNamespace(where=xp.zeros((cfg.max_steps, batch, 3), xp.float32),
                           what=xp.zeros((cfg.max_steps, batch, cfg.what), xp.float32))


# ================================================================ scenes

def load_glyphs(cfg, split, data_dir):
    """What the scenes are made of; sprites are drawn from nothing."""
    if cfg.data == "sprites":
        return None
    if cfg.data == "omniglot":
        return data.omniglot(split, data_dir)
    return data.digits(split, data_dir, drawn=cfg.data == "drawn")


def source(glyphs):
    return "sprites" if glyphs is None else glyphs.source


def draw_scenes(cfg, glyphs, seed, start, count):
    """Scenes start .. start + count - 1 of the endless stream `seed`."""
    if cfg.data == "sprites":
        return scenes.sprites(seed, start, count, cfg.canvas, cfg.counts)
    if cfg.data == "omniglot":
        return scenes.characters(glyphs, seed, start, count, cfg.canvas)
    return scenes.multi_digits(glyphs, seed, start, count, cfg.canvas, cfg.digit_low,
                               cfg.digit_high, cfg.counts, cfg.layout)


# ================================================================ reading scenes, scoring

def infer_scenes(p, cfg, images):
    """The most probable count, and every latent at its mean. Host arrays in and out."""
    B, N, S = len(images), cfg.max_steps, cfg.canvas
    x = to_device(images)
    traces, _ = unroll(p, cfg, x, no_noise(cfg, B))
    q = to_host(xp.exp(log_posterior(xp.stack([t.logit for t in traces]))))     # (N+1, B)
    windows, patches, ys = (np.stack([to_host(getattr(t, name)) for t in traces], 1)
                            for name in ("window", "patch", "y"))
    canvases = np.concatenate([np.zeros_like(ys[:, :1]), ys], 1)    # (B, N+1, C, S, S)
    n = q.argmax(0)                                                 # (B,)
    there = np.arange(N) < n[:, None]                               # (B, N)
    boxes = ink_boxes(np.diff(canvases, axis=1), INK)               # (B, N, 4)
    attended = window_boxes(windows, (S, S))                        # (B, N, 4)
    boxes[~there] = attended[~there] = np.nan
    return SimpleNamespace(n=n, q=q.T, there=there, boxes=boxes, windows=attended, patches=patches,
                           canvases=canvases, recon=canvases[np.arange(B), n])


def score(p, cfg, parts):
    """The paper's metrics over scenes that come in parts (images, counts, boxes or None)."""
    true, found, objects, error, elbo, overlap, pixels = [], [], 0, 0.0, 0.0, 0.0, 0
    weights = SimpleNamespace(temperature=1.0, spread=0.0, C=cfg.prior)
    for images, counts, boxes in parts:
        guess = infer_scenes(p, cfg, images)
        error += float(((guess.recon - images) ** 2).sum())
        pixels += images.size
        if boxes is not None:
            overlap += matched_iou(boxes, guess.boxes)
            objects += (~np.isnan(boxes[..., 0])).sum()
        x, noise = to_device(images), draw_noise(cfg, len(images), TEST, len(found))
        traces, _ = unroll(p, cfg, x, noise)
        elbo -= float(exact(p, cfg, x, traces, noise, weights)[0]) * len(x)
        true.append(counts)
        found.append(guess.n)
    true, found = np.concatenate(true), np.concatenate(found)
    metrics = {"count_accuracy": float((true == found).mean()),
               "count_confusion": confusion(true, found, true.max(), cfg.max_steps).tolist(),
               "mse": error / pixels, "elbo": elbo / len(true)}
    if boxes is not None:
        metrics["mean_iou"] = float(overlap / objects) if objects else None
    return metrics


def stream(cfg, glyphs, seed, total, part=250):
    """`total` scenes of a stream, a part at a time, for `score`."""
    for start in range(0, total, part):
        yield draw_scenes(cfg, glyphs, seed, start, min(part, total - start))[:3]


def evaluate(cfg, weights, path=None, data_dir=None):
    """Score weights on a scene file, or without one on fresh test scenes."""
    p = fitting(weights, init(cfg, 0))
    if path is None:
        glyphs = load_glyphs(cfg, "test", data_dir)
        fresh = stream(cfg, glyphs, TEST, cfg.test_scenes)
        return {"scenes": source(glyphs), **score(p, cfg, fresh)}
    return score(p, cfg, file_parts(cfg, path))


def file_parts(cfg, path, part=250):
    """The scenes of an npz file, checked, a part at a time."""
    C, S = channels(cfg), cfg.canvas
    axes = ("N", S, S) if C == 1 else ("N", S, S, C)
    file = read_scenes(path, {"images": axes, "counts": ("N",), "boxes": ("N", "K", 4)}, ("boxes",))
    images = as_picture(file["images"], f"{path}: images")
    images = images[:, None] if C == 1 else np.ascontiguousarray(np.moveaxis(images, 3, 1))
    counts, boxes = file["counts"], file.get("boxes")
    if not np.isin(counts, np.arange(100)).all():
        raise Fail(f"{path}: counts must be whole numbers from 0 to 99")
    if boxes is not None and boxes.shape[1] > 8:
        raise Fail(f"{path}: boxes has room for {boxes.shape[1]} objects a scene, at most 8 are "
                   "matched")
    for k in range(0, len(images), part):
        some = None if boxes is None else boxes[k:k + part]
        yield images[k:k + part], counts[k:k + part].astype(np.int64), some


def infer(cfg, weights, files, out):
    """The objects of each picture, in its own pixels, and an overlay that shows them."""
    from viz.scenes import boxes_on_scenes

    p, results = fitting(weights, init(cfg, 0)), []
    for path in files:
        image, to_picture = read_picture(path, cfg.canvas, channels(cfg))
        guess = infer_scenes(p, cfg, image[None])
        overlay = Path(out) / f"{Path(path).name}.objects.png"
        boxes_on_scenes(overlay, image[None], guess.boxes, guess.recon)
        objects = [{"box": to_picture(guess.boxes[0, i]), "window": to_picture(guess.windows[0, i])}
                   for i in range(guess.n[0])]
        results.append({"file": str(path), "overlay": str(overlay), "count": int(guess.n[0]),
                        "count_probabilities": guess.q[0].round(4).tolist(), "objects": objects})
    return {"pictures": results}


# ================================================================ training

def train(cfg, run):
    """The loop: scenes in, one update out. Everything is keyed by (seed, step)."""
    if cfg.estimator == "relaxed" and len(cfg.rates) != cfg.max_steps:
        raise Fail(f"--rates must be {cfg.max_steps} numbers, one for each of --max-steps")
    glyphs, test_glyphs = (load_glyphs(cfg, split, run.data_dir) for split in ("train", "test"))
    p = Params(init(cfg, run.seed))
    g = p.grads()
    adam = Optimiser(p, groups={"baseline": cfg.baseline_lr})
    watched = list(stream(cfg, glyphs, VALIDATION, cfg.eval_scenes))
    for step in run.steps(cfg.steps, {"params": p.flat, "m": adam.m, "v": adam.v}):
        start, count = share(cfg.batch_size)
        batch = draw_scenes(cfg, glyphs, run.seed, step * cfg.batch_size + start, count)
        noise = draw_noise(cfg, cfg.batch_size, run.seed, step, start, count)
        weights = schedule(cfg, step)
        loss, back = objective(p, cfg, to_device(batch.images), noise, weights)
        g.zero()
        back(g)
        g.average()
        seen = run.watch(loss=float(loss), gradient=norm(g.flat))
        adam.update(g, weights.lr, step + 1)
        if run.due(step + 1, cfg.eval_every) or step + 1 == cfg.steps:
            run.log(step + 1, **seen, **score(p, cfg, watched))
        if is_root() and run.due(step + 1, max(cfg.steps // 50, 1)):
            images, counts, _ = watched[0]
            keep_frame(run.folder, step + 1, p, cfg, images[varied(counts, (3, 2, 1))])

    metrics = {"trained_on": source(glyphs),
               **score(p, cfg, stream(cfg, test_glyphs, TEST, cfg.test_scenes))}
    if is_root():
        save_weights(run.folder / "weights.npz", p.host(), cfg, about=source(glyphs))
        figures([run.folder], run.data_dir)
    return metrics


# ================================================================ figures

def varied(counts, numbers):
    """Which scenes to show: so many with the most objects, so many with the next fewer, ..."""
    kinds = np.unique(counts)[::-1]
    return np.concatenate([np.flatnonzero(counts == n)[:k]
                           for n, k in zip(kinds, numbers, strict=False)])


def keep_frame(folder, step, p, cfg, images):
    """What the attention GIF will show of this moment of training."""
    guess = infer_scenes(p, cfg, images)
    with whole_file(folder / "frames" / f"{step:07d}.npz") as file:
        np.savez_compressed(file, images=to_bytes(images), boxes=guess.windows,
                            recon=to_bytes(guess.recon))


def to_bytes(images):
    return (images * 255).clip(0, 255).astype(np.uint8)


def frames(folder):
    """The moments that training kept, with what was logged of them."""
    from viz.curves import read_jsonl

    log = read_jsonl(folder / "metrics.jsonl")
    steps, seconds = [line["step"] for line in log], [line["seconds"] for line in log]
    for path in sorted((folder / "frames").glob("*.npz")):
        step = int(path.stem)
        known = [line["count_accuracy"] for line in log if line["step"] <= step]
        with np.load(path) as kept:
            yield {"step": step, "seconds": np.interp(step, [0, *steps], [0, *seconds]),
                   "accuracy": known[-1] if known else None, "boxes": kept["boxes"],
                   "images": kept["images"] / np.float32(255),
                   "recon": kept["recon"] / np.float32(255)}


def prior_samples(p, cfg, count, rng):
    """Scenes from the generative model: n uniform from 1 to the most objects, z ~ N(0, 1)."""
    n = rng.integers(1, max(1, *cfg.counts) + 1, count)             # (count,)
    y = xp.zeros((count, channels(cfg), cfg.canvas, cfg.canvas), xp.float32)
    for i in range(n.max()):
        where = to_device(rng.standard_normal((count, 3), np.float32))
        what = to_device(rng.standard_normal((count, cfg.what), np.float32))
        patch, _ = decode(p, what, (count, channels(cfg), cfg.glimpse, cfg.glimpse))
        drawn, _ = write(patch, window_of(where)[0], (cfg.canvas, cfg.canvas))
        y = y + drawn * to_device((i < n).astype(np.float32))[:, None, None, None]
    return to_host(y).clip(0, 1)


def scanning_heat(p, cfg, images, chunk=250):
    """How often each pixel lies in the inner quarter of step i's window: (N, S, S)."""
    heat = np.zeros((cfg.max_steps, cfg.canvas, cfg.canvas), np.float32)
    for start in range(0, len(images), chunk):
        boxes = infer_scenes(p, cfg, images[start:start + chunk]).windows
        middle = (boxes[..., :2] + boxes[..., 2:]) / 2              # (B, N, 2)  x, y
        quarter = (boxes[..., 2:] - boxes[..., :2]) / 8
        pixel = np.arange(cfg.canvas) + 0.5                         # (S,)
        inside = np.abs(pixel - middle[..., None]) < quarter[..., None]     # (B, N, 2, S)
        heat += np.einsum("bny,bnx->nyx", inside[:, :, 1], inside[:, :, 0], dtype=np.float32)
    return heat


def figures(folders, data_dir=None):
    """Draw all that run folders hold: scenes of the first, curves and policies of them all."""
    from viz import curves, gif
    from viz.scenes import boxes_on_scenes, patches, samples, scanning, step_by_step

    runs = [load_run(folder) for folder in folders]                 # config and weights of each
    folder, (cfg, p) = folders[0], runs[0]
    for other, (c, _) in zip(folders, runs, strict=True):
        if (channels(c), c.canvas, c.max_steps) != (channels(cfg), cfg.canvas, cfg.max_steps):
            raise Fail(f"{other} and {folder} cannot be compared: their scenes or steps differ")
    glyphs = load_glyphs(cfg, "test", data_dir)
    images, counts = draw_scenes(cfg, glyphs, TEST, 0, 1000)[:2]
    pick = varied(counts, (4, 3, 1))
    guess = infer_scenes(p, cfg, images[pick])
    there, drawn, canvases = (getattr(guess, name).swapaxes(0, 1)
                              for name in ("there", "patches", "canvases"))
    boxes_on_scenes(folder / "boxes.png", images[pick], guess.boxes, guess.recon)
    step_by_step(folder / "steps.png", images[pick], canvases, guess.boxes, there)
    patches(folder / "patches.png", images[pick], drawn, there)
    samples(folder / "samples.png", prior_samples(p, cfg, 40, np.random.default_rng(0)))
    heat = np.stack([scanning_heat(q, c, images) for c, q in runs])
    scanning(folder / "scanning.png", heat, [f.name for f in folders])
    table = score(p, cfg, stream(cfg, glyphs, TEST, 1000))["count_confusion"]
    curves.confusion(folder / "confusion.png", table)
    curves.curves(folder / "curves.png", {f.name: f / "metrics.jsonl" for f in folders},
                  [("count_accuracy", "count accuracy"), ("elbo", "ELBO (nats)"),
                   ("mse", "squared error per pixel")])
    gif.attention_gif(folder / "attention.gif", list(frames(folder)))


def load_run(folder):
    """Config and weights of a run folder."""
    config, weights, _ = load_weights(folder / "weights.npz")
    cfg = cli.from_dict(Config, config, folder / "weights.npz")
    return cfg, fitting(weights, init(cfg, 0))


if __name__ == "__main__":
    cli.main(__doc__, Config, PRESETS, train=train, evaluate=evaluate, infer=infer, figures=figures,
             adjustable=("max_steps", "prior", "data", "layout", "counts", "test_scenes"))
