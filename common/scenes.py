"""Scenes as pure functions of (seed, index): the same on every machine, in every batch.

Every scene has a generator of its own (splitmix64, keyed by seed and index), and the kernels
use nothing but + - * / and square roots, so that golden hashes hold.
Dimension key: B scenes, C channels, H = W canvas, K objects at most, N glyphs.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from common.errors import Fail

INK = np.float32(0.1)           # a pixel brighter than this belongs to the ink box
GAPS = {"disjoint": 0, "separated": 4, "overlap": None}     # pixels between ink boxes
PLACINGS, SIZINGS, GLYPHINGS = 100, 10, 100     # tries before sizes, glyphs, hope are given up
GLOW = np.float32(0.5)          # a sprite's brightness: two may add up and still be told apart
SHAPES = ("circle", "square", "diamond")        # red, green, blue


class Scenes(NamedTuple):
    images: np.ndarray          # (B, C, H, W) float32 in [0, 1]
    counts: np.ndarray          # (B,) int64
    boxes: np.ndarray           # (B, K, 4) float32 x0, y0, x1, y1 in pixels; NaN where absent
    labels: np.ndarray          # (B, K) int64, -1 where absent


# ---------------------------------------------------------------- random numbers

@njit(cache=True, nogil=True)
def mix(z):
    """The output function of splitmix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True)
