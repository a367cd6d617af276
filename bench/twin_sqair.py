"""SQAIR once more, in PyTorch with autograd: the second implementation that ours is held against.

It takes the same named weights (those of `--net mlp`), videos and noise as `sqair_moving.objective`
and returns a loss whose value and gradient must be ours. Slopes that are no derivative of the loss
(presences, and all that `vimco` samples) are those of a term that is added and whose value is 0.

Propagation works on the objects that are there, or with `dense` on every slot, empty ones weighted
with `here` = 0: more work, but the same shapes for every frame, which `torch.compile` needs.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

NEVER = -40.0


class State(NamedTuple):
    s: torch.Tensor             # (B, N, F)
    there: torch.Tensor         # (B, N)
    age: torch.Tensor           # (B, N)


class Kept(NamedTuple):
    """What propagation says of the objects of one slot, in videos `rows`."""
    rows: torch.Tensor
    here: torch.Tensor
    z: torch.Tensor
    logit: torch.Tensor
    cost: torch.Tensor
    drawn: torch.Tensor


class Trace(NamedTuple):
    kept: list
    costs: torch.Tensor         # (D, B)
    ys: torch.Tensor            # (D+1, B, 1, S, S)
    n: torch.Tensor
    log_q: torch.Tensor
    free: torch.Tensor
    first: bool


# ---------------------------------------------------------------- pieces

def linear(p, name, x):
    return torch.addmm(p[name + ".b"], x, p[name + ".W"])


def mlp(p, name, x):
    k = 0
    while f"{name}.{k}.W" in p:
        x = linear(p, f"{name}.{k}", F.relu(x) if k else x)
        k += 1
    return x


def rnn(p, name, x, h):
    return F.elu(torch.addmm(linear(p, name + ".x", x), h, p[name + ".h.W"]))


def gru(p, name, x, h):
    H = h.shape[1]
    a, b = linear(p, name + ".x", x), h @ p[name + ".h.W"]
    u, r = torch.sigmoid(a[:, :2 * H] + b[:, :2 * H]).chunk(2, 1)
    return torch.lerp(h, torch.tanh(a[:, 2 * H:] + r * b[:, 2 * H:]), u)


def hats(scale, shift, n_out, n_in):
    """Weights (R, n_out, n_in) of n_in pixels at scale u + shift for n_out values of u."""
    u = (2 * torch.arange(n_out, dtype=scale.dtype, device=scale.device) + 1) / n_out - 1
    at = ((scale * u + shift + 1) * n_in - 1) / 2
    return F.relu(1 - (at[:, :, None] - torch.arange(n_in).to(scale)).abs())


def read(image, window, size):
    u = (2 * torch.arange(size, dtype=window.dtype, device=window.device) + 1) / size - 1
    x, y = (window[:, :1] * u + window[:, k:k + 1] for k in (1, 2))
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    return F.grid_sample(image, grid, align_corners=False)


def write(patch, window, size):
    """A product from the left and one from the right: here faster than `grid_sample`."""
    zoom = 1 / window[:, :1]
    columns, rows = (hats(zoom, -window[:, k:k + 1] * zoom, size, patch.shape[2]) for k in (1, 2))
    return (rows @ patch[:, 0] @ columns.mT)[:, None]


def window_of(where):
    return torch.cat([0.5 * torch.exp(0.15 * where[:, :1]), 0.5 * where[:, 1:]], 1)


def latent(mean, log_std, eps, mean0, log_std0, sampled):
    """The sample, and KL(q || p), or log q(z) - log p(z) with `sampled`."""
    log_std = log_std.clamp(-5, 1)
    std = log_std.exp()
    z = mean + std * eps
    if sampled:
        squares = ((z - mean0) * (-log_std0).exp()) ** 2 - eps**2
    else:
        squares = ((mean - mean0) ** 2 + std**2) * (-2 * log_std0).exp() - 1
    return z, (0.5 * squares + log_std0 - log_std).sum(1)


def glimpse_of(p, cfg, x, where):
    return F.relu(mlp(p, "encode", read(x, window_of(where), cfg.glimpse).flatten(1)))


def draw(p, cfg, what, where):
    patch = torch.sigmoid(mlp(p, "decode", what)).reshape(-1, 1, cfg.glimpse, cfg.glimpse)
    return write(patch, window_of(where), cfg.canvas)


# ---------------------------------------------------------------- propagation

def expect(p, cfg, s, age):
    K, Q = cfg.what, cfg.memory
    where, velocity, what, h, memory = s.split((3, 3, K, Q, Q), 1)
    moving = (age > 0).to(s)[:, None]
    memory = gru(p, "prior", torch.cat([where, moving * velocity, what, moving], 1), memory)
    y = linear(p, "expect", memory)
    coasting = where + moving * velocity
    mean = torch.cat([coasting, what + y[:, :K]], 1)
    return coasting + 0.1 * linear(p, "propose", h), mean, y[:, K:].clamp(-5, 2), memory


def propagate(p, cfg, x, s, age, proposal, mean0, log_std0, memory, relation, eps):
    K, Q, sampled = cfg.what, cfg.memory, cfg.objective == "vimco"
    where0, velocity, what0, h0, _ = s.split((3, 3, K, Q, Q), 1)
    e0 = glimpse_of(p, cfg, x, proposal)
    seen = torch.cat([e0, what0, where0, h0, relation[:, Q:]], 1)
    r = rnn(p, "relate", seen, relation[:, :Q])
    delta = mlp(p, "where", torch.cat([r, e0], 1))
    where, cost_where = latent(proposal + delta[:, :3], delta[:, 3:], eps[:, :3], mean0[:, :3],
                               log_std0[:, :3], sampled)
    e = glimpse_of(p, cfg, x, where)
    moved = where - where0
    h = gru(p, "time", torch.cat([e, where, moved, r], 1), h0)
    mix, add, log_std = linear(p, "gate", torch.cat([e, h, r], 1)).split(K, 1)
    code = linear(p, "code", e)[:, :K]
    what, cost_what = latent(torch.lerp(what0, code, torch.sigmoid(mix)) + add, log_std, eps[:, 3:],
                             mean0[:, 3:], log_std0[:, 3:], sampled)
    logit = mlp(p, "stay", torch.cat([h, e, what, where], 1))[:, 0]
    share = torch.where(age > 0, 0.6, 1.0).to(s)[:, None] * torch.tensor([0, 1, 1]).to(s)
    s = torch.cat([where, torch.lerp(velocity, moved, share), what, h, memory], 1)
    return logit, cost_where + cost_what, draw(p, cfg, what, where), s, torch.cat(
        [r, where, what], 1)


def who(there, dense):
    """Slots and videos of the objects, slot after slot, and how many there are in each slot."""
    B, N = there.shape
    if dense:
        every = torch.arange(B * N, device=there.device)
        return every // B, every % B, [B] * N
    slots, rows = there.T.nonzero(as_tuple=True)
    return slots, rows, slots.bincount(minlength=N).tolist()


def propagate_all(p, cfg, x, state, eps, uniform, dense, parts):
    K, Q = cfg.what, cfg.memory
    slots, rows, counts = who(state.there, dense)
    here = state.there[rows, slots]
    s0, age = state.s[rows, slots], state.age[rows, slots]
    ahead = parts.expect(p, cfg, s0, age)
    relation, y = x.new_zeros(len(x), Q + 3 + K), torch.zeros_like(x)
    others = torch.zeros_like(x)
    sketched = cfg.explain_away and sum(c > 0 for c in counts) > 1
    if sketched:
        with torch.no_grad():
            sketch = here[:, None, None, None] * draw(p, cfg, s0[:, 6:6 + K], ahead[0])
            for r, drawn in zip(rows.split(counts), sketch.split(counts), strict=True):
                others[r] += drawn
    kept, new = [], []
    for i, shares in enumerate(zip(*(a.split(counts) for a in (
            rows, here, s0, age, *ahead, sketch if sketched else rows)), strict=True)):
        r, here_k, s_k, age_k, *ahead_k, sketch_k = shares
        if not counts[i]:
            continue
        seen = x[r]
        if cfg.explain_away:
            if sketched:
                others[r] -= sketch_k
            seen = seen - y.detach()[r] - others[r]
        logit, cost, drawn, s, relation_k = parts.propagate(
            p, cfg, seen, s_k, age_k, *ahead_k, relation[r], eps[i][r])
        z = here_k * (uniform[i][r] < torch.sigmoid(logit)).to(x)
        if dense:
            relation = torch.where(here_k[:, None] > 0, relation_k, relation)
        else:
            relation = relation.index_put((r,), relation_k)
        y = y.index_put((r,), y[r] + z[:, None, None, None] * drawn)
        kept.append(Kept(r, here_k, z, logit, cost, drawn))
        new.append(s)
    return kept, torch.cat(new) if new else s0, (rows, slots), y


# ---------------------------------------------------------------- discovery

def discover(p, cfg, x, a, d, z, later, eps):
    sampled, zero = cfg.objective == "vimco", x.new_zeros(1, 1)
    d = rnn(p, "discover", a, torch.cat([d, z], 1))
    head = linear(p, "head", d)
    logit = head[:, 0] + p["later.b"] if later else head[:, 0]
    where, cost_where = latent(head[:, 1:4], head[:, 4:], eps[:, :3], zero, zero, sampled)
    code = linear(p, "code", glimpse_of(p, cfg, x, where))
    what, cost_what = latent(code[:, :cfg.what], code[:, cfg.what:], eps[:, 3:], zero, zero,
                             sampled)
    z = torch.cat([torch.ones_like(where[:, :1]), where, what], 1)
    return logit, cost_where + cost_what, draw(p, cfg, what, where), d, z


def discover_all(p, cfg, x, l, y, free, later, eps, parts):
    a = torch.cat([F.relu(mlp(p, "look", F.avg_pool2d(x, 2).flatten(1))), l], 1)
    d, z = x.new_zeros(len(x), cfg.hidden), x.new_zeros(len(x), 4 + cfg.what)
    logits, costs, zs, ys = [], [], [], [y]
    for i in range(cfg.later if later else cfg.slots):
        logit, cost, drawn, d, z = parts.discover(p, cfg, x, a, d, z, later, eps[i])
        logits.append(torch.where(free > i, logit, NEVER))
        costs.append(cost)
        zs.append(z[:, 1:])
        ys.append(ys[-1] + drawn)
    return torch.stack(logits), torch.stack(costs), zs, torch.stack(ys)


# ---------------------------------------------------------------- one frame

def nothing(cfg, x):
    B, N = len(x), cfg.slots
    return State(x.new_zeros(B, N, 6 + cfg.what + 2 * cfg.memory), x.new_zeros(B, N),
                 x.new_zeros(B, N))


def log_posterior(logits):
    yes, zero = F.logsigmoid(logits).cumsum(0), torch.zeros_like(logits[:1])
    return torch.cat([zero, yes]) + torch.cat([F.logsigmoid(-logits), zero])


def frame(p, cfg, x, state, eps, uniform, first, dense, parts):
    """Propagate, discover, and sort the objects into slots. There are none before the first."""
    B, N, K = len(x), cfg.slots, cfg.what
    kept, y, l = [], torch.zeros_like(x), x.new_zeros(B, 128)
    s, there, age = torch.zeros_like(state.s), torch.zeros_like(state.there), state.age
    if not first:
        kept, new, at, y = propagate_all(p, cfg, x, state, eps, uniform, dense, parts)
    if kept:
        z = torch.cat([t.z for t in kept])
        code = F.relu(mlp(p, "known", torch.cat([new[:, 6:6 + K], new[:, :3]], 1)))
        l = l.index_add(0, at[0], z[:, None] * code)
        new = new if cfg.through_time else new.detach()
        s, there = s.index_put(at, z[:, None] * new), there.index_put(at, z)
    age = there * (age + 1)
    free = N - there.sum(1)
    logits, costs, zs, ys = discover_all(p, cfg, x, l, y, free, not first, eps[N:], parts)
    log_q = log_posterior(logits)
    n = (log_q[:-1].exp().cumsum(0) < uniform[-1]).sum(0)
    empty = (there * N + torch.arange(N).to(x)).argsort(1)
    for i, z in enumerate(zs):
        here = (n > i).to(x)[:, None] * F.one_hot(empty[:, i], N)
        found = z if cfg.through_time else z.detach()
        found = torch.cat([found[:, :3], x.new_zeros(B, 3), found[:, 3:],
                           x.new_zeros(B, 2 * cfg.memory)], 1)
        s, there = s + here[:, :, None] * found[:, None], there + here
    return Trace(kept, costs, ys, n, log_q, free, first), State(s, there, age)


# ---------------------------------------------------------------- the bound, two ways

def log_prior(cfg, trace):
    n = torch.arange(len(trace.ys)).to(trace.log_q)
    log_p = -(cfg.first if trace.first else cfg.newcomer) * n
    sums = log_p.logcumsumexp(0)
    return log_p[:, None] - sums[trace.free.clamp(max=len(n) - 1).long()]


def likelihoods(cfg, x, ys):
    away = (x - ys).flatten(2)
    squares = torch.linalg.vecdot(away, away)
    return -0.5 / cfg.std**2 * squares - x[0].numel() * (
        0.5 * math.log(2 * math.pi) + math.log(cfg.std))


def fast(cfg, x, trace, temperature):
    """The frame's loss, summed over videos."""
    T = temperature if trace.first else 1.0
    E = likelihoods(cfg, x, trace.ys) + log_prior(cfg, trace)
    E = E - torch.cat([torch.zeros_like(E[:1]), trace.costs.cumsum(0)])
    q = trace.log_q.exp()
    loss = -(q * (E - T * trace.log_q)).sum()
    if trace.kept:
        with torch.no_grad():
            slope = (x - torch.einsum("nb,nbchw->bchw", q, trace.ys)) / cfg.std**2
    for t in trace.kept:
        p = torch.sigmoid(t.logit)
        with torch.no_grad():
            drawn = t.drawn.flatten(1)
            size = torch.linalg.vecdot(drawn, drawn) / cfg.std**2
            gain = (torch.linalg.vecdot(slope[t.rows].flatten(1), drawn) + (t.z - 0.5) * size
                    - t.cost)
        kl = p * (t.logit - cfg.stay) + F.logsigmoid(-t.logit) + math.log1p(math.exp(cfg.stay))
        loss = loss + (t.z * t.cost + t.here * (kl - (p - p.detach()) * gain)).sum()
    return loss


