"""Scores are what their definitions say, on cases small enough to see."""

import numpy as np
import pytest

from common.metrics import (
    adjusted_rand_index,
    box_iou,
    confusion,
    depth_pairs,
    ink_boxes,
    mask_iou,
    matched_iou,
    partners,
    taken,
    visible_masks,
)

NONE = [np.nan] * 4


def test_ink_boxes_are_tight_with_exclusive_ends():
    images = np.zeros((2, 2, 3, 6, 8))                                  # (B, K, C, H, W)
    images[0, 0, 1, 2:5, 3:7] = 1
    images[1, 1, 2, 0, 7] = images[1, 1, 0, 5, 0] = 1                   # opposite corners
    images[1, 0] = 0.1                                                  # not above the threshold
    boxes = ink_boxes(images, 0.1)
    np.testing.assert_array_equal(boxes, [[[3, 2, 7, 5], NONE], [NONE, [0, 0, 8, 6]]])
    assert boxes.dtype == np.float32


@pytest.mark.parametrize(("a", "b", "iou"), [
    ([0, 0, 2, 2], [0, 0, 2, 2], 1),
    ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7),
    ([0, 0, 4, 4], [1, 1, 3, 2], 2 / 16),
    ([0, 0, 2, 2], [2, 0, 4, 2], 0),                    # they touch
    ([0, 0, 2, 2], [5, 5, 6, 6], 0),                    # apart along both axes
    ([0, 0, 2, 2], NONE, 0),
    (NONE, NONE, 0),
    ([1, 1, 1, 1], [1, 1, 1, 1], 0),                    # nothing in them
])
def test_box_iou(a, b, iou):
    a, b = np.array(a, float), np.array(b, float)
    assert box_iou(a, b) == pytest.approx(iou) and box_iou(b, a) == pytest.approx(iou)


A, B, HALF_OF_A = [0, 0, 2, 2], [5, 5, 9, 9], [0, 0, 2, 1]


@pytest.mark.parametrize(("true", "found", "total"), [
    ([A, B], [B, A], 2),                                # in any order
    ([A, B], [A, NONE], 1),                             # one is missed
    ([A, NONE], [A, B], 1),                             # one too many: counts tell, not this
    ([A, NONE], [HALF_OF_A, A], 1),
    ([A, B], [A], 1),
    ([A], [NONE, NONE, A], 1),
    ([NONE], [A], 0),                                   # no objects at all
    ([A, HALF_OF_A], [A, NONE], 1),                     # no partner serves two
])
def test_matched_iou(true, found, total):
    one = matched_iou(np.array([true], float), np.array([found], float))
    many = matched_iou(np.array([true] * 3, float), np.array([found] * 3, float))
    assert (one, many) == pytest.approx((total, 3 * total))


def test_matched_iou_takes_the_best_pairs_together_not_the_best_pair_first():
    """Along a line: a = 0..4, b = 2..9; p = 2..4 fits a best (1/2), but q = 0..1 fits a only."""
    a, b, p, q = ([x0, 0, x1, 1] for x0, x1 in ((0, 4), (2, 9), (2, 4), (0, 1)))
    both = matched_iou(np.array([[a, b]], float), np.array([[p, q]], float))
    assert both == pytest.approx(1 / 4 + 2 / 7)         # a with q, b with p


def test_confusion_counts_pairs():
    table = confusion(np.array([0, 1, 1, 2]), np.array([0, 1, 3, 1]), 2, 3)
    assert table.tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0]]


# ---------------------------------------------------------------- masks and who is in front

def strip(*spans, width=8):
    """Masks (1, K, 1, width) that cover the pixels a .. b - 1."""
    pixels = np.arange(width)
    return np.array([[[(a <= pixels) & (pixels < b)] for a, b in spans]])


def test_visible_is_what_no_nearer_object_hides():
    amodal = strip((0, 4), (2, 6), (3, 8))
    seen = visible_masks(amodal, np.array([[1, 0, 2]]))
    np.testing.assert_array_equal(seen, strip((0, 2), (2, 6), (6, 8)))
    seen = visible_masks(amodal, np.array([[1, -1, 0]]))                # the second is not there
    np.testing.assert_array_equal(seen, strip((0, 3), (0, 0), (3, 8)))


