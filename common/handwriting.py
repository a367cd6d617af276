"""Handwriting that nobody wrote: digits and characters drawn stroke by stroke.

A way of writing is a few points that a pen passes; every picture is another hand's trace of it.
"""


import numpy as np
from numba import njit

from common.scenes import below, stream, uniform

CURVE = 8                                                       # straight pieces between two points
DRAWN_DIGITS = {"train": (1, 10_000), "test": (2, 2_000)}       # seed, pictures
DRAWN_CHARACTERS = {"train": (3, 200), "test": (4, 50)}         # seed, characters

# Each digit's ways of being written: x y of the points a pen passes, in a box of height 1.
# A point given twice is a corner; | lifts the pen.
WAYS = """
0  .55 .02  .22 .12  .03 .5  .2 .9  .5 1  .82 .87  .97 .5  .8 .12  .5 0  .4 .06
0  .5 0  .15 .2  .02 .6  .3 .98  .7 .95  .98 .55  .85 .15  .55 .02  .45 .1
0  .7 .08  .4 0  .08 .35  .08 .75  .4 1  .8 .8  .95 .4  .75 .06  .5 .05
1  .5 0  .5 .35  .5 .7  .5 1
1  .55 0  .5 .5  .47 1
1  .5 0  .51 .5  .5 1
1  .3 .22  .52 0  .52 0  .52 .5  .5 1
1  .33 .2  .5 0  .5 0  .5 .5  .5 .98 | .28 1  .5 .98  .74 .99
2  .08 .25  .3 .02  .68 .04  .83 .3  .6 .62  .05 .97  .05 .97  .5 .95  .98 .96
2  .1 .2  .4 0  .8 .12  .72 .5  .35 .85  .08 .95  .1 .78  .4 .8  .7 .97  1 .9
2  .05 .12  .4 0  .78 .14  .75 .42  .4 .75  .1 1  .1 1  .5 .93  .9 .98
3  .1 .14  .42 0  .78 .12  .72 .36  .4 .47  .4 .47  .8 .56  .9 .8  .55 1  .05 .9
3  .1 .04  .5 .02  .85 .03  .85 .03  .42 .42  .42 .42  .8 .52  .88 .8  .5 1  .05 .92
3  .15 .1  .5 0  .8 .2  .6 .43  .35 .48  .7 .52  .88 .75  .6 .98  .1 .95
4  .18 0  .1 .3  .15 .53  .5 .55  .92 .48 | .8 .02  .76 .5  .7 1
4  .65 0  .35 .35  .04 .64  .04 .64  .5 .64  .95 .6 | .66 .3  .64 .65  .62 1
4  .6 0  .3 .35  .05 .62  .05 .62  .5 .63  .95 .6 | .66 0  .66 .5  .64 1
4  .1 .05  .12 .4  .3 .55  .6 .48  .82 .3  .85 .05  .85 .05  .8 .5  .75 1
5  .22 .02  .18 .42  .18 .42  .5 .36  .86 .58  .78 .9  .4 1  .05 .9 | .22 .03  .55 .03  .9 0
5  .9 .02  .3 .04  .3 .04  .2 .43  .2 .43  .55 .38  .86 .6  .72 .92  .38 1  .04 .92
5  .85 0  .4 .05  .25 .2  .3 .42  .65 .55  .8 .8  .5 1  .1 .92
6  .72 0  .35 .22  .1 .62  .25 .96  .65 .97  .85 .75  .62 .54  .28 .62  .12 .78
6  .5 0  .2 .4  .12 .75  .35 1  .72 .9  .75 .64  .45 .56  .16 .74
6  .85 .05  .5 .1  .15 .5  .12 .85  .45 1  .82 .84  .7 .58  .4 .56  .15 .75
7  .05 .06  .5 .04  .92 .05  .92 .05  .62 .5  .45 1
7  .05 .18  .08 .04  .08 .04  .5 .05  .9 .02  .9 .02  .68 .4  .5 1
7  .05 .05  .5 .05  .92 .03  .92 .03  .6 .5  .42 1 | .3 .52  .6 .5  .88 .5
7  .08 .1  .45 .03  .88 .06  .88 .06  .8 .3  .55 .62  .45 1
8  .8 .14  .5 0  .15 .2  .42 .45  .82 .74  .5 1  .12 .78  .48 .5  .8 .25  .72 .06
8  .5 .48  .18 .25  .5 0  .82 .22  .5 .48  .12 .76  .5 1  .88 .75  .5 .48
8  .85 .1  .4 .02  .2 .22  .5 .46  .8 .72  .55 1  .15 .85  .35 .58  .7 .35  .88 .12
9  .84 .2  .5 .02  .12 .22  .3 .5  .68 .42  .84 .18  .84 .18  .82 .6  .75 1
9  .82 .15  .45 .02  .1 .28  .35 .52  .75 .35  .84 .1  .84 .1  .8 .6  .55 .95  .15 .92
9  .75 .1  .4 .03  .12 .25  .3 .48  .7 .4  .82 .2  .74 .6  .55 1
"""


