"""The few loops that NumPy does badly, each three times: reference, numba, CUDA.

`warp`        resample an image along both axes (attention windows: read and write)
`lstm_gates`  the elementwise half of an LSTM cell
`adam`, `rmsprop`   one pass over all parameters
`times_transposed`  a product with few rows, which BLAS does slowly when it is transposed

The public functions at the end choose by device; tests hold the three versions together.
Dimension key: B images, C channels, h w source size, H W target size; axis 0 of a and b is y.
"""

import functools

import numpy as np
from numba import njit

from common.backend import DEVICE, gemm, xp
from common.vectors import BYTES, DOT_ROWS, DOTS, copy, dots

FEW = 48                # rows of a product up to which `times_transposed` beats BLAS
TINY = 1e-30            # moments below this are flushed to zero: denormal numbers are very slow


# ---------------------------------------------------------------- reference, in plain NumPy

def hat_weights(a, b, n_out, n_in):
    """Weight of source pixel k in target pixel j, which looks at position a j + b."""
    away = (b[:, None] + a[:, None] * xp.arange(n_out, dtype=a.dtype))[..., None] \
        - xp.arange(n_in, dtype=a.dtype)                # (B, n_out, n_in)
    weight = xp.maximum(0, 1 - xp.abs(away))            # (B, n_out, n_in)
    slope = -xp.sign(away) * (weight > 0)               # (B, n_out, n_in)
    return weight, slope


def warp_reference(src, a, b, size):
    """out = R_y src R_x^T with bilinear weights; what lies outside the source is 0."""
    Ry, _ = hat_weights(a[:, 0], b[:, 0], size[0], src.shape[2])        # (B, H, h)
    Rx, _ = hat_weights(a[:, 1], b[:, 1], size[1], src.shape[3])        # (B, W, w)
    return xp.einsum("bik,bckl,bjl->bcij", Ry, src, Rx)                 # (B, C, H, W)


def warp_back_reference(dout, src, a, b):
    Ry, slope_y = hat_weights(a[:, 0], b[:, 0], dout.shape[2], src.shape[2])
    Rx, slope_x = hat_weights(a[:, 1], b[:, 1], dout.shape[3], src.shape[3])
    dsrc = xp.einsum("bik,bcij,bjl->bckl", Ry, dout, Rx)                # (B, C, h, w)
    dRy = xp.einsum("bcij,bckl,bjl->bik", dout, src, Rx)                # (B, H, h)
    dRx = xp.einsum("bcij,bckl,bik->bjl", dout, src, Ry)                # (B, W, w)
    dpos_y, dpos_x = (dRy * slope_y).sum(2), (dRx * slope_x).sum(2)     # (B, H), (B, W)
    da = xp.stack([(d * xp.arange(d.shape[1])).sum(1) for d in (dpos_y, dpos_x)], 1)
    db = xp.stack([d.sum(1) for d in (dpos_y, dpos_x)], 1)
    return dsrc, da.astype(a.dtype), db


def lstm_gates_reference(u, c):
    """c' = f c + i g, h = o tanh(c'); the gates are kept for the way back."""
    i, f, g, o = xp.split(u, 4, 1)
    i, f, o = (xp.tanh(x * 0.5) * 0.5 + 0.5 for x in (i, f, o))
    g = xp.tanh(g)
    c_new = f * c + i * g                               # (B, H)
    t = xp.tanh(c_new)                                  # (B, H)
    return o * t, c_new, xp.concatenate([i, f, g, o, t], 1)


def lstm_gates_back_reference(dh, dc_new, c, gates):
    i, f, g, o, t = xp.split(gates, 5, 1)
    dc = dc_new + dh * o * (1 - t * t)                  # (B, H)
    du = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)]
    return xp.concatenate(du, 1), dc * f


def adam_reference(p, g, m, v, lr, beta1, beta2, eps, t, scale):
    """Kingma and Ba's Adam, in place; `scale` multiplies the gradient (clipping)."""
    g = g * scale
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g * g
    m[...] = xp.where(xp.abs(m) < TINY, 0, m)
    v[...] = xp.where(v < TINY, 0, v)
    p -= lr / (1 - beta1**t) * m / (xp.sqrt(v / (1 - beta2**t)) + eps)


