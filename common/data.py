"""Pictures of single things: MNIST digits, Omniglot characters, and handwriting drawn here.

Real files are looked for in --data-dir, then in $SCENES_DATA, then in the cache, then on the
network; when none of these has them, handwriting is drawn instead, and a box on stderr says so.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import re
import sys
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from common.errors import Fail
from common.scenes import below, stream, uniform

CACHE = Path.home() / ".cache" / "scenes-by-hand"
TIMEOUT = 5                                         # seconds that a server may stay silent
MIRRORS = {
    "mnist": ("https://storage.googleapis.com/cvdf-datasets/mnist/",
              "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "omniglot": ("https://raw.githubusercontent.com/brendenlake/omniglot/master/python/",),
}
MNIST = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
OMNIGLOT = {"train": ("images_background.zip", "images_background.npz",
                      "images_background_small1.zip"),
            "test": ("images_evaluation.zip", "images_evaluation.npz")}
PICTURE = re.compile(r"[^/]+/character\d+/\w+\.png$")
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}


class Glyphs(NamedTuple):
    images: np.ndarray          # (N, S, S) uint8, ink 255 on 0
    labels: np.ndarray          # (N,) uint8 digits or int64 characters
    source: str                 # such as "MNIST test"


# ---------------------------------------------------------------- finding and fetching files

def find(kind, names, data_dir):
    """(path, contents) of the first of `names` to be found; None if there is none anywhere."""
    if data_dir is not None:
        hit = look(kind, names, [Path(data_dir)])
        if hit is None:
            raise Fail(f"found no {names[0]} in {data_dir} or {Path(data_dir) / kind}")
        return hit
    given = os.environ.get("SCENES_DATA")
    if given and not Path(given).is_dir():
        raise Fail(f"SCENES_DATA names {given}, which is no folder")
    return look(kind, names, [*([Path(given)] if given else []), CACHE]) or download(kind, names[0])


def look(kind, names, folders):
    """(path, contents) of the first file that exists; an official file must be intact."""
    for path in [f / name for folder in folders for f in (folder, folder / kind) for name in names]:
        if path.is_file():
            try:
                blob = path.read_bytes()
            except OSError as e:
                raise Fail(f"cannot read {path}: {e.strerror}") from None
            if not intact(path.name, blob):
                raise Fail(f"{path} is corrupt or truncated (its MD5 is not the official one)")
            return path, blob
    return None


def intact(name, blob):
    return name not in MD5 or hashlib.md5(blob, usedforsecurity=False).hexdigest() == MD5[name]


def download(kind, name):
    """(path, contents) of an official file, kept in the cache if that is writable; else None."""
    for mirror in MIRRORS[kind]:
        print(f"downloading {mirror}{name}", file=sys.stderr)
        try:
            with urllib.request.urlopen(mirror + name, timeout=TIMEOUT) as answer:
                blob = answer.read()
        except (OSError, http.client.HTTPException):
            continue
        if intact(name, blob):
            path = CACHE / kind / name
            write(path, blob)
            return path, blob
    return None


def write(path, blob):
    """Whole or not at all; a cache that cannot be written is no reason to stop."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(blob)
        os.replace(draft, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            draft.unlink()
        print(f"cannot keep {path}: {e.strerror}", file=sys.stderr)


def announce(missing, drawn):
    lines = (f"No {missing} here, and none could be downloaded: using {drawn} instead.",
             "Numbers will differ from those on the real data. If you have the official files:",
             f"--data-dir FOLDER, or put them in {CACHE}")
    width = max(map(len, lines))
    rule = "+" + "-" * (width + 2) + "+"
    print(rule, *(f"| {line:{width}} |" for line in lines), rule, sep="\n", file=sys.stderr)


# ---------------------------------------------------------------- MNIST

def digits(split, data_dir=None, drawn=False):
    """MNIST's "train" or "test" digits; drawn ones if there are none, or if `drawn`."""
    if not drawn:
        hits = []
        for name in MNIST[split]:
            hit = find("mnist", (name + ".gz", name), data_dir)
            if hit is None:
                announce("MNIST", "drawn digits")
                break
            hits.append(hit)
        else:
            (path, images), (_, labels) = ((path, read_idx(path, blob)) for path, blob in hits)
            if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
                raise Fail(f"{path} and its labels do not fit together: "
                           f"shapes {images.shape} and {labels.shape}")
            return Glyphs(images, labels, f"MNIST {split}")
    images, labels = draw(*points(WAYS), *DRAWN_DIGITS[split], size=28, box=20, pen=1.3)
    return Glyphs(images, labels.astype(np.uint8), f"drawn digits {split}")


def read_idx(path, blob):
    """The array of an idx file: 0 0 8 (bytes), number of axes, their sizes, the values."""
    if path.suffix == ".gz":
        try:
            blob = gzip.decompress(blob)
        except (OSError, EOFError, zlib.error):
            raise Fail(f"{path} is corrupt or truncated") from None
    axes = blob[3] if blob[:3] == b"\0\0\x08" and len(blob) > 3 else 0
    if axes not in (1, 3):
        raise Fail(f"{path} is not an idx file of bytes")
    start = 4 + 4 * axes
    shape = [int.from_bytes(blob[i:i + 4], "big") for i in range(4, start, 4)]
    if len(blob) != start + math.prod(shape):
        raise Fail(f"{path} is truncated or too long: {len(blob)} bytes for sizes {shape}")
    return np.frombuffer(blob, np.uint8, offset=start).reshape(shape).copy()


# ---------------------------------------------------------------- Omniglot

def omniglot(split, data_dir=None):
    """Omniglot's background ("train") or evaluation ("test") characters, 50 x 50; or drawn ones."""
    hit = find("omniglot", OMNIGLOT[split], data_dir)
    if hit is None:
        announce("Omniglot", "drawn characters")
        seed, count = DRAWN_CHARACTERS[split]
        images, labels = draw(*invented(seed, count), seed, 20 * count, size=50, box=36, pen=1.1)
        return Glyphs(images, labels, f"drawn characters {split}")
    path, blob = hit
    images, labels = (read_zip if path.suffix == ".zip" else read_npz)(path, blob)
    return Glyphs(images, labels, f"Omniglot {split}")


def read_npz(path, blob):
    """(characters, 20, 105, 105) booleans, True where the paper is white."""
    try:
        with np.load(io.BytesIO(blob), allow_pickle=False) as file:
            paper = file["images"]
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError,
            zipfile.BadZipFile, zlib.error):
        raise Fail(f"{path} is corrupt, truncated or holds no array 'images'") from None
    if paper.dtype != bool or paper.ndim != 4 or paper.shape[2:] != (105, 105) or not paper.size:
        raise Fail(f"{path}: images are {paper.dtype} {paper.shape}, not bool (n, m, 105, 105)")
    return (shrink(paper.reshape(-1, 105, 105)),
            np.repeat(np.arange(len(paper)), paper.shape[1]))


