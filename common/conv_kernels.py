"""The loops of a convolution: its output, its input's gradient, its weights' gradient.

A convolution is a matrix product whose second matrix is never built. Images are laid into padded
planes, flattened, so that what tap (i, j) of the kernel sees of the whole image is one contiguous
piece that starts at an offset of its own:

    y[o, at] = sum_r W[o, r] x[offset[r] + at]          r runs over input channels and taps
    dW[o, r] = sum_at dy[o, at] x[offset[r] + at]

The input's gradient is the first line again, with W transposed and taps reversed. At stride 2 the
planes hold even and odd rows and columns apart, and nothing else changes. Both lines keep a small
block of sums in vector registers; loops that compilers do not make by themselves, so they are
written in LLVM's own terms (`tile`, `dots`).

As in kernels.py there is a reference in NumPy, and a version for the GPU, which does build that
matrix. Images are (B, C, H, W), kernels (O, C, k, k), zero padding (k-1)//2 on each side.
Dimension key: B images, C input and O output channels, H W input size, h w output size, k kernel,
R = C k k.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
from numba import njit

from common.backend import DEVICE, THREADS, gemm, xp
from common.kernels import jit, launch
from common.processes import threads
from common.vectors import BYTES, DOT_ROWS, DOTS, ROWS, VECTORS, copy, dots, tile

ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu")
SLOPE = 0.1             # of leaky_relu below 0
CHUNK = 2048            # pixels that `dots` sees at a time, for the cache's sake


def out_side(n, k, stride):
    return (n + 2 * ((k - 1) // 2) - k) // stride + 1


# ---------------------------------------------------------------- reference, in plain NumPy

def taps(x, k, stride, h, w):
    """Every tap (i, j) of the kernel, and what it sees of the padded x: a view, (B, C, h, w)."""
    height, width = stride * (h - 1) + 1, stride * (w - 1) + 1
    for i in range(k):
        for j in range(k):
            yield i, j, x[:, :, i:i + height:stride, j:j + width:stride]


def pad(x, k):
    n = (k - 1) // 2
    return xp.pad(x, ((0, 0), (0, 0), (n, n), (n, n)))


def conv_reference(x, W, b, stride, act):
    O, _, k, _ = W.shape
    y = xp.zeros((len(x), O, *(out_side(n, k, stride) for n in x.shape[2:])), x.dtype)
    for i, j, seen in taps(pad(x, k), k, stride, *y.shape[2:]):
        y += xp.einsum("oc,bchw->bohw", W[:, :, i, j], seen)
    return act_reference(y if b is None else y + b[:, None, None], act)


def conv_back_x_reference(dy, W, b, stride, size, act):
    k = W.shape[2]
    n = (k - 1) // 2
    dx = xp.zeros((len(dy), W.shape[1], size[0] + 2 * n, size[1] + 2 * n), dy.dtype)
    for i, j, seen in taps(dx, k, stride, *dy.shape[2:]):
        seen += xp.einsum("oc,bohw->bchw", W[:, :, i, j], dy)
    dx = dx[:, :, n:n + size[0], n:n + size[1]]
    return act_reference(dx if b is None else dx + b[:, None, None], act)


def conv_back_w_reference(x, dy, stride, k):
    dW = xp.zeros((dy.shape[1], x.shape[1], k, k), x.dtype)
    for i, j, seen in taps(pad(x, k), k, stride, *dy.shape[2:]):
        dW[:, :, i, j] = xp.einsum("bohw,bchw->oc", dy, seen)
    return dW


def act_reference(u, act):
    if act == "elu":
        return xp.where(u > 0, u, xp.expm1(xp.minimum(u, 0)))
    slope = {"identity": 1, "relu": 0, "leaky_relu": SLOPE}[act]
    return xp.where(u > 0, u, slope * u)


def act_back_reference(dy, y, act):
    """The derivative is written with the activation's own output y."""
    if act == "elu":
        return dy * xp.where(y > 0, 1, y + 1)
    slope = {"identity": 1, "relu": 0, "leaky_relu": SLOPE}[act]
    return xp.where(y > 0, dy, slope * dy)


# ---------------------------------------------------------------- numba: images to planes and back