def rmsprop_reference(p, g, m, v, lr, momentum, rho, eps, scale):
    """RMSProp with momentum, in place."""
    g = g * scale
    v[...] = rho * v + (1 - rho) * g * g
    v[...] = xp.where(v < TINY, 0, v)
    m[...] = momentum * m + lr * g / xp.sqrt(v + eps)
    m[...] = xp.where(xp.abs(m) < TINY, 0, m)
    p -= m


# ---------------------------------------------------------------- numba

# One thread each: waking a second one costs more than these loops take at training sizes.

jit = njit(fastmath=True, nogil=True, cache=True, error_model="numpy")


@jit
def taps(a, b, first, part, n_in):
    """Target pixels lo..hi-1 look at source pixels first and first + 1, in parts 1 - part, part.

    The other target pixels see nothing. `first` runs from -1 (one tap outside) to n_in - 1.
    """
    lo, hi = len(first), 0
    for j in range(len(first)):
        pos = b + a * j
        if -1 < pos < n_in:
            first[j] = int(np.floor(pos))
            part[j] = pos - first[j]
            lo, hi = min(lo, j), j + 1
    return lo, hi


@jit
def _warp(src, a, b, out):
    B, C, h, w = src.shape
    H, W = out.shape[2:]
    row, one = np.zeros(w + 2, src.dtype), src.dtype.type(1)
    ky, kx, fy, fx = np.zeros(H, np.intp), np.zeros(W, np.intp), np.zeros(H, a.dtype), \
        np.zeros(W, a.dtype)
    for n in range(B):
        lo_y, hi_y = taps(a[n, 0], b[n, 0], ky, fy, h)
        lo, hi = taps(a[n, 1], b[n, 1], kx, fx, w)
        out[n] = 0
        for c in range(C):
            for i in range(lo_y, hi_y):
                k0, k1 = max(ky[i], 0), min(ky[i] + 1, h - 1)
                up, down = one * (ky[i] >= 0) * (1 - fy[i]), one * (ky[i] + 1 < h) * fy[i]
                for l in range(w):
                    row[l + 1] = up * src[n, c, k0, l] + down * src[n, c, k1, l]
                for j in range(lo, hi):
                    k = kx[j] + 1                       # row begins with a zero
                    out[n, c, i, j] = row[k] + fx[j] * (row[k + 1] - row[k])


@jit
def _warp_back(dout, src, a, b, dsrc, da, db, want_src):
    B, C, h, w = src.shape
    H, W = dout.shape[2:]
    row, slope, drow = np.zeros((3, w + 2), src.dtype)
    ky, kx, fy, fx = np.zeros(H, np.intp), np.zeros(W, np.intp), np.zeros(H, a.dtype), \
        np.zeros(W, a.dtype)
    dpos, one = np.zeros(W, src.dtype), src.dtype.type(1)
    for n in range(B):
        lo_y, hi_y = taps(a[n, 0], b[n, 0], ky, fy, h)
        lo, hi = taps(a[n, 1], b[n, 1], kx, fx, w)
        dpos[:] = 0
        for c in range(C):
            for i in range(lo_y, hi_y):
                k0, k1 = max(ky[i], 0), min(ky[i] + 1, h - 1)
                in_up, in_down = one * (ky[i] >= 0), one * (ky[i] + 1 < h)
                up, down = in_up * (1 - fy[i]), in_down * fy[i]
                for l in range(w):
                    row[l + 1] = up * src[n, c, k0, l] + down * src[n, c, k1, l]
                dpos_y = 0 * up
                if want_src:
                    drow[:] = 0
                    for j in range(lo, hi):
                        k, d = kx[j] + 1, dout[n, c, i, j]
                        dpos[j] += d * (row[k + 1] - row[k])
                        drow[k] += d * (1 - fx[j])
                        drow[k + 1] += d * fx[j]
                    for l in range(w):
                        dpos_y += drow[l + 1] * (in_down * src[n, c, k1, l]
                                                 - in_up * src[n, c, k0, l])
                    for l in range(w):
                        dsrc[n, c, k0, l] += up * drow[l + 1]
                    for l in range(w):
                        dsrc[n, c, k1, l] += down * drow[l + 1]
                else:                                   # nothing is written, so nothing waits
                    for l in range(w):
                        slope[l + 1] = in_down * src[n, c, k1, l] - in_up * src[n, c, k0, l]
                    for j in range(lo, hi):
                        k, d = kx[j] + 1, dout[n, c, i, j]
                        dpos[j] += d * (row[k + 1] - row[k])
                        dpos_y += d * (slope[k] + fx[j] * (slope[k + 1] - slope[k]))
                da[n, 0] += dpos_y * i
                db[n, 0] += dpos_y
        for j in range(lo, hi):
            da[n, 1] += dpos[j] * j
            db[n, 1] += dpos[j]


