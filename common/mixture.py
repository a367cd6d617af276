"""The spatial mixture: how well K slots explain each pixel, and what they should change.

A slot says for each pixel what it would look like (mean) and how much it wants to own it (logit):
    m_k = softmax_k(logit),   e_k = log N(x; mean_k, scale^2) or the logistic density,
    log p(x) = log sum_k m_k exp(e_k),   responsibility r_k = m_k exp(e_k) / p(x),
    dlog p/dmean_k = r_k de_k/dmean_k,   dlog p/dlogit_k = r_k - m_k.
The composite (no mixture) is one Gaussian around the mean of the means, y = sum_k m_k mean_k:
    dlog p/dmean_k = m_k s,   dlog p/dlogit_k = m_k s . (mean_k - y),   s = (x - y) / scale^2.
As in kernels.py, the loop is there three times: reference, numba, CUDA.
Dimension key: B images, K slots, C channels, H W pixels.
"""

import math
from typing import NamedTuple

import numpy as np

from common.backend import DEVICE, xp
from common.kernels import jit, launch

KINDS = ("gaussian", "logistic", "composite")
MOST = 16               # slots that the CUDA version has room for
LEAST = 1e-5            # at least so much of a mixture is left without one of its slots


class Pixels(NamedTuple):
    """All that the slots' decodes (B, K, C + 1, H, W) mean for an image (B, C, H, W)."""
    log_p: np.ndarray           # (B, H, W) how well the pixel is explained
    slope: np.ndarray           # (B, K, C+1, H, W) of the sum of log_p, by means and logits
    mask: np.ndarray            # (B, K, H, W) m_k
    posterior: np.ndarray       # (B, K, H, W) softmax_k(e_k): who looks like the pixel
    without: np.ndarray         # (B, K, H, W) log p(x) of the other slots alone


# ---------------------------------------------------------------- reference, in plain NumPy

def density(x, mean, scale, kind):
    """e_k (B, K, H, W) and its slope by the mean (B, K, C, H, W)."""
    away = (x[:, None] - mean) / scale                                  # (B, ..., C, H, W)
    if kind == "logistic":
        t = xp.exp(-xp.abs(away))
        e = -xp.abs(away) - 2 * xp.log1p(t) - math.log(scale)           # (B, K, C, H, W)
        return e.sum(2), xp.sign(away) * (1 - t) / (1 + t) / scale
    e = -0.5 * away * away - (math.log(scale) + 0.5 * math.log(2 * math.pi))
    return e.sum(2), away / scale


def log_sum_exp(a):
    """Over the slots, which stay as an axis of length 1."""
    most = a.max(1, keepdims=True)
    return most + xp.log(xp.exp(a - most).sum(1, keepdims=True))


def mixture_reference(x, y, scale, kind):
    mean, logit = y[:, :, :-1], y[:, :, -1]             # (B, K, C, H, W), (B, K, H, W)
    e, de = density(x, mean, scale, kind)               # (B, K, H, W), (B, K, C, H, W)
    log_m = logit - log_sum_exp(logit)                  # (B, K, H, W)
    mask, joint = xp.exp(log_m), log_m + e              # (B, K, H, W), (B, K, H, W)
    log_p = log_sum_exp(joint)                          # (B, 1, H, W)
    r = xp.exp(joint - log_p)                           # (B, K, H, W)
    posterior = xp.exp(e - log_sum_exp(e))              # (B, K, H, W)
    without = log_p + xp.log(xp.maximum(1 - r, LEAST)) - xp.log(xp.maximum(1 - mask, LEAST))
    dmean, dlogit = r[:, :, None] * de, r - mask
    if kind == "composite":
        whole = (mask[:, :, None] * mean).sum(1, keepdims=True)         # (B, 1, C, H, W)
        log_p, s = density(x, whole, scale, kind)       # (B, 1, H, W), (B, 1, C, H, W)
        dmean, dlogit = mask[:, :, None] * s, mask * (s * (mean - whole)).sum(2)
    slope = xp.concatenate([dmean, dlogit[:, :, None]], 2)              # (B, K, C+1, H, W)
    return Pixels(log_p[:, 0], slope, mask, posterior, without)


# ---------------------------------------------------------------- numba

