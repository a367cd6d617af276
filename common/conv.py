"""Pieces for images, as pullbacks: convolutions, resampling, normalisation.

Images are (B, C, H, W). Kernels are (O, C, k, k) with zero padding (k-1)//2 on each side. As in
ops.py, `p` maps names to weights, `g` to their gradients, and nothing is written into but `g`;
convolutions add their weight gradients at once.
Dimension key: B images, C input and O output channels, H W input size, h w output size, k kernel,
K latent dimensions.
"""

import functools

import numpy as np

from common.backend import gemm, to_device, xp
from common.conv_kernels import act_back, activate, conv_back_w, conv_back_x, conv_forward
from common.ops import identity

EPS = 1e-5              # added to variances


# ---------------------------------------------------------------- convolutions

def conv(p, name, x, stride=1, want_dx=True, act=identity):
    """act(W * x + b); the side becomes (H + 2 (k-1)//2 - k) // stride + 1.

    `act` is one of identity, relu, leaky_relu and elu of ops.py, computed on the way.
    """
    W = p[name + ".W"]                                  # (O, C, k, k)
    b = p.get(name + ".b")                              # (O,)
    y = conv_forward(x, W, b, stride, act.__name__)     # (B, O, h, w)

    def back(dy, g):
        du = act_back(dy, y, act.__name__)
        add_bias_gradient(g, name, du)
        add(g, name + ".W", conv_back_w(x, du, stride, W.shape[2]))
        return conv_back_x(du, W, None, stride, x.shape[2:]) if want_dx else None

    return y, back


def conv_transpose(p, name, x, stride=2, act=identity):
    """The adjoint of `conv`, whose loops exchange their roles; the side becomes stride H.

    W is (C, O, k, k): `conv` with it would lead from O channels to C. With k = 4 the stride is 2.
    """
    W = p[name + ".W"]                                  # (C, O, k, k)
    b = p.get(name + ".b")                              # (O,)
    size = stride * x.shape[2], stride * x.shape[3]
    y = conv_back_x(x, W, b, stride, size, act.__name__)

    def back(dy, g):
        du = act_back(dy, y, act.__name__)
        add_bias_gradient(g, name, du)
        add(g, name + ".W", conv_back_w(du, x, stride, W.shape[2]))
        return conv_forward(du, W, None, stride)

    return y, back


def add(g, name, grad):
    total = g[name]
    total += grad


def add_bias_gradient(g, name, dy):
    if name + ".b" in g:
        add(g, name + ".b", dy.reshape(*dy.shape[:2], -1).sum(2).sum(0))


# ---------------------------------------------------------------- the broadcast decoder's layer

def broadcast_conv(p, name, z, coords, act=identity):
    """`conv` of images that are z (B, K) at every pixel, beside the channels coords (C, H, W).

    The kernel is (O, K + C, k, k) with k odd, the stride 1. All pixels see the same z, but near the
    border fewer taps do: one product with z for each way to clip the kernel, at most k k of them.
    The share of coords is the same for all images.
    """
    W, b = p[name + ".W"], p.get(name + ".b")           # (O, K+C, k, k), (O,)
    (B, K), (_, height, width) = z.shape, coords.shape
    clip_y, rows = clippings(height, W.shape[2], W.dtype)   # (a, k), (a, H)
    clip_x, columns = clippings(width, W.shape[2], W.dtype)     # (e, k), (e, W)
    left = xp.einsum("ai,ocij,ej->coae", clip_y, W[:, :K], clip_x)      # (K, O, a, e)
    each = gemm(z, left.reshape(K, -1))                 # (B, O*a*e)
    u = gemm(each.reshape(-1, len(clip_x)), columns)    # (B*O*a, W)
    u = xp.take(u.reshape(B, len(W), -1, width), rows.argmax(0), 2)     # (B, O, H, W)
    u += conv_forward(coords[None], W[:, K:], b, 1)
    y = activate(u, act.__name__)                       # (B, O, H, W)

    def back(dy, g):
        du = act_back(dy, y, act.__name__)
        add_bias_gradient(g, name, du)
        dW = g[name + ".W"]
        dW[:, K:] += conv_back_w(coords[None], du.sum(0)[None], 1, W.shape[2])
        deach = gemm(du.reshape(-1, width), columns.T).reshape(*du.shape[:3], -1)
        deach = xp.einsum("bohe,ah->boae", deach, rows, optimize=True).reshape(B, -1)
        dleft = gemm(z.T, deach).reshape(left.shape)
        dW[:, :K] += xp.einsum("ai,coae,ej->ocij", clip_y, dleft, clip_x)
        return gemm(deach, left.reshape(K, -1).T)

    return y, back


@functools.cache
def clippings(n, k, dtype):
    """The ways in which a border of an axis of n pixels clips a kernel of k taps.

    (ways, k): 1 where a tap is left, and (ways, n): 1 where a pixel sees the kernel so.
    """
    seen = np.arange(n)[:, None] + np.arange(k) - (k - 1) // 2
    left, way = np.unique((seen >= 0) & (seen < n), axis=0, return_inverse=True)
    return to_device(left.astype(dtype)), to_device(np.eye(len(left), dtype=dtype)[:, way.ravel()])


# ---------------------------------------------------------------- resampling

