"""Scores are what their definitions say, on cases small enough to see."""

import numpy as np
import pytest

from common.metrics import box_iou, confusion, ink_boxes, matched_iou

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