@jit
def _exp(x):
    """exp(x) of x <= 0, in place, to within the type's eps (absolute); LLVM vectorises it.

    exp(x) - 1 by its series at x / 1024, then 10 times exp(2x) - 1 = q (q + 2).
    """
    f = x.dtype.type
    one, two, lowest, shrunk = f(1), f(2), f(-40), f(1 / 1024)
    c2, c3, c4, c5, c6, c7 = f(1 / 2), f(1 / 3), f(1 / 4), f(1 / 5), f(1 / 6), f(1 / 7)
    for j in range(x.size):
        t = max(x[j], lowest) * shrunk
        q = one + c5 * t * (one + c6 * t * (one + c7 * t))
        q = t * (one + c2 * t * (one + c3 * t * (one + c4 * t * q)))
        for _ in range(10):
            q *= q + two
        x[j] = one + q


@jit
def _mixture(x, y, scale, kind, log_p, ratio, slope, mask, posterior, without):
    """All of Pixels but logarithms: of `ratio`, which log_p lacks, and of `without`."""
    B, C, P = x.shape
    K = y.shape[1]
    one = x.dtype.type(1)
    inverse, half, least = one / scale, one / 2, one * LEAST
    e, m, t = np.empty((K, P), x.dtype), np.empty((K, P), x.dtype), np.empty(P, x.dtype)
    most, top, best, total = np.empty((4, P), x.dtype)
    norm = -C * np.log(scale)
    if kind != 1:
        norm -= C * half * np.log(one * 2 * np.pi)
    for b in range(B):
        most[:] = -np.inf
        top[:] = -np.inf
        for k in range(K):
            e[k] = norm
            for c in range(C):
                if kind == 1:
                    for j in range(P):
                        t[j] = -abs(x[b, c, j] - y[b, k, c, j]) * inverse
                        e[k, j] += t[j]
                    _exp(t)
                    for j in range(P):
                        e[k, j] -= 2 * np.log(one + t[j])
                        sign = one if x[b, c, j] > y[b, k, c, j] else -one
                        slope[b, k, c, j] = sign * (one - t[j]) / (one + t[j]) * inverse
                else:
                    for j in range(P):
                        away = (x[b, c, j] - y[b, k, c, j]) * inverse
                        e[k, j] -= half * away * away
                        slope[b, k, c, j] = away * inverse
            for j in range(P):
                most[j] = max(most[j], e[k, j])
                top[j] = max(top[j], y[b, k, C, j])
        total[:] = 0
        best[:] = -np.inf
        for k in range(K):
            for j in range(P):
                m[k, j] = y[b, k, C, j] - top[j]
                best[j] = max(best[j], m[k, j] + e[k, j])
            _exp(m[k])
            for j in range(P):
                total[j] += m[k, j]
        for j in range(P):
            log_p[b, j] = best[j]
            ratio[b, j] = one / total[j]
        for k in range(K):
            for j in range(P):
                m[k, j] *= ratio[b, j]
                mask[b, k, j] = m[k, j]
        total[:] = 0
        for k in range(K):                              # who looks like the pixel
            for j in range(P):
                posterior[b, k, j] = e[k, j] - most[j]
            _exp(posterior[b, k])
            for j in range(P):
                total[j] += posterior[b, k, j]
        for k in range(K):
            for j in range(P):
                posterior[b, k, j] /= total[j]
        total[:] = 0
        for k in range(K):                              # and owns it, too
            for j in range(P):
                e[k, j] += y[b, k, C, j] - top[j] - best[j]
            _exp(e[k])
            for j in range(P):
                total[j] += e[k, j]
        for j in range(P):
            ratio[b, j] *= total[j]
        for k in range(K):
            for j in range(P):
                e[k, j] /= total[j]
                without[b, k, j] = max(one - e[k, j], least) / max(one - m[k, j], least)
                slope[b, k, C, j] = e[k, j] - m[k, j]
        if kind < 2:
            for k in range(K):
                for c in range(C):
                    for j in range(P):
                        slope[b, k, c, j] *= e[k, j]
    if kind == 2:
        _composite(x, y, inverse, mask, slope)


@jit
def _composite(x, y, inverse, mask, slope):
    """The slope of one Gaussian around the mean of the means."""
    B, C, P = x.shape
    K = y.shape[1]
    whole = np.empty((C, P), x.dtype)
    for b in range(B):
        whole[:] = 0
        slope[b, :, C] = 0
        for k in range(K):
            for c in range(C):
                for j in range(P):
                    whole[c, j] += mask[b, k, j] * y[b, k, c, j]
        for k in range(K):
            for c in range(C):
                for j in range(P):
                    s = mask[b, k, j] * (x[b, c, j] - whole[c, j]) * inverse * inverse
                    slope[b, k, c, j] = s
                    slope[b, k, C, j] += s * (y[b, k, c, j] - whole[c, j])


# ---------------------------------------------------------------- CUDA