def log_weights(cfg, x, trace, temperature):
    """The frame's share of log w and of log q(its discrete latents), for each row."""
    chosen = F.one_hot(trace.n, len(trace.ys)).T.to(x)
    log_q = (chosen * trace.log_q).sum(0)
    found = (torch.arange(len(trace.costs)).to(trace.n)[:, None] < trace.n).to(x)
    log_p = (chosen * (likelihoods(cfg, x, trace.ys) + log_prior(cfg, trace))).sum(0)
    log_p = log_p - (found * trace.costs).sum(0)
    for t in trace.kept:
        log_z = F.logsigmoid(torch.where(t.z > 0, t.logit, -t.logit))
        prior = t.z * cfg.stay - math.log1p(math.exp(cfg.stay))
        log_q = log_q.index_add(0, t.rows, t.here * log_z)
        log_p = log_p.index_add(0, t.rows, t.here * prior - t.z * t.cost)
    return torch.stack([log_p - log_q, log_q])


def vimco(cfg, log_w, log_q):
    K = cfg.particles
    log_w, log_q = log_w.reshape(-1, K), log_q.reshape(-1, K)
    bound = log_w.logsumexp(1) - math.log(K)
    with torch.no_grad():
        others = (log_w.sum(1, keepdim=True) - log_w) / (K - 1)
        own = torch.eye(K, dtype=torch.bool, device=log_w.device)
        without = torch.where(own, others[:, None], log_w[:, None])
        signal = bound[:, None] - (without.logsumexp(2) - math.log(K))
    return -(bound + (signal * (log_q - log_q.detach())).sum(1)).mean()


