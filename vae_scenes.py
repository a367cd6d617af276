"""Convolutional VAE: what depth_scene.py is compared with, an image model without objects.

    python vae_scenes.py            trains, scores on 1,000 fresh scenes, draws figures

One vector z for the whole scene; the architecture is that of Anciukevicius et al. (2020), Table 6.
The equations that tag the lines below (forward and backward alike):

    eq.1   q(z | x) = N(mean, std^2), both from encode(x)
    eq.2   y = decode(z),   p(x | z) = N(y, sigma^2),   p(z) = N(0, 1)
    eq.3   loss = |x - y|^2 / (2 sigma^2) + v KL(q(z | x) || N(0, 1)),   a mean over scenes

`default` is narrower than Table 6 (`paper`), so that it has as many weights as depth_scene.py, and
z as many dimensions as all of that model's latents. Sigma falls while training, as it does there.

Dimension key: B images, C colours, N canvas side, K dimensions of z, F what the encoder ends in.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from common.backend import to_device, to_host, xp  # before NumPy: sets threads, BLAS kernels

import numpy as np

from common import cli, features, raycast, shapes
from common.conv import conv, group_norm, upsample
from common.errors import Fail
from common.files import as_picture, read_picture, read_scenes
from common.ops import clamp, dense, elu, latent, linear
from common.optim import Optimiser, cosine, norm, ramp
from common.params import Params, fitting
from common.processes import is_root, share
from common.store import load_weights, save_weights

C, GROUPS = 3, 4        # colours; groups of channels that are normalised together
DOUBLINGS = 3           # of the decoder's maps
DRAW = {                # seed, start, count, canvas: scenes with .images
    "polygons": lambda *a: shapes.polygons(*a),
    "dsprites": lambda *a: shapes.dsprites(*a),
    "clevr-3": lambda *a: raycast.clevr(*a, "3"),
    "clevr-5": lambda *a: raycast.clevr(*a, "5"),
    "clevr-5-vbg": lambda *a: raycast.clevr(*a, "5-vbg"),
}
VALIDATION, TEST = 1_000_001, 1_000_002     # seeds of the streams that no training run draws from


# ================================================================ configuration

@dataclass(frozen=True)
class Config:
    steps: int = cli.option(5000, "optimiser updates", low=1)
    batch_size: int = cli.option(16, "scenes per update", low=1)
    data: str = cli.option("polygons", "what the scenes show", choices=tuple(DRAW))
    canvas: int = cli.option(64, "N: side of the scene in pixels", low=16)
    latent: int = cli.option(22, "K: dimensions of z", low=1)
    halvings: tuple[int, ...] = cli.option((16, 48, 192, 256), "encoder: channels of the "
                                           "convolutions that halve the picture", low=4)
    mixings: tuple[int, ...] = cli.option((32, 96, 192), "encoder: channels of the 1 x 1 "
                                          "convolutions behind all but the last", low=4)
    seeds: int = cli.option(32, "decoder: channels of the first maps", low=1)
    widths: tuple[int, ...] = cli.option((96, 48, 16), "decoder: channels at an eighth, a quarter "
                                         "and half of the canvas", low=1)
    std_first: float = cli.option(0.14, "sigma of the likelihood at the start", low=1e-3)
    std: float = cli.option(0.06, "sigma at the end", low=1e-3)
    kl_weight: float = cli.option(1.0, "v: weight of the KL", low=0.0)
    lr: float = cli.option(1e-3, "peak learning rate (Adam)", low=0.0)
    lr_floor: float = cli.option(0.02, "share of lr that is left at the end", low=0.0, high=1.0)
    warmup: int = cli.option(100, "updates of linear warm-up", low=0)
    clip: float = cli.option(30_000.0, "largest norm of a gradient", low=0.0)
    eval_every: int = cli.option(500, "updates between two lines of metrics", low=1)
    eval_scenes: int = cli.option(250, "validation scenes for each line of metrics", low=1)
    test_scenes: int = cli.option(1000, "fresh test scenes for the final score", low=1)
    generated: int = cli.option(0, "evaluate: scenes to generate, compared with fresh ones",
                                 low=0)


PRESETS = {
    "default": {},
    "quick": {"steps": 300, "eval_every": 100, "test_scenes": 250},
    "paper": {"steps": 450_000, "batch_size": 100, "latent": 16,
              "halvings": (32, 64, 256, 256), "mixings": (64, 128, 256),
              "widths": (128, 96, 48), "std_first": 0.01 / 3**0.5,
              "std": 0.01 / 5**0.5, "lr": 5e-4, "lr_floor": 1.0, "warmup": 0, "eval_every": 900},
}
ADJUSTABLE = ("test_scenes", "generated")


def check(cfg):
    """What no single flag can see."""
    if len(cfg.halvings) != len(cfg.mixings) + 1 or len(cfg.widths) != DOUBLINGS:
        raise Fail(f"--mixings needs one number less than --halvings, --widths {DOUBLINGS}")
    if any(n % GROUPS for n in (*cfg.mixings, cfg.halvings[-1])):
        raise Fail(f"--mixings and the last of --halvings must be multiples of {GROUPS}")
    if cfg.canvas % 2**max(DOUBLINGS, len(cfg.halvings)):
        raise Fail(f"--canvas {cfg.canvas} cannot be halved {len(cfg.halvings)} times")


# ================================================================ parameters

def init(cfg, seed):
    """Normal weights scaled by the square root of the fan-in; the flat vector keeps this order."""
    rng, arrays, GAIN, SMALL = np.random.default_rng([seed, 0]), {}, 1.2, 0.3
    K, N = cfg.latent, cfg.canvas

    def weights(name, shape, fan_in, gain=GAIN, bias=0.0, outputs=None):
        arrays[name + ".W"] = rng.standard_normal(shape) * (gain / np.sqrt(fan_in))
        arrays[name + ".b"] = np.broadcast_to(np.asarray(bias, float), outputs or shape[0])

    def layer(name, n, m, gain=GAIN, bias=0.0):
        weights(name, (n, m), n, gain, bias, m)

    def kernel(name, n, m, k=3, gain=GAIN):
        weights(name, (m, n, k, k), n * k * k, gain)

    def normed(name, n):
        arrays[name + ".gain"], arrays[name + ".b"] = np.ones((n, 1, 1)), np.zeros((n, 1, 1))

    last = len(cfg.mixings)
    for k, (n, m) in enumerate(zip((C, *cfg.mixings), cfg.halvings, strict=True)):
        kernel(f"see.{k}.halve", n, m)
        if k < last:
            m = cfg.mixings[k]
            kernel(f"see.{k}.mix", cfg.halvings[k], m, 1)
            kernel(f"see.{k}.more", m, m, 1, SMALL)
        normed(f"see.{k}.norm", m)
    F = cfg.halvings[-1] * (N // 2**len(cfg.halvings)) ** 2
    layer("code", F, 2 * K, SMALL, [0.0] * K + [-1.0] * K)
    layer("sow", K, cfg.seeds * (N // 2**DOUBLINGS) ** 2)
    for k, (n, m) in enumerate(pairwise((cfg.seeds, *cfg.widths))):
        kernel(f"grow.{k}", n, m)
        for i in range(1 if k == 0 else 2):
            kernel(f"grow.{k}.more.{i}", m, m, gain=SMALL)
    for i in range(2):
        kernel(f"finish.{i}", m, m, gain=SMALL)
    kernel("paint", m, C, 1, SMALL)
    return arrays


# ================================================================ encoder and decoder

def residual(p, name, x):
    """x and what a convolution of it adds."""
    y, back_y = conv(p, name, x, act=elu)

    def back(dy, g):
        return dy + back_y(dy, g)

    return x + y, back


def residuals(p, name, x):
    """`name.0`, `name.1`, ... as many as p has."""
    backs = []
    while f"{name}.{len(backs)}.W" in p:
        x, back_i = residual(p, f"{name}.{len(backs)}", x)
        backs.append(back_i)

    def back(dx, g):
        for back_i in reversed(backs):
            dx = back_i(dx, g)
        return dx

    return x, back


def halve(p, name, x, first):
    """Half the side; but for the last time colours mixed, and once more as a residual; normed."""
    x, back_x = conv(p, name + ".halve", x, 2, want_dx=not first, act=elu)
    mixed = name + ".mix.W" in p
    if mixed:
        x, back_mix = conv(p, name + ".mix", x, act=elu)
        x, back_more = residual(p, name + ".more", x)
    y, back_y = group_norm(p, name + ".norm", x, GROUPS)

    def back(dy, g):
        dx = back_y(dy, g)
        if mixed:
            dx = back_more(dx, g)
            dx = back_mix(dx, g)
        return back_x(dx, g)

    return y, back


def encode(p, cfg, x):
    """Mean and log std of z."""
    h, backs, K = x, [], cfg.latent
    for k in range(len(cfg.halvings)):
        h, back_h = halve(p, f"see.{k}", h, k == 0)                 # eq.1
        backs.append(back_h)
    u, back_u = linear(p, "code", h.reshape(len(x), -1))            # (B, 2K)  eq.1
    log_std, back_clamp = clamp(u[:, K:], -6, 1)                    # (B, K)  eq.1

    def back(dmean, dlog_std, g):
        dlog_std = back_clamp(dlog_std)                                             # eq.1
        dh = back_u(xp.concatenate([dmean, dlog_std], 1), g).reshape(h.shape)       # eq.1
        for back_h in reversed(backs):
            dh = back_h(dh, g)                                                      # eq.1

    return u[:, :K], log_std, back


def decode(p, cfg, z):
    """The mean of a scene; Table 6 names no activation behind its last layer."""
    side = cfg.canvas // 2**DOUBLINGS
    h, back_z = dense(p, "sow", z, elu)                             # eq.2
    h, backs = h.reshape(len(z), cfg.seeds, side, side), []         # (B, seeds, N/8, N/8)
    for k in range(DOUBLINGS):
        h, back_h = conv(p, f"grow.{k}", h, act=elu)                # eq.2
        h, back_more = residuals(p, f"grow.{k}.more", h)            # eq.2
        h, back_up = upsample(h)                                    # eq.2
        backs.append((back_h, back_more, back_up))
    h, back_finish = residuals(p, "finish", h)                      # (B, W, N, N)  eq.2
    y, back_y = conv(p, "paint", h)                                 # (B, C, N, N)  eq.2

    def back(dy, g):
        dh = back_y(dy, g)                                                          # eq.2
        dh = back_finish(dh, g)                                                     # eq.2
        for back_h, back_more, back_up in reversed(backs):
            dh = back_up(dh)                                                        # eq.2
            dh = back_more(dh, g)                                                   # eq.2
            dh = back_h(dh, g)                                                      # eq.2
        return back_z(dh.reshape(len(z), -1), g)                                    # eq.2

    return y, back


# ================================================================ the loss

def objective(p, cfg, x, eps, std):
    """Eq. 3, the reconstruction, and the pullback to all parameters."""
    B = len(x)
    mean, log_std, back_code = encode(p, cfg, x)                    # (B, K), (B, K)  eq.1
    z, kl, back_z = latent(mean, log_std, eps)                      # (B, K), (B,)  eq.1
    y, back_y = decode(p, cfg, z)                                   # (B, C, N, N)  eq.2
    away = y - x                                                    # (B, C, N, N)  eq.3
    loss = ((away * away).sum() / (2 * std**2) + cfg.kl_weight * kl.sum()) / B

    def back(g):
        dy = away / (std**2 * B)                                                    # eq.3
        dz = back_y(dy, g)                                                          # eq.2
        dmean, dlog_std = back_z(dz, xp.full_like(kl, cfg.kl_weight / B))           # eq.1
        back_code(dmean, dlog_std, g)                                               # eq.1
        g.flush()

    return loss, kl, y, back


def schedule(cfg, step):
    """Sigma and the learning rate of an update."""
    std = float(np.exp(ramp(step, 0, cfg.steps, np.log(cfg.std_first), np.log(cfg.std))))
    return std, cfg.lr * cosine(step, cfg.steps, cfg.lr_floor, cfg.warmup)


def draw_noise(cfg, batch, seed, step, start=0, count=None):
    """The randomness of one update, keyed by (seed, step); a process takes its own rows."""
    eps = np.random.default_rng([seed, 1, step]).standard_normal((batch, cfg.latent), np.float32)
    return to_device(eps[start:start + (count or batch)])


# ================================================================ scenes, scoring, generating

def stream(cfg, seed, total, part=250):
    """Images of the endless stream `seed`, a part at a time."""
    for start in range(0, total, part):
        yield DRAW[cfg.data](seed, start, min(part, total - start), cfg.canvas).images


def file_parts(cfg, path, part=250):
    """The scenes of an npz file, checked, a part at a time."""
    N = cfg.canvas
    images = read_scenes(path, {"images": ("N", N, N, C)})["images"]
    images = np.ascontiguousarray(np.moveaxis(as_picture(images, f"{path}: images"), 3, 1))
    for k in range(0, len(images), part):
        yield images[k:k + part]


def reconstruct(p, cfg, images):
    """Every latent at its mean: what is drawn then, and the KL. Host arrays in and out."""
    x = to_device(images)
    _, kl, y, _ = objective(p, cfg, x, xp.zeros((len(x), cfg.latent), x.dtype), cfg.std)
    return to_host(y), to_host(kl)


def score(p, cfg, parts):
    """Squared error of a pixel, and KL of a scene."""
    error, kl, scenes, pixels = 0.0, 0.0, 0, 0
    for images in parts:
        recon, cost = reconstruct(p, cfg, images)
        error, kl = error + float(((recon - images) ** 2).sum()), kl + float(cost.sum())
        scenes, pixels = scenes + len(images), pixels + images.size
    return {"mse": error / pixels, "kl": kl / scenes}


def imagine(p, cfg, count, seed=0, part=250):
    """Scenes from the prior, a part at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, part):
        z = rng.standard_normal((min(part, count - start), cfg.latent), np.float32)
        yield to_host(decode(p, cfg, to_device(z))[0]).clip(0, 1)