def read_zip(path, blob):
    """A picture for each <root>/<alphabet>/<character>/<name>.png; a label for each character."""
    import imageio.v3 as imageio

    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as file:
            names = [n for n in sorted(file.namelist()) if PICTURE.search(n)]
            paper = np.array([imageio.imread(file.read(n), extension=".png") > 0 for n in names])
    except Exception as e:      # imageio's readers raise whatever they like
        raise Fail(f"{path} is corrupt or truncated ({type(e).__name__})") from None
    if paper.shape[1:] != (105, 105):
        raise Fail(f"{path} holds no pictures of 105 x 105 pixels in alphabet/characterNN")
    return shrink(paper), np.unique([n.rsplit("/", 1)[0] for n in names], return_inverse=True)[1]


def shrink(paper, size=50):
    """White paper (N, 105, 105) to ink (N, size, size), each pixel the mean of what it covers."""
    edges = np.linspace(0, paper.shape[1], size + 1)
    pixel = np.arange(paper.shape[1])
    low, high = np.maximum(pixel, edges[:-1, None]), np.minimum(pixel + 1, edges[1:, None])
    cover = np.maximum(0, high - low)                                       # (size, 105)
    mean = (cover / cover.sum(1, keepdims=True)).astype(np.float32)         # (size, 105)
    ink = np.empty((len(paper), size, size), np.uint8)
    for i in range(0, len(paper), 500):
        ink[i:i + 500] = np.rint(255 * (1 - mean @ paper[i:i + 500].astype(np.float32) @ mean.T))
    return ink


# ---------------------------------------------------------------- drawn handwriting

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
