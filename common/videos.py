"""Moving digits as pure functions of (seed, index), as `common/scenes.py` has them for scenes.

Dimension key: B videos, T frames, K digits at most, S canvas, N glyphs.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from common.errors import Fail
from common.scenes import INK, PLACINGS, below, blank, ink_box, key, place, resize, stream, uniform

SIZE, GLYPHINGS = 28, 100       # a glyph's frame in pixels; tries before hope is given up
# How fast at most (pixels a frame), how much faster per frame at most, the acceleration's noise,
# and which share of a digit may lie beyond the left or upper and the right or lower edge.
MOTIONS = {"paper": (5.0, 0.0, 0.0, 0.5, 0.5),
           "gentle": (2.5, 0.0, 0.0, 0.25, 0.25),
           "fast": (10.0, 3.0, 0.01, 0.5, 0.5),
           "released": (10.0, 3.0, 0.01, 0.0, 1.0)}


class Videos(NamedTuple):
    images: np.ndarray          # (B, T, 1, S, S) float32 in [0, 1]
    counts: np.ndarray          # (B, T) int64: digits, seen or not; the same in all frames
    boxes: np.ndarray           # (B, T, K, 4) float32 around the ink on the canvas; NaN without any
    labels: np.ndarray          # (B, K) int64, -1 where absent
    visible: np.ndarray         # (B, T, K) float32: share of the digit's ink that is on the canvas


@njit(cache=True, nogil=True)
def step(state, move, side, canvas, motion):
    """Place, velocity, acceleration along one axis a frame later; edges turn all three round."""
    speed, push, noise, before, beyond = motion
    low, high = -before * side, canvas - (1 - beyond) * side
    at, velocity = move[0] + move[1], move[1] + move[2]
    acceleration = move[2] + uniform(state, -1.0, 1.0) * noise * np.sqrt(3.0)
    if at < low or at > high:
        at = 2 * (low if at < low else high) - at
        velocity, acceleration = -velocity, -acceleration
    move[0] = min(max(at, low), high)
    move[1] = min(max(velocity, -speed), speed)
    move[2] = min(max(acceleration, -push), push)


@njit(cache=True, nogil=True)
def show(canvas, picture, left, top, box):
    """canvas = max(canvas, picture); the tight box of what is seen of it, and how much that is."""
    size, S, seen, total = len(picture), len(canvas), 0.0, 0.0
    x0, y0, x1, y1 = S, S, 0, 0
    for i in range(size):
        for j in range(size):
            ink, y, x = picture[i, j], top + i, left + j
            total += ink
            if 0 <= y < S and 0 <= x < S:
                seen += ink
                canvas[y, x] = max(canvas[y, x], ink)
                if ink > INK:
                    x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x + 1), y + 1
    if x1 > x0:
        box[0], box[1], box[2], box[3] = x0, y0, x1, y1
    return seen / total


@njit(cache=True, nogil=True)
def draw_videos(glyphs, glyph_labels, seed, start, choices, motion, images, counts, boxes, labels,
                visible):
    """Fill the last five arguments; False if digits cannot be placed."""
    (B, T, _, S, _), K = images.shape, labels.shape[1]
    pictures, ink = np.empty((K, SIZE, SIZE), np.float32), np.empty((K, 4), np.int64)
    which, put = np.empty(K, np.int64), np.empty((K, 2), np.int64)
    moves = np.empty((K, 2, 3))                 # x and y: place, velocity, acceleration
    for b in range(B):
        state = stream(seed, start + np.uint64(b))
        counts[b] = n = choices[below(state, len(choices))]
        placed = False
        for attempt in range(PLACINGS * GLYPHINGS):
            for k in range(n if attempt % PLACINGS == 0 else 0):
                which[k] = below(state, len(glyphs))
                resize(glyphs[which[k]], pictures[k], SIZE)
                ink_box(pictures[k], SIZE, ink[k])
            placed = place(state, ink, put, n, S, 0)
            if placed:
                break
        if not placed:
            return False
        for k in range(n):
            labels[b, k] = glyph_labels[which[k]]
            for axis in range(2):
                moves[k, axis, 0] = put[k, axis] + ink[k, axis]
                moves[k, axis, 1] = uniform(state, -motion[0], motion[0])
                moves[k, axis, 2] = uniform(state, -motion[1], motion[1])
        for t in range(T):
            for k in range(n):
                for axis in range(2):
                    if t > 0:
                        side = ink[k, axis + 2] - ink[k, axis]
                        step(state, moves[k, axis], side, S, motion)
                    put[k, axis] = int(np.floor(moves[k, axis, 0] + 0.5)) - ink[k, axis]
                visible[b, t, k] = show(images[b, t, 0], pictures[k], put[k, 0], put[k, 1],
                                        boxes[b, t, k])
    return True


def moving_digits(glyphs, seed, start, count, frames=10, canvas=50, counts=(0, 1, 2),
                  motion="paper"):
    """Videos start .. start + count - 1 of the stream `seed`.

    A video keeps its digits, drawn in frames of 28 pixels. In the first frame the boxes of their
    ink (pixels above 0.1) lie on the canvas and apart; later they may leave in part, come back,
    and overlap, the brighter pixel in front. Places are rounded to whole pixels. Along each axis
    a digit has a velocity and an acceleration, drawn uniformly up to the motion's bounds and kept
    within them; an acceleration has a little noise. At an edge, place, velocity and acceleration
    are reflected; the motion says how much of the box may lie beyond. Motions:

    paper       5 pixels a frame, never accelerating; half of the box may lie beyond an edge
                (the paper's text gives these rules, and no speeds)
    gentle      2.5 pixels a frame; a quarter of the box
    fast        10 pixels a frame, accelerating by up to 3 (the speeds of the released generator)
    released    `fast` with the edges of the released generator: digits leave to the right and
                below only, there altogether, and are counted all the same

    A shorter video is the beginning of a longer one.
    """
    if motion not in MOTIONS:
        raise Fail(f"motion {motion!r} is unknown, choose from {', '.join(MOTIONS)}")
    if frames < 1:
        raise Fail(f"a video must have at least 1 frame, got {frames}")
    if canvas < SIZE:
        raise Fail(f"digits of {SIZE} pixels do not fit a canvas of {canvas}")
    scenes, choices = blank(count, 1, 1, counts)
    B, T, K = count, frames, max(counts)
    videos = Videos(np.zeros((B, T, 1, canvas, canvas), np.float32), np.zeros((B, T), np.int64),
                    np.full((B, T, K, 4), np.nan, np.float32), scenes.labels,
                    np.zeros((B, T, K), np.float32))
    if not draw_videos(glyphs.images, glyphs.labels, *key(seed, start), choices, MOTIONS[motion],
                       *videos):
        raise Fail(f"found no places apart for {K} digits on a canvas of {canvas}")
    return videos