def evaluate(cfg, weights, path=None, data_dir=None):
    """Score weights on a scene file, or without one on fresh test scenes."""
    p = fitting(weights, init(cfg, 0))
    if path is not None:
        return score(p, cfg, file_parts(cfg, path))
    metrics = {"scenes": cfg.data, **score(p, cfg, stream(cfg, TEST, cfg.test_scenes))}
    if cfg.generated:
        net = features.load(cfg.data, cfg.canvas)
        metrics |= features.compare(features.of(net, imagine(p, cfg, cfg.generated)),
                                    features.of(net, stream(cfg, TEST, cfg.generated)))
    return metrics


def infer(cfg, weights, files, out):
    """What the model makes of pictures: each as a PNG beside what it draws."""
    from viz.depth import interpolations

    p, results = fitting(weights, init(cfg, 0)), []
    for path in files:
        image, _ = read_picture(path, cfg.canvas, C)
        recon, kl = reconstruct(p, cfg, image[None])
        overlay = Path(out) / f"{Path(path).name}.recon.png"
        interpolations(overlay, [("input", image[None]), ("drawn", recon)])
        results.append({"file": str(path), "overlay": str(overlay), "kl": float(kl[0]),
                        "mse": float(((recon[0] - image) ** 2).mean())})
    return {"pictures": results}


