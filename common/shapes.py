"""Scenes of shapes whose masks, depth order and factors are known: functions of (seed, index).

The random numbers are those of common/scenes.py, and the kernels use nothing but + - * / and roots,
so that golden hashes hold. Dimension key: B scenes, C channels, H = W canvas, K objects at most.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from common import scenes
from common.errors import Fail
from common.scenes import below, key, stream, uniform


class Layers(NamedTuple):
    """Positions and lengths are in pixels. Factors are NaN where absent or not varied."""
    images: np.ndarray          # float32 in [0, 1]
    counts: np.ndarray
    masks: np.ndarray           # who is seen: 0 background, k + 1 object k, -1 two at once
    amodal: np.ndarray          # all that an object covers, seen or hidden
    order: np.ndarray           # 0 is nearest, -1 absent; all 0 where nothing can hide
    kinds: np.ndarray           # which shape, -1 absent
    colours: np.ndarray
    sizes: np.ndarray           # radius of the circle around it
    turns: np.ndarray           # cosine and sine of its angle
    centres: np.ndarray         # x, y


def blank(batch, channels, canvas, counts):
    """Layers with nothing in them yet, and the counts to choose from as an array."""
    empty, choices = scenes.blank(batch, channels, canvas, counts)
    objects = (batch, max(counts))
    images, kinds = empty.images, empty.labels                              # (B, C, H, H), (B, K)
    masks = np.zeros((batch, canvas, canvas), np.int64)                     # (B, H, H)
    amodal = np.zeros((*objects, canvas, canvas), bool)                     # (B, K, H, H)
    order = np.full(objects, -1)                                            # (B, K)
    colours = np.full((*objects, channels), np.nan, np.float32)             # (B, K, C)
    sizes = np.full(objects, np.nan, np.float32)                            # (B, K)
    turns, centres = np.full((2, *objects, 2), np.nan, np.float32)          # (B, K, 2), (B, K, 2)
    return Layers(images, empty.counts, masks, amodal, order, kinds, colours, sizes, turns,
                  centres), choices


# ---------------------------------------------------------------- stamps: tetris, shapes

PLACINGS = 3_000_000            # tries to place all pieces of a scene
BEVEL = np.array([[191, 255, 255, 255, 223], *3 * [[127, 159, 159, 159, 191]],
                  [95, 63, 63, 63, 127]], np.float32) / 255
TETROMINOES = ("####", "## ##", "### .#.", "### #..", "### ..#", ".## ##.", "##. .##")
PALETTE = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]], np.float32)
WHITE = np.ones((1, 1), np.float32)


def oriented_tetrominoes():
    """The 19 pictures that seven tetrominoes show when turned, in the order of TETROMINOES."""
    grids = []
    for rows in TETROMINOES:
        piece = np.array([[cell == "#" for cell in row] for row in rows.split()])
        for turn in range(4):
            turned = np.rot90(piece, turn)
            if not any(np.array_equal(turned, grid) for grid in grids):
                grids.append(turned)
    return [np.kron(grid, BEVEL) for grid in grids]


def outlines():
    """Triangle, triangle upside down (both 12 x 7 pixels), square (7 x 7); lines 2 pixels thick."""
    y, x = np.mgrid[:7, :12]
    off = abs(x - 5.5)
    triangle = (off < 1 + np.minimum(y, 5)) & ~((off < y - 2) & (y < 5))
    square = np.pad(np.zeros((3, 3), bool), 2, constant_values=True)
    return [triangle, triangle[::-1], square]


def stamps(pictures):
    """Pictures in the corners of equal frames, and their heights and widths."""
    side = max(max(picture.shape) for picture in pictures)
    frames = np.zeros((len(pictures), side, side), np.float32)
    for frame, picture in zip(frames, pictures, strict=True):
        frame[:picture.shape[0], :picture.shape[1]] = picture
    return frames, np.array([picture.shape for picture in pictures])


@njit(cache=True, nogil=True)
def scatter(state, frames, extents, apart, s, b):
    """Draw places and fill masks; False if two shapes share a pixel and must be `apart`."""
    s.masks[b] = 0
    for k in range(s.counts[b]):
        kind, canvas = s.kinds[b, k], s.masks.shape[1]
        h, w = extents[kind]
        left, top = below(state, canvas - w + 1), below(state, canvas - h + 1)
        s.centres[b, k, 0], s.centres[b, k, 1] = left + w / 2, top + h / 2
        for i in range(h):
            for j in range(w):
                if frames[kind, i, j] > 0:
                    taken = s.masks[b, top + i, left + j] != 0
                    if taken and apart:
                        return False
                    s.masks[b, top + i, left + j] = -1 if taken else k + 1
    return True


@njit(cache=True, nogil=True)
def press(frames, extents, s, b):
    """Draw the shapes where they have been scattered."""
    for k in range(s.counts[b]):
        s.order[b, k], kind = 0, s.kinds[b, k]
        h, w = extents[kind]
        left, top = int(s.centres[b, k, 0] - w / 2), int(s.centres[b, k, 1] - h / 2)
        for i in range(h):
            for j in range(w):
                if frames[kind, i, j] > 0:
                    s.amodal[b, k, top + i, left + j] = True
                    for c in range(s.images.shape[1]):
                        s.images[b, c, top + i, left + j] = s.colours[b, k, c] * frames[kind, i, j]


@njit(cache=True, nogil=True)
def draw_stamps(frames, extents, palette, apart, seed, start, s):
    """Fill s; False if the pieces of a scene find no places apart."""
    s.counts[:] = s.kinds.shape[1]
    for b in range(len(s.images)):
        state = stream(seed, start + np.uint64(b))
        for k in range(s.counts[b]):
            s.kinds[b, k] = below(state, len(frames))
            s.colours[b, k] = palette[below(state, len(palette))]
        placed = False
        for _ in range(PLACINGS):
            placed = scatter(state, frames, extents, apart, s, b)
            if placed:
                break
        if not placed:
            return False
        press(frames, extents, s, b)
    return True


def tetris(seed, start, batch, objects=3):
    """Tetrominoes of bevelled 5 x 5 blocks on 35 x 35 black pixels; they may touch, not overlap.

    Kind (19), colour (6) and place are uniform; if any overlap, all are placed again
    (six pieces take some 60 ms a scene).
    """
    s, _ = blank(batch, 3, 35, (objects,))
    if not draw_stamps(*stamps(oriented_tetrominoes()), PALETTE, True, *key(seed, start), s):
        raise Fail(f"found no places for {objects} tetrominoes on 35 x 35 pixels")
    return s


def shapes(seed, start, batch, objects=3):
    """Outlines of triangles (0 up, 1 down) and squares (2), white on 28 x 28 black pixels.

    They may cross; masks are -1 where they do. Kind and place are uniform.
    """
    s, _ = blank(batch, 1, 28, (objects,))
    draw_stamps(*stamps(outlines()), WHITE, False, *key(seed, start), s)
    return s


# ---------------------------------------------------------------- layers: polygons, sprites

SQUARE, ELLIPSE, HEART = 0, 1, 2        # kinds from 3 are regular polygons of so many edges
COSINE = np.array([0, 0, 0, -0.5, 0, (5**0.5 - 1) / 4, 0.5])        # of the turn between edges
FLAT = 0.6                              # the ellipse's short axis to its long one
HEART_REACH, HEART_MIDDLE = 18.25, -2.5     # the circle around the heart's curve
REACH = 14.0                            # a sprite of scale 1 fits a circle of this radius


@njit(cache=True, nogil=True)
def outside(kind, x, y):
    """How far (x, y) lies outside a shape in the unit circle; of ellipse and heart only the sign.

    The heart is the curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t: for each x
    one point has cos t > 0, one cos t < 0, and the inside lies between the two.
    """
    if kind == SQUARE:
        return max(abs(x), abs(y)) - np.sqrt(0.5)
    if kind == ELLIPSE:
        return x * x + y * y / FLAT**2 - 1
    if kind == HEART:
        sine = np.cbrt(HEART_REACH / 16 * abs(x))
        if sine > 1:
            return 1.0
        c, up = np.sqrt(1 - sine * sine), HEART_MIDDLE - HEART_REACH * y
        even, odd = 4 - 2 * c**2 - 8 * c**4, 19 * c - 8 * c**3
        return abs(up - even) - odd
    cos = COSINE[kind]
    sin, away = np.sqrt(1 - cos * cos), x
    for _ in range(kind - 1):
        x, y = cos * x - sin * y, sin * x + cos * y
        away = max(away, x)
    return away - np.sqrt((1 + cos) / 2)


@njit(cache=True, nogil=True)
def paint(s, b, sharp):
    """Paint the objects of scene b over its background, the farthest first.

    An object covers the pixels whose middle it holds; edges are antialiased unless `sharp`.
    """
    C, canvas = s.images.shape[1:3]
    for k in np.argsort(-s.order[b, :s.counts[b]]):
        radius, (x, y), (cos, sin) = s.sizes[b, k], s.centres[b, k], s.turns[b, k]
        for i in range(max(0, int(y - radius) - 1), min(canvas, int(y + radius) + 2)):
            for j in range(max(0, int(x - radius) - 1), min(canvas, int(x + radius) + 2)):
                dx, dy = (j + 0.5 - x) / radius, (i + 0.5 - y) / radius
                away = outside(s.kinds[b, k], cos * dx + sin * dy, cos * dy - sin * dx)
                if away <= 0:
                    s.amodal[b, k, i, j], s.masks[b, i, j] = True, k + 1
                cover = min(1.0, max(0.0, 0.5 - away * radius))
                if sharp:
                    cover = 1.0 if away <= 0 else 0.0
                for c in range(C if cover > 0 else 0):
                    behind = (1 - cover) * s.images[b, c, i, j]
                    s.images[b, c, i, j] = behind + cover * s.colours[b, k, c]


@njit(cache=True, nogil=True)
def stack_and_turn(state, s, b):
    """A random depth order, and a random angle for each object."""
    n = s.counts[b]
    for k in range(n):
        j = below(state, k + 1)
        s.order[b, k] = s.order[b, j]
        s.order[b, j] = k
        cos, sin = 1.0, 1.0
        while not 0.01 < cos * cos + sin * sin <= 1:
            cos, sin = uniform(state, -1.0, 1.0), uniform(state, -1.0, 1.0)
        length = np.sqrt(cos * cos + sin * sin)
        s.turns[b, k, 0], s.turns[b, k, 1] = cos / length, sin / length


@njit(cache=True, nogil=True)
def draw_polygons(seed, start, unit, s):
    """Fill s; `unit` is the length of a pixel of 64."""
    s.counts[:] = s.kinds.shape[1]
    middle = s.images.shape[2] / 2
    for b in range(len(s.images)):
        state = stream(seed, start + np.uint64(b))
        stack_and_turn(state, s, b)
        for k in range(s.counts[b]):
            s.kinds[b, k], s.sizes[b, k] = 3 + below(state, 4), unit * uniform(state, 7.5, 12.5)
            for c in range(3):
                s.colours[b, k, c] = uniform(state, 0.0, 1.0)
            for i in range(2):
                s.centres[b, k, i] = middle + unit * uniform(state, -5.0, 5.0)
        paint(s, b, False)


def polygons(seed, start, batch, size=64, objects=2):
    """Overlapping polygons on black, antialiased; lengths below are for 64 pixels.

    3 to 6 edges, radius 7.5 to 12.5, colour from the RGB cube, centre up to 5 from the middle along
    each axis, all uniform. What the paper leaves open: they are regular, the radius reaches the
    corners, any angle, one may hide another, and numbers say nothing about depth.
    """
    s, _ = blank(batch, 3, size, (objects,))
    draw_polygons(*key(seed, start), size / 64, s)
    return s


@njit(cache=True, nogil=True)
def draw_sprites(seed, start, unit, choices, s):
    """Fill s; `unit` is the length of a pixel of 64."""
    C, canvas = s.images.shape[1:3]
    for b in range(len(s.images)):
        state = stream(seed, start + np.uint64(b))
        s.counts[b] = choices[below(state, len(choices))]
        s.images[b] = uniform(state, 0.0, 1.0) if C == 3 else 0.0
        stack_and_turn(state, s, b)
        for k in range(s.counts[b]):
            radius = unit * REACH * uniform(state, 0.5, 1.0)
            s.kinds[b, k], s.sizes[b, k], s.colours[b, k] = below(state, 3), radius, 1
            for i in range(2):
                s.centres[b, k, i] = uniform(state, radius, canvas - radius)
            hue = uniform(state, 0.0, 6.0)
            for c in range(C if C == 3 else 0):
                bright = abs(hue - 3) - 1 if c == 0 else 2 - abs(hue - 2 * c)
                s.colours[b, k, c] = min(1.0, max(0.0, bright))
        paint(s, b, True)


def dsprites(seed, start, batch, size=64, counts=(2, 3, 4), colour=True):
    """Squares (0), ellipses (1) and hearts (2) that hide one another, with sharp edges.

    Scale .5 to 1 (radius 7 to 14 on 64 pixels), any angle, anywhere on the canvas as a whole; hues
    of full saturation and value on any grey, or white on black with one channel. All uniform.
    """
    s, choices = blank(batch, 3 if colour else 1, size, counts)
    draw_sprites(*key(seed, start), size / 64, choices, s)
    return s
