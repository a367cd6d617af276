"""A small network that tells what a scene is made of; its features say how alike pictures are.

It is trained here (python -m bench.features) with the labels that the generators give for free, so
distances on its features do not compare with those on Inception's. What it tells of each object,
the nearest first: its kind, or that there is none; where the middle of its mask lies, how large it
is, and its colour.
Dimension key: B scenes, K objects at most, C colours, N canvas side, F features.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np

from common.backend import to_device, to_host, xp
from common.conv import conv
from common.distances import frechet, kernel
from common.errors import Fail
from common.metrics import visible_masks
from common.ops import dense, elu, linear, softmax
from common.optim import Optimiser, cosine
from common.params import Params
from common.probe import surprise
from common.store import load_weights

MAPS, F, KINDS, NUMBERS = (3, 16, 32, 64, 64), 64, 8, 6
FOLDER = Path(__file__).resolve().parent.parent / "results" / "features"


def init(canvas, K, seed):
    rng, arrays = np.random.default_rng([seed, 0]), {}
    for k, (n, m) in enumerate(pairwise(MAPS)):
        arrays[f"see.{k}.W"] = rng.standard_normal((m, n, 4, 4)) * (1.2 / np.sqrt(16 * n))
        arrays[f"see.{k}.b"] = np.zeros(m)
    seen = MAPS[-1] * (canvas // 2**(len(MAPS) - 1)) ** 2
    for name, n, m in (("know", seen, F), ("tell", F, K * (KINDS + NUMBERS))):
        arrays[name + ".W"] = rng.standard_normal((n, m)) / np.sqrt(n)
        arrays[name + ".b"] = np.zeros(m)
    return arrays


def know(p, x):
    """Features of pictures."""
    h, backs = x, []
    for k in range(len(MAPS) - 1):
        h, back_h = conv(p, f"see.{k}", h, 2, want_dx=k > 0, act=elu)
        backs.append(back_h)
    f, back_f = dense(p, "know", h.reshape(len(h), -1), elu)        # (B, F)

    def back(df, g):
        dh = back_f(df, g).reshape(h.shape)
        for back_h in reversed(backs):
            dh = back_h(dh, g)

    return f, back


def lesson(p, x, kinds, numbers, weight=4.0):
    """How wrong it is about scenes, of which kinds (B, K) and numbers (B, K, NUMBERS) are true."""
    f, back_f = know(p, x)                                          # (B, F)
    u, back_u = linear(p, "tell", f)                                # (B, K*KINDS + K*NUMBERS)
    told = u.reshape(*kinds.shape, -1)                              # (B, K, KINDS + NUMBERS)
    q, back_q = softmax(told[..., :KINDS].reshape(-1, KINDS))       # (B*K, KINDS)
    wrong, back_wrong = surprise(q, kinds.ravel())
    away = (told[..., KINDS:] - numbers) * (kinds > 0)[..., None]   # (B, K, NUMBERS)
    loss = wrong + weight * (away * away).sum() / len(x)

    def back(g):
        daway = away * (2 * weight / len(x))
        dkinds = back_q(back_wrong(1.0)).reshape(*kinds.shape, KINDS)
        df = back_u(xp.concatenate([dkinds, daway], 2).reshape(u.shape), g)
        back_f(df, g)
        g.flush()

    return loss, told, back


def truth(images, amodal, order, kinds):
    """What there is to tell, the nearest object first: kinds from 1, 0 none; and the numbers."""
    (B, K), N = order.shape, images.shape[2]
    at = np.where(order < 0, K, order).argsort(1)                   # (B, K)
    rows = np.arange(B)[:, None]
    seen = visible_masks(amodal, order)[rows, at]                   # (B, K, N, N)
    whole = amodal[rows, at]                                        # (B, K, N, N)
    area, shown = whole.sum((2, 3)), seen.sum((2, 3))               # (B, K), (B, K)
    grid = (2 * np.arange(N) + 1) / N - 1
    middle = np.stack([whole.sum(2) @ grid, whole.sum(3) @ grid], 2)
    middle = middle / np.maximum(area, 1)[..., None]
    colour = np.einsum("bkij,bcij->bkc", seen, images) / np.maximum(shown, 1)[..., None]
    numbers = np.concatenate([middle, np.sqrt(area)[..., None] / N, colour], 2)
    return np.where(order >= 0, kinds + 1, 0)[rows, at], numbers.astype(np.float32)


def fit(draw, canvas, K, seed=0, steps=3000, batch=64, lr=2e-3):
    """Train on draw(seed, start, count) = images, kinds, numbers. Features are scaled at the end:
    `mean` and `std` are those of real scenes."""
    p = Params(init(canvas, K, seed))
    g, adam = p.grads(), Optimiser(p)
    for step in range(steps):
        images, kinds, numbers = map(to_device, draw(seed, step * batch, batch))
        _, _, back = lesson(p, images, kinds, numbers)
        g.zero()
        back(g)
        adam.update(g, lr * cosine(step, steps, 0.01), step + 1)
    real = np.concatenate([to_host(know(p, to_device(draw(seed, k, 250)[0]))[0])
                           for k in range(steps * batch, steps * batch + 2000, 250)])
    return p.host() | {"mean": real.mean(0), "std": real.std(0) + 1e-3}


def load(data, canvas):
    """The network that knows a data set."""
    path = FOLDER / f"{data}-{canvas}.npz"
    if not path.exists():
        raise Fail(f"no features of {data} at {canvas} pixels (see python -m bench.features)")
    return Params(load_weights(path)[1])


def of(p, parts):
    """Features of pictures that come in parts, on the host."""
    found = [to_host((know(p, to_device(images))[0] - p["mean"]) / p["std"]) for images in parts]
    return np.concatenate(found)


def compare(a, b, name=""):
    """Frechet and kernel distance of two sets of features, under names that end in `name`."""
    distance, error = kernel(a, b)
    return {"frechet" + name: frechet(a, b), "kernel" + name: distance,
            "kernel_error" + name: error}
