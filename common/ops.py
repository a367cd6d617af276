"""Differentiable pieces as pullbacks.

    y, back = f(p, ...)       forward, equation on the right
    dx = back(dy, g)          its mirror; parameter gradients go into g

`p` maps names to weights, `g` to their gradients. Pieces without weights take no `p`, and their
`back` no `g`. Nothing here writes into an argument but into `g`.
Dimension key: B rows, I inputs, O outputs, H hidden units, K latent dimensions, D all pixels.
"""

import math

from common.backend import gemm, xp
from common.kernels import lstm_gates, lstm_gates_back, times_transposed

LOG_2PI = math.log(2 * math.pi)


# ---------------------------------------------------------------- activations
# Each derivative is written with the activation's own output y.

def relu(x):
    y = xp.maximum(x, 0)

    def back(dy):
        return dy * (y > 0)

    return y, back


def sigmoid(x):
    y = logistic(x)

    def back(dy):
        return dy * y * (1 - y)

    return y, back


def tanh(x):
    y = xp.tanh(x)

    def back(dy):
        return dy * (1 - y * y)

    return y, back


def elu(x):
    y = xp.maximum(x, xp.expm1(xp.minimum(x, 0)))

    def back(dy):
        return dy * xp.minimum(y + 1, 1)

    return y, back


def leaky_relu(x, slope=0.1):
    y = xp.maximum(x, slope * x)

    def back(dy):
        return xp.where(y > 0, dy, slope * dy)

    return y, back


def clamp(x, low, high):
    """Cut to [low, high]; no gradient passes where it cuts."""
    y = xp.minimum(xp.maximum(x, low), high)

    def back(dy):
        return dy * (y == x)

    return y, back


def softmax(x, axis=-1):
    y = xp.exp(x - x.max(axis, keepdims=True))
    y /= y.sum(axis, keepdims=True)

    def back(dy):
        return softmax_back(dy, y, axis)

    return y, back


def softmax_back(dy, y, axis=-1):
    """What x receives; for those, too, who got y = softmax(x) in another way."""
    return y * (dy - (dy * y).sum(axis, keepdims=True))


def identity(x):
    return x, lambda dy: dy


def logistic(x):
    """1 / (1 + e^-x), by way of tanh, which neither overflows nor needs two branches."""
    return xp.tanh(x * 0.5) * 0.5 + 0.5


def log_logistic(x):
    """log(1 / (1 + e^-x)) without overflow."""
    return xp.minimum(x, 0) - xp.log1p(xp.exp(-xp.abs(x)))


# ---------------------------------------------------------------- layers

def linear(p, name, x, want_dx=True):
    """x W + b; without dx where x is a picture, which learns nothing."""
    W = p[name + ".W"]                                  # (I, O)
    y = gemm(x, W)                                      # (B, O)
    if name + ".b" in p:
        y += p[name + ".b"]

    def back(dy, g):
        g.queue(name, x, dy)                            # dW = x^T dy, db = sum dy
        return times_transposed(dy, W) if want_dx else None

    return y, back


def dense(p, name, x, act, want_dx=True):
    """act(x W + b)"""
    u, back_u = linear(p, name, x, want_dx)             # (B, O)
    y, back_y = act(u)                                  # (B, O)

    def back(dy, g):
        du = back_y(dy)
        return back_u(du, g)

    return y, back


def mlp(p, name, x, act=relu, last=identity, want_dx=True):
    """`name.0`, `name.1`, ... as many layers as p has; `act` between them, `last` at the end."""
    backs, layer = [], 0
    while f"{name}.{layer}.W" in p:
        more = f"{name}.{layer + 1}.W" in p
        x, back_layer = dense(p, f"{name}.{layer}", x, act if more else last,
                              want_dx or layer > 0)
        backs.append(back_layer)
        layer += 1

    def back(dy, g):
        for back_layer in reversed(backs):
            dy = back_layer(dy, g)
        return dy

    return x, back


def rnn(p, name, x, h, act=tanh):
    """h' = act(x Wx + h Wh + b)"""
    u, back_x = linear(p, name + ".x", x)               # (B, H)
    v, back_h = linear(p, name + ".h", h)               # (B, H)
    y, back_act = act(u + v)                            # (B, H)

    def back(dy, g):
        du = back_act(dy)
        dh = back_h(du, g)
        dx = back_x(du, g)
        return dx, dh

    return y, back


