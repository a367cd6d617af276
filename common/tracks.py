"""Who is who in a video: found objects against true ones. Host arrays in, host numbers out.

Boxes are (.., 4) as x0, y0, x1, y1 in pixels, NaN where there is nothing to see. Identities are
whole numbers, -1 where nothing was found.
Dimension key: B videos, T frames, K true objects, N found ones.
"""

from typing import NamedTuple

import numpy as np

from common.metrics import box_iou, partners, taken

LEAST = 0.3     # a found box with less IoU is another object's
HOLD = 0.2      # head start, in IoU, of the identity that an object had last
BARELY = 0.25   # no verdict where less than this share of an object's largest box is seen


class Tally(NamedTuple):
    """Numbers of things in some videos; may be added up."""
    videos: int
    objects: int            # true ones
    kept: int               # of these, under one identity wherever they are judged
    crossing: int           # those whose box overlaps another's in some frame
    crossing_kept: int
    boxes: int              # true boxes that are judged
    missed: int             # of these, without a partner
    ghosts: int             # found boxes without a partner
    switches: int           # an object goes by another identity than before
    born_late: int          # identities that are not there in the first frame
    rediscovered: int       # of these, given to an object that had had one


def matched(true, found, identities):
    """The identity by which each true object goes (B, T, K), -1 where it is missed.

    In each frame true and found boxes are paired one to one, so that the sum of IoU is largest; an
    object's last identity has a head start, so that two boxes in one place do not change partners
    for a pixel.
    """
    (B, T, K), N = true.shape[:3], found.shape[2]
    who, last = np.full((B, T, K), -1), np.full((B, K), -1)
    for t in range(T if K and N else 0):
        names = identities[:, t]                                    # (B, N)
        iou = box_iou(true[:, t, :, None], found[:, t, None])       # (B, K, N)
        iou[(iou < LEAST) | (names < 0)[:, None]] = 0
        partner = partners(iou + HOLD * (iou > 0) * (names[:, None] == last[:, :, None]))
        hit = taken(iou, partner) > 0                               # (B, K)
        who[:, t][hit] = np.take_along_axis(names, np.maximum(partner, 0), 1)[hit]
        last[hit] = who[:, t][hit]
    return who


def judged(true):
    """Frames (B, T, K) that show enough of an object to ask who it is."""
    area = np.prod(true[..., 2:] - true[..., :2], -1)               # (B, T, K)
    area = np.nan_to_num(area)
    return (area > 0) & (area >= BARELY * area.max(1, keepdims=True))


def kept(true, who):
    """Objects (B, K) that go by one identity in all frames that are judged."""
    ask = judged(true)
    first = np.take_along_axis(who, ask.argmax(1)[:, None], 1)      # (B, 1, K)
    return ask.any(1) & ((who == first) & (who >= 0) | ~ask).all(1)


def crossing(true):
    """Objects (B, K) whose box overlaps another's in some frame."""
    both = box_iou(true[:, :, :, None], true[:, :, None]) > 0       # (B, T, K, K)
    return (both & ~np.eye(true.shape[2], dtype=bool)).any((1, 3))


def before(who):
    """The identity that each object had last, ahead of every frame (B, T, K); -1 if it had none."""
    T = who.shape[1]
    latest = np.maximum.accumulate(np.where(who >= 0, np.arange(T)[:, None], 0), 1)
    known = np.take_along_axis(who, latest, 1)                      # (B, T, K)
    return np.concatenate([np.full_like(who[:, :1], -1), known[:, :-1]], 1)


def late(identities, others):
    """Of `others` (B, ...), which are identities that the first frame (B, T, N) does not know."""
    flat = others.reshape(len(others), -1)
    known = (flat[..., None] == identities[:, 0, None]).any(2)
    return (others >= 0) & ~known.reshape(others.shape)


def different(identities, chosen):
    """How many identities are chosen, each video's counted once."""
    return len({(b, name) for (b, *_), name
                in zip(np.argwhere(chosen), identities[chosen].tolist(), strict=True)})


def follow(true, found, identities):
    """The tally of true (B, T, K, 4) and found boxes (B, T, N, 4) with identities (B, T, N)."""
    who = matched(true, found, identities)                          # (B, T, K)
    last, ask, crosses, keeps = before(who), judged(true), crossing(true), kept(true, who)
    switched = (who >= 0) & (last >= 0) & (who != last)             # (B, T, K)
    seen = (identities >= 0) & ~np.isnan(found[..., 0])             # (B, T, N)
    return Tally(len(true), int(ask.any(1).sum()), int(keeps.sum()), int(crosses.sum()),
                 int((crosses & keeps).sum()), int(ask.sum()), int((ask & (who < 0)).sum()),
                 int(seen.sum() - (who >= 0).sum()), int(switched.sum()),
                 different(identities, late(identities, identities)),
                 different(who, switched & late(identities, who)))


def summary(tallies):
    """Shares and means over all videos; None where there is nothing to divide by."""
    n = Tally(*map(sum, zip(*tallies, strict=True)))

    def share(a, b):
        return a / b if b else None

    errors = n.missed + n.ghosts + n.switches
    return {"identity_accuracy": share(n.kept, n.objects),
            "identity_through_overlaps": share(n.crossing_kept, n.crossing),
            "rediscoveries_per_sequence": share(n.rediscovered, n.videos),
            "late_births_per_sequence": share(n.born_late, n.videos),
            "switches_per_sequence": share(n.switches, n.videos),
            "mota": share(n.boxes - errors, n.boxes)}
