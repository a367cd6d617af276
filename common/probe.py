"""What a representation knows of digits: a small classifier that adds them, scored on fresh frames.

Dimension key: B frames, N objects at most, M objects of all frames, K features, H units, O sums.
"""

import numpy as np

from common.backend import to_device, to_host, xp
from common.ops import elu, mlp, softmax
from common.optim import Optimiser
from common.params import Params

TINY = 1e-6


def init(sizes, seed):
    rng, (K, H, O) = np.random.default_rng(seed), sizes
    return Params({f"digit.{k}.{kind}": a for k, (n, m) in enumerate(((K, H), (H, H), (H, O)))
                   for kind, a in (("W", rng.standard_normal((n, m)) / np.sqrt(n)),
                                   ("b", np.zeros(m)))})


def plus(a, b):
    """The distribution of i + j where a is that of i and b that of j, all from 0 to O - 1."""
    O, y = a.shape[1], xp.zeros_like(a)                         # (B, O)
    for i in range(O):
        y[:, i:] += a[:, i:i + 1] * b[:, :O - i]

    def back(dy):
        da, db = xp.empty_like(a), xp.zeros_like(b)
        for i in range(O):
            da[:, i] = (dy[:, i:] * b[:, :O - i]).sum(1)
            db[:, :O - i] += dy[:, i:] * a[:, i:i + 1]
        return da, db

    return y, back


def add(p, x):
    """The distribution (B, O) of the sum of what the objects x (B, N, K) of a frame stand for.

    Each says a number by itself; one that is all 0 is not there, and says 0.
    """
    rows, slots = xp.nonzero(x.any(2))                          # (M,), (M,)
    logits, back_logits = mlp(p, "digit", x[rows, slots], elu)  # (M, O)
    said, back_said = softmax(logits)                           # (M, O)
    q = xp.zeros((x.shape[1], len(x), said.shape[1]), x.dtype)  # (N, B, O)
    q[:, :, 0] = 1
    q[slots, rows] = said
    y, backs = q[0], []                                         # (B, O)
    for q_n in q[1:]:
        y, back_n = plus(y, q_n)                                # (B, O)
        backs.append(back_n)

    def back(dy, g):
        dq = xp.empty_like(q)
        for n, back_n in reversed(list(enumerate(backs, 1))):
            dy, dq[n] = back_n(dy)
        dq[0] = dy
        dlogits = back_said(dq[slots, rows])
        back_logits(dlogits, g)

    return y, back


def surprise(q, labels):
    """Mean of -log q(label)."""
    rows = xp.arange(len(labels))                               # (B,)
    told = q[rows, labels] + TINY                               # (B,)
    loss = -xp.log(told).mean()

    def back(dloss):
        dq = xp.zeros_like(q)
        dq[rows, labels] = -dloss / (len(labels) * told)
        return dq

    return loss, back


def probe(train, test, classes, seed=0, steps=20_000, batch=128, units=256, lr=1e-3, noise=0.5):
    """Accuracies on `test`, of frames alone and of videos, of a classifier learned on `train`.

    Both are (features, labels) on the host. Features (videos, T, N, K) are scaled by the standard
    deviation that they have in training; noise comes on top, lest they are learned by heart. It
    learns from single frames; what it says of a video is the product of what it says of each.
    """
    rng, (x, labels) = np.random.default_rng(seed), train
    p = init((x.shape[-1], units, classes), seed)
    scale = np.float32(1 / (x[:20_000].std(dtype=np.float32) + 1e-8))
    g, adam = p.grads(), Optimiser(p)

    def part(x):
        return to_device(x.astype(np.float32) * scale)

    for step in range(steps):
        video, frame = rng.integers(len(x), size=batch), rng.integers(x.shape[1], size=batch)
        some = part(x[video, frame])                            # (B, N, K)
        some += noise * some.any(2, keepdims=True) * to_device(
            rng.standard_normal(some.shape, np.float32))
        q, back_q = add(p, some)                                # (B, O)
        _, back_loss = surprise(q, to_device(labels[video]))
        g.zero()
        back_q(back_loss(1.0), g)
        g.flush()
        adam.update(g, lr * 0.5 * (1 + np.cos(np.pi * step / steps)), step + 1)
    x, labels = test
    frames = x.reshape(-1, *x.shape[2:])
    q = np.concatenate([to_host(add(p, part(some))[0]) for some in
                        np.array_split(frames, -(-len(frames) // 500))])
    log_q = np.log(q + TINY).reshape(*x.shape[:2], classes)     # (videos, T, O)
    return {"addition": float((log_q.argmax(2) == labels[:, None]).mean()),
            "addition_of_videos": float((log_q.mean(1).argmax(1) == labels).mean())}
