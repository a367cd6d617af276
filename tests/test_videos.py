"""Videos depend on (seed, index) alone, and digits move in them as their motion says."""

import time

import numpy as np
import pytest

from bars import bars, fingerprint
from common import videos
from common.data import Glyphs
from common.errors import Fail
from common.handwriting import drawn_digits
from common.videos import MOTIONS, moving_digits

glyphs = pytest.fixture(bars, scope="module")


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def path(steps, motion, at=20.0, velocity=0.0, acceleration=0.0, side=20, canvas=50):
    """Place, velocity and acceleration along one axis, (steps, 3)."""
    state, move = np.array([7], np.uint64), np.array([at, velocity, acceleration])
    rows = []
    for _ in range(steps):
        videos.step(state, move, side, canvas, motion)
        rows.append(move.copy())
    return np.array(rows)


@pytest.mark.parametrize("motion, golden", [
    ("paper", "b2a20653b2b0b900"), ("gentle", "6aaba9851a63d593"),
    ("fast", "2181879e5a79acd4"), ("released", "c76540815e9adc41")])
def test_golden(glyphs, motion, golden):
    assert fingerprint(moving_digits(glyphs, 7, 0, 32, motion=motion)) == golden


def test_a_video_depends_on_seed_and_index_alone(glyphs):
    whole = moving_digits(glyphs, 3, 10, 12)
    for start, count in ((10, 1), (13, 5), (21, 1)):
        same([a[start - 10:start - 10 + count] for a in whole],
             moving_digits(glyphs, 3, start, count))
    assert (whole.images != moving_digits(glyphs, 4, 10, 12).images).any()


def test_a_shorter_video_is_the_beginning_of_a_longer_one(glyphs):
    long, short = moving_digits(glyphs, 0, 0, 20, frames=7), moving_digits(glyphs, 0, 0, 20, 4)
    same([short.images, short.boxes, short.visible, short.labels],
         [long.images[:, :4], long.boxes[:, :4], long.visible[:, :4], long.labels])


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_first_frame_is_whole_and_apart(glyphs, motion):
    v = moving_digits(glyphs, 1, 0, 300, frames=2, counts=(2, 3), motion=motion)
    there = v.labels >= 0
    np.testing.assert_array_equal(v.visible[:, 0][there], 1)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b = v.boxes[:, 0, i], v.boxes[:, 0, j]
        apart = np.maximum(a[:, :2], b[:, :2]) >= np.minimum(a[:, 2:], b[:, 2:])
        assert (apart.any(1) | ~there[:, j]).all()


def test_shapes_counts_and_digits(glyphs):
    v = moving_digits(glyphs, 2, 0, 3000, frames=2)
    assert v.images.shape == (3000, 2, 1, 50, 50) and v.boxes.shape == (3000, 2, 2, 4)
    assert v.images.dtype == v.boxes.dtype == v.visible.dtype == np.float32
    assert v.counts.dtype == v.labels.dtype == np.int64
    np.testing.assert_array_equal(v.counts, (v.labels >= 0).sum(1)[:, None].repeat(2, 1))
    for seen, kinds in ((v.counts[:, 0], 3), (v.labels[v.labels >= 0], 10)):
        expected = len(seen) / kinds
        chi2 = ((np.bincount(seen, minlength=kinds) - expected) ** 2 / expected).sum()
        assert chi2 < kinds + 5 * np.sqrt(2 * kinds)
    assert not v.images[v.counts == 0].any() and not v.visible[v.counts == 0].any()
    assert np.isnan(v.boxes[v.counts == 0]).all()


@pytest.mark.parametrize("motion", ["paper", "released"])
def test_boxes_hold_the_visible_ink_tightly(glyphs, motion):
    v = moving_digits(glyphs, 0, 0, 200, counts=(1,), motion=motion)
    whole = v.images[:, 0].sum((1, 2, 3))
    for b, t in np.ndindex(200, 10):
        y, x = np.nonzero(v.images[b, t, 0] > 0.1)
        if len(y):
            np.testing.assert_array_equal(v.boxes[b, t, 0],
                                          [x.min(), y.min(), x.max() + 1, y.max() + 1])
        else:
            assert np.isnan(v.boxes[b, t, 0]).all()
        np.testing.assert_allclose(v.visible[b, t, 0], v.images[b, t].sum() / whole[b], atol=1e-5)


