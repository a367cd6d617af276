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


@pytest.mark.parametrize(("true", "found", "iou"), [
    ([A, B], [B, A], 1),                                # in any order
    ([A, B], [A, NONE], 0.5),                           # one is missed
    ([A, NONE], [A, B], 1),                             # one too many: counts tell, not this
    ([A, NONE], [HALF_OF_A, A], 1),
    ([A, B], [A], 0.5),
    ([A], [NONE, NONE, A], 1),
    ([NONE], [A], 0),                                   # no objects at all
    ([A, HALF_OF_A], [A, NONE], 0.5),                   # no partner serves two
])
def test_matched_iou(true, found, iou):
    assert matched_iou(np.array([true], float), np.array([found], float)) == pytest.approx(iou)


def test_matched_iou_takes_the_best_pairs_together_not_the_best_first():
    """Greedy: A with P (1/2) and B with nothing. Best: A with Q (2/5), B with P (2/5)."""
    a, b = [0, 0, 4, 1], [2, 0, 9, 1]
    p, q = [2, 0, 4, 1], [0, 0, 1, 1]
    pairs = np.array([[box_iou(np.array(s, float), np.array(t, float)) for t in (p, q)]
                      for s in (a, b)])
    best = max(pairs[0, 0] + pairs[1, 1], pairs[0, 1] + pairs[1, 0])
    assert pairs.max() + 0 < best                       # greedy would take a with p: b gets nothing
    assert matched_iou(np.array([[a, b]], float), np.array([[p, q]], float)) == best / 2


def test_matched_iou_is_a_mean_over_objects_not_over_scenes():
    true = np.array([[A, B], [A, NONE]], float)
    found = np.array([[A, B], [NONE, NONE]], float)
    assert matched_iou(true, found) == pytest.approx(2 / 3)


def test_confusion_counts_pairs():
    table = confusion(np.array([0, 1, 1, 2]), np.array([0, 1, 3, 1]), 2, 3)
    assert table.tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0]]