@jit
def _spread(image, s, p, planes, pitch, at):
    """An image (C, H, W), padded by p, into planes (C, s, s, n): every s-th row and column.

    Row u, column v of the padded image comes to plane (u % s, v % s), place u//s pitch + v//s.
    """
    C, H, W = image.shape
    n, flat = planes.shape[3], planes.ravel()
    for c in range(C):
        for a in range(s):
            for b in range(s):
                first, j = (a - p) % s, (b - p) % s
                to = ((c * s + a) * s + b) * n + at + (first + p) // s * pitch + (j + p) // s
                for i in range(first, H, s):
                    if s == 1:
                        copy(flat, to, image, (c * H + i) * W, W)
                    else:
                        for m in range((W - j + 1) // 2):
                            flat[to + m] = image[c, i, j + 2 * m]
                    to += pitch


@jit
def _collect(planes, s, p, image, pitch, at):
    """The way back, from planes (O // ROWS, s, s, ROWS, n)."""
    C, H, W = image.shape
    n, flat = planes.shape[4], planes.ravel()
    for c in range(C):
        for a in range(s):
            for b in range(s):
                first, j = (a - p) % s, (b - p) % s
                plane = ((c // ROWS * s + a) * s + b) * ROWS + c % ROWS
                to = plane * n + at + (first + p) // s * pitch + (j + p) // s
                for i in range(first, H, s):
                    if s == 1:
                        copy(image, (c * H + i) * W, flat, to, W)
                    else:
                        for m in range((W - j + 1) // 2):
                            image[c, i, j + 2 * m] = flat[to + m]
                    to += pitch


# Not with `jit`, which may take it that no number is a NaN: those must get through.
keeps_nan = njit(fastmath={"contract", "nsz"}, nogil=True, cache=True, error_model="numpy")


@keeps_nan
def _activate(y, act):
    """In place. exp(x) - 1 by its series at x / 1024, then 10 times exp(2x) - 1 = q (q + 2)."""
    f = y.dtype.type
    if act == 1 or act == 2:
        zero, slope = f(0), f(SLOPE if act == 2 else 0)
        for k in range(y.size):
            y[k] = slope * y[k] if y[k] < zero else y[k]
    elif act == 3:
        zero, one, two, lowest, shrunk = f(0), f(1), f(2), f(-40), f(1 / 1024)
        c2, c3, c4, c5, c6 = f(1 / 2), f(1 / 3), f(1 / 4), f(1 / 5), f(1 / 6)
        for k in range(y.size):
            t = (lowest if y[k] < lowest else zero if y[k] > zero else y[k]) * shrunk
            q = one + c2 * t * (one + c3 * t * (one + c4 * t * (one + c5 * t * (one + c6 * t))))
            q *= t
            for _ in range(10):
                q *= q + two
            y[k] = y[k] if y[k] > zero else q


@keeps_nan
def _activate_back(dy, y, act, du):
    f = y.dtype.type
    zero, one, slope = f(0), f(1), f(SLOPE if act == 2 else 0)
    for k in range(y.size):
        below = y[k] + one if act == 3 else slope
        du[k] = dy[k] if y[k] > zero else dy[k] * below


@jit
def _convolve(x, s_in, p_in, y, s_out, p_out, offsets, parts, weights, start, act, pitch, period,
              group, n):
    """All `tile`s of a piece of the batch, `group` images at a time, one under the other.

    parts[f]:parts[f + 1] are the r that reach plane f of the output.
    """
    B, C = x.shape[:2]
    source = np.zeros((C, s_in, s_in, n), x.dtype)
    target = np.empty((len(weights), s_out, s_out, ROWS, n), x.dtype)
    width = VECTORS * (BYTES // x.itemsize)
    for first in range(0, B, group):
        last = min(first + group, B)
        for m in range(first, last):
            _spread(x[m], s_in, p_in, source, pitch, (m - first) * period)
        for o in range(len(weights)):
            for f in range(s_out * s_out):
                for at in range(0, (last - first) * period, width):
                    tile(source, at, offsets, parts[f], parts[f + 1], weights[o], start[o],
                         target[o, f // s_out, f % s_out], n)
        for m in range(first, last):
            _collect(target, s_out, p_out, y[m], pitch, (m - first) * period)
            _activate(y[m].ravel(), act)


@jit
def _weight_gradient(x, s, p, dy, offsets, dW, pitch, period, group, n):
    """All `dots` of a piece of the batch."""
    B, C = x.shape[:2]
    source = np.zeros((C, s, s, n), x.dtype)
    target = np.zeros((len(dW) * DOT_ROWS, 1, 1, n), x.dtype)
    lanes = BYTES // x.itemsize
    for first in range(0, B, group):
        last = min(first + group, B)
        for m in range(first, last):
            _spread(x[m], s, p, source, pitch, (m - first) * period)
            _spread(dy[m], 1, 0, target, pitch, (m - first) * period)
        size = (last - first) * period
        if last < first + group:
            target[..., size:] = 0                       # images of the group before
        size = (size + lanes - 1) // lanes * lanes
        for begin in range(0, size, CHUNK):
            for o in range(dW.shape[0]):
                for r in range(dW.shape[1]):
                    dots(source, offsets, r * DOTS, target, o * DOT_ROWS * n, n, begin,
                         min(begin + CHUNK, size), dW, (o * dW.shape[1] + r) * dW.shape[2])


# ---------------------------------------------------------------- numba: what the loops need

def multiple(n, of):
    return -(-n // of) * of


@functools.lru_cache(256)
def layout(H, W, k, s, itemsize):
    """Where an image's numbers lie in a plane of n numbers, `pitch` to a row.

    Rows share their padding: the right end of one is the left end of the next. A `group` of small
    images, each `period` numbers, fills a plane together, or vectors would be half empty.
    """
    p, q = (k - 1) // 2, (k - 1) // s
    rows, pitch = (max(out_side(n, k, s) + -(-p // s), (n + p - 1) // s + 1) for n in (H, W))
    group = max(1, 1200 // (rows * pitch))
    n = multiple(group * rows * pitch, VECTORS * BYTES // itemsize) \
        + multiple((q + 1) * pitch + q, BYTES // itemsize)
    return SimpleNamespace(p=p, q=q, out=(out_side(H, k, s), out_side(W, k, s)), pitch=pitch,
                           period=rows * pitch, group=group, n=n)


@functools.lru_cache(256)
def seen_by_taps(C, k, s, n, pitch):
    """offset[r] of the input's planes (C, s, s, n), r = (channel, tap)."""
    c, i, j = np.indices((C, k, k)).reshape(3, -1)
    return ((c * s + i % s) * s + j % s) * n + i // s * pitch + j // s


def phases(W, s):
    """The weights whose taps reach plane (a, b) of the input, plane after plane."""
    return [W[:, :, a::s, b::s] for a in range(s) for b in range(s)]


@functools.lru_cache(256)
def seen_by_inputs(O, k, s, n, pitch):
    """The same for the way back: offset[r] of the output's planes (O, n), r = (channel, tap),
    plane after plane of the input; and where each plane's share ends.
    """
    q, offsets = (k - 1) // s, []
    for taps_of_plane in phases(np.empty((O, 1, k, k)), s):
        o, i, j = np.indices((O, *taps_of_plane.shape[2:])).reshape(3, -1)
        offsets.append(o * n + (q - i) * pitch + q - j)
    return np.concatenate(offsets), np.cumsum([0, *map(len, offsets)])


def blocks(W):
    """Weights (O, R) as `tile` reads them: (O / ROWS, R, ROWS)."""
    padded = np.zeros((multiple(len(W), ROWS), W.shape[1]), W.dtype)
    padded[:len(W)] = W
    return padded.reshape(-1, ROWS, W.shape[1]).transpose(0, 2, 1).copy()


def start_of(b, O, dtype):
    start = np.zeros((multiple(O, ROWS) // ROWS, ROWS), dtype)
    if b is not None:
        start.ravel()[:O] = b
    return start


pool = ThreadPoolExecutor(THREADS)      # the loops leave Python alone


def over_batch(work, B, group):
    """work(slice) for pieces of the batch, several at a time; whole groups of images each."""
    groups = -(-B // group)
    count = max(1, min(groups, 1 if threads() == 1 else 4 * threads()))
    edges = [min(groups * k // count * group, B) for k in range(count + 1)]
    parts = [slice(*pair) for pair in pairwise(edges)]
    return [work(parts[0])] if count == 1 else list(pool.map(work, parts))


def conv_numba(x, W, b, stride, act):
    O, C, k, _ = W.shape
    l = layout(*x.shape[2:], k, stride, W.itemsize)
    y = np.empty((len(x), O, *l.out), W.dtype)
    offsets, weights = seen_by_taps(C, k, stride, l.n, l.pitch), blocks(W.reshape(O, -1))
    numbers = offsets, np.array([0, len(offsets)]), weights, start_of(b, O, W.dtype), \
        ACTIVATIONS.index(act), l.pitch, l.period, l.group, l.n
    x = np.ascontiguousarray(x, W.dtype)
    over_batch(lambda part: _convolve(x[part], stride, l.p, y[part], 1, 0, *numbers),
               len(x), l.group)
    return y


def conv_back_x_numba(dy, W, b, stride, size, act):
    O, C, k, _ = W.shape
    l = layout(*size, k, stride, W.itemsize)
    dx = np.empty((len(dy), C, *size), W.dtype)
    weights = [some.swapaxes(0, 1).reshape(C, -1) for some in phases(W, stride)]
    numbers = *seen_by_inputs(O, k, stride, l.n, l.pitch), blocks(np.concatenate(weights, 1)), \
        start_of(b, C, W.dtype), ACTIVATIONS.index(act), l.pitch, l.period, l.group, l.n
    dy = np.ascontiguousarray(dy, W.dtype)
    over_batch(lambda part: _convolve(dy[part], 1, l.q, dx[part], stride, l.p, *numbers),
               len(dy), l.group)
    return dx


def conv_back_w_numba(x, dy, stride, k):
    O, C = dy.shape[1], x.shape[1]
    R = C * k * k
    l = layout(*x.shape[2:], k, stride, x.itemsize)
    offsets = np.zeros(multiple(R, DOTS), int)
    offsets[:R] = seen_by_taps(C, k, stride, l.n, l.pitch)
    shape = -(-O // DOT_ROWS), len(offsets) // DOTS, multiple(DOT_ROWS * DOTS, BYTES // x.itemsize)
    x, dy = np.ascontiguousarray(x), np.ascontiguousarray(dy, x.dtype)

    def work(part):
        dW = np.zeros(shape, x.dtype)
        _weight_gradient(x[part], stride, l.p, dy[part], offsets, dW, l.pitch, l.period, l.group,
                         l.n)
        return dW

    dW = sum(over_batch(work, len(x), l.group))[:, :, :DOT_ROWS * DOTS]
    dW = dW.reshape(*shape[:2], DOT_ROWS, DOTS).transpose(0, 2, 1, 3)
    return dW.reshape(-1, len(offsets))[:O, :R].reshape(O, C, k, k)


def activate_numba(y, act):
    """In place."""
    over_batch(lambda part: _activate(y[part].ravel(), ACTIVATIONS.index(act)), len(y), 1)
    return y


def act_back_numba(dy, y, act):
    du, dy = np.empty_like(y), np.ascontiguousarray(dy, y.dtype)
    code = ACTIVATIONS.index(act)
    over_batch(lambda part: _activate_back(dy[part].ravel(), y[part].ravel(), code,
                                           du[part].ravel()), len(y), 1)
    return du


# ---------------------------------------------------------------- CUDA: the matrix is built

CUDA = r"""
extern "C" {

__global__ void columns(const real* x, real* out, int B, int C, int H, int W, int k, int s,
                        int h, int w) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a number of `out`
    if (t >= C * k * k * B * h * w) return;
    int n = t / (w * h) % B, r = t / (w * h * B);
    int u = t / w % h * s + r / k % k - (k - 1) / 2, v = t % w * s + r % k - (k - 1) / 2;
    bool inside = u >= 0 && u < H && v >= 0 && v < W;
    out[t] = inside ? x[((n * C + r / (k * k)) * H + u) * W + v] : (real)0;
}

__global__ void columns_back(const real* dout, real* dx, int B, int C, int H, int W, int k, int s,
                             int h, int w) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a pixel of dx
    if (t >= B * C * H * W) return;
    int v = t % W + (k - 1) / 2, u = t / W % H + (k - 1) / 2, c = t / (W * H) % C;
    int n = t / (W * H * C);
    real sum = 0;
    for (int a = 0; a < k; a++)
        for (int b = 0; b < k; b++) {
            int i = (u - a) / s, j = (v - b) / s;
            if (u - a == i * s && v - b == j * s && u >= a && v >= b && i < h && j < w)
                sum += dout[((((c * k + a) * k + b) * B + n) * h + i) * w + j];
        }
    dx[t] = sum;
}

}
"""
MOST = 1 << 26          # numbers of that matrix at a time


def pieces(B, size):
    """Slices of the batch, of so many images that the matrix is not too large."""
    step = max(1, MOST // size)
    return [slice(first, min(first + step, B)) for first in range(0, B, step)]


def columns(x, k, stride, h, w):
    """What all taps see, (C k k, B h w)."""
    B, C, H, W = x.shape
    out = xp.empty((C * k * k, B * h * w), x.dtype)
    launch("columns", out.size, x, out, B, C, H, W, k, stride, h, w, source=CUDA)
    return out


def channels_first(y):
    """(B, O, h, w) as (O, B h w)"""
    return y.swapaxes(0, 1).reshape(y.shape[1], -1)


def conv_gpu(x, W, b, stride, act):
    O, C, k, _ = W.shape
    h, w = (out_side(n, k, stride) for n in x.shape[2:])
    y = xp.empty((len(x), O, h, w), x.dtype)
    for some in pieces(len(x), C * k * k * h * w):
        product = gemm(W.reshape(O, -1), columns(x[some], k, stride, h, w))
        y[some] = product.reshape(O, -1, h, w).swapaxes(0, 1)
    return act_reference(y if b is None else y + b[:, None, None], act)


def conv_back_x_gpu(dy, W, b, stride, size, act):
    O, C, k, _ = W.shape
    h, w = dy.shape[2:]
    dx = xp.empty((len(dy), C, *size), dy.dtype)
    for some in pieces(len(dy), C * k * k * h * w):
        dcolumns = gemm(W.reshape(O, -1).T, channels_first(dy[some]))
        launch("columns_back", dx[some].size, dcolumns, dx[some], *dx[some].shape, k, stride, h, w,
               source=CUDA)
    return act_reference(dx if b is None else dx + b[:, None, None], act)


def conv_back_w_gpu(x, dy, stride, k):
    h, w = dy.shape[2:]
    O, C = dy.shape[1], x.shape[1]
    dW = xp.zeros((O, C * k * k), x.dtype)
    for some in pieces(len(x), C * k * k * h * w):
        dW += gemm(channels_first(dy[some]), columns(x[some], k, stride, h, w).T)
    return dW.reshape(O, C, k, k)


# ---------------------------------------------------------------- the version by device

def conv_forward(x, W, b, stride, act="identity"):
    """act(W * x + b); b may be None."""
    return (conv_numba if DEVICE == "cpu" else conv_gpu)(x, W, b, stride, act)


def conv_back_x(dy, W, b, stride, size, act="identity"):
    """The adjoint of W *: from what the output receives to what an input of this size does.

    It also serves as a layer of its own (transposed convolution), hence b and act.
    """
    versions = {"cpu": conv_back_x_numba, "gpu": conv_back_x_gpu}
    return versions[DEVICE](dy, W, b, stride, size, act)


def conv_back_w(x, dy, stride, k):
    """dW (O, C, k, k)"""
    return (conv_back_w_numba if DEVICE == "cpu" else conv_back_w_gpu)(x, dy, stride, k)


def activate(u, act):
    """act(u); u may be written over."""
    return (activate_numba if DEVICE == "cpu" else act_reference)(u, act)


def act_back(dy, y, act):
    """From what y = act(u) receives to what u does."""
    if act == "identity":
        return dy
    return (act_back_numba if DEVICE == "cpu" else act_back_reference)(dy, y, act)