def stream(seed, index):
    """The generator of scene `index`: a counter in an array of one."""
    state = np.empty(1, np.uint64)
    state[0] = mix(mix(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(index))
    return state


@njit(cache=True, nogil=True)
def uniform(state, low, high):
    """A float64 from [low, high)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    return low + (high - low) * (np.float64(mix(state[0]) >> np.uint64(11)) * 2.0**-53)


@njit(cache=True, nogil=True)
def below(state, n):
    """An integer from 0 .. n - 1."""
    return int(uniform(state, 0.0, 1.0) * n)


# ---------------------------------------------------------------- resizing

@njit(cache=True, nogil=True)
def taps(n_in, n_out):
    """First source pixel and weights of each target pixel: a triangle too wide to alias."""
    scale = n_in / n_out
    reach = max(1.0, scale)
    width = min(n_in, int(np.ceil(2 * reach)))
    first = np.empty(n_out, np.int64)
    weight = np.empty((n_out, width), np.float32)
    for j in range(n_out):
        centre = (j + 0.5) * scale - 0.5
        first[j] = min(max(0, int(np.floor(centre - reach)) + 1), n_in - width)
        total = 0.0
        for t in range(width):
            total += max(0.0, 1 - abs(first[j] + t - centre) / reach)
        for t in range(width):
            weight[j, t] = max(0.0, 1 - abs(first[j] + t - centre) / reach) / total
    return first, weight


@njit(cache=True, nogil=True)
def resize(source, out, size):
    """The square picture `source` (uint8) to out[:size, :size] (float32, 0..1), antialiased."""
    first, weight = taps(len(source), size)
    row = np.empty(len(source), np.float32)
    for i in range(size):
        row[:] = 0
        for t in range(weight.shape[1]):
            w = weight[i, t] / np.float32(255)
            for k in range(len(row)):
                row[k] += w * np.float32(source[first[i] + t, k])
        for j in range(size):
            total = np.float32(0)
            for t in range(weight.shape[1]):
                total += weight[j, t] * row[first[j] + t]
            out[i, j] = total


@njit(cache=True, nogil=True)
def ink_box(picture, size, box):
    """Tight box x0, y0, x1, y1 (exclusive) of the pixels above INK; x1 <= x0 if there are none."""
    x0, y0, x1, y1 = size, size, 0, 0
    for y in range(size):
        for x in range(size):
            if picture[y, x] > INK:
                x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x + 1), y + 1
    box[0], box[1], box[2], box[3] = x0, y0, x1, y1


@njit(cache=True, nogil=True)
def add_clipped(canvas, picture, size, left, top):
    """canvas = min(1, canvas + picture[:size, :size]); what falls outside is lost."""
    for y in range(max(0, -top), min(size, len(canvas) - top)):
        for x in range(max(0, -left), min(size, len(canvas) - left)):
            total = canvas[top + y, left + x] + picture[y, x]
            canvas[top + y, left + x] = min(np.float32(1), total)


# ---------------------------------------------------------------- glyph scenes

@njit(cache=True, nogil=True)
def place(state, ink, put, n, canvas, gap):
    """Put each picture where its ink box may lie; False if two boxes come closer than `gap`."""
    for k in range(n):
        w, h = ink[k, 2] - ink[k, 0], ink[k, 3] - ink[k, 1]
        if w <= 0:
            return False
        x, y = below(state, canvas - w + 1), below(state, canvas - h + 1)
        put[k, 0], put[k, 1] = x - ink[k, 0], y - ink[k, 1]
        for j in range(k):
            left, top = put[j, 0] + ink[j, 0], put[j, 1] + ink[j, 1]
            right, bottom = put[j, 0] + ink[j, 2], put[j, 1] + ink[j, 3]
            if (max(x, left) < min(x + w, right) + gap
                    and max(y, top) < min(y + h, bottom) + gap):
                return False
    return True


@njit(cache=True, nogil=True)
def draw_glyph_scenes(glyphs, glyph_labels, seed, start, low, high, choices, gap, fixed,
                      images, counts, boxes, labels):
    """Fill the last four arguments; False if objects cannot be placed."""
    K, canvas = labels.shape[1], images.shape[2]
    pictures, sizes = np.empty((K, high, high), np.float32), np.empty(K, np.int64)
    which, ink, put = np.empty(K, np.int64), np.empty((K, 4), np.int64), np.empty((K, 2), np.int64)
    for b in range(len(images)):
        state = stream(seed, start + np.uint64(b))
        counts[b] = n = choices[below(state, len(choices))]
        placed = False
        for attempt in range(PLACINGS * SIZINGS * GLYPHINGS):
            for k in range(n if attempt % PLACINGS == 0 else 0):
                if attempt % (PLACINGS * SIZINGS) == 0:
                    which[k] = below(state, len(glyphs))
                sizes[k] = low + below(state, high - low + 1)
                resize(glyphs[which[k]], pictures[k], sizes[k])
                ink_box(pictures[k], sizes[k], ink[k])
            placed = fixed or place(state, ink, put, n, canvas, gap)
            if placed:
                break
        if not placed:
            return False
        for k in range(n):
            left, top = (0, 0) if fixed else (put[k, 0], put[k, 1])
            for i in range(4):
                boxes[b, k, i] = ink[k, i] + (top if i % 2 else left)
            labels[b, k] = glyph_labels[which[k]]
            add_clipped(images[b, 0], pictures[k], sizes[k], left, top)
    return True


def multi_digits(glyphs, seed, start, batch, canvas=50, lo=20, hi=28, counts=(0, 1, 2),
                 layout="disjoint"):
    """Scenes start .. start + batch - 1 of the stream `seed`: digits, additive, clipped to 1.

    Each glyph's frame gets a size uniform in lo .. hi, and a place uniform among those where its
    ink (the tight box of pixels above 0.1) lies on the canvas. Layouts: ink boxes "disjoint",
    "separated" by 4 pixels or more, or free to "overlap". What does not fit is placed again, then
    sized again, then exchanged for other digits; the count stays.
    """
    if layout not in GAPS:
        raise Fail(f"layout {layout!r} is unknown, choose from {', '.join(GAPS)}")
    if not 1 <= lo <= hi:
        raise Fail(f"digit sizes must obey 1 <= low <= high, got {lo} and {hi}")
    if hi > canvas:
        raise Fail(f"digits of {hi} pixels do not fit a canvas of {canvas}")
    scenes, choices = blank(batch, 1, canvas, counts)
    gap = -canvas if layout == "overlap" else GAPS[layout]
    if not draw_glyph_scenes(glyphs.images, glyphs.labels, *key(seed, start), lo, hi, choices, gap,
                             False, *scenes):
        raise Fail(f"found no {layout} places for {max(counts)} digits of {lo} to {hi} pixels on a "
                   f"canvas of {canvas}")
    return scenes


def characters(glyphs, seed, start, batch, canvas=50):
    """One character a scene, its frame filling the canvas."""
    scenes, choices = blank(batch, 1, canvas, (1,))
    draw_glyph_scenes(glyphs.images, glyphs.labels, *key(seed, start), canvas, canvas, choices, 0,
                      True, *scenes)
    return scenes


def blank(batch, channels, canvas, counts):
    """Scenes with nothing in them yet, and the counts to choose from as an array."""
    if batch < 1:
        raise Fail(f"batch size must be at least 1, got {batch}")
    if not len(counts) or min(counts) < 0:
        raise Fail(f"counts must be whole numbers from 0, got {tuple(counts)}")
    if canvas < 1:
        raise Fail(f"the canvas must have at least 1 pixel, got {canvas}")
    K = max(counts)
    return Scenes(np.zeros((batch, channels, canvas, canvas), np.float32),
                  np.zeros(batch, np.int64), np.full((batch, K, 4), np.nan, np.float32),
                  np.full((batch, K), -1)), np.array(counts, np.int64)


def key(seed, start):
    """Any whole numbers as the unsigned ones that the generators take."""
    return np.uint64(seed % 2**64), np.uint64(start % 2**64)


# ---------------------------------------------------------------- sprites

@njit(cache=True, nogil=True)
def outside(shape, dx, dy, radius):
    """How far a point lies outside the shape (negative: inside)."""
    if shape == 0:
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == 1:
        return max(abs(dx), abs(dy)) - radius
    return (abs(dx) + abs(dy) - radius) * np.sqrt(0.5)


@njit(cache=True, nogil=True)
def draw_sprite_scenes(seed, start, low, high, choices, images, counts, boxes, labels):
    """Fill the last four arguments."""
    canvas, size = images.shape[2], int(high) + 2
    picture, ink = np.empty((size, size), np.float32), np.empty(4, np.int64)
    for b in range(len(images)):
        state = stream(seed, start + np.uint64(b))
        counts[b] = choices[below(state, len(choices))]
        for k in range(counts[b]):
            shape, radius = below(state, 3), uniform(state, low / 2, high / 2)
            x, y = uniform(state, radius, canvas - radius), uniform(state, radius, canvas - radius)
            left, top = int(x - radius) - 1, int(y - radius) - 1
            for i in range(size):
                for j in range(size):
                    away = outside(shape, left + j + 0.5 - x, top + i + 0.5 - y, radius)
                    picture[i, j] = GLOW * min(1.0, max(0.0, 0.5 - away))
            ink_box(picture, size, ink)
            for i in range(4):
                boxes[b, k, i] = ink[i] + (top if i % 2 else left)
            labels[b, k] = shape
            add_clipped(images[b, shape], picture, size, left, top)


def sprites(seed, start, batch, canvas=50, counts=(0, 1, 2)):
    """Red circles, green squares, blue diamonds of 12 to 20 pixels, half bright; label = shape."""
    if canvas < 20:
        raise Fail(f"sprites of 20 pixels do not fit a canvas of {canvas}")
    scenes, choices = blank(batch, 3, canvas, counts)
    draw_sprite_scenes(*key(seed, start), 12, 20, choices, *scenes)
    return scenes
