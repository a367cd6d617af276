"""Shapes keep their data sets' rules; masks, depth order, factors and pictures agree."""

import hashlib
import time

import numpy as np
import pytest

from common import shapes
from common.errors import Fail
from common.shapes import BEVEL, Layers, oriented_tetrominoes

DRAW = {
    "tetris": shapes.tetris,
    "polygons": shapes.polygons,
    "small polygons": lambda *key: shapes.polygons(*key, size=32, objects=3),
    "sprites": lambda *key: shapes.dsprites(*key, counts=(0, 2, 3, 4)),
    "white sprites": lambda *key: shapes.dsprites(*key, colour=False),
    "outlines": shapes.shapes,
}
GOLDEN = {
    "tetris": "70d2603396f7704c",
    "polygons": "8405df60483b82f9",
    "small polygons": "7b2f855e3169fd6a",
    "sprites": "e055efee476dc2ad",
    "white sprites": "b98caa8be5a801c0",
    "outlines": "e9620136a6078f0e",
}


@pytest.fixture(params=DRAW)
def layers(request):
    return DRAW[request.param](5, 0, 200)


def uniform(values, low, high):
    """Do the values (N,) or (N, D) fill low .. high evenly?"""
    values = np.sort(values, 0)
    spread = np.linspace(low, high, len(values)).reshape(-1, *[1] * (values.ndim - 1))
    return abs(values - spread).max() < 2 * (high - low) / len(values) ** 0.5


def even(kinds, n):
    """Are the kinds 0 .. n - 1 equally frequent, as far as chance allows?"""
    seen, expected = np.bincount(kinds, minlength=n), len(kinds) / n
    return len(seen) == n and ((seen - expected) ** 2 / expected).sum() < n + 5 * np.sqrt(2 * n)


@pytest.mark.parametrize("name", DRAW)
def test_golden(name):
    s = DRAW[name](7, 0, 32)
    images = np.rint(s.images * 255).astype(np.uint8)
    parts = images, s.masks, s.amodal, s.order, s.kinds
    assert hashlib.sha256(b"".join(a.tobytes() for a in parts)).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", DRAW)
def test_a_scene_depends_on_seed_and_index_alone(name):
    whole = DRAW[name](3, 10, 12)
    for start, batch in ((10, 1), (13, 5), (21, 1)):
        for a, b in zip(whole, DRAW[name](3, start, batch), strict=True):
            np.testing.assert_array_equal(a[start - 10:start - 10 + batch], b)
    assert (whole.images != DRAW[name](4, 10, 12).images).any((1, 2, 3)).all()


def test_masks_are_what_nothing_nearer_covers(layers):
    for masks, amodal, order in zip(layers.masks, layers.amodal, layers.order, strict=True):
        seen = [amodal[k] & ~amodal[(order >= 0) & (order < depth)].any(0)
                for k, depth in enumerate(order)]
        owner = sum((k + 1) * mask for k, mask in enumerate(seen))
        np.testing.assert_array_equal(masks, np.where(np.sum(seen, 0) > 1, -1, owner))


def test_absent_objects_have_nothing_and_the_others_all(layers):
    K = layers.kinds.shape[1]
    present = np.arange(K) < layers.counts[:, None]
    for there in (layers.kinds >= 0, layers.order >= 0, layers.amodal.any((2, 3)),
                  np.isfinite(layers.colours).all(2), np.isfinite(layers.centres).all(2)):
        np.testing.assert_array_equal(there, present)
    for order, n in zip(layers.order, layers.counts, strict=True):
        assert sorted(order[:n]) in (list(range(n)), [0] * n)
    assert layers.images.dtype == np.float32
    assert layers.images.min() >= 0 and layers.images.max() <= 1


