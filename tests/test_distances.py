"""Distances between sets of pictures: closed forms, bias; the network whose features they use."""

import numpy as np
import pytest

from common import features, shapes
from common.distances import discrepancy, frechet, kernel
from common.errors import Fail
from common.gradcheck import directional
from common.params import Params
from test_gradcheck import BOUND, EPS


def with_moments(rng, n, mean, covariance):
    """n points whose mean and covariance are exactly these."""
    x = rng.standard_normal((n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T)).T)
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_of_gaussians_whose_covariances_commute(rng):
    """|mean - mean'|^2 + sum of (std - std')^2, in any rotated frame."""
    turn, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    std_a, std_b = rng.uniform(0.5, 2, (2, 4))
    mean_a, mean_b = rng.standard_normal((2, 4))
    a = with_moments(rng, 300, mean_a, turn @ np.diag(std_a**2) @ turn.T)
    b = with_moments(rng, 500, mean_b, turn @ np.diag(std_b**2) @ turn.T)
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_any_two_by_two(rng):
    """There tr (A B)^(1/2) = sqrt(tr A B + 2 sqrt(det A B))."""
    A, B = (m @ m.T for m in rng.standard_normal((2, 2, 2)))
    a, b = with_moments(rng, 200, np.zeros(2), A), with_moments(rng, 100, np.ones(2), B)
    both = np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A @ B)))
    assert frechet(a, b) == pytest.approx(2 + np.trace(A) + np.trace(B) - 2 * both, rel=1e-6)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-9)


def test_a_set_is_no_distance_from_itself(rng):
    """Also where features are constant or copies of each other."""
    x = rng.standard_normal((500, 6)).astype(np.float32)
    x = np.concatenate([x, x[:, :2], np.zeros((500, 1), np.float32)], 1)
    assert abs(frechet(x, x)) < 1e-6
    assert frechet(x, x + 1) == pytest.approx(9, rel=1e-5)


def test_kernel_distance_is_unbiased(rng):
    """The mean over many small sets is the closed form, and for one distribution it is 0.

    In one dimension E (x y + 1)^3 = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3.
    """
    small = 0.5 * rng.standard_normal((2, 4000, 5, 1))
    same = [discrepancy(a, b) for a, b in zip(*small, strict=True)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 4000**0.5 < 0.2
    moved = [discrepancy(a, b + 0.5) for a, b in zip(*small, strict=True)]
    squares = 3 * 0.5**2 + 3 * 0.25**2 + (0.5**3 + 3 * 0.5 * 0.25) ** 2
    assert np.mean(moved) == pytest.approx(squares, abs=4 * np.std(moved) / 4000**0.5)


def test_kernel_distance_in_blocks(rng):
    a, b = rng.standard_normal((2, 1100, 3))
    mean, error = kernel(a, b, 300)
    each = [discrepancy(a[k:k + 300], b[k:k + 300]) for k in (0, 300, 600)]
    assert mean == pytest.approx(np.mean(each))
    assert error == pytest.approx(np.std(each, ddof=1) / 3**0.5)
    assert np.isnan(kernel(a, b, 2000)[1])
    far, far_error = kernel(a, b + 1, 300)
    assert far > mean + 4 * far_error


# ---------------------------------------------------------------- the network

def lesson(seed=0):
    s = shapes.polygons(seed, 0, 4, 32)
    kinds, numbers = features.truth(s.images, s.amodal, s.order, s.kinds)
    return s, kinds, numbers


def test_gradients_of_the_lesson(rng):
    s, kinds, numbers = lesson()
    kinds = kinds * np.array([[1, 0], [1, 1], [1, 1], [1, 1]])      # one object is not there
    p = Params(features.init(32, 2, 0), np.float64)
    p.flat[...] += 0.05 * rng.standard_normal(p.flat.size)
    g, images = p.grads(), s.images.astype(float)
    features.lesson(p, images, kinds, numbers)[-1](g)
    for name in p:
        error = directional(lambda: features.lesson(p, images, kinds, numbers)[0], p[name],
                            g[name], rng, EPS)
        assert error < BOUND, (name, error)


def test_truth_is_that_of_the_generator():
    s, kinds, numbers = lesson()
    for b in range(4):
        for k in range(2):
            rank = s.order[b, k]
            assert kinds[b, rank] == s.kinds[b, k] + 1
            x, y, size, *colour = numbers[b, rank]
            near = (np.array([x, y]) + 1) * 16 - s.centres[b, k]
            assert np.hypot(*near) < 1 and 0.8 * s.sizes[b, k] < 32 * size < 1.8 * s.sizes[b, k]
            if rank == 0:
                np.testing.assert_allclose(colour, s.colours[b, k], atol=0.08)
    absent = np.array([[0, -1]] * 4)
    kinds, _ = features.truth(s.images, s.amodal, absent, s.kinds)
    assert (kinds[:, 1] == 0).all() and (kinds[:, 0] == s.kinds[:, 0] + 1).all()


def test_the_kept_network_knows_its_scenes_and_sees_when_they_change():
    from bench.features import knowledge, polygons

    p = features.load("polygons", 64)
    known = knowledge(dict(p), polygons)
    assert known["kind_nearest"] > 0.5 and known["place_error"] < 1.5
    assert known["colour_error"] < 0.1
    real, other, alone = (shapes.polygons(seed, 0, 500, 64, objects).images
                          for seed, objects in ((1, 2), (2, 2), (2, 1)))
    known = features.of(p, [real])
    floor, far, near, again = (features.compare(features.of(p, parts), known)["frechet"]
                               for parts in ([other], [alone], [other * 0.8],
                                             [other[:200], other[200:]]))
    assert far > 5 * floor and near > 1.5 * floor
    assert again == pytest.approx(floor, rel=1e-3)


def test_fitting_is_repeatable():
    from bench.features import polygons

    a, b = (features.fit(polygons, 64, 2, steps=2, batch=8) for _ in range(2))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_unknown_data_fail_with_one_clear_line():
    with pytest.raises(Fail, match="no features of nothing at 64"):
        features.load("nothing", 64)
