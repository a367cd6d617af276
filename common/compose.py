"""Layers over each other: the squared error of the picture that every depth order makes; and how
a layer is made from an object and a map of where it is.

With objects s_1, s_2, .. from the nearest to the farthest and T_k the light that the k nearest let
through, T_0 = 1, T_k = T_{k-1} (1 - alpha_{s_k}), and V_k the picture behind them,
V_K = background, V_{k-1} = alpha_{s_k} colour_{s_k} + (1 - alpha_{s_k}) V_k, the picture is V_0 and
    dalpha_{s_k} = T_{k-1} dV_0 . (colour_{s_k} - V_k),   dcolour_{s_k} = T_{k-1} alpha_{s_k} dV_0,
    dbackground = T_K dV_0.
An object's canvas is placed by convolution with its position map, out = canvas * theta, and cut
out of a picture by cross-correlation with it: each is the other's way back. On the CPU sharp maps
cost what their few large weights do, whatever the canvas: what is below FAINT is left out, and so
are, on the way back, orders that weigh less than FAINT of an image's heaviest. For blurred maps
Fourier transforms take less time.
As in kernels.py each loop is there three times: reference, numba, CUDA. Colours and background are
pictures of their own, or flat (h = w = 1).
Dimension key: B images, C channels, K objects, S orders, H W pixels, h w colours' pixels,
R layers, M side of an object's canvas.
"""

import numpy as np

from common.backend import DEVICE, xp
from common.kernels import jit, launch

MOST = 8                # objects that the CUDA version has room for
FAINT = 1e-6            # weights that are not worth their time
SLOWER = 8              # a transform's time for a pixel, of a loop's for a weight and a pixel


# ---------------------------------------------------------------- reference, in plain NumPy

def layers(alpha, colour, background, order):
    """T_0..T_K, V_0..V_K of one order (nearest first)."""
    through, behind = [xp.ones_like(alpha[:, :1])], [background]
    for k in order:
        through.append(through[-1] * (1 - alpha[:, k, None]))
    for k in order[::-1]:
        behind.append(behind[-1] + alpha[:, k, None] * (colour[:, k] - behind[-1]))
    return through, behind[::-1]


def order_errors_reference(x, alpha, colour, background, orders):
    pictures = [layers(alpha, colour, background, order)[1][0] for order in orders]
    return xp.stack([((y - x) ** 2).sum((1, 2, 3)) for y in pictures], 1)       # (B, S)


def order_errors_back_reference(derrors, x, alpha, colour, background, orders):
    dalpha, dcolour = xp.zeros_like(alpha), xp.zeros_like(colour)
    dbackground = xp.zeros_like(background)
    for s, order in enumerate(orders):
        through, behind = layers(alpha, colour, background, order)
        dy = 2 * derrors[:, s, None, None, None] * (behind[0] - x)      # (B, C, H, W)
        for k, T, V in zip(order, through[:-1], behind[1:], strict=True):
            dalpha[:, k] += (T * dy * (colour[:, k] - V)).sum(1)
            dcolour[:, k] += shrink(T * alpha[:, k, None] * dy, colour)
        dbackground += shrink(through[-1] * dy, background)
    return dalpha, dcolour, dbackground


def shrink(d, like):
    """What a flat colour receives is what all of its pixels do."""
    return d if like.shape[-1] > 1 else d.sum((-2, -1), keepdims=True)


def shifts(image, M):
    """For every pixel (u, v) of the canvas the part of a padded image that it may fall on."""
    H, W = image.shape[2:]
    n = M // 2
    padded = xp.pad(image, ((0, 0), (0, 0), (n, M - 1 - n), (n, M - 1 - n)))
    for u in range(M):
        for v in range(M):
            yield u, v, padded[:, :, u:u + H, v:v + W]


def place_reference(canvas, theta):
    """out[y, x] = sum_uv canvas[u, v] theta[y - u + M // 2, x - v + M // 2]"""
    flipped, out = theta[:, None, ::-1, ::-1], 0
    for u, v, part in shifts(flipped, canvas.shape[2]):
        out = out + canvas[:, :, u, v, None, None] * part
    return out[:, :, ::-1, ::-1]                        # (R, C, H, W)


