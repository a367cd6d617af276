"""IODINE once more, in PyTorch with autograd: the second implementation that ours is held against.

It takes the same named weights, scenes and noise as `iodine_tetris.objective`, and returns a loss
whose gradient must be ours.
"""

import math

import torch
import torch.nn.functional as F


def activation(cfg):
    return F.elu if cfg.activation == "elu" else lambda x: F.leaky_relu(x, 0.1)


def conv(p, name, x, stride=1):
    W = p[name + ".W"]
    return F.conv2d(x, W, p.get(name + ".b"), stride, (W.shape[2] - 1) // 2)


def linear(p, name, x):
    return F.linear(x, p[name + ".W"].T, p.get(name + ".b"))


def decode(p, cfg, z):
    N, R, S, act = len(z), cfg.rank, cfg.canvas, activation(cfg)
    if cfg.decoder != "broadcast":
        for i in range(cfg.decoder_layers):
            z = act(linear(p, f"decode.{i}", z))
        a = linear(p, f"decode.{cfg.decoder_layers}", z)
    if cfg.decoder == "separable":
        rows, columns = a[:, :2 * S * R].chunk(2, 1)
        colours = a[:, 2 * S * R:].reshape(N, -1, R)
        return torch.einsum("nor,nir,nrj->noij", colours * (0.5 / R**0.5), rows.reshape(N, S, R),
                            columns.reshape(N, R, S))
    if cfg.decoder == "patch":
        G = cfg.patch
        C = 1 if cfg.data in ("binary", "shapes") else 3
        sizes = [2, C + 1, C * G * G]
        place, flat, patch, own = a.split([*sizes, a.shape[1] - sum(sizes)], 1)
        if cfg.masks == "round":
            line = torch.linspace(-1, 1, G, dtype=z.dtype, device=z.device)
            away = line[:, None]**2 + line**2
            own = own @ torch.stack([F.relu(1 - away / w**2).flatten() for w in (0.4, 0.7, 1.0)])
        patch = torch.cat([patch, own], 1).reshape(N, -1, G, G)
        cells, pixels = (torch.arange(n, dtype=z.dtype, device=z.device) - (n - 1) / 2
                         for n in (G, S))
        away = pixels[:, None] - cells - place[:, :, None, None] * ((S - 1) / 2)
        rows, columns = F.relu(1 - away.abs()).unbind(1)
        laid = torch.einsum("nig,nogh,njh->noij", rows, patch, columns)
        return laid + flat[:, :, None, None]
    line = torch.linspace(-1, 1, S, dtype=z.dtype, device=z.device)
    place = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(N, 2, S, S)
    y = torch.cat([z[:, :, None, None].expand(-1, -1, S, S), place], 1)
    for i in range(cfg.layers):
        y = act(conv(p, f"decode.{i}", y))
    return conv(p, f"decode.{cfg.layers}", y)


def log_density(cfg, x, mean, scale):
    away = (x - mean) / scale
    if cfg.components == "logistic":
        return (-away - 2 * F.softplus(-away) - math.log(scale)).sum(2)
    return (-0.5 * away**2 - math.log(scale) - 0.5 * math.log(2 * math.pi)).sum(2)


def normal(a):
    return F.layer_norm(a, a.shape[1:])


def coordinates(x):
    S = x.shape[-1]
    u = torch.linspace(-1, 1, S, dtype=x.dtype, device=x.device) * math.pi / 2
    waves = [f(n * u) for n in (1, 2) for f in (torch.cos, torch.sin)]
    rows = [w[:, None].expand(S, S) for w in waves]
    return torch.stack([torch.full_like(rows[0], 0.5), *rows, *[row.T for row in rows]])


def guess(p, cfg, lam, eps):
    """What latents drawn from lambda decode to, and their KL."""
    Z = cfg.latents
    log_std = lam[:, Z:].clamp(-6, 2)
    kl = 0.5 * ((2 * log_std).exp() + lam[:, :Z]**2 - 1).sum(1) - log_std.sum(1)
    return decode(p, cfg, lam[:, :Z] + log_std.exp() * eps), kl.sum()


def explain(cfg, x, y, sigma):
    """log p of each pixel; who owns it, who looks like it, and what it were without one slot."""
    (B, C, S, _), N = x.shape, len(y)
    y = y.reshape(B, -1, C + 1, S, S)
    mean, log_m = y[:, :, :C], F.log_softmax(y[:, :, C], 1)
    e = log_density(cfg, x[:, None], mean, sigma)
    joint = log_m + e
    pixel = torch.logsumexp(joint, 1)
    log_p = pixel
    if cfg.components == "composite":
        whole = (log_m.exp()[:, :, None] * mean).sum(1, keepdim=True)
        log_p = log_density(cfg, x[:, None], whole, sigma)[:, 0]
    r, m = (joint - pixel[:, None]).exp(), log_m.exp()
    without = pixel[:, None] + ((1 - r).clamp(min=1e-5) / (1 - m).clamp(min=1e-5)).log()
    owners = torch.stack([m, F.softmax(e, 1)], 2).reshape(N, 2, S, S)
    return log_p, owners, without.reshape(N, 1, S, S)


def refine(p, cfg, still, y, owners, facts, lam, dlam, state):
    """A step for every lambda; facts: slopes by y, log p, leave-one-out."""
    C, act, (dy, log_p, without) = y.shape[1] - 1, activation(cfg), facts
    log_p = normal(log_p[:, None]).repeat_interleave(len(y) // len(log_p), 0)
    facts = [normal(dy[:, :C]), normal(dy[:, C:]), log_p, normal(without)]
    maps = torch.cat([y, owners, torch.cat(facts, 1).detach()], 1)
    if cfg.backprop == "steps":
        maps, lam = maps.detach(), lam.detach()
    v = act(conv(p, "refine.maps", maps, 2) + still)
    v = act(conv(p, "refine.2", act(conv(p, "refine.1", v, 2)), 2))
    v = v.flatten(1) if cfg.pool == "flatten" else v.mean((2, 3))
    vectors = torch.cat([lam, normal(dlam)], 1)
    u = act(linear(p, "refine.mix", torch.cat([v, vectors], 1)))
    if cfg.lstm:
        h, c = state
        i, f, g, o = (linear(p, "refine.lstm.x", u) + linear(p, "refine.lstm.h", h)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        u = torch.sigmoid(o) * torch.tanh(c)
        state = u, c
    return linear(p, "refine.step", torch.cat([u, vectors], 1)), state


def objective(p, cfg, x, noise, weights, parts=(guess, explain, refine)):
    guess, explain, refine = parts
    B, N = len(x), noise.shape[1]
    fixed = torch.cat([x, coordinates(x).expand(B, -1, -1, -1)], 1)
    still = conv(p, "refine.image", fixed, 2).repeat_interleave(N // B, 0)
    lam = p["start.b"].expand(N, -1)
    state = x.new_zeros(N, cfg.units), x.new_zeros(N, cfg.units)
    loss = 0.0
    for t, weight in enumerate(weights.iterations):
        y, kl = guess(p, cfg, lam, noise[t])
        log_p, owners, without = explain(cfg, x, y, weights.sigma)
        bound = kl - log_p.sum()
        loss = loss + weight / B * bound
        if t + 1 == len(weights.iterations):
            return loss
        dlam, dy = torch.autograd.grad(bound, [lam, y], retain_graph=True)
        step, state = refine(p, cfg, still, y, owners, (dy, log_p, without), lam, dlam, state)
        lam = lam + step


def compiled():
    """Part by part: one graph of all refinements takes too long to compile."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False            # the same decode is differentiated twice
    parts = [torch.compile(part, dynamic=False) for part in (guess, explain, refine)]
    return lambda *args: objective(*args, parts=parts)