# ================================================================ training

def train(cfg, run):
    """The loop: scenes in, one update out. Everything is keyed by (seed, step)."""
    check(cfg)
    p = Params(init(cfg, run.seed))
    g, adam = p.grads(), Optimiser(p, clip=cfg.clip)
    watched = list(stream(cfg, VALIDATION, cfg.eval_scenes))
    for step in run.steps(cfg.steps, {"params": p.flat, "m": adam.m, "v": adam.v}):
        start, count = share(cfg.batch_size)
        first = step * cfg.batch_size + start
        images = DRAW[cfg.data](run.seed, first, count, cfg.canvas).images
        std, lr = schedule(cfg, step)
        noise = draw_noise(cfg, cfg.batch_size, run.seed, step, start, count)
        loss, _, _, back = objective(p, cfg, to_device(images), noise, std)
        g.zero()
        back(g)
        g.average()
        seen = run.watch(loss=float(loss), gradient=norm(g.flat))
        adam.update(g, lr, step + 1)
        if run.due(step + 1, cfg.eval_every) or step + 1 == cfg.steps:
            run.log(step + 1, **seen, **score(p, cfg, watched))

    metrics = {"trained_on": cfg.data, "weights": p.flat.size,
               **score(p, cfg, stream(cfg, TEST, cfg.test_scenes))}
    if is_root():
        save_weights(run.folder / "weights.npz", p.host(), cfg, about=cfg.data)
        figures([run.folder], run.data_dir)
    return metrics


def load_run(folder):
    """Config and weights of a run folder."""
    config, weights, _ = load_weights(folder / "weights.npz")
    cfg = cli.from_dict(Config, config, folder / "weights.npz")
    return cfg, fitting(weights, init(cfg, 0))


def figures(folders, data_dir=None):
    """Reconstructions and generated scenes of the first run; curves compare them all."""
    from viz import curves
    from viz.depth import interpolations
    from viz.scenes import samples

    folder, (cfg, p) = folders[0], load_run(folders[0])
    images = next(stream(cfg, TEST, 8))
    interpolations(folder / "reconstructions.png",
                   [("input", images), ("drawn", reconstruct(p, cfg, images)[0])])
    samples(folder / "samples.png", next(imagine(p, cfg, 40)))
    curves.curves(folder / "curves.png", {f.name: f / "metrics.jsonl" for f in folders},
                  [("mse", "squared error per pixel"), ("kl", "KL divergence (nats)")])


if __name__ == "__main__":
    cli.main(__doc__, Config, PRESETS, train=train, evaluate=evaluate, infer=infer, figures=figures,
             adjustable=ADJUSTABLE)