def cut_reference(image, theta, M):
    """canvas[u, v] = sum_ij theta[i, j] image[i + u - M // 2, j + v - M // 2]"""
    out = xp.empty((*image.shape[:2], M, M), image.dtype)
    for u, v, part in shifts(image, M):
        out[:, :, u, v] = (part * theta[:, None]).sum((2, 3))
    return out                                          # (R, C, M, M)


def match_reference(canvas, image):
    """theta[i, j] = sum_uv canvas[u, v] image[i + u - M // 2, j + v - M // 2]"""
    out = 0
    for u, v, part in shifts(image, canvas.shape[2]):
        out = out + (canvas[:, :, u, v, None, None] * part).sum(1)
    return out                                          # (R, H, W)


# ---------------------------------------------------------------- numba

@jit
def _meet(theta, r, i, j, M):
    """Which pixels of a canvas with its middle at (i, j) lie in the picture; none if too faint."""
    H, W = theta.shape[1:]
    n = M // 2
    if theta[r, i, j] < FAINT:
        return 0, 0, 0, 0
    return max(0, n - i), min(M, H - i + n), max(0, n - j), min(M, W - j + n)


@jit
def _empty(theta, r, i):
    """Is all of a row faint?"""
    weights = 0
    for j in range(theta.shape[2]):
        weights += theta[r, i, j] >= FAINT
    return weights == 0


@jit
def _place(canvas, theta, out):
    R, C, M = canvas.shape[:3]
    n = M // 2
    for r in range(R):
        for i in range(theta.shape[1]):
            for j in range(0 if _empty(theta, r, i) else theta.shape[2]):
                top, end, left, right = _meet(theta, r, i, j, M)
                for c in range(C):
                    for u in range(top, end):
                        for v in range(left, right):
                            out[r, c, i + u - n, j + v - n] += theta[r, i, j] * canvas[r, c, u, v]


@jit
def _cut(image, theta, out):
    R, C, M = out.shape[:3]
    n = M // 2
    for r in range(R):
        for i in range(theta.shape[1]):
            for j in range(0 if _empty(theta, r, i) else theta.shape[2]):
                top, end, left, right = _meet(theta, r, i, j, M)
                for c in range(C):
                    for u in range(top, end):
                        for v in range(left, right):
                            out[r, c, u, v] += theta[r, i, j] * image[r, c, i + u - n, j + v - n]


@jit
def _match(canvas, image, theta, out):
    R, C, M = canvas.shape[:3]
    n = M // 2
    for r in range(R):
        for i in range(theta.shape[1]):
            for j in range(0 if _empty(theta, r, i) else theta.shape[2]):
                top, end, left, right = _meet(theta, r, i, j, M)
                total = out[r, i, j]
                for c in range(C):
                    for u in range(top, end):
                        for v in range(left, right):
                            total += canvas[r, c, u, v] * image[r, c, i + u - n, j + v - n]
                out[r, i, j] = total


@jit
def _row(source, n, i, row):
    """Row i of image n of a picture, or of a flat colour."""
    flat = source.shape[-1] == 1
    for c in range(row.shape[0]):
        if flat:
            row[c, :] = source[n, c, 0, 0]
        else:
            row[c, :] = source[n, c, i]


@jit
def _rows(alpha, colour, background, n, i, a, front, back):
    """Row i of image n of all layers, where it is contiguous."""
    for k in range(a.shape[0]):
        a[k] = alpha[n, k, i]
        _row(colour[:, k], n, i, front[k])
    _row(background, n, i, back)


@jit
def _layers(a, front, back, order, T, V):
    """One row of T_0..T_K and V_0..V_K."""
    K, C, W = front.shape
    T[0] = 1
    V[K] = back
    for k in range(K):
        seen, light, rest = a[order[k]], T[k], T[k + 1]
        for j in range(W):
            rest[j] = light[j] * (1 - seen[j])
    for k in range(K - 1, -1, -1):
        seen = a[order[k]]
        for c in range(C):
            behind, own, picture = V[k + 1, c], front[order[k], c], V[k, c]
            for j in range(W):
                picture[j] = behind[j] + seen[j] * (own[j] - behind[j])


