"""The spatial transformer (Jaderberg et al., 2015) for windows without rotation.

A window is (scale, x, y) in canvas coordinates, where the canvas spans [-1, 1] in both axes: it
covers [x - scale, x + scale] x [y - scale, y + scale]. `read` cuts a glimpse out of an image,
`write` puts a patch back. Both resample along rows and columns with `kernels.warp`: target pixel j
looks at source position pos_j = a j + b. What a window's scale and shift receive follows from
dpos, the loss's slope along each position: da = sum_j j dpos_j, db = sum_j dpos_j, so that
    read:   dscale = sum_j dpos_j n/2 u_j             dshift = sum_j dpos_j n/2
    write:  dscale = -sum_j dpos_j G/2 (x_j - shift) / scale^2,   dshift = -sum_j dpos_j G/2 / scale
with u_j, x_j the target pixels' coordinates and n the source's size, summed over both axes.
Dimension key: B images, C channels, G glimpse side, H W canvas.
"""

import numpy as np

from common.backend import xp
from common.kernels import warp, warp_back


def read(image, window, size, want_image=False):
    """glimpse(u) = image(scale u + shift), u in [-1, 1]; the image's gradient only if wanted."""
    source, target = image.shape[2:], (size, size)
    half = xp.asarray([n / 2 for n in source], window.dtype)            # (2,)
    first = xp.asarray([1 / n - 1 for n in target], window.dtype)       # (2,)  u of pixel 0
    step = xp.asarray([2 / n for n in target], window.dtype)            # (2,)
    scale, shift = window[:, :1], window[:, :0:-1]                      # (B, 1), (B, 2)  (y, x)
    a = scale * step * half                                             # (B, 2)
    b = (scale * first + shift + 1) * half - 0.5                        # (B, 2)
    glimpse = warp(image, a, b, target)                                 # (B, C, G, G)

    def back(dglimpse):
        dimage, da, db = warp_back(dglimpse, image, a, b, want_image)
        dshift = db * half
        dscale = (da * step * half + dshift * first).sum(1)
        return dimage, xp.stack([dscale, dshift[:, 1], dshift[:, 0]], 1)

    return glimpse, back


def write(patch, window, shape):
    """canvas(x) = patch((x - shift) / scale), and 0 where that lies outside the patch."""
    half = xp.asarray([n / 2 for n in patch.shape[2:]], window.dtype)   # (2,)
    first = xp.asarray([1 / n - 1 for n in shape], window.dtype)        # (2,)  x of pixel 0
    step = xp.asarray([2 / n for n in shape], window.dtype)             # (2,)
    scale, shift = window[:, :1], window[:, :0:-1]                      # (B, 1), (B, 2)  (y, x)
    a = step / scale * half                                             # (B, 2)
    u = (first - shift) / scale                                         # (B, 2)
    b = (u + 1) * half - 0.5                                            # (B, 2)
    canvas = warp(patch, a, b, shape)                                   # (B, C, H, W)

    def back(dcanvas):
        dpatch, da, db = warp_back(dcanvas, patch, a, b)
        dshift = -db * half / scale
        dscale = -(da * a + db * half * u).sum(1) / scale[:, 0]
        return dpatch, xp.stack([dscale, dshift[:, 1], dshift[:, 0]], 1)

    return canvas, back


def window_boxes(window, shape):
    """Windows (..., 3) as boxes x0, y0, x1, y1 in pixels of a canvas (H, W). Host arrays."""
    scale, x, y = np.moveaxis(window, -1, 0)
    H, W = shape
    return np.stack([(x - scale + 1) * W / 2, (y - scale + 1) * H / 2,
                     (x + scale + 1) * W / 2, (y + scale + 1) * H / 2], -1)