@jit
def _lstm_gates(s, c, gates, c_new):
    """From s = tanh of the gates' inputs (halved for i, f, o) to the gates and c'."""
    B, H = c.shape
    for n in range(B):
        for k in range(4 * H):
            gates[n, k] = s[n, k]
        for k in range(2 * H):
            gates[n, k] = gates[n, k] / 2 + c.dtype.type(0.5)
        for k in range(3 * H, 4 * H):
            gates[n, k] = gates[n, k] / 2 + c.dtype.type(0.5)
        for k in range(H):
            c_new[n, k] = gates[n, k + H] * c[n, k] + gates[n, k] * gates[n, k + 2 * H]


@jit
def _lstm_gates_back(dh, dc_new, c, gates, du, dc_old):
    B, H = c.shape
    for n in range(B):
        for k in range(H):
            i, f, g = gates[n, k], gates[n, k + H], gates[n, k + 2 * H]
            o, t = gates[n, k + 3 * H], gates[n, k + 4 * H]
            dc = dc_new[n, k] + dh[n, k] * o * (1 - t * t)
            du[n, k] = dc * g * i * (1 - i)
            du[n, k + H] = dc * c[n, k] * f * (1 - f)
            du[n, k + 2 * H] = dc * i * (1 - g * g)
            du[n, k + 3 * H] = dh[n, k] * t * o * (1 - o)
            dc_old[n, k] = dc * f


@jit
def _adam(p, g, m, v, lr1, beta1, beta2, eps, c2, scale):
    one, tiny = p.dtype.type(1), p.dtype.type(TINY)
    for k in range(p.size):
        d = g[k] * scale
        mk = beta1 * m[k] + (one - beta1) * d
        vk = beta2 * v[k] + (one - beta2) * d * d
        m[k] = mk if abs(mk) >= tiny else one - one
        v[k] = vk if vk >= tiny else one - one
        p[k] -= lr1 * m[k] / (np.sqrt(v[k] * c2) + eps)


@jit
def _rmsprop(p, g, m, v, lr, momentum, rho, eps, scale):
    one, tiny = p.dtype.type(1), p.dtype.type(TINY)
    for k in range(p.size):
        d = g[k] * scale
        vk = rho * v[k] + (one - rho) * d * d
        v[k] = vk if vk >= tiny else one - one
        mk = momentum * m[k] + lr * d / np.sqrt(v[k] + eps)
        m[k] = mk if abs(mk) >= tiny else one - one
        p[k] -= m[k]


@jit
def _times_transposed(a, b, y, offsets, a_wide, tail, sums):
    """y = a b^T in blocks of DOT_ROWS x DOTS sums of products along rows.

    Vectors may reach beyond a row's end: a_wide has zeros there, and the last rows of b, up to
    DOTS, are copied to `tail`, so that nothing behind b is read.
    """
    (M, N), K, pitch = a.shape, len(b), a_wide.shape[1]
    for m in range(M):
        copy(a_wide, m * pitch, a, m * N, N)
    last = (K - 1) // DOTS * DOTS
    for k in range(last, K):
        copy(tail, (k - last) * pitch, b, k * N, N)
    for first in range(0, K, DOTS):
        for m in range(0, len(a_wide), DOT_ROWS):
            sums[:] = 0
            if first < last:
                dots(b, offsets, first, a_wide, m * pitch, pitch, 0, pitch, sums, 0)
            else:
                dots(tail, offsets, K, a_wide, m * pitch, pitch, 0, pitch, sums, 0)
            for i in range(DOT_ROWS):
                for j in range(min(DOTS, K - first)):
                    y[m + i, first + j] = sums[i * DOTS + j]


