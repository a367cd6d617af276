"""The convolutional VAE once more, in PyTorch with autograd: what ours is held against.
It takes the same named weights, scenes and noise as `vae_scenes.objective`.
"""

import torch
import torch.nn.functional as F


def conv(p, name, x, stride=1):
    W = p[name + ".W"]
    return F.conv2d(x, W, p[name + ".b"], stride=stride, padding=(W.shape[2] - 1) // 2)


def residuals(p, name, x):
    k = 0
    while f"{name}.{k}.W" in p:
        x = x + F.elu(conv(p, f"{name}.{k}", x))
        k += 1
    return x


def encode(p, cfg, x):
    for k in range(len(cfg.halvings)):
        x = F.elu(conv(p, f"see.{k}.halve", x, 2))
        if k < len(cfg.mixings):
            x = F.elu(conv(p, f"see.{k}.mix", x))
            x = x + F.elu(conv(p, f"see.{k}.more", x))
        norm = (p[f"see.{k}.norm.{name}"].flatten() for name in ("gain", "b"))
        x = F.group_norm(x, 4, *norm)
    u = x.flatten(1) @ p["code.W"] + p["code.b"]
    return u[:, :cfg.latent], u[:, cfg.latent:].clamp(-6, 1)


def decode(p, cfg, z):
    side = cfg.canvas // 8
    h = F.elu(z @ p["sow.W"] + p["sow.b"]).reshape(len(z), cfg.seeds, side, side)
    for k in range(3):
        h = residuals(p, f"grow.{k}.more", F.elu(conv(p, f"grow.{k}", h)))
        h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
    return conv(p, "paint", residuals(p, "finish", h))


def objective(p, cfg, x, eps, std):
    mean, log_std = encode(p, cfg, x)
    y = decode(p, cfg, mean + torch.exp(log_std) * eps)
    kl = (0.5 * (torch.exp(2 * log_std) + mean**2 - 1) - log_std).sum()
    return (((y - x) ** 2).sum() / (2 * std**2) + cfg.kl_weight * kl) / len(x)
