"""What users bring: scene files, pictures and videos, checked before any model sees them."""

import re
from pathlib import Path

import numpy as np

from common.errors import Fail


def read_scenes(path, shapes, optional=()):
    """Arrays of an npz scene file as {name: array}.

    `shapes` gives each name its axes, such as {"images": ("N", 50, 50), "counts": ("N",)}; a letter
    must have one size throughout the file. Pictures (3 axes and more) come back as float32 in
    [0, 1], whether stored as uint8 0..255 or as floats 0..1; all else is left as it is.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = {name: file[name] for name in shapes if name in file.files}
    except FileNotFoundError:
        raise Fail(f"no scene file {path}") from None
    except Exception as e:  # damaged files have many ways to fail
        raise Fail(f"{path} is not a readable npz file ({type(e).__name__})") from None
    sizes = {}
    for name, axes in shapes.items():
        if name not in found:
            if name in optional:
                continue
            raise Fail(f"{path} has no array {name!r}")
        a = found[name]
        if a.ndim != len(axes):
            raise Fail(f"{path}: {name} has shape {a.shape}, expected {_text(axes)}")
        for axis, n in zip(axes, a.shape, strict=True):
            if n != (axis if isinstance(axis, int) else sizes.setdefault(axis, n)):
                raise Fail(f"{path}: {name} has shape {a.shape}, expected {_text(axes)}"
                           + (f" with {axis} = {sizes[axis]}" if axis in sizes else ""))
        if a.dtype.kind not in "buif":
            raise Fail(f"{path}: {name} has dtype {a.dtype}, expected numbers")
    if not all(sizes.values()):
        raise Fail(f"{path} holds no scenes")
    return found


def as_picture(a, where):
    """uint8 0..255 or float 0..1 as float32 in [0, 1]; anything else is told apart loudly."""
    if a.dtype == np.uint8:
        return a.astype(np.float32) / 255
    if a.dtype.kind == "b":
        return a.astype(np.float32)
    if a.dtype.kind != "f":
        raise Fail(f"{where} has dtype {a.dtype}, expected uint8 (0..255) or float (0..1)")
    if not np.isfinite(a).all():
        raise Fail(f"{where} has values that are NaN or infinite")
    if a.min() < 0 or a.max() > 1:
        raise Fail(f"{where} has values from {a.min():g} to {a.max():g}, expected 0 to 1")
    return a.astype(np.float32)


def _text(axes):
    return "(" + ", ".join(map(str, axes)) + ("," if len(axes) == 1 else "") + ")"


def read_picture(path, size, channels):
    """Any picture file as (channels, size, size), and where its pixels went.

    It is resized to fit and padded with its border's colour; bright backgrounds are turned dark for
    single-channel models, which know white on black. Returns the array, and a function from boxes
    x0, y0, x1, y1 on it to boxes in the file's own pixels.
    """
    import imageio.v3 as imageio

    try:
        a = np.asarray(imageio.imread(path, index=0))
    except FileNotFoundError:
        raise Fail(f"no such file: {path}") from None
    except Exception as e:  # imageio raises whatever its many readers raise
        raise Fail(f"{path} is not a picture that can be read ({type(e).__name__})") from None
    a = opaque(a, path)
    if channels == 1:
        a = a.mean(2, keepdims=True)
    elif a.shape[2] == 1:
        a = np.repeat(a, 3, 2)
    zoom = max(a.shape[:2]) / size
    a = resize(a, size)
    border = np.median(np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]]), 0)
    if channels == 1 and border[0] > 0.5:
        a, border = 1 - a, 1 - border
    out = np.empty((size, size, channels), np.float32)
    out[...] = border
    top, left = (size - a.shape[0]) // 2, (size - a.shape[1]) // 2
    out[top:top + a.shape[0], left:left + a.shape[1]] = a

    def to_picture(box):
        return ((np.asarray(box) - [left, top, left, top]) * zoom).round(2).tolist()

    return np.moveaxis(out, 2, 0), to_picture


def opaque(a, path):
    """Pixels as a reader gives them as (h, w, 1 or 3) float32 in [0, 1], transparent ones black."""
    if a.ndim == 2:
        a = a[..., None]
    if a.ndim != 3 or 0 in a.shape:
        raise Fail(f"{path} is not a picture: its shape is {a.shape}")
    a = a.astype(np.float32) / np.iinfo(a.dtype).max if a.dtype.kind == "u" else as_picture(a, path)
    return a[..., :-1] * a[..., -1:] if a.shape[2] in (2, 4) else a


def read_video(path, size):
    """A GIF, a video file, or a folder of pictures: a frame each, sorted by the numbers in names.

    Returns its frames (T, h, w, 3) uint8; these as (T, 1, size, size) float32 for a model that
    knows white on black (as `read_picture` does it, and all frames alike); and a function from
    boxes (.., 4) on the latter to boxes in the video's own pixels.
    """
    path = Path(path)
    files = in_order(path) if path.is_dir() else [path]
    frames = [(file, frame) for file in files for frame in read_frames(file)]
    if not frames:
        raise Fail(f"{path} holds no frames")
    (first, one), *_ = frames
    for file, frame in frames:
        if frame.shape != one.shape:
            raise Fail(f"{file} has {frame.shape[1]} x {frame.shape[0]} pixels, but {first} has "
                       f"{one.shape[1]} x {one.shape[0]}: all frames must be of one size")
    frames = np.stack([frame for _, frame in frames])
    grey = frames.mean(3, dtype=np.float32, keepdims=True) / 255
    small = np.stack([resize(frame, size) for frame in grey])[..., 0]
    T, h, w = small.shape
    edges = [small[:, 0], small[:, -1], small[..., 0], small[..., -1]]
    border = np.median(np.concatenate(edges, 1))
    if border > 0.5:
        small, border = 1 - small, 1 - border
    images = np.full((T, 1, size, size), border, np.float32)
    top, left = (size - h) // 2, (size - w) // 2
    images[:, 0, top:top + h, left:left + w] = small

    def to_video(boxes):
        return (boxes - np.array([left, top, left, top])) * (max(one.shape[:2]) / size)

    return frames, images, to_video


def in_order(folder):
    """The files of a folder, 2.png ahead of 10.png."""
    def parts(file):
        return [(0, int(s), "") if s.isdecimal() else (1, 0, s)
                for s in re.split(r"([0-9]+)", file.name)]

    return sorted((f for f in folder.iterdir() if f.is_file() and f.name[0] != "."), key=parts)


def read_frames(path):
    """The frames of a file, each (h, w, 3) uint8."""
    import imageio.v3 as imageio

    try:
        frames = list(imageio.imiter(path))
    except FileNotFoundError:
        raise Fail(f"no such file: {path}") from None
    except Exception as e:  # imageio raises whatever its many readers raise
        raise Fail(f"{path} cannot be read as picture or video ({type(e).__name__}): use a GIF or "
                   "a folder of pictures, or install imageio[pyav] for other formats") from None
    light = (opaque(np.asarray(a), path) for a in frames)
    return [np.broadcast_to((255 * a).round().astype(np.uint8), (*a.shape[:2], 3)) for a in light]


def resize(a, size):
    """(h, w, c) so that the longer side is `size`: each new pixel is the mean of what it covers."""
    scale = size / max(a.shape[:2])
    for axis in (0, 1):
        n, m = a.shape[axis], max(1, round(a.shape[axis] * scale))
        edges = np.linspace(0, n, m + 1)
        total = np.concatenate([np.zeros_like(a.take([0], axis)), a.cumsum(axis, np.float64)], axis)
        low = np.minimum(edges.astype(int), n - 1)
        part = (edges - low).reshape([-1 if k == axis else 1 for k in range(a.ndim)])
        upto = total.take(low, axis) + part * (total.take(low + 1, axis) - total.take(low, axis))
        a = np.diff(upto, axis=axis) * (m / n)
    return a.astype(np.float32)
