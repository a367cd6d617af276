"""CLEVR-like scenes keep their rules; pictures, masks, depth, order and factors agree."""

import hashlib
import time

import numpy as np
import pytest

from common import raycast
from common.errors import Fail
from common.raycast import CUBE, SPHERE, VARIANTS, clevr

GOLDEN = {"3": "2b52ac0ab5937d12", "5": "f06950ccc2909599", "5-vbg": "1d89feeb427fa556"}


def parts(s):
    """All arrays of the pictures, those of their factors too."""
    return *s[:-1], *s.factors


def pixel_rays(eye, size):
    """The directions, 1 forward, through the middles of all pixels, from the eye to the origin."""
    forward = -eye / np.linalg.norm(eye)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    at = raycast.TAN * ((np.arange(size) + 0.5) / size * 2 - 1)
    return forward + at[:, None] * right + at[:, None, None] * np.cross(forward, right)


def held(f, b, k, points):
    """Which points lie in object k of scene b?"""
    half = f.sizes[b, k] * (0.5**0.5 if f.kinds[b, k] == CUBE else 1)
    cos, sin = f.turns[b, k]
    x, y, z = np.moveaxis(points - [*f.places[b, k], half], -1, 0) / half
    x, y, z = cos * x + sin * y, cos * y - sin * x, abs(z)
    if f.kinds[b, k] == SPHERE:
        return x * x + y * y + z * z < 1
    flat = np.maximum(abs(x), abs(y)) if f.kinds[b, k] == CUBE else np.hypot(x, y)
    return np.maximum(flat, z) < 1


def near_ball(eye, d, middle, radius):
    """Which rays come nearer to the middle than the radius?"""
    away = np.cross(d, middle - eye)
    return (away**2).sum(-1) < radius**2 * (d**2).sum(-1)


