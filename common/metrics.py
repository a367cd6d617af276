"""Scores that several papers share. Host arrays in, host numbers out.

Dimension key: B scenes, K true boxes, H W pixels, size the larger number of boxes.
"""

from itertools import permutations

import numpy as np


def ink_boxes(images, threshold=0.1):
    """Tight boxes x0, y0, x1, y1 of the pixels above `threshold`; NaN where there are none.

    images (..., C, H, W) -> boxes (..., 4)
    """
    ink = (images > threshold).any(-3)                              # (..., H, W)
    ends = []
    for axis in (-2, -1):                                           # columns, then rows
        line = ink.any(axis)
        ends.append((line.argmax(-1), line.shape[-1] - line[..., ::-1].argmax(-1)))
    (x0, x1), (y0, y1) = ends
    boxes = np.stack([x0, y0, x1, y1], -1).astype(np.float32)
    boxes[~ink.any((-2, -1))] = np.nan
    return boxes


def box_iou(a, b):
    """Intersection over union of boxes (..., 4) against (..., 4); 0 where either is NaN."""
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    both = np.prod(np.maximum(high - low, 0), -1)
    union = np.prod(a[..., 2:] - a[..., :2], -1) + np.prod(b[..., 2:] - b[..., :2], -1) - both
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(both / union)


def matched_iou(true, found):
    """Sum over true boxes (B, K, 4) of the IoU with their partner among found (B, N, 4).

    Partners are chosen one to one, the best way for each scene; a missed object counts 0.
    """
    B, K = true.shape[:2]
    size = max(K, found.shape[1])
    padded = np.full((B, size, 4), np.nan)
    padded[:, :found.shape[1]] = found
    iou = box_iou(true[:, :, None], padded[:, None])                # (B, K, size)
    best = np.zeros(B)
    for partners in permutations(range(size), K):
        best = np.maximum(best, iou[:, range(K), partners].sum(1))
    return best.sum()


def confusion(true, found, most_true, most_found):
    """table[i, j]: how many scenes with i objects were said to hold j."""
    table = np.zeros((most_true + 1, most_found + 1), np.int64)
    np.add.at(table, (true, found), 1)
    return table