def test_mask_iou_and_partners():
    iou = mask_iou(strip((0, 4), (4, 8)), strip((5, 8), (0, 2), (0, 0)))
    np.testing.assert_allclose(iou, [[[0, 1 / 2, 0], [3 / 4, 0, 0]]])
    assert mask_iou(strip((0, 0)), strip((0, 0))) == 0                  # nothing and nothing
    np.testing.assert_array_equal(partners(iou), [[1, 0]])
    np.testing.assert_allclose(taken(iou, partners(iou)), [[1 / 2, 3 / 4]])
    few = partners(iou[:, :, :1])                                       # one found, two true
    np.testing.assert_array_equal(few, [[-1, 0]])
    np.testing.assert_allclose(taken(iou[:, :, :1], few), [[0, 3 / 4]])


def test_partners_are_best_together():
    iou = np.array([[[0.5, 0.4], [0.45, 0.0]], [[0.5, 0.1], [0.45, 0.3]]])
    np.testing.assert_array_equal(partners(iou), [[1, 0], [0, 1]])


@pytest.mark.parametrize(("partner", "found", "overlap", "want"), [
    ([0, 1], [0, 1], 2, (1, 1)),                        # the true one in front is in front
    ([0, 1], [1, 0], 2, (0, 1)),
    ([1, 0], [1, 0], 2, (1, 1)),                        # the same two, named the other way round
    ([0, -1], [0, 1], 2, (0, 1)),                       # one of them was not found
    ([0, 1], [0, 1], 3, (0, 0)),                        # they share two pixels only
])
def test_depth_pairs(partner, found, overlap, want):
    got = depth_pairs(strip((0, 4), (2, 6)), np.array([[0, 1]]), np.array([partner]),
                      np.array([found]), overlap)
    assert got == want


def test_depth_pairs_leave_absent_objects_out():
    amodal = strip((0, 4), (0, 4), (0, 4))
    got = depth_pairs(amodal, np.array([[0, 1, -1]]), np.array([[2, 0, 1]]), np.array([[2, 0, 1]]),
                      2)
    assert got == (1, 1)


# ---------------------------------------------------------------- segmentations

def test_adjusted_rand_index_by_counting_pairs(rng):
    """The definition: how many pairs of foreground pixels agree, corrected for chance."""
    true, found = rng.integers(0, 4, (3, 6, 6)), rng.integers(0, 3, (3, 6, 6))
    for t, f, got in zip(true, found, adjusted_rand_index(true, found), strict=True):
        i, j = np.triu_indices((t > 0).sum(), 1)
        same_t, same_f = (a[t > 0][i] == a[t > 0][j] for a in (t, f))
        chance = same_t.mean() * same_f.mean()
        want = ((same_t & same_f).mean() - chance) / ((same_t.mean() + same_f.mean()) / 2 - chance)
        assert got == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("true", "found", "want"), [
    ([0, 1, 1, 2, 2], [3, 0, 0, 1, 1], 1),              # names do not matter
    ([0, 1, 1, 2, 2], [0, 0, 0, 1, 1], 1),              # nor does the background
    ([0, 1, 1, 2, 2], [3, 0, 0, 0, 0], 0),              # all in one is chance
    ([0, 1, 1, 1, 1], [2, 0, 0, 0, 0], 1),              # one object, found as one
    ([0, 1, 1, 1, 1], [2, 0, 0, 1, 1], 0),
    ([0, 0, 0, 0, 0], [2, 0, 0, 1, 1], 1),              # there is nothing to find
    ([-1, 1, 1, 2, 2], [0, 0, 0, 1, 1], 1),             # unknown pixels do not count
])
def test_adjusted_rand_index_of_small_cases(true, found, want):
    assert adjusted_rand_index(np.array([[true]]), np.array([[found]])) == pytest.approx(want)
