"""Loops that keep a small block of sums in vector registers, in LLVM's own terms.

Compilers do not make them by themselves. `tile` is a convolution's inner loop, `dots` that of its
weights' gradient and of products with a transposed matrix.
"""

import functools

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# A CPU with 512-bit vectors has 32 registers: 8 x 3 sums, 3 vectors of x, one weight at a time.
# With 256 bits there are 16. Vectors of 128 bits stand for ARM, which has 32 of them.
features = get_host_cpu_features()
BYTES = 64 if features.get("avx512f") else 32 if features.get("avx") else 16
ROWS = 4 if BYTES == 32 else 8          # output channels and vectors of pixels of a `tile`
VECTORS = 3
DOT_ROWS, DOTS = ROWS // 2, 6           # output channels and columns r of a block of `dots`


class Vectors:
    """LLVM instructions on vectors, for the intrinsics below. Arrays are pointers to numbers."""

    def __init__(self, context, builder, signature, args):
        self.build, dtype = builder, signature.args[0].dtype
        self.size = dtype.bitwidth // 8
        self.lanes = BYTES // self.size
        self.type = ir.VectorType(context.get_value_type(dtype), self.lanes)
        self.args = [context.make_array(t)(context, builder, a).data
                     if isinstance(t, types.Array) else a
                     for t, a in zip(signature.args, args, strict=True)]

    def at(self, array, *index):
        """Address of array[the sum of the indices]."""
        return self.build.gep(array, [functools.reduce(self.build.add, index)])

    def pixels(self, array, *index):
        """The same, of as many neighbours as a vector has."""
        return self.build.bitcast(self.at(array, *index), self.type.as_pointer())

    def load(self, array, *index):
        return self.build.load(self.pixels(array, *index), align=self.size)

    def store(self, v, array, *index):
        self.build.store(v, self.pixels(array, *index), align=self.size)

    def splat(self, address):
        """The number there in all lanes."""
        v = self.build.insert_element(self.zero(), self.build.load(address), ir.IntType(32)(0))
        return self.shuffle(v, v, [0] * self.lanes)

    def shuffle(self, a, b, lanes):
        return self.build.shuffle_vector(a, b, ir.VectorType(ir.IntType(32), self.lanes)([*lanes]))

    def zero(self):
        return self.type([0.0] * self.lanes)

    def variable(self, value):
        """In memory as far as LLVM's builder goes; its optimiser finds a register."""
        return cgutils.alloca_once_value(self.build, value)

    def add(self, a, b):
        return self.build.fadd(a, b, flags=("fast",))

    def add_product(self, total, a, b):
        product = self.build.fmul(a, b, flags=("fast",))
        self.build.store(self.add(self.build.load(total), product), total)

    def sums(self, vs):
        """One vector whose lane k is the sum over vs[k]: halves meet until one is left."""
        vs = vs + [self.zero()] * (self.lanes - len(vs))
        while len(vs) > 1:
            vs = [self.add(*(self.shuffle(a, b, range(odd, 2 * self.lanes, 2)) for odd in (0, 1)))
                  for a, b in zip(vs[0::2], vs[1::2], strict=True)]
        return vs[0]


def integer(n):
    return ir.IntType(64)(n)


@intrinsic
def tile(typing, x, at, offsets, begin, end, weights, start, y, pitch):
    """y[o pitch + at + i] = start[o] + sum_{begin <= r < end} weights[r, o] x[offsets[r] + at + i]

    for ROWS channels o and VECTORS vectors of pixels i.
    """
    def generate(context, build, signature, args):
        v = Vectors(context, build, signature, args)
        x, at, offsets, begin, end, weights, start, y, pitch = v.args
        rows, steps = range(ROWS), [integer(k * v.lanes) for k in range(VECTORS)]
        block = [[v.variable(v.splat(v.at(start, integer(o)))) for _ in steps] for o in rows]
        with cgutils.for_range_slice(build, begin, end, integer(1), inc=True) as (r, _):
            first = build.add(build.load(v.at(offsets, r)), at)
            seen = [v.load(x, first, step) for step in steps]
            for o in rows:
                weight = v.splat(v.at(weights, build.mul(r, integer(ROWS)), integer(o)))
                for pixels, total in zip(seen, block[o], strict=True):
                    v.add_product(total, pixels, weight)
        for o in rows:
            for step, total in zip(steps, block[o], strict=True):
                v.store(build.load(total), y, at, build.mul(pitch, integer(o)), step)
        return context.get_dummy_value()

    return types.void(x, at, offsets, begin, end, weights, start, y, pitch), generate


@intrinsic
def dots(typing, x, offsets, r, dy, plane, pitch, begin, end, out, to):
    """out[to + (o, j)] += sum_{begin <= i < end} dy[plane + o pitch + i] x[offsets[r + j] + i]

    for DOT_ROWS channels o and DOTS columns j.
    """
    def generate(context, build, signature, args):
        v = Vectors(context, build, signature, args)
        x, offsets, r, dy, plane, pitch, begin, end, out, to = v.args
        firsts = [build.load(v.at(offsets, r, integer(j))) for j in range(DOTS)]
        planes = [build.add(plane, build.mul(pitch, integer(o))) for o in range(DOT_ROWS)]
        block = [[v.variable(v.zero()) for _ in firsts] for _ in planes]
        with cgutils.for_range_slice(build, begin, end, integer(v.lanes), inc=True) as (i, _):
            seen = [v.load(x, first, i) for first in firsts]
            for first, row in zip(planes, block, strict=True):
                d = v.load(dy, first, i)
                for pixels, total in zip(seen, row, strict=True):
                    v.add_product(total, pixels, d)
        flat = [build.load(total) for row in block for total in row]
        for k in range(0, len(flat), v.lanes):
            kept = v.load(out, to, integer(k))
            v.store(v.add(kept, v.sums(flat[k:k + v.lanes])), out, to, integer(k))
        return context.get_dummy_value()

    return types.void(x, offsets, r, dy, plane, pitch, begin, end, out, to), generate


@intrinsic
def copy(typing, target, i, source, j, n):
    """target[i:i + n] = source[j:j + n], both flat"""
    def generate(context, build, signature, args):
        v = Vectors(context, build, signature, args)
        target, i, source, j, n = v.args
        cgutils.raw_memcpy(build, v.at(target, i), v.at(source, j), n, v.size)
        return context.get_dummy_value()

    return types.void(target, i, source, j, n), generate
