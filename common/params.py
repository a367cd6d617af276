"""All weights of a model as named views of one flat vector, and their gradients as another."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from common.backend import gemm, to_device, to_host, xp
from common.errors import Fail
from common.processes import mean_over_processes, row, rows, zeros


class Params(Mapping):
    """`p["name"]` is a view into `p.flat`; the order of the names is the order in memory."""

    def __init__(self, arrays, dtype=np.float32):
        self.spans, size = {}, 0
        for name, a in arrays.items():
            self.spans[name] = slice(size, size + a.size)
            size += a.size
        self.shapes = {name: a.shape for name, a in arrays.items()}
        self.lay(zeros(size, dtype))
        for name, a in arrays.items():
            self.views[name][...] = to_device(np.asarray(a, dtype))

    def lay(self, flat):
        """Make `flat` the memory that the names are views of."""
        self.flat = flat
        self.views = {name: flat[span].reshape(self.shapes[name])
                      for name, span in self.spans.items()}

    def __getitem__(self, name):
        return self.views[name]

    def __contains__(self, name):
        return name in self.views

    def __iter__(self):
        return iter(self.views)

    def __len__(self):
        return len(self.views)

    def span(self, prefix):
        """The slice of `flat` that holds all names starting with `prefix` (they are neighbours)."""
        spans = [s for name, s in self.spans.items() if name.startswith(prefix)]
        assert spans, f"no parameter starts with {prefix!r}"
        assert all(a.stop == b.start for a, b in pairwise(spans)), prefix
        return slice(spans[0].start, spans[-1].stop)

    def grads(self):
        return Grads(self)

    def host(self):
        """A plain dict of NumPy arrays, for files and figures."""
        return {name: to_host(a) for name, a in self.items()}


class Grads(Params):
    """Same names, same shapes. `linear` queues its products, `flush` makes them.

    `zero` is lazy: a view is cleared when first read, and a queued product simply lands on it.
    `flat` is whole after `flush`.
    """

    def __init__(self, p):
        self.spans, self.shapes = p.spans, p.shapes
        self.rows = rows(p.flat.size, p.flat.dtype)         # one for each process of a run
        self.at = None
        self.zero()

    def zero(self):
        self.turn_to(row())
        self.queues, self.stale = {}, set(self)

    def average(self):
        """Become the mean over all processes that share the batch; forked ones find it in row 0."""
        mean_over_processes(self.flat, self.rows)
        self.turn_to(0)

    def turn_to(self, k):
        if k != self.at:
            self.at = k
            self.lay(self.rows[k])

    def __getitem__(self, name):
        if name in self.stale:
            self.stale.remove(name)
            self.views[name][...] = 0
        return self.views[name]

    def queue(self, name, x, dy):
        """Remember that `y = x W + b` received dy; a weight used N times waits for one product."""
        self.queues.setdefault(name, []).append((x, dy))

    def flush(self):
        """dW += x^T dy and db += sum dy, one product per weight however often it was used."""
        for name, uses in self.queues.items():
            x, dy = (join([use[k] for use in uses]) for k in (0, 1))
            self.add_product(name + ".W", x.T, dy)
            if name + ".b" in self.views:
                self.add_product(name + ".b", xp.ones_like(dy[:, 0]), dy)
        self.queues.clear()
        for name in list(self.stale):
            self[name]                                  # what nothing has reached is zero

    def add_product(self, name, a, b):
        if name in self.stale:
            self.stale.remove(name)
            gemm(a, b, out=self.views[name])
        else:
            self.views[name] += gemm(a, b)


def fitting(weights, wanted):
    """Weights from a file as parameters, if names and shapes are those of `wanted`."""
    if {k: a.shape for k, a in weights.items()} != {k: a.shape for k, a in wanted.items()}:
        raise Fail("these weights do not fit the config")
    return Params(weights)


def join(arrays):
    return arrays[0] if len(arrays) == 1 else xp.concatenate(arrays)
