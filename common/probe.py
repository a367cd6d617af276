"""What a representation knows: a small classifier trained on it, and its accuracy on fresh data."""

from itertools import pairwise

import numpy as np

from common.backend import to_device, xp
from common.ops import elu, mlp
from common.optim import Optimiser
from common.params import Params


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


def probe(train, test, classes, seed=0, steps=8000, batch=256, units=256, lr=1e-3):
    """Accuracy on `test` of an MLP with two hidden layers; both are (features, labels) on the host.

    Features are scaled by the standard deviation that they have in training.
    """
    rng, inputs = np.random.default_rng(seed), train[0].shape[1]
    sizes = (inputs, units, units, classes)
    p = Params({f"probe.{i}.{kind}": a for i, (n, m) in enumerate(pairwise(sizes))
                for kind, a in (("W", rng.standard_normal((n, m)) / np.sqrt(n)),
                                ("b", np.zeros(m)))})
    scale = 1 / (train[0].std() + 1e-8)
    g, adam = p.grads(), Optimiser(p)
    x, labels = to_device(train[0] * np.float32(scale)), to_device(train[1])
    for step in range(steps):
        pick = to_device(rng.integers(len(x), size=batch))
        logits, back_logits = mlp(p, "probe", x[pick], elu)         # (B, O)
        _, back_loss = cross_entropy(logits, labels[pick])
        g.zero()
        back_logits(back_loss(1.0), g)
        g.flush()
        adam.update(g, lr * 0.5 * (1 + np.cos(np.pi * step / steps)), step + 1)
    guess = mlp(p, "probe", to_device(test[0] * np.float32(scale)), elu)[0].argmax(1)
    return float((guess == to_device(test[1])).mean())