def gru(p, name, x, h):
    """Cho et al.'s cell, h' = (1 - u) h + u n; weights of update, reset, new side by side."""
    H = h.shape[1]
    a, back_a = linear(p, name + ".x", x)               # (B, 3H)
    b, back_b = linear(p, name + ".h", h)               # (B, 3H)
    gates = logistic(a[:, :2 * H] + b[:, :2 * H])       # (B, 2H)
    u, r = gates[:, :H], gates[:, H:]                   # (B, H), (B, H)
    n = xp.tanh(a[:, 2 * H:] + r * b[:, 2 * H:])        # (B, H)
    h_new = h + u * (n - h)                             # (B, H)

    def back(dh_new, g):
        dn = dh_new * u * (1 - n * n)
        dgates = xp.concatenate([dh_new * (n - h), dn * b[:, 2 * H:]], 1) * gates * (1 - gates)
        dh = dh_new * (1 - u)
        dh = dh + back_b(xp.concatenate([dgates, dn * r], 1), g)
        dx = back_a(xp.concatenate([dgates, dn], 1), g)
        return dx, dh

    return h_new, back


def lstm(p, name, a, x, h, c):
    """Hochreiter and Schmidhuber's cell. `a` (B, 4H) is what the gates get that does not recur."""
    u, back_x = linear(p, name + ".x", x)               # (B, 4H)
    v, back_h = linear(p, name + ".h", h)               # (B, 4H)
    u += v
    u += a
    h, c_new, back_cell = lstm_cell(u, c)               # (B, H), (B, H)

    def back(dh, dc_new, g):
        du, dc = back_cell(dh, dc_new)
        dh = back_h(du, g)
        dx = back_x(du, g)
        return du, dx, dh, dc                           # da = du

    return h, c_new, back


def lstm_cell(u, c):
    """The part without weights; alone it is a first step, whose x and h would be zero."""
    h, c_new, gates = lstm_gates(u, c)                  # (B, H), (B, H), (B, 5H)

    def back(dh, dc_new):
        return lstm_gates_back(dh, dc_new, c, gates)    # du, dc

    return h, c_new, back


# ---------------------------------------------------------------- distributions

def gaussian(mean, log_std, eps):
    """A sample of N(mean, exp(log_std)^2) with the noise given: z = mean + std eps."""
    noise = xp.exp(log_std) * eps                       # (B, K)
    z = mean + noise                                    # (B, K)

    def back(dz):
        return dz, dz * noise

    return z, back


def gaussian_kl(mean, log_std, mean0=0.0, std0=1.0):
    """KL( N(mean, std^2) || N(mean0, std0^2) ), summed over the last axis; the prior is fixed."""
    precision = 1.0 / (std0 * std0)
    away = (mean - mean0) * precision                   # (B, K)
    ratio = xp.exp(log_std * 2.0) * precision           # (B, K)
    kl = (0.5 * (ratio + away * (mean - mean0) - 1.0) - log_std + math.log(std0)).sum(-1)   # (B,)

    def back(dkl):
        dkl = dkl[..., None]
        return dkl * away, dkl * (ratio - 1.0)

    return kl, back


def latent(mean, log_std, eps):
    """A sample of N(mean, std^2) and its KL to the prior N(0, 1)."""
    z, back_z = gaussian(mean, log_std, eps)            # (B, K)
    kl, back_kl = gaussian_kl(mean, log_std)            # (B,)

    def back(dz, dkl):
        dmean_kl, dlog_std_kl = back_kl(dkl)
        dmean, dlog_std = back_z(dz)
        return dmean + dmean_kl, dlog_std + dlog_std_kl

    return z, kl, back


def gaussian_log_density(x, mean, std):
    """log N(x; mean, std^2), summed over all but the first axis; std is a number."""
    away = (x - mean).reshape(len(x), -1)               # (B, D)
    squares = xp.einsum("bd,bd->b", away, away)         # (B,)
    log_p = squares * (-0.5 / std**2) - away.shape[1] * (0.5 * LOG_2PI + math.log(std))

    def back(dlog_p):
        return (away * (dlog_p * (1.0 / std**2))[:, None]).reshape(x.shape)     # dmean

    return log_p, back


def bernoulli_kl(logit, rate):
    """KL( Bernoulli(sigmoid(logit)) || Bernoulli(rate) ), elementwise; rate is an array."""
    log_rate, log_other = xp.log(rate), xp.log1p(-rate)
    q = logistic(logit)
    kl = q * (log_logistic(logit) - log_rate) + (1 - q) * (log_logistic(-logit) - log_other)

    def back(dkl):
        return dkl * q * (1 - q) * (logit - log_rate + log_other)

    return kl, back