def test_tetris_is_three_bevelled_tetrominoes_apart():
    s = shapes.tetris(0, 0, 3000)
    assert s.images.shape == (3000, 3, 35, 35)
    assert (s.amodal.sum((2, 3)) == 100).all() and s.amodal.sum(1).max() == 1
    pictures, corners = oriented_tetrominoes(), []
    for image, amodal, kinds, colours, centres in zip(
            s.images, s.amodal, s.kinds, s.colours, s.centres, strict=True):
        rebuilt = np.zeros_like(image)
        for k, kind in enumerate(kinds):
            h, w = pictures[kind].shape
            x, y = (centres[k] - (w / 2, h / 2)).astype(int)
            rebuilt[:, y:y + h, x:x + w] += colours[k, :, None, None] * pictures[kind]
            np.testing.assert_array_equal(amodal[k, y:y + h, x:x + w], pictures[kind] > 0)
            corners.append((x / (35 - w), y / (35 - h)))
        np.testing.assert_array_equal(image, rebuilt)
    corners = np.array(corners)
    assert corners.min() == 0 and corners.max() == 1
    np.testing.assert_allclose(corners.mean(0), 0.5, atol=0.02)
    assert even(s.kinds.ravel(), 19)
    assert even((s.colours.reshape(-1, 3) @ [1, 2, 4]).astype(int) - 1, 6)
    left, right = s.masks[:, :, :-1], s.masks[:, :, 1:]
    assert (left * right > 0)[left != right].any()                  # some touch


def test_blocks_and_pieces():
    np.testing.assert_array_equal(np.rint(BEVEL * 255), [
        [191, 255, 255, 255, 223], [127, 159, 159, 159, 191], [127, 159, 159, 159, 191],
        [127, 159, 159, 159, 191], [95, 63, 63, 63, 127]])
    pictures = oriented_tetrominoes()
    cells = {tuple(map(tuple, picture[::5, ::5] > 0)) for picture in pictures}
    assert len(pictures) == len(cells) == 19
    for picture in pictures:
        h, w = picture.shape
        blocks = picture.reshape(h // 5, 5, w // 5, 5).swapaxes(1, 2).reshape(-1, 5, 5)
        assert sum(block.any() for block in blocks) == 4
        assert all(np.array_equal(block, BEVEL) or not block.any() for block in blocks)
        assert connected(picture[::5, ::5] > 0)


def connected(cells):
    """Do shared edges lead from one cell to all the others?"""
    todo = set(zip(*np.nonzero(cells), strict=True))
    here = [todo.pop()]
    while here:
        y, x = here.pop()
        reached = todo & {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)}
        todo -= reached
        here += reached
    return not todo


def test_polygons_fill_their_ranges():
    s = shapes.polygons(0, 0, 4000)
    assert s.images.shape == (4000, 3, 64, 64) and (s.counts == 2).all()
    assert even(s.kinds.ravel() - 3, 4) and even(s.order[:, 0], 2)
    assert uniform(s.sizes.ravel(), 7.5, 12.5) and uniform(s.centres.reshape(-1, 2), 27, 37)
    assert uniform(s.colours.reshape(-1, 3), 0, 1)
    assert uniform(np.arctan2(*s.turns.reshape(-1, 2).T), -np.pi, np.pi)
    edges = s.kinds
    area = edges / 2 * np.sin(2 * np.pi / edges) * s.sizes**2
    np.testing.assert_allclose(s.amodal.sum((2, 3)) / area, 1, atol=0.12)
    np.testing.assert_allclose((s.amodal.sum((2, 3)) / area).mean(), 1, atol=0.002)
    assert (s.amodal.all(1).sum((1, 2)) >= 30).mean() > 0.9         # nearly all overlap


def test_half_the_size_is_the_same_scene_with_half_the_lengths():
    big, small = shapes.polygons(1, 0, 50), shapes.polygons(1, 0, 50, size=32)
    for name in ("kinds", "order", "colours", "turns"):
        np.testing.assert_array_equal(getattr(big, name), getattr(small, name))
    np.testing.assert_allclose(small.sizes, big.sizes / 2, rtol=1e-6)
    np.testing.assert_allclose(small.centres, big.centres / 2, rtol=1e-6)
    shrunk = big.images.reshape(50, 3, 32, 2, 32, 2).mean((3, 5))
    assert abs(shrunk - small.images).mean() < 0.003


def test_polygon_edges_are_antialiased_and_the_inside_is_flat():
    s = shapes.polygons(2, 0, 300, objects=1)
    share = (s.images / s.colours[:, 0, :, None, None]).mean(1)
    soft = (share > 0.01) & (share < 0.99)
    assert 10 < soft.sum((1, 2)).mean() < 100
    np.testing.assert_array_equal(share > 0.5, s.amodal[:, 0])
    edges = s.kinds[:, 0]
    area = edges / 2 * np.sin(2 * np.pi / edges) * s.sizes[:, 0]**2
    np.testing.assert_allclose(share.sum((1, 2)), area, rtol=0.02)


