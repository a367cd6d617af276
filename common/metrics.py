"""Scores that several papers share. Host arrays in, host numbers out.

Dimension key: B scenes, K true and J found objects, H W pixels, size or most the larger number.
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


# ---------------------------------------------------------------- masks and who is in front

def visible_masks(amodal, order):
    """Of each object what no nearer one hides: amodal (B, K, H, W) booleans, order (B, K).

    Order counts from 0, the nearest; -1 is an object that is not there, and shows nothing.
    """
    there = order >= 0                                              # (B, K)
    masks = amodal & there[:, :, None, None]                        # (B, K, H, W)
    nearer = (order[:, None] < order[:, :, None]) & there[:, None]  # (B, K, K)
    hidden = (nearer[..., None, None] & masks[:, None]).any(2)      # (B, K, H, W)
    return masks & ~hidden


def mask_iou(true, found):
    """Intersection over union of all masks (B, K, H, W) with all (B, J, H, W); 0 if both empty."""
    a, b = (m.reshape(*m.shape[:2], -1).astype(np.float32) for m in (true, found))
    both = a @ b.swapaxes(1, 2)                                     # (B, K, J)
    union = a.sum(2)[:, :, None] + b.sum(2)[:, None] - both         # (B, K, J)
    return both / np.maximum(union, 1)


def partners(iou):
    """Who is whom (B, K), each found object at most once, by the best sum of IoU (B, K, J).

    -1: there are fewer found objects than true ones, and this one gets none.
    """
    B, K, J = iou.shape
    padded = np.zeros((B, K, max(K, J)))                            # (B, K, most)
    padded[:, :, :J] = iou
    ways = np.array([*permutations(range(max(K, J)), K)])           # (ways, K)
    total = padded[:, range(K), ways].sum(2)                        # (B, ways)
    chosen = ways[total.argmax(1)]                                  # (B, K)
    return np.where(chosen < J, chosen, -1)


def taken(iou, partner):
    """The IoU (B, K, J) of each true object with its partner (B, K)."""
    return np.take_along_axis(iou, np.maximum(partner, 0)[..., None], 2)[..., 0] * (partner >= 0)


def depth_pairs(amodal, order, partner, found_order, overlap=30):
    """(correct, pairs): of true pairs that overlap in `overlap` pixels, how many are in order.

    A pair of which one has no partner is not in order.
    """
    flat = amodal.reshape(*amodal.shape[:2], -1).astype(np.float32)
    shared = flat @ flat.swapaxes(1, 2)                             # (B, K, K)
    front = (order[:, :, None] < order[:, None]) & (order >= 0)[:, :, None]     # (B, K, K)
    pairs = front & (shared >= overlap)                             # (B, K, K)
    theirs = np.take_along_axis(found_order, np.maximum(partner, 0), 1)     # (B, K)
    known = (partner >= 0)[:, :, None] & (partner >= 0)[:, None]    # (B, K, K)
    right = (theirs[:, :, None] < theirs[:, None]) & known          # (B, K, K)
    return int((pairs & right).sum()), int(pairs.sum())


# ---------------------------------------------------------------- segmentations

def adjusted_rand_index(true, found):
    """Of each scene (B,): how well labels found (B, H, W) group the objects' pixels.

    Only pixels of true objects (labels above 0) count; 1 is perfect, 0 is chance (Hubert and
    Arabie, 1985). Where neither has anything to tell apart, the answer is right.
    """
    scores = np.ones(len(true))
    for b, (t, f) in enumerate(zip(true, found, strict=True)):
        table = confusion(t[t > 0], f[t > 0], max(t.max(), 0), f.max())
        both, rows, columns = (pairs(n) for n in (table, table.sum(1), table.sum(0)))
        every = pairs(table.sum())
        chance = rows * columns / every if every else 0.0
        if rows + columns != 2 * chance:
            scores[b] = (both - chance) / ((rows + columns) / 2 - chance)
    return scores


def pairs(n):
    """Among n things, how many pairs; summed over an array of such numbers."""
    return float((n * (n - 1) / 2).sum())