def sub_pixel(x, r):
    """(B, r r O, H, W) to (B, O, r H, r W): channels become pixels."""
    B, C, H, W = x.shape
    O = C // (r * r)
    y = x.reshape(B, O, r, r, H, W).transpose(0, 1, 4, 2, 5, 3).reshape(B, O, r * H, r * W)

    def back(dy):
        return dy.reshape(B, O, H, r, W, r).transpose(0, 1, 3, 5, 2, 4).reshape(x.shape)

    return y, back


def max_pool(x):
    """The largest of 2 x 2 pixels; an odd last row or column is dropped, equals share nothing."""
    B, C, H, W = x.shape
    h, w = H // 2, W // 2
    blocks = x[:, :, :2 * h, :2 * w].reshape(B, C, h, 2, w, 2).transpose(0, 1, 2, 4, 3, 5)
    blocks = blocks.reshape(B, C, h, w, 4)
    where = blocks.argmax(-1)[..., None]
    y = blocks.max(-1)                                  # (B, C, h, w)

    def back(dy):
        dx = xp.zeros_like(x)
        chosen = (xp.arange(4) == where) * dy[..., None]
        chosen = chosen.reshape(B, C, h, w, 2, 2).transpose(0, 1, 2, 4, 3, 5)
        dx[:, :, :2 * h, :2 * w] = chosen.reshape(B, C, 2 * h, 2 * w)
        return dx

    return y, back


def upsample(x):
    """Twice the side, bilinear; pixel centres lie at halves, the border repeats."""
    y = double(double(x, 2), 3)                         # (B, C, 2*H, 2*W)

    def back(dy):
        return halve(halve(dy, 3), 2)

    return y, back


def double(x, axis):
    """Along one axis: 2i looks a quarter pixel before i, 2i+1 a quarter behind."""
    x = xp.moveaxis(x, axis, 0)
    before, behind = xp.concatenate([x[:1], x[:-1]]), xp.concatenate([x[1:], x[-1:]])
    y = xp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * behind], 1)
    return xp.moveaxis(y.reshape(-1, *x.shape[1:]), 0, axis)


def halve(dy, axis):
    """The way back of `double`."""
    dy = xp.moveaxis(dy, axis, 0)
    even, odd = dy[0::2], dy[1::2]
    dx = 0.75 * (even + odd)
    dx[:-1] += 0.25 * even[1:]
    dx[0] += 0.25 * even[0]
    dx[1:] += 0.25 * odd[:-1]
    dx[-1] += 0.25 * odd[-1]
    return xp.moveaxis(dx, 0, axis)


# ---------------------------------------------------------------- normalisation
# Learned gain and offset are `name.gain` and `name.b`, where p has them, of any shape that
# broadcasts against an image: (C, 1, 1) or (C, H, W).

def standardise(x, axes):
    """(x - mean) / std over `axes`, and the pullback."""
    away = x - x.mean(axes, keepdims=True)
    inverse = 1 / xp.sqrt((away * away).mean(axes, keepdims=True) + EPS)
    u = away * inverse

    def back(du):
        du = du - du.mean(axes, keepdims=True) - u * (du * u).mean(axes, keepdims=True)
        return du * inverse

    return u, back


def scaled(p, name, u):
    """u gain + b"""
    gain = p.get(name + ".gain")
    y = u if gain is None else u * gain + p[name + ".b"]

    def back(dy, g):
        if gain is None:
            return dy
        add(g, name + ".b", sum_to(dy, gain.shape))
        add(g, name + ".gain", sum_to(dy * u, gain.shape))
        return dy * gain

    return y, back


def sum_to(d, shape):
    """What an array of this shape receives that was broadcast to d's."""
    d = d.sum(tuple(range(d.ndim - len(shape))))
    return d.sum(tuple(k for k, n in enumerate(shape) if n == 1), keepdims=True)


def layer_norm(p, name, x, axes):
    """Standardised over `axes`, then scaled."""
    u, back_u = standardise(x, axes)
    y, back_y = scaled(p, name, u)

    def back(dy, g):
        du = back_y(dy, g)
        return back_u(du)

    return y, back


def group_norm(p, name, x, groups):
    """Standardised over the pixels of each image's groups of channels, then scaled."""
    u, back_u = standardise(x.reshape(len(x), groups, -1), 2)
    y, back_y = scaled(p, name, u.reshape(x.shape))

    def back(dy, g):
        du = back_y(dy, g)
        return back_u(du.reshape(u.shape)).reshape(x.shape)

    return y, back


def batch_norm(p, name, x, known=None):
    """Standardised over all images, then scaled; returns also what it took: (mean, variance).

    Training keeps a moving average of these; with it as `known`, images do not see each other.
    """
    if known is None:
        mean, variance = (f(x, (0, 2, 3), keepdims=True) for f in (xp.mean, xp.var))
        u, back_u = standardise(x, (0, 2, 3))
    else:
        mean, variance = known
        inverse = 1 / xp.sqrt(variance + EPS)
        u, back_u = (x - mean) * inverse, lambda du: du * inverse
    y, back_y = scaled(p, name, u)

    def back(dy, g):
        du = back_y(dy, g)
        return back_u(du)

    return y, (mean, variance), back