PARTS = SimpleNamespace(expect=expect, propagate=propagate, discover=discover, fast=fast)


def objective(p, cfg, videos, noise, weights, dense=False, parts=PARTS):
    if cfg.objective == "vimco":
        videos = videos.repeat_interleave(cfg.particles, 0)
    total, state = 0.0, nothing(cfg, videos[:, 0])
    share = parts.fast if cfg.objective == "fast" else log_weights
    for t, (x, frame_noise) in enumerate(zip(videos.unbind(1), noise, strict=True)):
        trace, state = frame(p, cfg, x, state, frame_noise.eps, frame_noise.uniform,
                             t == 0 or cfg.model == "air", dense, parts)
        total = total + share(cfg, x, trace, weights.temperature)
    return total / len(videos) if cfg.objective == "fast" else vimco(cfg, *total)


def compiled():
    """Part by part: a graph of a whole frame takes too long to compile."""
    parts = SimpleNamespace(**{name: torch.compile(part, dynamic=False)
                               for name, part in vars(PARTS).items()})
    return lambda *args: objective(*args, dense=True, parts=parts)


@torch.no_grad()
def infer(p, cfg, videos):
    """Who is there, and what each object draws, every latent at its mean."""
    x, N, there, pictures = videos[:, 0], cfg.slots, [], []
    eps, uniform = x.new_zeros(2 * N, len(x), 3 + cfg.what), x.new_full((N + 1, len(x)), 0.5)
    state = nothing(cfg, x)
    for t, x in enumerate(videos.unbind(1)):
        _, state = frame(p, cfg, x, state, eps, uniform, t == 0 or cfg.model == "air", False,
                         PARTS)
        at = state.there.nonzero(as_tuple=True)
        s, drawn = state.s[at], x.new_zeros(len(x), N, *x.shape[1:])
        drawn[at] = draw(p, cfg, s[:, 6:6 + cfg.what], s[:, :3])
        there.append(state.there)
        pictures.append(drawn)
    return torch.stack(there, 1), torch.stack(pictures, 1)
