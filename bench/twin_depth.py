"""Factored depths once more, in PyTorch with autograd: the second implementation that ours is held
against. It takes the same named weights, scenes and noise as `depth_scene.objective`.
"""

import itertools

import torch
import torch.nn.functional as F

A, C = 16, 3


def linear(p, name, x):
    return torch.addmm(p[name + ".b"], x, p[name + ".W"])


def leaky(x):
    return F.leaky_relu(x, 0.1)


def halvings(p, name, x):
    k = 0
    while f"{name}.{k}.W" in p:
        x = leaky(F.conv2d(x, p[f"{name}.{k}.W"], p[f"{name}.{k}.b"], stride=2, padding=1))
        k += 1
    return x.flatten(1)


def attend(p, cfg, x):
    B, J = len(x), cfg.objects
    h = leaky(linear(p, "look", halvings(p, "trunk", F.avg_pool2d(x, 2))))
    a = torch.softmax(linear(p, "where", h).reshape(B, J, A * A), 2)
    u = (2 * torch.arange(A, dtype=x.dtype, device=x.device) + 1) / A - 1
    grid = torch.stack(torch.meshgrid(u, u, indexing="xy"), -1).reshape(A * A, 2)
    pixels = F.avg_pool2d(x, cfg.canvas // A).flatten(2).transpose(1, 2)
    return a @ grid, a @ pixels


def resample(image, scale, shift, size):
    """What lies at scale u + shift, u in [-1, 1]; 0 outside of the image."""
    one = torch.full_like(shift[:, :1], scale)
    zero = torch.zeros_like(one)
    theta = torch.stack([torch.cat([one, zero, shift[:, :1]], 1),
                         torch.cat([zero, one, shift[:, 1:]], 1)], 1)
    grid = F.affine_grid(theta, (*image.shape[:2], size, size), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


def inspect(p, cfg, x, where, tint):
    B, J, K = len(x), cfg.objects, cfg.what
    R, G = B * J, cfg.crop
    crop = resample(x.repeat_interleave(J, 0), cfg.reach, where.reshape(R, 2), G)
    away = crop.reshape(B, J, 1, C, G, G) - tint.reshape(B, 1, J, C, 1, 1)
    like = torch.exp(-(away**2).sum(3) / (2 * 0.15**2))
    own = torch.eye(J).to(x)[:, :, None, None]
    maps = torch.stack([(like * own).sum(2), (like * (1 - own)).sum(2)], 2).reshape(R, 2, G, G)
    e = halvings(p, "crop", torch.cat([crop, maps], 1))
    others = tint.sum(1, keepdim=True) - tint
    h = leaky(linear(p, "read", torch.cat([e, torch.cat([tint, others], 2).reshape(R, 2 * C)], 1)))
    u = linear(p, "head", h)
    where = where + cfg.nudge * u[:, 2 * K + 1:].reshape(B, J, 2)
    return u[:, :K], u[:, K:2 * K].clamp(-5, 1), u[:, 2 * K].reshape(B, J), where


def draw(p, cfg, z):
    h = k = leaky(linear(p, "draw.0", z))
    for layer in range(1, len(cfg.decoder)):
        k = leaky(linear(p, f"draw.{layer}", k))
    shape = -1, 1, cfg.patch, cfg.patch
    tint = linear(p, "colour", h)[:, :, None, None]
    if "shade.W" in p:
        tint = tint + linear(p, "shade", k).reshape(shape)
    return torch.sigmoid(linear(p, "alpha", k)).reshape(shape), torch.sigmoid(tint)


def order_errors(x, alpha, colour, background, orders):
    """Squared errors (B, S) of the pictures of all orders."""
    errors = []
    for order in orders:
        y = background
        for k in reversed(order):
            y = y + alpha[:, k, None] * (colour[:, k] - y)
        errors.append(((x - y) ** 2).flatten(1).sum(1))
    return torch.stack(errors, 1)


def order_posterior(depth, gamma, orders):
    columns = []
    for order in orders:
        u = -depth[:, list(order)] / gamma
        columns.append(sum(u[:, k] - torch.logsumexp(u[:, k:], 1) for k in range(u.shape[1])))
    return torch.stack(columns, 1)


def fast(p, cfg, x, noise, weights):
    B, J, N = len(x), cfg.objects, cfg.canvas
    R, orders = B * J, list(itertools.permutations(range(J)))
    guess, tint = attend(p, cfg, x)
    mean, log_std, depth, where = inspect(p, cfg, x, guess, tint)
    z = mean + log_std.exp() * noise.what.reshape(R, -1)
    kl = (0.5 * ((2 * log_std).exp() + mean**2 - 1) - log_std).sum()
    alpha, colour = draw(p, cfg, z)
    zoom = N / cfg.patch
    placed = resample(alpha, zoom, -where.reshape(R, 2) * zoom, N).reshape(B, J, N, N)
    q = order_posterior(depth, weights.gamma, orders).exp()
    colour, black = colour.reshape(B, J, C, 1, 1), torch.zeros_like(x)
    errors = order_errors(x, placed, colour, black, orders)
    prior = kl + 0.5 * (depth**2).sum()
    return ((32 / N) ** 2 / (2 * weights.std**2) * (q * errors).sum() + cfg.kl_weight * prior) / B


# ---------------------------------------------------------------- one object after the other

def unexplained(x, background, left, uniform, sharp):
    """The middle and the colour of a cell, drawn by the error that is left in it."""
    n = x.shape[2] // A
    unlike = 1 - torch.exp(-((x - background)**2).sum(1, keepdim=True) / (2 * 0.15**2))
    error = F.avg_pool2d(left * unlike, n).flatten(1)
    cell = (sharp * torch.log(error + 1e-6) - torch.log(-torch.log(uniform))).argmax(1)
    where = torch.stack([2 * (cell % A) + 1, 2 * (cell // A) + 1], 1).to(x) / A - 1
    return where, F.avg_pool2d(x, n).flatten(2)[torch.arange(len(x)), :, cell]


def examine(p, cfg, x, left, where, tint):
    K, G = cfg.what, cfg.crop
    crop = resample(torch.cat([x, left], 1), cfg.reach, where, G)
    away = crop[:, :C] - tint[:, :, None, None]
    like = torch.exp(-(away**2).sum(1, keepdim=True) / (2 * 0.15**2))
    e = halvings(p, "crop", torch.cat([crop[:, :C], like, crop[:, C:]], 1))
    u = linear(p, "head", leaky(linear(p, "read", torch.cat([e, tint, where], 1))))
    where = where + cfg.nudge * u[:, 2 * K + 1:]
    return u[:, :K], u[:, K:2 * K].clamp(-5, 1), u[:, 2 * K], where


def turns(p, cfg, x, noise, weights):
    B, J, N = len(x), cfg.objects, cfg.canvas
    orders, zoom = list(itertools.permutations(range(J))), N / cfg.patch
    z_bg, kl = sample(*look_behind(p, cfg, x), noise.far)
    background, left, found = draw_background(p, cfg, z_bg), torch.ones_like(x[:, :1]), []
    for j in range(J):
        with torch.no_grad():
            where, tint = unexplained(x, background, left, noise.uniform[:, j], cfg.sharp)
        for _ in range(cfg.looks):
            mean, log_std, depth, where = examine(p, cfg, x, left, where, tint)
        z, kl_j = sample(mean, log_std, noise.what[:, j])
        alpha, colour = draw(p, cfg, z)
        alpha = resample(alpha, zoom, -where * zoom, N)
        if colour.shape[-1] > 1:
            colour = resample(colour, zoom, -where * zoom, N)
        found.append((alpha[:, 0], colour, depth))
        kl, left = kl + kl_j, left * (1 - alpha)
    alpha, colour, depth = (torch.stack(a, 1) for a in zip(*found, strict=True))
    q = order_posterior(depth, weights.gamma, orders).exp()
    errors = order_errors(x, alpha, colour, background, orders)
    prior = kl + 0.5 * (depth**2).sum()
    return ((32 / N) ** 2 / (2 * weights.std**2) * (q * errors).sum() + cfg.kl_weight * prior) / B


# ---------------------------------------------------------------- the paper's own formulation

def block(p, name, x, act, stride=1):
    W = p[name + ".W"]
    x = act(F.conv2d(x, W, p[name + ".b"], stride=stride, padding=(W.shape[2] - 1) // 2))
    return norm(p, name + ".norm", x) if name + ".norm.gain" in p else x


def norm(p, name, x):
    return F.group_norm(x, 4, p[name + ".gain"].flatten(), p[name + ".b"].flatten())


def enlarge(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def u_net(p, cfg, x):
    h, bridges = x, []
    for k in range(len(cfg.unet) - 1):
        bridges.append(block(p, f"down.{k}", h, F.relu))
        h = F.max_pool2d(bridges[-1], 2)
    h = block(p, "middle", h, F.relu)
    for k in reversed(range(len(bridges))):
        h = block(p, f"up.{k}", torch.cat([enlarge(h), bridges[k]], 1), F.relu)
    return (F.conv2d(h, p["logits.W"], p["logits.b"]) + p["guess"]).flatten(2)


def recognise(p, cfg, crop):
    h, K = crop, cfg.what + 1
    for k in range(len(cfg.stages) // 2):
        h = block(p, f"stage.{k}.mix", block(p, f"stage.{k}.halve", h, F.elu, 2), F.elu)
        name = f"stage.{k}.more"
        h = norm(p, name + ".norm", h + F.elu(F.conv2d(h, p[name + ".W"], p[name + ".b"])))
    u = linear(p, "head", h.flatten(1))
    return u[:, :K], u[:, K:].clamp(-5, 1)


def draw_canvas(p, cfg, z):
    h = F.elu(linear(p, "object.1", F.elu(linear(p, "object.0", z))))
    h = h.reshape(len(z), -1, cfg.patch // 4, cfg.patch // 4)
    for k in range(2):
        h = F.elu(F.conv_transpose2d(h, p[f"grow.{k}.W"], p[f"grow.{k}.b"], stride=2, padding=1,
                                     output_padding=1))
    return block(p, "canvas", block(p, "smooth", h, F.elu), torch.sigmoid)


def look_behind(p, cfg, x):
    h = x
    for k in range(5):
        h = block(p, f"far.{k}", h, F.relu, 2)
    u = linear(p, "far.code.1", F.relu(linear(p, "far.code.0", h.flatten(1))))
    return u[:, :cfg.background], u[:, cfg.background:].clamp(-5, 1)


def draw_background(p, cfg, z):
    h = F.elu(linear(p, "sky", z)).reshape(len(z), 16, cfg.canvas // 32, cfg.canvas // 32)
    for k, doublings in enumerate((1, 2, 2)):
        for _ in range(doublings):
            h = enlarge(h)
        h = block(p, f"sky.{k}", h, torch.sigmoid if k == 2 else F.elu)
    return h


def place(canvas, theta):
    """Convolution of every canvas with its own position map."""
    R, channels, M, _ = canvas.shape
    n = M // 2
    padded = F.pad(theta[None], (M - 1 - n, n, M - 1 - n, n))
    out = F.conv2d(padded, canvas.flip(2, 3).reshape(-1, 1, M, M), groups=R)
    return out.reshape(R, channels, *theta.shape[1:])


def cut(image, theta, M):
    """Cross-correlation of every image with its position map."""
    R, n = len(image), M // 2
    padded = F.pad(image.reshape(1, -1, *image.shape[2:]), (n, M - 1 - n, n, M - 1 - n))
    weight = theta.repeat_interleave(C, 0)[:, None]
    return F.conv2d(padded, weight, groups=len(weight)).reshape(R, C, M, M)


def soft_depths(alpha, depth, gamma):
    J = alpha.shape[1]
    seen = []
    for j in range(J):
        v = alpha[:, j]
        for k in range(J):
            if k != j:
                nearer = torch.sigmoid((depth[:, j] - depth[:, k]) / gamma)[:, None, None]
                v = v * (1 - alpha[:, k] * nearer)
        seen.append(v)
    seen = torch.stack([*seen, (1 - alpha).prod(1)], 1)
    return seen / seen.sum(1, keepdim=True)


def sample(mean, log_std, eps):
    kl = (0.5 * ((2 * log_std).exp() + mean**2 - 1) - log_std).sum()
    return mean + log_std.exp() * eps, kl


def paper(p, cfg, x, noise, weights):
    B, J, N, M, K = len(x), cfg.objects, cfg.canvas, cfg.patch, cfg.what
    R, n = B * J, cfg.canvas // cfg.l1_cell
    logits = u_net(p, cfg, x)
    theta = torch.softmax((logits - torch.log(-torch.log(noise.uniform))) / cfg.temperature, 2)
    theta = theta.reshape(R, N, N)
    crop = cut(x.repeat_interleave(J, 0), theta, M)
    z, kl = sample(*recognise(p, cfg, crop), noise.what.reshape(R, -1))
    z_bg, kl_bg = sample(*look_behind(p, cfg, x), noise.far)
    placed = place(draw_canvas(p, cfg, z[:, :K]), theta).reshape(B, J, C + 1, N, N)
    depth = torch.sigmoid(z[:, K].reshape(B, J))
    seen = soft_depths(placed[:, :, C], depth, weights.gamma)[:, :, None]
    y = (seen[:, :-1] * placed[:, :, :C]).sum(1) + seen[:, -1] * draw_background(p, cfg, z_bg)
    mean = torch.softmax(logits, 2).mean((0, 1)).reshape(n, cfg.l1_cell, n, cfg.l1_cell).sum((1, 3))
    return (((y - x) ** 2).sum() / (2 * weights.std**2) / B + cfg.kl_weight * (kl + kl_bg) / B
            + cfg.l1_weight * (mean - 1 / n**2).abs().sum())


def objective(p, cfg, x, noise, weights):
    return {"fast": fast, "turns": turns, "paper": paper}[cfg.formulation](p, cfg, x, noise,
                                                                           weights)
