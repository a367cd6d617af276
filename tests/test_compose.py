"""Layers placed, and over each other: by hand, three versions against each other, gradients."""

import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from common import compose
from common.backend import DEVICE, to_device, to_host
from test_gradcheck import BOUND, pullback_error
from test_kernels import GPUS, PRECISION, assert_close, device, dtypes, has_gpu


@pytest.mark.skipif(DEVICE == "gpu", reason="this is that run")
@pytest.mark.parametrize("gpu", GPUS)
def test_all_of_this_on_a_gpu(gpu):
    if gpu == "stand-in" and not shutil.which("g++"):
        pytest.skip("the stand-in compiles CUDA source with g++")
    if gpu == "real" and not has_gpu():
        pytest.skip("no CuPy with a GPU here")
    code = f"import sys; sys.argv += ['--device', 'gpu']; {GPUS[gpu]}; import pytest; " \
           f"sys.exit(pytest.main([{__file__!r}, '-p', 'no:cacheprovider']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def scene(K, flat, rng, dtype=np.float64, B=2, C=3, H=4, W=5):
    """Pictures, alphas, colours, background, and all orders."""
    h, w = (1, 1) if flat else (H, W)
    shapes = (B, C, H, W), (B, K, H, W), (B, K, C, h, w), (B, C, h, w)
    return [rng.random(s).astype(dtype) for s in shapes], np.array([*permutations(range(K))])


@dtypes
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_versions_agree(K, flat, dtype, rng):
    arrays, orders = scene(K, flat, rng, dtype)
    arrays = device(*arrays)
    errors, back = compose.order_errors(*arrays, orders)
    derrors = to_device(rng.standard_normal(errors.shape).astype(dtype))
    want = compose.order_errors_reference(*arrays, orders)
    assert_close([errors], [want], PRECISION[dtype])
    want = compose.order_errors_back_reference(derrors, *arrays, orders)
    assert_close(back(derrors), want, PRECISION[dtype])


@pytest.mark.skipif(DEVICE == "gpu", reason="finite differences are for the CPU")
@pytest.mark.parametrize("flat", [True, False])
def test_gradients(flat, rng):
    (x, *layers), orders = scene(3, flat, rng)
    assert pullback_error(lambda *a: compose.order_errors(x, *a, orders), layers) < BOUND


def test_orders_that_weigh_nothing_may_be_left_out(rng):
    """One that is below FAINT of an image's heaviest moves nothing that can be seen."""
    arrays, orders = scene(3, False, rng)
    arrays = device(*arrays)
    _, back = compose.order_errors(*arrays, orders)
    derrors = to_device(np.array([[0.5, 0, 1e-8, 0, 0.2, 1e-9], [0, 1e-7, 0, 0, 0, 1e-5]]))
    want = compose.order_errors_back_reference(derrors, *arrays, orders)
    assert_close(back(derrors), want, 1e-6)


def test_opaque_objects_are_painted_the_farthest_first():
    x = np.zeros((1, 1, 1, 3))
    alpha = np.array([[[[1.0, 1, 0]], [[0, 1, 0]]]])                # 0 covers two pixels, 1 one
    colour = np.array([0.5, 0.25]).reshape(1, 2, 1, 1, 1)
    background = np.full((1, 1, 1, 1), 2.0)
    orders = np.array([[0, 1], [1, 0]])                             # nearest first
    errors, _ = compose.order_errors(*device(x, alpha, colour, background), orders)
    want = [[0.25 + 0.25 + 4, 0.25 + 0.0625 + 4]]
    np.testing.assert_allclose(to_host(errors), want)


# ---------------------------------------------------------------- placing and cutting

def maps(rng, R=2, C=3, M=4, H=7, W=9):
    """Canvases, sparse position maps, pictures."""
    theta = rng.random((R, H, W)) * (rng.random((R, H, W)) < 0.4)
    return rng.random((R, C, M, M)), theta, rng.random((R, C, H, W))


@dtypes
@pytest.mark.parametrize("M", [1, 4, 5])
def test_placing_versions_agree(M, dtype, rng):
    canvas, theta, image = device(*(a.astype(dtype) for a in maps(rng, M=M)))
    out, back = compose.place(canvas, theta)
    assert_close([out], [compose.place_reference(canvas, theta)], PRECISION[dtype])
    dcanvas, dtheta = back(image)
    there = theta > 0                                   # the CPU leaves the other weights out
    want = compose.cut_reference(image, theta, M), compose.match_reference(canvas, image) * there
    assert_close([dcanvas, dtheta * there], want, PRECISION[dtype])
    crop, back = compose.cut(image, theta, M)
    assert_close([crop, back(canvas) * there], want, PRECISION[dtype])


@pytest.mark.skipif(DEVICE == "gpu", reason="the GPU has one way for all maps")
@pytest.mark.parametrize("M", [1, 4, 5])
def test_transforms_place_as_the_loops_do(M, rng):
    canvas, theta, image = maps(rng, M=M)
    for kernel, arrays, want in (("place", (canvas, theta), compose.place_reference(canvas, theta)),
                                 ("cut", (image, theta), compose.cut_reference(image, theta, M)),
                                 ("match", (canvas, image),
                                  compose.match_reference(canvas, image))):
        np.testing.assert_allclose(compose.fourier(kernel, *arrays, theta, M), want, atol=1e-12)


@pytest.mark.skipif(DEVICE == "gpu", reason="the GPU has one way for all maps")
def test_blurred_maps_are_transformed_and_sharp_ones_are_not(monkeypatch, rng):
    canvas, image = rng.random((2, 4, 24, 24)), rng.random((2, 4, 64, 64))
    sharp, even = np.zeros((2, 64, 64)), np.full((2, 64, 64), 1 / 64**2)
    sharp[:, 30:33, 40:43] = 1 / 9
    assert not compose.blurred(canvas, sharp) and compose.blurred(canvas, even)
    answers = []
    for slower in (compose.SLOWER, np.inf):             # then the loops have to do it
        monkeypatch.setattr(compose, "SLOWER", slower)
        out, back = compose.place(canvas, even)
        answers.append((out, *back(image), compose.cut(image, even, 24)[0]))
    assert_close(*answers, 1e-12)


@pytest.mark.skipif(DEVICE == "gpu", reason="finite differences are for the CPU")
@pytest.mark.parametrize("slower", [0, np.inf])
def test_placing_gradients(slower, monkeypatch, rng):
    monkeypatch.setattr(compose, "SLOWER", slower)
    canvas, theta, image = maps(rng)
    theta += 0.1
    assert pullback_error(compose.place, [canvas, theta]) < BOUND
    assert pullback_error(lambda t: compose.cut(image, t, 4), [theta]) < BOUND


def test_a_one_hot_map_puts_the_canvas_there():
    canvas, theta = np.arange(1.0, 10).reshape(1, 1, 3, 3), np.zeros((1, 6, 6))
    theta[0, 4, 5] = 1                                  # its middle; the last column falls outside
    want = np.zeros((6, 6))
    want[3:6, 4:6] = canvas[0, 0, :, :2]
    out, _ = compose.place(*device(canvas, theta))
    np.testing.assert_array_equal(to_host(out)[0, 0], want)
    crop, _ = compose.cut(*device(want[None, None], theta), 3)
    np.testing.assert_array_equal(to_host(crop)[0, 0, :, :2], canvas[0, 0, :, :2])
