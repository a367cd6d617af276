"""Windows read and write the right pixels, and their gradients are right."""

import numpy as np
import pytest

from common.sampler import read, window_boxes, write
from test_gradcheck import BOUND, pullback_error

# scale, x, y: inside, small, partly outside, larger than the canvas, wholly outside
WINDOWS = np.array([[0.53, 0.11, -0.23], [0.17, -0.41, 0.37], [0.61, 0.83, 0.71],
                    [1.43, -0.29, 0.13], [0.21, 1.9, 0.3]])


@pytest.mark.parametrize(("channels", "shape", "size"), [(1, (9, 9), 5), (3, (8, 11), 6)])
def test_read_gradients(channels, shape, size, rng):
    image = rng.standard_normal((5, channels, *shape))
    inputs = [image, WINDOWS.copy()]
    assert pullback_error(lambda x, w: read(x, w, size, want_image=True), inputs) < BOUND


@pytest.mark.parametrize(("channels", "shape", "size"), [(1, (9, 9), 5), (3, (8, 11), 6)])
def test_write_gradients(channels, shape, size, rng):
    patch = rng.standard_normal((5, channels, size, size))
    inputs = [patch, WINDOWS.copy()]
    assert pullback_error(lambda x, w: write(x, w, shape), inputs) < BOUND


def test_the_image_gets_a_gradient_only_when_asked(rng):
    image, dglimpse = rng.standard_normal((5, 1, 9, 9)), rng.standard_normal((5, 1, 4, 4))
    dimage, dwindow = read(image, WINDOWS, 4)[1](dglimpse)
    assert dimage is None
    asked = read(image, WINDOWS, 4, True)[1](dglimpse)[1]
    np.testing.assert_allclose(dwindow, asked, rtol=1e-12)


def test_the_whole_canvas_as_window_is_the_image(rng):
    image, all_of_it = rng.standard_normal((2, 3, 8, 8)), np.array([[1.0, 0, 0]] * 2)
    np.testing.assert_allclose(read(image, all_of_it, 8)[0], image, atol=1e-12)
    np.testing.assert_allclose(write(image, all_of_it, (8, 8))[0], image, atol=1e-12)


def test_half_the_size_is_the_mean_of_four_pixels(rng):
    image = rng.standard_normal((1, 1, 8, 8))
    glimpse, _ = read(image, np.array([[1.0, 0, 0]]), 4)
    np.testing.assert_allclose(glimpse, image.reshape(1, 1, 4, 2, 4, 2).mean((3, 5)), atol=1e-12)


@pytest.mark.parametrize(("left", "top"), [(0, 0), (3, 5), (6, 1)])
def test_a_window_on_whole_pixels_moves_the_patch_there_and_back(left, top, rng):
    """x counts columns, y counts rows, both from the top left; shown by slicing."""
    patch = rng.standard_normal((1, 2, 4, 4))
    window = np.array([[4 / 10, (left + 2) / 5 - 1, (top + 2) / 5 - 1]])
    canvas, _ = write(patch, window, (10, 10))
    want = np.zeros((1, 2, 10, 10))
    want[:, :, top:top + 4, left:left + 4] = patch
    np.testing.assert_allclose(canvas, want, atol=1e-12)
    np.testing.assert_allclose(read(canvas, window, 4)[0], patch, atol=1e-12)
    np.testing.assert_allclose(window_boxes(window, (10, 10)), [[left, top, left + 4, top + 4]])


def test_canvases_need_not_be_square():
    canvas, _ = write(np.ones((1, 1, 4, 4)), np.array([[0.5, 0.5, -0.5]]), (8, 16))
    np.testing.assert_allclose(canvas[0, 0, :4, 9:15], 1)           # 4 rows, 8 columns, soft ends
    assert not canvas[:, :, 5:].any() and not canvas[:, :, :, :7].any()


def test_window_boxes_are_in_pixels():
    windows = np.array([[[1.0, 0, 0], [0.5, 0.5, -0.5]]])               # (1, 2, 3)
    assert window_boxes(windows, (8, 16)).tolist() == [[[0, 0, 16, 8], [8, 0, 16, 4]]]
