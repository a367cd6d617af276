"""What a representation knows: a small classifier trained on it, and its accuracy on fresh data.

Dimension key: B scenes, T frames, N objects at most, M objects of all frames of all scenes,
K features, H units, O classes.
"""

import numpy as np

from common.backend import gemm, to_device, to_host, xp
from common.ops import elu, mlp
from common.optim import Optimiser
from common.params import Params


def init(sizes, seed):
    rng, (K, H, O) = np.random.default_rng(seed), sizes
    shapes = {"each.0": (K, H), "each.1": (H, H), "sum.0": (H, H), "sum.1": (H, O)}
    return Params({f"{name}.{kind}": a for name, (n, m) in shapes.items()
                   for kind, a in (("W", rng.standard_normal((n, m)) / np.sqrt(n)),
                                   ("b", np.zeros(m)))})


def classify(p, x):
    """Logits of scenes from their objects, in whatever order: a sum over what each one tells.

    x (B, T, N, K), of which the mean over frames is taken; objects that are all 0 are not there.
    """
    (B, T), at = x.shape[:2], xp.nonzero(x.any(3))
    each, back_each = mlp(p, "each", x[at], elu, last=elu)              # (M, H)
    member = (at[0] == xp.arange(B)[:, None]).astype(x.dtype) / T       # (B, M)
    logits, back_logits = mlp(p, "sum", gemm(member, each), elu)        # (B, O)

    def back(dlogits, g):
        dsum = back_logits(dlogits, g)
        back_each(gemm(member.T, dsum), g)

    return logits, back


def cross_entropy(logits, labels):
    """Mean of -log softmax(logits) at the labels; labels are whole numbers."""
    rows = xp.arange(len(labels))                                   # (B,)
    away = logits - logits.max(1, keepdims=True)                    # (B, O)
    log_p = away - xp.log(xp.exp(away).sum(1, keepdims=True))       # (B, O)
    loss = -log_p[rows, labels].mean()

    def back(dloss):
        d = xp.exp(log_p)
        d[rows, labels] -= 1
        return d * (dloss / len(labels))

    return loss, back


def probe(train, test, classes, seed=0, steps=20_000, batch=64, units=256, lr=1e-3, noise=0.8):
    """Accuracies on `test`, of frames alone and of videos, of a classifier learned on `train`.

    Both are (features, labels) on the host. Features (B, T, N, K) are scaled by the standard
    deviation that they have in training; noise comes on top, lest they are learned by heart. Each
    update sees some of the T frames, from one to all.
    """
    rng, (x, labels) = np.random.default_rng(seed), train
    p = init((x.shape[-1], units, classes), seed)
    scale = np.float32(1 / (x[:20_000].std(dtype=np.float32) + 1e-8))
    g, adam = p.grads(), Optimiser(p)

    def part(x):
        return to_device(x.astype(np.float32) * scale)

    def accuracy(x, labels):
        guess = [classify(p, part(x[k:k + 500]))[0].argmax(1) for k in range(0, len(x), 500)]
        return float((to_host(xp.concatenate(guess)) == labels).mean())

    for step in range(steps):
        pick = rng.integers(len(x), size=batch)
        frames = rng.permutation(x.shape[1])[:rng.integers(x.shape[1]) + 1]
        some = part(x[pick[:, None], frames])
        some += noise * some.any(3, keepdims=True) * to_device(
            rng.standard_normal(some.shape, np.float32))
        logits, back_logits = classify(p, some)                     # (B, O)
        _, back_loss = cross_entropy(logits, to_device(labels[pick]))
        g.zero()
        back_logits(back_loss(1.0), g)
        g.flush()
        adam.update(g, lr * 0.5 * (1 + np.cos(np.pi * step / steps)), step + 1)
    x, labels = test
    return accuracy(x.reshape(-1, 1, *x.shape[2:]), np.repeat(labels, x.shape[1])), accuracy(*test)