@jit
def _order_errors(x, alpha, colour, background, orders, errors):
    B, C, H, W = x.shape
    K = alpha.shape[1]
    T, V = np.empty((K + 1, W), x.dtype), np.empty((K + 1, C, W), x.dtype)
    a, front = np.empty((K, W), x.dtype), np.empty((K, C, W), x.dtype)
    back = np.empty((C, W), x.dtype)
    for n in range(B):
        for i in range(H):
            _rows(alpha, colour, background, n, i, a, front, back)
            for s in range(len(orders)):
                _layers(a, front, back, orders[s], T, V)
                total = errors[n, s]
                for c in range(C):
                    picture, seen = V[0, c], x[n, c, i]
                    for j in range(W):
                        total += (picture[j] - seen[j]) ** 2
                errors[n, s] = total


@jit
def _order_errors_back(derrors, x, alpha, colour, background, orders, dalpha, dcolour, dbackground):
    B, C, H, W = x.shape
    K = alpha.shape[1]
    T, V = np.empty((K + 1, W), x.dtype), np.empty((K + 1, C, W), x.dtype)
    a, front = np.empty((K, W), x.dtype), np.empty((K, C, W), x.dtype)
    back, d = np.empty((C, W), x.dtype), np.empty(W, x.dtype)
    dfront, dback = np.empty((K, C, W), x.dtype), np.empty((C, W), x.dtype)
    for n in range(B):
        least = FAINT * np.abs(derrors[n]).max()
        for i in range(H):
            _rows(alpha, colour, background, n, i, a, front, back)
            dfront[:] = 0
            dback[:] = 0
            for s in range(len(orders)):
                if abs(derrors[n, s]) < least:
                    continue
                twice = 2 * derrors[n, s]
                _layers(a, front, back, orders[s], T, V)
                for c in range(C):
                    picture, seen, dlast = V[0, c], x[n, c, i], dback[c]
                    for j in range(W):
                        d[j] = twice * (picture[j] - seen[j])
                    for k in range(K):
                        o = orders[s, k]
                        light, own, behind = T[k], front[o, c], V[k + 1, c]
                        alpha_o, dalpha_o, down = a[o], dalpha[n, o, i], dfront[o, c]
                        for j in range(W):
                            dalpha_o[j] += light[j] * d[j] * (own[j] - behind[j])
                        for j in range(W):
                            down[j] += light[j] * d[j] * alpha_o[j]
                    light = T[K]
                    for j in range(W):
                        dlast[j] += light[j] * d[j]
            for k in range(K):
                _add_row(dcolour[:, k], n, i, dfront[k])
            _add_row(dbackground, n, i, dback)


@jit
def _add_row(target, n, i, row):
    """The way back of `_row`."""
    flat = target.shape[-1] == 1
    for c in range(row.shape[0]):
        if flat:
            target[n, c, 0, 0] += row[c].sum()
        else:
            target[n, c, i] += row[c]


# ---------------------------------------------------------------- by Fourier transforms
# On a torus of L x L pixels, so large that nothing comes round to itself.

def torus(theta, M):
    """L: the least number without large factors that has room for a canvas beyond the picture."""
    room = max(theta.shape[1:]) + M
    sizes = (2**a * 3**b * 5**c for a in range(1, 14) for b in range(4) for c in range(3))
    return min(n for n in sizes if n >= room)


def blurred(canvas, theta):
    """Do the weights that are not faint take longer one by one than transforms of all do?"""
    R, C, M = canvas.shape[:3]
    weights = np.count_nonzero(theta >= FAINT) / R
    return weights * C * M * M > SLOWER * (2 * C + 1) * torus(theta, M)**2