def points(text):
    """Labels (W,) and points (W, P, 2) of many ways of writing; NaN where the pen is up."""
    lines = [line.replace("|", "nan nan").split() for line in text.strip().splitlines()]
    ways = np.full((len(lines), max(map(len, lines)) // 2 + 1, 2), np.nan)
    for way, (_, *numbers) in zip(ways, lines, strict=True):
        way[:len(numbers) // 2] = np.reshape(np.array(numbers, float), (-1, 2))
    return np.array([int(line[0]) for line in lines]), ways


def invented(seed, characters):
    """Labels and points of characters that nobody writes: two to four random strokes each."""
    rng = np.random.default_rng(seed)
    ways = np.full((characters, 24, 2), np.nan)
    for way in ways:
        row = before = 0
        for stroke in range(rng.integers(2, 5)):
            n = rng.integers(2, 6)
            hops = rng.uniform(-0.35, 0.35, 2) + rng.uniform(-0.45, 0.45, (n, 2))
            hops[0] = rng.uniform(0.2, 0.8, 2)
            if stroke and rng.random() < 0.6:                       # begin on the stroke before
                hops[0] = way[row - 1 - rng.integers(1, before + 1)]
            way[row:row + n] = np.clip(hops.cumsum(0), 0, 1)
            row, before = row + n + 1, n
    return np.arange(characters), ways


def drawn_digits(split):
    """(images (N, 28, 28) uint8, labels) much like MNIST's "train" or "test"."""
    return draw(*points(WAYS), *DRAWN_DIGITS[split], size=28, box=20, pen=1.3)


def drawn_characters(split):
    """(images (N, 50, 50) uint8, labels): 20 hands for each of many invented characters."""
    seed, count = DRAWN_CHARACTERS[split]
    return draw(*invented(seed, count), seed, 20 * count, size=50, box=36, pen=1.1)


def draw(labels, ways, seed, count, size, box, pen):
    """(count, size, size) handwriting: a label each, any of its ways, a hand of its own."""
    first = np.searchsorted(labels, np.arange(labels.max() + 2))
    images, drawn = np.zeros((count, size, size), np.uint8), np.empty(count, np.int64)
    draw_handwriting(ways, first, np.uint64(seed), box, pen, images, drawn)
    return images, drawn


@njit(cache=True, nogil=True)
def noise(state):
    """Bell-shaped, with mean 0 and standard deviation 1."""
    return uniform(state, -1.0, 1.0) + uniform(state, -1.0, 1.0) + uniform(state, -1.0, 1.0)


@njit(cache=True, nogil=True)
def write_down(way, state, path):
    """One hand's trace of a way of writing: rows x, y, pen pressure, pen down. Returns its length.

    The points are jittered, slanted, stretched and turned, and joined by Catmull-Rom curves.
    """
    slant, width = 0.12 + 0.2 * noise(state), uniform(state, 0.5, 1.05)
    bend, turn = 0.12 * noise(state), 0.05 * noise(state)
    cos, sin = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    hand = np.empty((len(way), 3))
    for k in range(len(way)):
        if k and way[k, 0] == way[k - 1, 0] and way[k, 1] == way[k - 1, 1]:
            hand[k, 0], hand[k, 1], hand[k, 2] = hand[k - 1, 0], hand[k - 1, 1], hand[k - 1, 2]
            continue
        y = way[k, 1] - 0.5 + 0.028 * noise(state)
        x = width * (way[k, 0] - 0.5 + 0.035 * noise(state)) - slant * y + bend * y * y
        hand[k, 0], hand[k, 1], hand[k, 2] = cos * x - sin * y, sin * x + cos * y, noise(state)
    n = 0
    for k in range(len(way) - 1):
        corner = hand[k, 0] == hand[k + 1, 0] and hand[k, 1] == hand[k + 1, 1]
        if corner or np.isnan(hand[k, 0]) or np.isnan(hand[k + 1, 0]):
            continue
        starts = k == 0 or np.isnan(hand[k - 1, 0])
        before = k if starts else k - 1
        after = k + 1 if k + 2 == len(way) or np.isnan(hand[k + 2, 0]) else k + 2
        for step in range(0 if starts else 1, CURVE + 1):
            t = step / CURVE
            for i in range(3):
                a, b, c, d = hand[before, i], hand[k, i], hand[k + 1, i], hand[after, i]
                path[n, i] = b + t * (c - a + t * (2 * a - 5 * b + 4 * c - d
                                                   + t * (3 * (b - c) + d - a))) / 2
            path[n, 3] = step
            n += 1
    return n


@njit(cache=True, nogil=True)
def fit(path, n, size, box, radius):
    """Scale a trace to a box of `box` pixels, its centre of mass in the middle of the picture."""
    x0 = y0 = np.inf
    x1 = y1 = -np.inf
    mass = mass_x = mass_y = 0.0
    for k in range(n):
        x, y = path[k, 0], path[k, 1]
        x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x), max(y1, y)
        if path[k, 3]:
            dx, dy = x - path[k - 1, 0], y - path[k - 1, 1]
            length = np.sqrt(dx * dx + dy * dy)
            mass += length
            mass_x += length * (x - dx / 2)
            mass_y += length * (y - dy / 2)
    scale = (box - 2 * radius) / max(x1 - x0, y1 - y0)
    edge = 1.4 * radius + 0.75                                      # no ink is cut off
    left = min(max(size / 2 - scale * mass_x / mass, edge - scale * x0), size - edge - scale * x1)
    top = min(max(size / 2 - scale * mass_y / mass, edge - scale * y0), size - edge - scale * y1)
    for k in range(n):
        path[k, 0], path[k, 1] = left + scale * path[k, 0], top + scale * path[k, 1]


@njit(cache=True, nogil=True)
def ink_segment(image, x0, y0, x1, y1, radius, soft):
    """A straight piece of line: full ink inside, fading over `soft` pixels at the edge."""
    reach = radius + soft
    dx, dy = x1 - x0, y1 - y0
    squared = dx * dx + dy * dy + 1e-12
    for i in range(max(0, int(min(y0, y1) - reach)), min(len(image), int(max(y0, y1) + reach) + 1)):
        for j in range(max(0, int(min(x0, x1) - reach)),
                       min(len(image), int(max(x0, x1) + reach) + 1)):
            x, y = j + 0.5 - x0, i + 0.5 - y0
            t = min(1.0, max(0.0, (x * dx + y * dy) / squared))
            away = np.sqrt((x - t * dx) * (x - t * dx) + (y - t * dy) * (y - t * dy))
            value = min(1.0, max(0.0, 0.5 + (radius - away) / soft))
            image[i, j] = max(image[i, j], np.uint8(255 * value + 0.5))


@njit(cache=True, nogil=True)
def draw_handwriting(ways, first, seed, box, pen, images, labels):
    """Fill images and labels."""
    path = np.empty((ways.shape[1] * (CURVE + 1), 4))
    for b in range(len(images)):
        state = stream(seed, np.uint64(b))
        labels[b] = below(state, len(first) - 1)
        way = first[labels[b]] + below(state, first[labels[b] + 1] - first[labels[b]])
        n = write_down(ways[way], state, path)
        radius, soft = pen * uniform(state, 0.75, 1.25), uniform(state, 0.9, 1.5)
        fit(path, n, images.shape[1], box, radius)
        for k in range(1, n):
            if path[k, 3]:
                thick = radius * (1 + 0.12 * path[k, 2])
                ink_segment(images[b], path[k - 1, 0], path[k - 1, 1], path[k, 0], path[k, 1],
                            thick, soft)