@jit
def average(rows, start, stop):
    """The first row becomes the mean over all rows, from column start to stop."""
    part, chunk = rows.dtype.type(1 / len(rows)), 2048
    for a in range(start, stop, chunk):
        b = min(a + chunk, stop)
        for r in range(1, len(rows)):
            for k in range(a, b):
                rows[0, k] += rows[r, k]
        for k in range(a, b):
            rows[0, k] *= part


# ---------------------------------------------------------------- CUDA

CUDA = r"""
extern "C" {

__device__ real hat(real a, real b, int j, int k) {
    real away = b + a * j - k;
    away = away < 0 ? -away : away;
    return away < 1 ? 1 - away : (real)0;
}

__device__ int clip(real x, int low, int high) {  // as an index: floor, kept in range
    x = floor(x);
    return x < low ? low : x > high ? high : (int)x;
}

__global__ void warp(const real* src, const real* a, const real* b, real* out,
                     int B, int C, int h, int w, int H, int W) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a target pixel
    if (t >= B * C * H * W) return;
    int j = t % W, i = t / W % H, n = t / (W * H * C);
    const real* image = src + (long)(t / (W * H)) * h * w;
    int k0 = clip(b[2*n] + a[2*n] * i, -2, h), l0 = clip(b[2*n+1] + a[2*n+1] * j, -2, w);
    real sum = 0;
    for (int k = max(k0, 0); k <= min(k0 + 1, h - 1); k++)
        for (int l = max(l0, 0); l <= min(l0 + 1, w - 1); l++)
            sum += hat(a[2*n], b[2*n], i, k) * hat(a[2*n+1], b[2*n+1], j, l) * image[k * w + l];
    out[t] = sum;
}

__global__ void warp_back_src(const real* dout, const real* a, const real* b, real* dsrc,
                              int B, int C, int h, int w, int H, int W) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a source pixel
    if (t >= B * C * h * w) return;
    int l = t % w, k = t / w % h, n = t / (w * h * C);
    const real* d = dout + (long)(t / (w * h)) * H * W;
    real ay = a[2*n], by = b[2*n], ax = a[2*n+1], bx = b[2*n+1], sum = 0;
    int i0 = clip((k - 1 - by) / ay, 0, H - 1), i1 = clip((k + 1 - by) / ay + 1, 0, H - 1);
    int j0 = clip((l - 1 - bx) / ax, 0, W - 1), j1 = clip((l + 1 - bx) / ax + 1, 0, W - 1);
    for (int i = i0; i <= i1; i++)
        for (int j = j0; j <= j1; j++)
            sum += hat(ay, by, i, k) * hat(ax, bx, j, l) * d[i * W + j];
    dsrc[t] = sum;
}

__global__ void warp_back_pos(const real* dout, const real* src, const real* a, const real* b,
                              real* dpos, int B, int C, int h, int w, int H, int W) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a target row
    if (t >= B * H) return;
    int i = t % H, n = t / H;
    real ay = a[2*n], by = b[2*n], ax = a[2*n+1], bx = b[2*n+1];
    real y = by + ay * i, dy = 0, dx = 0, dxj = 0;
    int k0 = clip(y, -2, h);
    for (int c = 0; c < C; c++)
        for (int j = 0; j < W; j++) {
            real d = dout[((long)(n * C + c) * H + i) * W + j], sum_y = 0, sum_x = 0;
            int l0 = clip(bx + ax * j, -2, w);
            for (int k = max(k0, 0); k <= min(k0 + 1, h - 1); k++)
                for (int l = max(l0, 0); l <= min(l0 + 1, w - 1); l++) {
                    real s = src[((long)(n * C + c) * h + k) * w + l];
                    sum_y += (k > k0 ? s : -s) * hat(ax, bx, j, l);
                    sum_x += (l > l0 ? s : -s) * hat(ay, by, i, k);
                }
            dy += d * sum_y;
            dx += d * sum_x;
            dxj += d * sum_x * j;
        }
    dpos[4*t] = dy * i; dpos[4*t+1] = dxj; dpos[4*t+2] = dy; dpos[4*t+3] = dx;
}

__global__ void lstm_gates(const real* u, const real* c, real* h, real* c_new, real* gates,
                           int B, int H) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= B * H) return;
    int n = t / H, k = t % H;
    const real* x = u + 4 * n * H + k;
    real i = tanh(x[0] / 2) / 2 + (real).5, f = tanh(x[H] / 2) / 2 + (real).5;
    real g = tanh(x[2*H]), o = tanh(x[3*H] / 2) / 2 + (real).5;
    real* kept = gates + 5 * n * H + k;
    c_new[t] = f * c[t] + i * g;
    real s = tanh(c_new[t]);
    h[t] = o * s;
    kept[0] = i; kept[H] = f; kept[2*H] = g; kept[3*H] = o; kept[4*H] = s;
}

__global__ void lstm_gates_back(const real* dh, const real* dc_new, const real* c,
                                const real* gates, real* du, real* dc_old, int B, int H) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= B * H) return;
    int n = t / H, k = t % H;
    const real* kept = gates + 5 * n * H + k;
    real i = kept[0], f = kept[H], g = kept[2*H], o = kept[3*H], s = kept[4*H];
    real dc = dc_new[t] + dh[t] * o * (1 - s * s);
    real* d = du + 4 * n * H + k;
    d[0] = dc * g * i * (1 - i);
    d[H] = dc * c[t] * f * (1 - f);
    d[2*H] = dc * i * (1 - g * g);
    d[3*H] = dh[t] * s * o * (1 - o);
    dc_old[t] = dc * f;
}

__global__ void adam(real* p, const real* g, real* m, real* v, real lr1, real beta1, real beta2,
                     real eps, real c2, real scale, real tiny, int size) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= size) return;
    real d = g[t] * scale;
    real mt = beta1 * m[t] + (1 - beta1) * d, vt = beta2 * v[t] + (1 - beta2) * d * d;
    m[t] = mt >= tiny || mt <= -tiny ? mt : (real)0;
    v[t] = vt >= tiny ? vt : (real)0;
    p[t] -= lr1 * m[t] / (sqrt(v[t] * c2) + eps);
}

__global__ void rmsprop(real* p, const real* g, real* m, real* v, real lr, real momentum,
                        real rho, real eps, real scale, real tiny, int size) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= size) return;
    real d = g[t] * scale;
    real vt = rho * v[t] + (1 - rho) * d * d;
    v[t] = vt >= tiny ? vt : (real)0;
    real mt = momentum * m[t] + lr * d / sqrt(v[t] + eps);
    m[t] = mt >= tiny || mt <= -tiny ? mt : (real)0;
    p[t] -= m[t];
}

}
"""