def fourier(kernel, a, b, theta, M):
    """`place` canvases a by maps b, `cut` images a by maps b, or `match` canvases a in images b."""
    L, (H, W) = torus(theta, M), theta.shape[1:]
    a, b = np.fft.rfft2(a, (L, L)), np.fft.rfft2(b if b.ndim == 4 else b[:, None], (L, L))
    if kernel == "place":
        return np.fft.irfft2(a * b, (L, L))[:, :, M // 2:M // 2 + H, M // 2:M // 2 + W]
    f = a * b.conj() if kernel == "cut" else (a.conj() * b).sum(1)
    out = np.roll(np.fft.irfft2(f, (L, L)), M // 2, (-2, -1))
    return out[:, :, :M, :M] if kernel == "cut" else out[:, :H, :W]


# ---------------------------------------------------------------- CUDA

CUDA = r"""
extern "C" {

__global__ void order_errors(const real* x, const real* alpha, const real* colour,
                             const real* background, const int* orders, real* errors,
                             int B, int C, int K, int S, int D) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a pixel
    if (t >= B * D) return;
    int n = t / D, i = t % D;
    for (int s = 0; s < S; s++) {
        real sum = 0;
        for (int c = 0; c < C; c++) {
            real v = background[(n * C + c) * D + i];
            for (int k = K - 1; k >= 0; k--) {
                int o = n * K + orders[s * K + k];
                v += alpha[o * D + i] * (colour[(o * C + c) * D + i] - v);
            }
            v -= x[(n * C + c) * D + i];
            sum += v * v;
        }
        errors[(n * S + s) * D + i] = sum;
    }
}

__global__ void order_errors_back(const real* derrors, const real* x, const real* alpha,
                                  const real* colour, const real* background, const int* orders,
                                  real* dalpha, real* dcolour, real* dbackground,
                                  int B, int C, int K, int S, int D) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= B * D) return;
    int n = t / D, i = t % D;
    real V[MOST + 1];
    for (int s = 0; s < S; s++)
        for (int c = 0; c < C; c++) {
            V[K] = background[(n * C + c) * D + i];
            for (int k = K - 1; k >= 0; k--) {
                int o = n * K + orders[s * K + k];
                V[k] = V[k + 1] + alpha[o * D + i] * (colour[(o * C + c) * D + i] - V[k + 1]);
            }
            real d = 2 * derrors[n * S + s] * (V[0] - x[(n * C + c) * D + i]);
            for (int k = 0; k < K; k++) {
                int o = n * K + orders[s * K + k];
                dalpha[o * D + i] += d * (colour[(o * C + c) * D + i] - V[k + 1]);
                dcolour[(o * C + c) * D + i] += d * alpha[o * D + i];
                d *= 1 - alpha[o * D + i];
            }
            dbackground[(n * C + c) * D + i] += d;
        }
}

__global__ void place(const real* canvas, const real* theta, real* out,
                      int R, int C, int M, int H, int W) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a pixel of out
    if (t >= R * C * H * W) return;
    int x = t % W, y = t / W % H, r = t / (W * H * C), n = M / 2;
    const real* own = canvas + t / (W * H) * M * M;
    real sum = 0;
    for (int u = max(0, y + n - H + 1); u < min(M, y + n + 1); u++)
        for (int v = max(0, x + n - W + 1); v < min(M, x + n + 1); v++)
            sum += own[u * M + v] * theta[(r * H + y - u + n) * W + x - v + n];
    out[t] = sum;
}

__global__ void cut(const real* image, const real* theta, real* out,
                    int R, int C, int M, int H, int W) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a pixel of out
    if (t >= R * C * M * M) return;
    int v = t % M - M / 2, u = t / M % M - M / 2, r = t / (M * M * C);
    const real* own = image + t / (M * M) * H * W;
    real sum = 0;
    for (int i = max(0, -u); i < min(H, H - u); i++)
        for (int j = max(0, -v); j < min(W, W - v); j++)
            sum += theta[(r * H + i) * W + j] * own[(i + u) * W + j + v];
    out[t] = sum;
}

__global__ void match(const real* canvas, const real* image, real* out,
                      int R, int C, int M, int H, int W) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;               // one thread a weight of theta
    if (t >= R * H * W) return;
    int j = t % W, i = t / W % H, r = t / (W * H), n = M / 2;
    real sum = 0;
    for (int c = r * C; c < (r + 1) * C; c++)
        for (int u = max(0, n - i); u < min(M, H - i + n); u++)
            for (int v = max(0, n - j); v < min(M, W - j + n); v++)
                sum += canvas[(c * M + u) * M + v] * image[(c * H + i + u - n) * W + j + v - n];
    out[t] = sum;
}

}
""".replace("MOST", str(MOST))


# ---------------------------------------------------------------- the versions by device

def order_errors(x, alpha, colour, background, orders):
    """Squared errors (B, S) of the pictures that objects make in each of `orders` (S, K).

    x (B, C, H, W), alpha (B, K, H, W), colour (B, K, C, h, w), background (B, C, h, w).
    """
    B, C, H, W = x.shape
    K, S = alpha.shape[1], len(orders)
    orders = xp.asarray(orders, np.int32)
    if DEVICE == "cpu":
        errors = np.zeros((B, S), x.dtype)
        _order_errors(x, alpha, colour, background, orders, errors)
    else:
        full = xp.broadcast_to(colour, (B, K, C, H, W)), xp.broadcast_to(background, x.shape)
        errors = xp.empty((B, S, H, W), x.dtype)
        launch("order_errors", B * H * W, x, alpha, *full, orders, errors, B, C, K, S, H * W,
               source=CUDA)
        errors = errors.sum((2, 3))

    def back(derrors):
        dalpha = xp.zeros_like(alpha)
        if DEVICE == "cpu":
            dcolour, dbackground = np.zeros_like(colour), np.zeros_like(background)
            _order_errors_back(derrors, x, alpha, colour, background, orders, dalpha, dcolour,
                               dbackground)
            return dalpha, dcolour, dbackground
        dfull = [xp.zeros(a.shape, x.dtype) for a in full]
        launch("order_errors_back", B * H * W, derrors, x, alpha, *full, orders, dalpha, *dfull,
               B, C, K, S, H * W, source=CUDA)
        return dalpha, shrink(dfull[0], colour), shrink(dfull[1], background)

    return errors, back


def place(canvas, theta):
    """Canvases (R, C, M, M) where position maps (R, H, W) say: (R, C, H, W)."""
    shape = (*canvas.shape[:2], *theta.shape[1:])
    out = run(_place, "place", (canvas, theta), shape, canvas, theta)

    def back(dout):
        dcanvas = run(_cut, "cut", (dout, theta), canvas.shape, canvas, theta)
        return dcanvas, find(canvas, dout, theta)

    return out, back


def cut(image, theta, M):
    """The mean of all crops (R, C, M, M) of an image, weighted by theta (R, H, W).

    Only the position map gets a gradient.
    """
    shape = (*image.shape[:2], M, M)
    out = run(_cut, "cut", (image, theta), shape, xp.empty(shape, image.dtype), theta)

    def back(dout):
        return find(dout, image, theta)

    return out, back


def find(canvas, image, theta):
    """What each weight of a position map receives."""
    arrays = (canvas, image, theta) if DEVICE == "cpu" else (canvas, image)
    return run(_match, "match", arrays, theta.shape, canvas, theta)


def run(loop, kernel, arrays, shape, canvas, theta):
    """One of the three loops, or transforms instead, into a new array."""
    if DEVICE == "cpu" and blurred(canvas, theta):
        out = fourier(kernel, *arrays[:2], theta, canvas.shape[2])
        return np.ascontiguousarray(out, theta.dtype)
    out = xp.zeros(shape, theta.dtype)
    if DEVICE == "cpu":
        loop(*arrays, out)
    else:
        R, C, M = canvas.shape[:3]
        launch(kernel, out.size, *arrays, out, R, C, M, *theta.shape[1:], source=CUDA)
    return out
