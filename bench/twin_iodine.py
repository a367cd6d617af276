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
    if cfg.decoder == "separable":
        a = linear(p, "decode.1", act(linear(p, "decode.0", z)))
        rows, columns = a[:, :2 * S * R].chunk(2, 1)
        colours = a[:, 2 * S * R:].reshape(N, -1, R)
        return torch.einsum("nor,nir,nrj->noij", colours * (0.5 / R**0.5), rows.reshape(N, S, R),
                            columns.reshape(N, R, S))
    line = torch.linspace(-1, 1, S, dtype=z.dtype, device=z.device)
    place = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(N, 2, S, S)
    if cfg.decoder == "planes":
        edges, a = cfg.features, linear(p, "decode.1", act(linear(p, "decode.0", z)))
        middle, lean, lift, w = a.split([2, 2 * edges, edges, a.shape[1] - 3 * edges - 2], 1)
        away = place - middle[:, :, None, None]
        u = torch.einsum("nfd,ndij->nfij", 4 * lean.reshape(N, -1, 2), away)
        flat = w.shape[1] - edges - 1 if cfg.colours == "flat" else 0
        w, colours = w[:, flat:].reshape(N, -1, edges + 1), w[:, :flat, None, None]
        y = torch.einsum("nof,nfij->noij", w[:, :, :-1], torch.tanh(u + lift[:, :, None, None]))
        return torch.cat([colours.expand(-1, -1, S, S), y / edges**0.5 + w[:, :, -1:, None]], 1)
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


def objective(p, cfg, x, noise, weights):
    B, C, S, _ = x.shape
    N, Z, sigma, act = noise.shape[1], cfg.latents, weights.sigma, activation(cfg)
    fixed = torch.cat([x, coordinates(x).expand(B, -1, -1, -1)], 1)
    still = conv(p, "refine.image", fixed, 2).repeat_interleave(N // B, 0)
    lam = p["start.b"].expand(N, -1)
    h = c = x.new_zeros(N, cfg.units)
    loss = 0.0
    for t, weight in enumerate(weights.iterations):
        log_std = lam[:, Z:].clamp(-6, 2)
        z = lam[:, :Z] + log_std.exp() * noise[t]
        kl = 0.5 * ((2 * log_std).exp() + lam[:, :Z]**2 - 1).sum(1) - log_std.sum(1)
        y = decode(p, cfg, z)
        y_of = y.reshape(B, -1, C + 1, S, S)
        mean, log_m = y_of[:, :, :C], F.log_softmax(y_of[:, :, C], 1)
        e = log_density(cfg, x[:, None], mean, sigma)
        joint = log_m + e
        pixel = torch.logsumexp(joint, 1)
        log_p = pixel
        if cfg.components == "composite":
            whole = (log_m.exp()[:, :, None] * mean).sum(1, keepdim=True)
            log_p = log_density(cfg, x[:, None], whole, sigma)[:, 0]
        bound = kl.sum() - log_p.sum()
        loss = loss + weight / B * bound
        if t + 1 == len(weights.iterations):
            return loss
        dlam, dy = torch.autograd.grad(bound, [lam, y], retain_graph=True)
        r, m = (joint - pixel[:, None]).exp(), log_m.exp()
        without = pixel[:, None] + ((1 - r).clamp(min=1e-5) / (1 - m).clamp(min=1e-5)).log()
        facts = [normal(dy[:, :C]), normal(dy[:, C:]),
                 normal(log_p[:, None]).repeat_interleave(N // B, 0),
                 normal(without.reshape(N, 1, S, S))]
        owners = torch.stack([m, F.softmax(e, 1)], 2).reshape(N, 2, S, S)
        maps = torch.cat([y, owners, torch.cat(facts, 1).detach()], 1)
        read = lam
        if cfg.backprop == "steps":
            maps, read = maps.detach(), lam.detach()
        v = act(conv(p, "refine.maps", maps, 2) + still)
        v = act(conv(p, "refine.2", act(conv(p, "refine.1", v, 2)), 2))
        v = v.flatten(1) if cfg.pool == "flatten" else v.mean((2, 3))
        vectors = torch.cat([read, normal(dlam)], 1)
        u = act(linear(p, "refine.mix", torch.cat([v, vectors], 1)))
        if cfg.lstm:
            i, f, g, o = (linear(p, "refine.lstm.x", u) + linear(p, "refine.lstm.h", h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = u = torch.sigmoid(o) * torch.tanh(c)
        lam = lam + linear(p, "refine.step", torch.cat([u, vectors], 1))