def test_sprites_fill_their_ranges_and_the_canvas_holds_them():
    s = shapes.dsprites(0, 0, 3000, counts=(2, 3, 4, 5))
    there = s.kinds >= 0
    assert even(s.counts - 2, 4) and even(s.kinds[there], 3)
    assert uniform(s.sizes[there], 7, 14)
    free = (s.centres - s.sizes[..., None])[there] / (64 - 2 * s.sizes[there])[:, None]
    assert uniform(free, 0, 1)
    assert uniform(np.arctan2(*s.turns[there].T), -np.pi, np.pi)
    np.testing.assert_array_equal(s.colours[there].max(1), 1)       # full value
    np.testing.assert_array_equal(s.colours[there].min(1), 0)       # full saturation
    assert abs(s.colours[there].mean(0) - 0.5).max() < 0.02
    grey = s.images[:, :, 0, 0][s.masks[:, 0, 0] == 0]
    assert (grey == grey[:, :1]).all() and uniform(grey[:, 0], 0, 1)
    scene, y, x = np.nonzero(s.masks)
    np.testing.assert_array_equal(s.images[scene, :, y, x],         # sharp
                                  s.colours[scene, s.masks[scene, y, x] - 1])


def test_sprites_have_the_shapes_that_they_say():
    s = shapes.dsprites(0, 0, 2000, counts=(1,))
    area = s.amodal.sum((1, 2, 3)) / s.sizes[:, 0]**2
    for kind, expected in enumerate((2, 0.6 * np.pi, 180 * np.pi / 18.25**2)):
        np.testing.assert_allclose(area[s.kinds[:, 0] == kind].mean(), expected, rtol=0.01)
    t = np.linspace(0, 2 * np.pi, 1000)
    curve = np.stack([16 * np.sin(t)**3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t)
                      - np.cos(4 * t) + 2.5]) / 18.25
    assert 0.99 < np.sqrt((curve**2).sum(0)).max() <= 1             # fits its circle
    for x, y in curve.T:
        assert shapes.outside(shapes.HEART, 0.98 * x, -0.98 * y) < 0
        assert shapes.outside(shapes.HEART, 1.03 * x, -1.03 * y - 0.01 * (x == 0)) > 0


def test_white_sprites_and_outlines_are_binary():
    for s in (shapes.dsprites(0, 0, 100, colour=False), shapes.shapes(0, 0, 100)):
        assert s.images.shape[1] == 1
        np.testing.assert_array_equal(s.images[:, 0], s.masks != 0)


def test_outlines():
    triangle, upside_down, square = shapes.outlines()
    assert ["".join(".#"[dot] for dot in row) for row in triangle.astype(int)] == [
        ".....##.....", "....####....", "...######...", "..###..###..", ".###....###.",
        "############", "############"]
    np.testing.assert_array_equal(upside_down, triangle[::-1])
    assert square.sum() == 40 and not square[2:5, 2:5].any()
    s = shapes.shapes(0, 0, 3000)
    assert s.images.shape == (3000, 1, 28, 28) and even(s.kinds.ravel(), 3)
    np.testing.assert_array_equal(s.masks < 0, s.amodal.sum(1) > 1)
    assert 0.3 < (s.masks < 0).any((1, 2)).mean() < 0.9


@pytest.mark.parametrize("draw", [shapes.tetris, shapes.polygons, shapes.dsprites])
def test_two_thousand_scenes_a_second(draw):
    draw(0, 0, 1)
    start = time.thread_time()
    draw(0, 0, 500)
    rate = 500 / (time.thread_time() - start)
    print(f"{draw.__name__}: {rate:.0f} scenes a second")
    assert rate > 2000


def test_more_or_fewer_objects_and_impossible_ones():
    assert (shapes.tetris(0, 0, 20, objects=5).amodal.sum((1, 2, 3)) == 500).all()
    assert isinstance(shapes.polygons(0, 0, 2, objects=4), Layers)
    for draw, says in ((lambda: shapes.tetris(0, 0, 1, objects=13), "no places for 13"),
                       (lambda: shapes.polygons(0, 0, 0), "batch size"),
                       (lambda: shapes.dsprites(0, 0, 1, counts=()), "counts")):
        with pytest.raises(Fail, match=says):
            draw()