CUDA = r"""
extern "C" __global__ void mixture(const real* x, const real* y, real* log_p, real* slope,
                                   real* mask, real* posterior, real* without,
                                   real scale, real norm, real least, int kind,
                                   int B, int K, int C, int P) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a pixel
    if (t >= B * P) return;
    int b = t / P, i = t % P;
    real e[MOST], m[MOST], most = 0, top = 0, best = 0, sum_m = 0, sum_e = 0, sum = 0;
    for (int k = 0; k < K; k++) {
        const real* own = y + (long)(b * K + k) * (C + 1) * P + i;
        real* out = slope + (long)(b * K + k) * (C + 1) * P + i;
        e[k] = norm;
        m[k] = own[C * P];
        for (int c = 0; c < C; c++) {
            real away = (x[(long)(b * C + c) * P + i] - own[c * P]) / scale;
            if (kind == 1) {
                real far = away < 0 ? -away : away, s = exp(-far);
                e[k] -= far + 2 * log(1 + s);
                out[c * P] = (away < 0 ? -1 : 1) * (1 - s) / (1 + s) / scale;
            } else {
                e[k] -= away * away / 2;
                out[c * P] = away / scale;
            }
        }
        most = k && most > e[k] ? most : e[k];
        top = k && top > m[k] ? top : m[k];
    }
    for (int k = 0; k < K; k++) {
        real joint = e[k] + m[k];
        best = k && best > joint ? best : joint;
        sum_m += exp(m[k] - top);
        sum_e += exp(e[k] - most);
    }
    for (int k = 0; k < K; k++) {
        long at = (long)(b * K + k) * P + i;
        real joint = exp(e[k] + m[k] - best);
        posterior[at] = exp(e[k] - most) / sum_e;
        m[k] = exp(m[k] - top) / sum_m;
        mask[at] = m[k];
        e[k] = joint;
        sum += joint;
    }
    log_p[t] = best + log(sum) - top - log(sum_m);
    for (int k = 0; k < K; k++) {
        real* out = slope + (long)(b * K + k) * (C + 1) * P + i;
        real r = e[k] / sum, left = 1 - r, room = 1 - m[k];
        without[(long)(b * K + k) * P + i] =
            log_p[t] + log((left > least ? left : least) / (room > least ? room : least));
        out[C * P] = r - m[k];
        for (int c = 0; c < C; c++) out[c * P] *= r;
    }
    if (kind < 2) return;
    log_p[t] = norm;
    for (int k = 0; k < K; k++) slope[((long)(b * K + k) * (C + 1) + C) * P + i] = 0;
    for (int c = 0; c < C; c++) {
        real whole = 0;
        for (int k = 0; k < K; k++) whole += m[k] * y[((long)(b * K + k) * (C + 1) + c) * P + i];
        real away = (x[(long)(b * C + c) * P + i] - whole) / scale;
        log_p[t] -= away * away / 2;
        for (int k = 0; k < K; k++) {
            long at = ((long)(b * K + k) * (C + 1) + c) * P + i;
            real s = m[k] * away / scale;
            slope[at + (long)(C - c) * P] += s * (y[at] - whole);
            slope[at] = s;
        }
    }
}
""".replace("MOST", str(MOST))


# ---------------------------------------------------------------- the version by device

def mixture(x, y, scale, kind="gaussian"):
    """Pixels of an image (B, C, H, W) and the slots' means and logits y (B, K, C + 1, H, W)."""
    B, K, channels, H, W = y.shape
    maps = [xp.empty((B, K, H, W), y.dtype) for _ in range(3)]
    found = Pixels(xp.empty((B, H, W), y.dtype), xp.empty_like(y), *maps)
    which = KINDS.index(kind)
    if DEVICE == "cpu":
        flat = [a.reshape(*a.shape[:-2], -1) for a in (x, y, *found)]
        ratio = np.empty((B, H * W), y.dtype)
        _mixture(*flat[:2], y.dtype.type(scale), which, flat[2], ratio, *flat[3:])
        flat[2] += np.log(ratio)
        np.log(found.without, out=found.without)
        np.add(found.without, found.log_p[:, None], out=found.without)
        if kind == "composite":
            whole = (found.mask[:, :, None] * y[:, :, :-1]).sum(1, keepdims=True)
            found.log_p[...] = density(x, whole, scale, kind)[0][:, 0]
    else:
        C = channels - 1
        norm = -C * (math.log(scale) + (which != 1) * 0.5 * math.log(2 * math.pi))
        launch("mixture", B * H * W, x, y, *found, float(scale), norm, LEAST, which, B, K, C, H * W,
               source=CUDA)
    return found