@pytest.fixture(scope="module", params=VARIANTS)
def drawn(request):
    return request.param, clevr(5, 0, 60, 64, request.param)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(variant):
    s = clevr(7, 0, 16, 64, variant)
    s = s._replace(images=np.rint(s.images * 255).astype(np.uint8), depth=np.rint(s.depth * 100))
    seen = s.images, s.counts, s.masks, s.amodal, s.order, s.depth, *s.factors[:3]
    assert hashlib.sha256(b"".join(a.tobytes() for a in seen)).hexdigest()[:16] == GOLDEN[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scene_depends_on_seed_and_index_alone(variant):
    whole = parts(clevr(3, 10, 12, 32, variant))
    for start, count in ((10, 1), (13, 5), (21, 1)):
        for a, b in zip(whole, parts(clevr(3, start, count, 32, variant)), strict=True):
            np.testing.assert_array_equal(a[start - 10:start - 10 + count], b)
    assert (whole[0] != clevr(4, 10, 12, 32, variant).images).any((1, 2, 3)).all()


def test_amodal_masks_and_depth_are_those_of_each_object_alone():
    """Against points along the rays that are tried one by one."""
    steps, wrong, area = np.arange(0, 3, 0.004)[:, None], 0, 0
    for variant in VARIANTS:
        s = clevr(11, 0, 3, 40, variant)
        for b, k in np.argwhere(s.order >= 0):
            eye = s.factors.eyes[b].astype(float)
            middle = np.array([*s.factors.places[b, k], s.factors.sizes[b, k]])
            near = (eye - middle) @ eye / np.linalg.norm(eye) - 1.5
            d = pixel_rays(eye, 40)
            wide = np.argwhere(near_ball(eye, d, middle, 1.8 * s.factors.sizes[b, k]))
            inside = held(s.factors, b, k, eye + (near + steps) * d[tuple(wide.T)][:, None])
            alone = np.zeros((40, 40), bool)
            alone[tuple(wide.T)] = inside.any(1)
            wrong, area = wrong + (alone != s.amodal[b, k]).sum(), area + alone.sum()
            seen = (s.masks[b] == k + 1)[tuple(wide.T)] & inside.any(1)
            t = near + steps[inside.argmax(1), 0]
            np.testing.assert_allclose(s.depth[b][tuple(wide.T)][seen], t[seen], atol=0.01)
    assert area > 500 and wrong <= 0.01 * area


def test_masks_are_what_nothing_nearer_covers_and_the_ground_is_flat(drawn):
    _, s = drawn
    for b, order in enumerate(s.order):
        expected = np.zeros_like(s.masks[b])
        for k in np.argsort(-order)[:s.counts[b]]:
            expected[s.amodal[b, k]] = k + 1
        np.testing.assert_array_equal(s.masks[b], expected)
        points = s.factors.eyes[b] + s.depth[b][..., None] * pixel_rays(s.factors.eyes[b], 64)
        height = points[..., 2]
        np.testing.assert_allclose(height[s.masks[b] == 0], 0, atol=1e-4)
        assert height[s.masks[b] > 0].min() > -1e-4
        hidden = -s.factors.eyes[b, 2] / pixel_rays(s.factors.eyes[b], 64)[..., 2]
        assert (s.depth[b] <= hidden + 1e-4).all()


def test_order_is_that_of_the_middles(drawn):
    _, s = drawn
    f = s.factors
    for b, n in enumerate(s.counts):
        half = f.sizes[b, :n] * np.where(f.kinds[b, :n] == CUBE, 0.5**0.5, 1)
        far = np.column_stack([f.places[b, :n], half]) @ -f.eyes[b]
        np.testing.assert_array_equal(np.argsort(far), np.argsort(s.order[b, :n]))


@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_objects_show_enough_and_lie_within_the_canvas(variant, size):
    s = clevr(1, 0, 60, size, variant)
    low, high, _, _, least = VARIANTS[variant]
    there = np.arange(high) < s.counts[:, None]
    seen = (s.masks[:, None] == np.arange(high)[:, None, None] + 1).sum((2, 3))
    assert seen[there].min() >= least * (size / 96)**2
    assert not s.masks[:, [0, -1]].any() and not s.masks[:, :, [0, -1]].any()
    assert sorted(set(s.counts)) == list(range(low, high + 1))
    for present in (s.order >= 0, s.amodal.any((2, 3)), s.factors.kinds >= 0,
                    np.isfinite(s.factors.sizes), np.isfinite(s.factors.places).all(2)):
        np.testing.assert_array_equal(present, there)
    assert s.images.dtype == s.depth.dtype == np.float32
    assert s.images.min() >= 0 and s.images.max() <= 1


def test_objects_of_3_overlap_more_often_than_those_of_5():
    shares = []
    for variant in ("3", "5"):
        amodal = clevr(2, 0, 100, 64, variant).amodal
        both = (amodal[:, :, None] & amodal[:, None]).sum((3, 4))
        i, j = np.triu_indices(both.shape[1], 1)
        shares.append((both[:, i, j] >= 30).mean())
    assert shares[0] > 3 * shares[1] > 0


def test_all_kinds_colours_materials_and_sizes_occur(drawn):
    f = drawn[1].factors
    for name, n in (("kinds", 3), ("colours", 8), ("shiny", 2), ("sizes", 2)):
        values = getattr(f, name)
        share = np.unique(values[f.kinds >= 0], return_counts=True)[1] / (f.kinds >= 0).sum()
        assert len(share) == n and share.min() > 0.3 / n, name


def test_grounds_vary_in_vbg_alone():
    s, plain = clevr(0, 0, 60, 32, "5-vbg"), clevr(0, 0, 60, 32, "5")
    assert (plain.factors.grounds == 1).all()
    levels = [np.median(s.images[s.factors.grounds == level][:, :, :, 0])
              for level in np.unique(s.factors.grounds)]
    assert len(levels) == 6 and (np.diff(levels) > 0.02).all()
    np.testing.assert_allclose(np.diff(np.log(np.unique(s.factors.grounds))), 0.555, atol=0.03)


def test_light_shadow_and_gloss():
    s = clevr(8, 0, 200, 64, "3")
    red, green, blue = np.median(s.images[:, :, -1], (0, 2))
    assert red > green > blue > 0.8 * red                       # a warm grey
    brightest = [[] for _ in range(2)]
    for b, k in np.argwhere(s.factors.kinds == SPHERE):
        body = s.images[b][:, s.masks[b] == k + 1]
        brightest[s.factors.shiny[b, k]].append(body.min(0).max())
    assert np.mean(brightest[1]) > np.mean(brightest[0]) + 0.2
    ground = np.where(s.masks == 0, s.images.mean(1), np.nan)
    usual = np.nanmedian(ground, 0)
    assert (ground < usual - 0.12).any((1, 2)).mean() > 0.9      # somewhere in shadow


def test_hundreds_of_scenes_a_second_and_core():
    clevr(0, 0, 1)
    start = time.process_time()
    clevr(0, 0, 150)
    rate = 150 / (time.process_time() - start)
    print(f"{rate:.0f} scenes a second and core")
    assert rate > 150


@pytest.mark.parametrize("wrong, says", [
    ({"variant": "4"}, "unknown"), ({"count": 0}, "at least 1"), ({"size": 0}, "at least 1"),
    ({"size": 1}, "no places")])
def test_impossible_scenes_fail_with_one_clear_line(wrong, says):
    with pytest.raises(Fail, match=says):
        clevr(**{"seed": 0, "start": 0, "count": 1} | wrong)
