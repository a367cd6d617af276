"""Pictures of single things: MNIST digits, Omniglot characters, or drawn handwriting.

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

from common.errors import Fail
from common.handwriting import drawn_characters, drawn_digits

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
    images, labels = drawn_digits(split)
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
        images, labels = drawn_characters(split)
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
