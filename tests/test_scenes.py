"""Scenes depend on (seed, index) alone, lie as their layout says, and never change."""

import numpy as np
import pytest

from bars import bars, fingerprint
from common import scenes
from common.errors import Fail

glyphs = pytest.fixture(bars, scope="module")


def gaps(a, b):
    """Pixels between two boxes (..., 4) along the axis where they are farther apart."""
    return np.maximum(np.maximum(a[..., :2], b[..., :2])
                      - np.minimum(a[..., 2:], b[..., 2:]), -99).max(-1)


@pytest.mark.parametrize("layout, golden", [("disjoint", "9d0354b92a3d43ce"),
                                            ("overlap", "02265e03ccab36cb")])
def test_golden_digits(glyphs, layout, golden):
    assert fingerprint(scenes.multi_digits(glyphs, 7, 0, 64, layout=layout)) == golden


def test_golden_sprites():
    assert fingerprint(scenes.sprites(7, 0, 64)) == "02339bee32d85f4a"


@pytest.mark.parametrize("kind", ["digits", "sprites", "characters"])
def test_a_scene_depends_on_seed_and_index_alone(glyphs, kind):
    def draw(seed, start, batch):
        if kind == "sprites":
            return scenes.sprites(seed, start, batch)
        if kind == "characters":
            return scenes.characters(glyphs, seed, start, batch)
        return scenes.multi_digits(glyphs, seed, start, batch)

    whole = draw(3, 10, 12)
    for start, batch in ((10, 1), (13, 5), (21, 1)):
        for a, b in zip(whole, draw(3, start, batch), strict=True):
            np.testing.assert_array_equal(a[start - 10:start - 10 + batch], b)
    assert (whole.images != draw(4, 10, 12).images).any()
    assert (whole.images[:-1] != draw(3, 11, 11).images[::-1]).any()


def test_boxes_are_tight_and_absent_objects_are_nan(glyphs):
    s = scenes.multi_digits(glyphs, 0, 0, 300)
    assert s.images.dtype == s.boxes.dtype == np.float32 and s.images.shape == (300, 1, 50, 50)
    np.testing.assert_array_equal((s.labels >= 0).sum(1), s.counts)
    np.testing.assert_array_equal(np.isnan(s.boxes).any(2), s.labels < 0)
    for image, box in zip(s.images[s.counts == 1, 0], s.boxes[s.counts == 1, 0], strict=True):
        y, x = np.nonzero(image > 0.1)
        np.testing.assert_array_equal(box, [x.min(), y.min(), x.max() + 1, y.max() + 1])
    assert not s.images[s.counts == 0].any()


def test_sprite_boxes_colours_and_sizes():
    s = scenes.sprites(0, 0, 300, counts=(1,))
    for image, box, label in zip(s.images, s.boxes[:, 0], s.labels[:, 0], strict=True):
        y, x = np.nonzero(image[label] > 0.1)
        np.testing.assert_array_equal(box, [x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert image.any((1, 2)).nonzero()[0] == label
    sides = s.boxes[:, 0, 2:] - s.boxes[:, 0, :2]
    assert 11 <= sides.min() <= 13 and 19 <= sides.max() <= 22
    area = [s.images[s.labels[:, 0] == shape].sum((1, 2, 3)).mean() for shape in range(3)]
    assert area[1] > area[0] > area[2]          # square, circle, diamond of the same width
    assert s.images.max() == 0.5                # two of a colour that overlap stay apart from one


@pytest.mark.parametrize("layout, apart", [("disjoint", 0), ("separated", 4)])
def test_layouts_keep_their_distance_and_their_counts(glyphs, layout, apart):
    s = scenes.multi_digits(glyphs, 1, 0, 400, counts=(2, 3), layout=layout)
    pairs = [gaps(s.boxes[:, i], s.boxes[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    closest = np.nanmin(pairs)
    assert closest == apart                     # kept, and used: touching is allowed
    assert 150 < (s.counts == 3).sum() < 250


def test_overlap_overlaps(glyphs):
    s = scenes.multi_digits(glyphs, 1, 0, 100, counts=(2,), layout="overlap")
    assert (gaps(s.boxes[:, 0], s.boxes[:, 1]) < 0).mean() > 0.2
    assert s.images.max() == 1


def test_counts_digits_sizes_and_places_are_uniform(glyphs):
    s = scenes.multi_digits(glyphs, 2, 0, 6000, layout="overlap")
    for seen, kinds in ((s.counts, 3), (s.labels[s.labels >= 0], 10)):
        expected = len(seen) / kinds
        chi2 = ((np.bincount(seen, minlength=kinds) - expected) ** 2 / expected).sum()
        assert chi2 < kinds + 5 * np.sqrt(2 * kinds)
    one = s.boxes[s.labels >= 0]
    free = 50 - (one[:, 2:] - one[:, :2])
    place = one[:, :2] / free
    assert place.min() == 0 and place.max() == 1
    np.testing.assert_allclose(place.mean(0), 0.5, atol=0.02)


def test_resizing_keeps_the_mean_and_leaves_the_same_size_alone(rng):
    picture, out = rng.integers(0, 256, (28, 28)).astype(np.uint8), np.empty((28, 28), np.float32)
    scenes.resize(picture, out, 28)
    np.testing.assert_allclose(out, picture / 255, atol=1e-6)
    stripes = np.zeros((28, 28), np.uint8)
    stripes[:, ::2] = 255
    scenes.resize(stripes, out, 14)
    np.testing.assert_allclose(out[:14, 1:13], 0.5, atol=0.01)


def test_characters_fill_the_canvas(glyphs):
    s = scenes.characters(glyphs, 0, 0, 8, canvas=28)
    np.testing.assert_allclose(s.images[:, 0], glyphs.images[s.labels[:, 0]] / 255, atol=1e-6)
    assert (s.counts == 1).all()


@pytest.mark.parametrize("wrong, says", [
    ({"canvas": 20}, "do not fit a canvas of 20"), ({"batch": 0}, "at least 1"),
    ({"counts": ()}, "counts"), ({"counts": (-1, 2)}, "counts"), ({"lo": 30}, "low <= high"),
    ({"layout": "heap"}, "unknown"),
    ({"counts": (9,), "layout": "separated"}, "no separated places"),
])
def test_impossible_scenes_fail_with_one_clear_line(glyphs, wrong, says):
    with pytest.raises(Fail, match=says) as e:
        scenes.multi_digits(glyphs, **{"seed": 0, "start": 0, "batch": 2} | wrong)
    assert "\n" not in str(e.value)


def test_any_whole_number_is_a_seed(glyphs):
    for seed in (-1, 2**63, 2**64 + 5):
        assert scenes.sprites(seed, 0, 1).images.shape == (1, 3, 50, 50)
    with pytest.raises(Fail, match="canvas of 19"):
        scenes.sprites(0, 0, 1, canvas=19)
