"""What users bring: scene files and pictures, checked before any model sees them."""

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
    if a.ndim == 2:
        a = a[..., None]
    if a.ndim != 3 or 0 in a.shape:
        raise Fail(f"{path} is not a picture: its shape is {a.shape}")
    a = a.astype(np.float32) / np.iinfo(a.dtype).max if a.dtype.kind == "u" else as_picture(a, path)
    if a.shape[2] in (2, 4):                                        # transparency over black
        a = a[..., :-1] * a[..., -1:]
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
