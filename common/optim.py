"""Adam and RMSProp over the flat vector, clipping, schedules."""

import math

from common.backend import xp
from common.kernels import adam, rmsprop
from common.processes import meet, part, shared, zeros


class Optimiser:
    """State of one optimiser. `groups` gives name prefixes a learning-rate factor of their own."""

    def __init__(self, p, kind="adam", groups=None, clip=None, **numbers):
        self.p, self.kind, self.clip = p, kind, clip
        self.shared = shared()                              # processes update a part each
        self.m, self.v = (zeros(p.flat.size, p.flat.dtype) for _ in range(2))
        self.numbers = {"adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
                        "rmsprop": {"momentum": 0.9, "rho": 0.9, "eps": 1e-10}}[kind] | numbers
        self.pieces = pieces(p, groups or {})

    def update(self, g, lr, t):
        """One step with gradient g; t is the number of this update, from 1."""
        scale = 1.0
        if self.clip is not None:
            scale = min(1.0, self.clip / (norm(g.flat) + 1e-12))
        for span, factor in self.pieces:
            own = part(span) if self.shared else span
            arrays = (a[own] for a in (self.p.flat, g.flat, self.m, self.v))
            if self.kind == "adam":
                adam(*arrays, lr * factor, **self.numbers, t=t, scale=scale)
            else:
                rmsprop(*arrays, lr * factor, **self.numbers, scale=scale)
        if self.shared:
            meet()                                          # all have done their part


def pieces(p, groups):
    """Cut the flat vector into (slice, learning-rate factor), covering all of it once."""
    spans = sorted(((p.span(prefix), f) for prefix, f in groups.items()), key=lambda s: s[0].start)
    cuts, at = [], 0
    for span, factor in spans:
        cuts += [(slice(at, span.start), 1.0), (span, factor)]
        at = span.stop
    cuts.append((slice(at, p.flat.size), 1.0))
    return [(span, factor) for span, factor in cuts if span.stop > span.start]


def norm(flat):
    return math.sqrt(float(xp.dot(flat, flat)))


def ramp(step, start, stop, first, last):
    """`first` until step `start`, then linearly to `last`, reached at step `stop`."""
    return first + (last - first) * min(max((step - start) / max(stop - start, 1), 0.0), 1.0)


def cosine(step, steps, floor, warmup=0):
    """A factor that falls from 1 to `floor` over `steps`, after a linear warm-up."""
    fall = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
    return min(1.0, (step + 1) / (warmup + 1)) * (floor + (1 - floor) * fall)