def test_the_brighter_pixel_is_in_front():
    canvas, box = np.zeros((4, 4), np.float32), np.full(4, np.nan, np.float32)
    videos.show(canvas, np.full((2, 2), 0.6, np.float32), 0, 0, box)
    assert videos.show(canvas, np.full((2, 2), 0.4, np.float32), 1, 0, box) == 1
    np.testing.assert_allclose(canvas[0], [0.6, 0.6, 0.4, 0])
    assert videos.show(canvas, np.full((2, 2), 0.4, np.float32), -1, 3, box) == 0.25
    assert box.tolist() == [0, 3, 1, 4]
    assert videos.show(canvas, np.full((2, 2), 0.4, np.float32), 4, 0, box) == 0


def test_motion_is_newton_s_until_an_edge_turns_it_round():
    still, half = (10.0, 3.0, 0.0), (0.5, 0.5)
    np.testing.assert_allclose(path(3, still + half, 0, 2, 1),
                               [[2, 3, 1], [5, 4, 1], [9, 5, 1]])
    np.testing.assert_allclose(path(2, still + half, 38, 5, -1),        # 20 wide: half is out at 40
                               [[37, -4, 1], [33, -3, 1]])
    np.testing.assert_allclose(path(1, still + half, -8, -5), [[-7, 5, 0]])
    np.testing.assert_allclose(path(1, still + (0.0, 1.0), 48, 5), [[47, -5, 0]])
    np.testing.assert_allclose(path(1, still + (0.0, 1.0), 2, -5), [[3, 5, 0]])
    np.testing.assert_allclose(path(9, still + half, 0, 0, 3)[:, 1].max(), 10)


def test_acceleration_has_its_noise():
    change = np.diff(path(2000, (1e9, 1e9, 0.1, 1e9, 1e9))[:, 2])
    assert abs(change.std() - 0.1) < 0.005 and abs(change.mean()) < 0.01


@pytest.mark.parametrize("motion", MOTIONS)
def test_places_follow_the_bounds_of_the_motion(glyphs, motion):
    speed, _, _, before, beyond = MOTIONS[motion]
    v = moving_digits(glyphs, 5, 0, 500, counts=(1,), motion=motion)
    box, side = v.boxes[:, :, 0], v.boxes[:, :1, 0, 2:] - v.boxes[:, :1, 0, :2]
    seen = (box[..., 2:] - box[..., :2]) / side                     # shares of width and height
    inside = (box[..., :2] > 0) & (box[..., 2:] < 50)
    moved = abs(np.diff(box[..., :2], axis=1))[inside[:, 1:] & inside[:, :-1]]
    assert 0.9 * speed < moved.max() <= speed + 1                   # rounded to whole pixels
    if motion == "released":
        assert np.isnan(seen).mean() > 0.01 and (seen[box[..., :2] == 0] == 1).all()
    else:
        least = 1 - max(before, beyond)
        assert least - 0.5 / side.min() <= np.nanmin(seen) < least + 0.1
        assert v.visible.min() > 0


def test_drawn_digits_move_too_and_quickly():
    glyphs = Glyphs(*drawn_digits("test"), "drawn digits")
    moving_digits(glyphs, 0, 0, 1)
    clock = time.process_time()
    v = moving_digits(glyphs, 0, 0, 400)
    assert 400 / (time.process_time() - clock) > 500                # alone: several thousand
    assert v.images.max() > 0.9 and set(v.labels.ravel()) == set(range(-1, 10))


@pytest.mark.parametrize("wrong, says", [
    ({"canvas": 20}, "do not fit a canvas of 20"), ({"count": 0}, "at least 1"),
    ({"frames": 0}, "at least 1 frame"), ({"counts": ()}, "counts"), ({"counts": (-1,)}, "counts"),
    ({"motion": "wild"}, "unknown"), ({"counts": (9,)}, "no places apart for 9"),
])
def test_impossible_videos_fail_with_one_clear_line(glyphs, wrong, says):
    with pytest.raises(Fail, match=says) as e:
        moving_digits(glyphs, **{"seed": 0, "start": 0, "count": 2} | wrong)
    assert "\n" not in str(e.value)
