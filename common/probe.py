"""What a representation knows: a small classifier trained on it, and its accuracy on fresh data.

Dimension key: B scenes, N objects at most, M objects of all scenes, K features, H units, O classes.
"""

import numpy as np

from common.backend import gemm, to_device, xp
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

    x (B, N, K); an object whose features are all 0 is not there.
    """
    rows, slots = xp.nonzero(x.any(2))              # (M,), (M,)
    each, back_each = mlp(p, "each", x[rows, slots], elu, last=elu)     # (M, H)
    member = (rows == xp.arange(len(x))[:, None]).astype(x.dtype)       # (B, M)
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


def probe(train, test, classes, seed=0, steps=40_000, batch=256, units=256, lr=1e-3):
    """Accuracy on `test` of a classifier learned on `train`; both are (features, labels), host.

    Features (B, N, K) are scaled by the standard deviation that they have in training.
    """
    rng, (x, labels) = np.random.default_rng(seed), train
    p = init((x.shape[2], units, classes), seed)
    scale = np.float32(1 / (x[:20_000].std(dtype=np.float32) + 1e-8))
    g, adam = p.grads(), Optimiser(p)

    def part(x):
        return to_device(x.astype(np.float32) * scale)

    for step in range(steps):
        pick = rng.integers(len(x), size=batch)
        logits, back_logits = classify(p, part(x[pick]))            # (B, O)
        _, back_loss = cross_entropy(logits, to_device(labels[pick]))
        g.zero()
        back_logits(back_loss(1.0), g)
        g.flush()
        adam.update(g, lr * 0.5 * (1 + np.cos(np.pi * step / steps)), step + 1)
    right = 0
    for k in range(0, len(test[0]), 500):
        guess = classify(p, part(test[0][k:k + 500]))[0].argmax(1)
        right += int((guess == to_device(test[1][k:k + 500])).sum())
    return right / len(test[0])