@functools.cache
def cuda_module(real, source):
    return xp.RawModule(code=f"typedef {real} real;\n" + source)


def launch(name, threads, *args, source=CUDA):
    """One CUDA thread for each of `threads`; ints go as int32, floats in the arrays' own type."""
    dtype = args[0].dtype
    args = [np.int32(x) if isinstance(x, int) else dtype.type(x) if isinstance(x, float)
            else xp.ascontiguousarray(x) for x in args]
    kernel = cuda_module("double" if dtype == np.float64 else "float", source).get_function(name)
    kernel(((threads + 127) // 128,), (128,), tuple(args))


# ---------------------------------------------------------------- the versions by device

def warp(src, a, b, size):
    """Resample (B, C, h, w) to (B, C, *size): target pixel (i, j) looks at a (i, j) + b."""
    out = xp.empty((*src.shape[:2], *size), src.dtype)
    if DEVICE == "cpu":
        _warp(src, a, b, out)
    else:
        launch("warp", out.size, src, a, b, out, *src.shape, *size)
    return out


def warp_back(dout, src, a, b, want_src=True):
    """(dsrc, da, db); dsrc is None unless wanted."""
    B, C, h, w = src.shape
    H, W = dout.shape[2:]
    dsrc = xp.zeros(src.shape if want_src else (0, 0, 0, 0), src.dtype)
    if DEVICE == "cpu":
        da, db = np.zeros((2, *a.shape), a.dtype)
        _warp_back(dout, src, a, b, dsrc, da, db, want_src)
    else:
        if want_src:
            launch("warp_back_src", src.size, dout, a, b, dsrc, B, C, h, w, H, W)
        dpos = xp.empty((B, H, 2, 2), a.dtype)
        launch("warp_back_pos", B * H, dout, src, a, b, dpos, B, C, h, w, H, W)
        da, db = dpos[:, :, 0].sum(1), dpos[:, :, 1].sum(1)
    return dsrc if want_src else None, da, db


@functools.cache
def halves(H, dtype):
    return np.repeat(np.array([0.5, 0.5, 1, 0.5], dtype), H)


@functools.lru_cache(256)
def wide(M, N, K, dtype):
    """What `_times_transposed` needs beside its arguments."""
    lanes = BYTES // dtype.itemsize
    rows, pitch = -(-M // DOT_ROWS) * DOT_ROWS, -(-N // lanes) * lanes
    offsets = np.concatenate([np.arange(K) * N, np.arange(DOTS) * pitch])
    return (offsets, np.zeros((rows, pitch), dtype), np.zeros((DOTS, pitch), dtype),
            np.zeros(-(-DOT_ROWS * DOTS // lanes) * lanes, dtype))


def times_transposed(a, b):
    """a b^T"""
    if DEVICE == "gpu" or len(a) > FEW or a.shape[1] < BYTES // b.itemsize:
        return gemm(a, b.T)
    needs = wide(*a.shape, len(b), b.dtype)
    y = np.empty((len(needs[1]), len(b)), b.dtype)
    _times_transposed(np.ascontiguousarray(a, b.dtype), b, y, *needs)
    return y[:len(a)]


def lstm_gates(u, c):
    """(h, c', gates); on the CPU with NumPy's tanh, which is vectorised where numba's is not."""
    B, H = c.shape
    h, c_new, gates = xp.empty_like(c), xp.empty_like(c), xp.empty((B, 5 * H), c.dtype)
    if DEVICE == "cpu":
        _lstm_gates(np.tanh(u * halves(H, c.dtype)), c, gates, c_new)
        t = np.tanh(c_new, out=gates[:, 4 * H:])
        return np.multiply(gates[:, 3 * H:4 * H], t, out=h), c_new, gates
    launch("lstm_gates", c.size, u, c, h, c_new, gates, *c.shape)
    return h, c_new, gates


def lstm_gates_back(dh, dc_new, c, gates):
    """(du, dc)"""
    du, dc = xp.empty((c.shape[0], 4 * c.shape[1]), c.dtype), xp.empty_like(c)
    if DEVICE == "cpu":
        _lstm_gates_back(dh, dc_new, c, gates, du, dc)
    else:
        launch("lstm_gates_back", c.size, dh, dc_new, c, gates, du, dc, *c.shape)
    return du, dc


def adam(p, g, m, v, lr, beta1, beta2, eps, t, scale):
    """One update in place; t counts from 1."""
    f = p.dtype.type
    numbers = [lr / (1 - beta1**t), beta1, beta2, eps, 1 / (1 - beta2**t), scale]
    if DEVICE == "cpu":
        _adam(p, g, m, v, *map(f, numbers))
    else:
        launch("adam", p.size, p, g, m, v, *map(float, numbers), TINY, p.size)


def rmsprop(p, g, m, v, lr, momentum, rho, eps, scale):
    """One update in place."""
    f = p.dtype.type
    numbers = [lr, momentum, rho, eps, scale]
    if DEVICE == "cpu":
        _rmsprop(p, g, m, v, *map(f, numbers))
    else:
        launch("rmsprop", p.size, p, g, m, v, *map(float, numbers), TINY, p.size)
