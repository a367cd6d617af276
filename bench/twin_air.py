"""AIR once more, in PyTorch with autograd: the second implementation that ours is held against.

It takes the same named weights, scenes and noise as `air_multimnist.objective`, and returns a loss
whose gradient must be ours. `nvil` is the usual surrogate: its value means nothing.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Traces(NamedTuple):
    """What the steps leave for the loss. A plain tuple: `torch.compile` wants one whole graph."""
    logit: list
    kl: list
    y: list
    h: list


def mlp(p, name, x):
    k = 0
    while f"{name}.{k}.W" in p:
        if k:
            x = F.relu(x)
        x = torch.addmm(p[f"{name}.{k}.b"], x, p[f"{name}.{k}.W"])
        k += 1
    return x


def pool(x):
    return F.avg_pool2d(x, 2).flatten(1)


def read(image, window, size):
    s, t = window[:, :1], window[:, 1:]
    zero = torch.zeros_like(s)
    theta = torch.stack([torch.cat([s, zero, t[:, :1]], 1), torch.cat([zero, s, t[:, 1:]], 1)], 1)
    grid = F.affine_grid(theta, (*image.shape[:2], size, size), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


def write(patch, window, size):
    s, t = window[:, :1], window[:, 1:]
    return read(patch, torch.cat([1 / s, -t / s], 1), size)


def latent(mean, log_std, eps):
    z = mean + log_std.exp() * eps
    kl = (0.5 * ((2 * log_std).exp() + mean**2 - 1) - log_std).sum(1)
    return z, kl


def window_of(where):
    return torch.cat([0.5 * torch.exp(0.15 * where[:, :1]), 0.5 * where[:, 1:]], 1)


def lstm(p, a, z, h, c):
    u = torch.addmm(torch.addmm(a, z, p["lstm.x.W"]), h, p["lstm.h.W"])
    i, f, g, o = u.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def unroll(p, cfg, x, noise):
    """Logits, KLs, canvases and LSTM states of all steps."""
    B, C, S, _ = x.shape
    K, G = cfg.what, cfg.glimpse
    h = c = x.new_zeros(B, cfg.hidden)
    z, y = x.new_zeros(B, 4 + K), torch.zeros_like(x)
    if cfg.model != "dair":
        a = mlp(p, "look", x.flatten(1) if cfg.model == "heads" else pool(x))
    out = Traces([], [], [], [])
    for i in range(cfg.max_steps):
        if cfg.model == "heads":
            own = a.reshape(B, cfg.max_steps, -1)[:, i]
            logit, where = own[:, 0], own[:, 1:4]
            window = window_of(where)
            what, kl = latent(own[:, 4:4 + K], own[:, 4 + K:].clamp(-5, 1), noise.what[i])
        else:
            seen = (x - y).detach() if cfg.model == "dair" else x
            if cfg.model == "dair":
                h = F.relu(mlp(p, "look", pool(seen)))
            else:
                h, c = lstm(p, a, z, h, c)
            head = torch.addmm(p["head.b"], h, p["head.W"])
            logit = head[:, 0]
            where, kl_where = latent(head[:, 1:4], head[:, 4:].clamp(-5, 1), noise.where[i])
            window = window_of(where)
            code = mlp(p, "encode", read(seen, window, G).flatten(1))
            what, kl_what = latent(code[:, :K], code[:, K:].clamp(-5, 1), noise.what[i])
            kl = kl_where + kl_what
            z = torch.cat([torch.ones_like(where[:, :1]), where, what], 1)
        patch = torch.sigmoid(mlp(p, "decode", what)).reshape(B, C, G, G)
        y = y + write(patch, window, S)
        for kept, value in zip(out, (logit, kl, y, h), strict=True):
            kept.append(value)
    return out


def log_likelihood(cfg, x, y):
    D = x[0].numel()
    return (-0.5 * ((x - y) / cfg.std) ** 2).flatten(1).sum(1) - D * (
        0.5 * math.log(2 * math.pi) + math.log(cfg.std))


def log_prior(cfg, C, like):
    return torch.log_softmax(-C * torch.arange(cfg.max_steps + 1).to(like), 0)


def bounds(cfg, x, out, weights):
    """E_n, and log q(n), for n = 0..N."""
    logits = torch.stack(out.logit)
    zero = torch.zeros_like(logits[:1])
    yes, no = F.logsigmoid(logits).cumsum(0), F.logsigmoid(-logits)
    log_q = torch.cat([zero, yes]) + torch.cat([no, zero])
    ll = torch.stack([log_likelihood(cfg, x, y) for y in (torch.zeros_like(x), *out.y)])
    kl = torch.cat([zero, torch.stack(out.kl).cumsum(0)])
    return ll - kl + log_prior(cfg, weights.C, x)[:, None], log_q, ll


def exact(p, cfg, x, out, noise, weights):
    E, log_q, _ = bounds(cfg, x, out, weights)
    S = weights.spread / (cfg.max_steps + 1)
    return -(log_q.exp() * (E - weights.temperature * log_q) + S * E).sum(0).mean()


def nvil(p, cfg, x, out, noise, weights):
    E, log_q, ll = bounds(cfg, x, out, weights)
    T, N, B = weights.temperature, cfg.max_steps, len(x)
    logits = torch.stack(out.logit)
    there = (noise.uniform < torch.sigmoid(logits)).to(x).cumprod(0)
    n = there.sum(0).long()
    chosen = F.one_hot(n, N + 1).T.to(x)
    log_p = log_prior(cfg, weights.C, x)
    baseline = 100 * mlp(p, "baseline", torch.cat(out.h).detach()).reshape(N, B) + ll[:-1].detach()
    score, fit = 0.0, 0.0
    for i in range(N):
        asked = there[i - 1] if i else torch.ones_like(there[0])
        past = torch.stack(out.kl)[:i].sum(0) + T * F.logsigmoid(logits)[:i].sum(0)
        R = (chosen * (E - T * log_q)).sum(0) - torch.logsumexp(log_p[i:], 0) + past
        log_z = F.logsigmoid(torch.where(there[i] > 0, logits[i], -logits[i]))
        score = score + (asked * (R - baseline[i]).detach() * log_z).sum() / B
        fit = fit + 0.5 * (asked * (R.detach() - baseline[i]) ** 2).sum() / B
    return -(chosen * E).sum() / B - score + fit


def relaxed(p, cfg, x, out, noise, weights):
    logits, u = torch.stack(out.logit), noise.uniform
    c = torch.sigmoid((logits + torch.logit(u)) / weights.tau).cumprod(0)
    ys = torch.stack([torch.zeros_like(x), *out.y])
    y = (c[:, :, None, None, None] * (ys[1:] - ys[:-1])).sum(0)
    q, rate = torch.sigmoid(logits), torch.tensor(cfg.rates, dtype=x.dtype)[:, None].to(x)
    kl_pres = (q * (F.logsigmoid(logits) - rate.log())
               + (1 - q) * (F.logsigmoid(-logits) - torch.log1p(-rate)))
    loss = (-log_likelihood(cfg, x, y).sum() + cfg.kl_weight * torch.stack(out.kl).sum()
            + weights.presence * kl_pres.sum())
    return loss / len(x)


def objective(p, cfg, x, noise, weights):
    out = unroll(p, cfg, x, noise)
    return {"exact": exact, "nvil": nvil, "relaxed": relaxed}[cfg.estimator](
        p, cfg, x, out, noise, weights)
