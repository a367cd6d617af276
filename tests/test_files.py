"""Good files come in as they are; bad ones get one clear line."""

import imageio.v3 as imageio
import numpy as np
import pytest

from common.errors import Fail
from common.files import as_picture, read_picture, read_scenes, resize

AXES = {"images": ("N", 6, 6), "counts": ("N",), "boxes": ("N", "K", 4)}
IMAGES, COUNTS = np.zeros((3, 6, 6), np.uint8), np.array([0, 1, 2])


@pytest.fixture
def scenes(tmp_path):
    """Writes arrays as a scene file and reads it."""
    def read(**arrays):
        np.savez(tmp_path / "scenes.npz", **arrays)
        return read_scenes(tmp_path / "scenes.npz", AXES, optional=("boxes",))
    return read


def test_scene_files_come_back_as_they_were_saved(scenes, rng):
    boxes = rng.random((3, 2, 4)).astype(np.float32)
    boxes[0, 1] = np.nan
    found = scenes(images=IMAGES, counts=COUNTS, boxes=boxes, more=np.ones(1))
    assert [*found] == ["images", "counts", "boxes"]
    for name, a in {"images": IMAGES, "counts": COUNTS, "boxes": boxes}.items():
        np.testing.assert_array_equal(found[name], a)
        assert found[name].dtype == a.dtype
    assert "boxes" not in scenes(images=IMAGES, counts=COUNTS)


@pytest.mark.parametrize(("arrays", "line"), [
    ({"images": IMAGES}, "no array 'counts'"),
    ({"images": IMAGES[0], "counts": COUNTS}, r"images has shape \(6, 6\), expected \(N, 6, 6\)"),
    ({"images": IMAGES[:, :5], "counts": COUNTS}, r"images has shape \(3, 5, 6\), expected"),
    ({"images": IMAGES, "counts": COUNTS[:2]}, r"counts has shape \(2,\), .* with N = 3"),
    ({"images": IMAGES, "counts": COUNTS, "boxes": np.zeros((3, 2, 5))}, "boxes has shape"),
    ({"images": IMAGES, "counts": np.array(["0", "1", "2"])}, "counts has dtype <U1"),
    ({"images": IMAGES, "counts": COUNTS * 1j}, "counts has dtype complex128"),
    ({"images": IMAGES, "counts": np.array([0, 1, None])}, "not a readable npz file"),    # a pickle
    ({"images": IMAGES[:0], "counts": COUNTS[:0]}, "holds no scenes"),
])
def test_bad_scene_files_get_one_line(scenes, arrays, line):
    with pytest.raises(Fail, match=line) as failed:
        scenes(**arrays)
    assert "scenes.npz" in str(failed.value) and "\n" not in str(failed.value)


def npz(path, save=np.savez):
    save(path, images=IMAGES, counts=COUNTS)
    return path.read_bytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_gets_one_line_or_does_no_harm(tmp_path, save):
    path = tmp_path / "scenes.npz"
    whole, failures = npz(path, save), 0
    for k in range(0, len(whole), 5):
        for blob in (whole[:k], whole[:k] + bytes([whole[k] ^ 8]) + whole[k + 1:]):
            path.write_bytes(blob)
            try:
                read_scenes(path, AXES, optional=("boxes",))
            except Fail as failed:
                failures += 1
                assert "\n" not in str(failed)
    assert failures > len(whole) / 5


@pytest.mark.parametrize("content", [
    lambda path: npz(path)[:-40],
    lambda path: b"",
    lambda path: b"PK\x03\x04 is how zip files begin",
    lambda path: b"not an npz file at all",
    lambda path: b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, "
                 b"'shape': (3,), }".ljust(127) + b"\n\0\0\0",           # npy instead of npz
], ids=["truncated", "empty", "zip magic", "text", "npy"])
def test_files_that_are_no_npz_get_one_line(tmp_path, content):
    path = tmp_path / "scenes.npz"
    path.write_bytes(content(path))
    with pytest.raises(Fail, match="not a readable npz file") as failed:
        read_scenes(path, AXES)
    assert "\n" not in str(failed.value)


def test_files_that_are_not_there_get_one_line(tmp_path):
    with pytest.raises(Fail, match="no scene file"):
        read_scenes(tmp_path / "none.npz", AXES)
    with pytest.raises(Fail, match="not a readable npz file"):
        read_scenes(tmp_path, AXES)
    with pytest.raises(Fail, match="no such file"):
        read_picture(tmp_path / "none.png", 8, 1)


# ---------------------------------------------------------------- pixel values

@pytest.mark.parametrize("a", [
    np.array([0, 51, 255], np.uint8), np.array([0, 0.2, 1]), np.array([0, 0.2, 1], np.float16)])
def test_pictures_are_bytes_or_floats_from_0_to_1(a):
    picture = as_picture(a, "here")
    assert picture.dtype == np.float32
    np.testing.assert_allclose(picture, [0, 0.2, 1], atol=1e-4)
    assert as_picture(np.array([True, False]), "here").tolist() == [1, 0]


@pytest.mark.parametrize(("a", "line"), [
    (np.array([0, 1]), "here has dtype int64"),
    (np.array([0, np.nan]), "here has values that are NaN or infinite"),
    (np.array([0, np.inf]), "here has values that are NaN or infinite"),
    (np.array([-0.1, 1]), "here has values from -0.1 to 1, expected 0 to 1"),
    (np.array([0, 255.0]), "here has values from 0 to 255, expected 0 to 1"),
])
def test_other_pixel_values_get_one_line(a, line):
    with pytest.raises(Fail, match=line):
        as_picture(a, "here")


# ---------------------------------------------------------------- pictures

@pytest.fixture
def picture(tmp_path):
    """Saves pixels as a PNG and reads it as a model's input."""
    def read(pixels, size, channels):
        imageio.imwrite(tmp_path / "picture.png", pixels)
        return read_picture(tmp_path / "picture.png", size, channels)[0]
    return read


def test_a_picture_of_the_right_size_comes_back_exactly(picture, rng):
    grey = rng.integers(0, 100, (8, 8)).astype(np.uint8)        # dark: nothing is turned
    np.testing.assert_allclose(picture(grey, 8, 1)[0], grey / 255, atol=1e-6)
    np.testing.assert_allclose(picture(grey, 8, 3), [grey / 255] * 3, atol=1e-6)
    colour = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    np.testing.assert_allclose(picture(colour, 8, 3), np.moveaxis(colour, 2, 0) / 255, atol=1e-6)
    np.testing.assert_allclose(picture(colour // 3, 8, 1)[0], (colour // 3).mean(2) / 255,
                               atol=1e-6)


def test_other_shapes_are_centred_on_their_border_s_colour(picture):
    wide = np.full((4, 8, 3), (30, 60, 90), np.uint8)
    wide[1:3, 1:-1] = 255
    out = picture(wide, 16, 3)
    assert out.shape == (3, 16, 16) and out.dtype == np.float32
    np.testing.assert_allclose(out[:, [0, 3, 12, 15], 5].T, [[30 / 255, 60 / 255, 90 / 255]] * 4)
    assert out[:, 7:9, 2:14].min() == 1


def test_dark_on_bright_is_turned_for_models_that_know_bright_on_dark(picture):
    page = np.full((8, 8), 255, np.uint8)
    page[3:5, 3:5] = 0
    np.testing.assert_array_equal(picture(page, 8, 1)[0], 1 - page / 255)
    np.testing.assert_array_equal(picture(page, 8, 3)[0], page / 255)
    assert picture(page[2:6], 8, 1).sum() == 4                  # what is added beside it is too


def test_transparent_is_black_and_16_bits_are_understood(picture, rng):
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[..., 3] = 51
    np.testing.assert_allclose(picture(pixels, 8, 3), 200 / 255 * 0.2, rtol=1e-5)
    deep = (rng.integers(0, 100, (8, 8)) * 257).astype(np.uint16)
    np.testing.assert_allclose(picture(deep, 8, 1)[0], deep / 65535, atol=1e-6)


def test_what_is_no_picture_gets_one_line(tmp_path):
    (tmp_path / "a.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(Fail, match="not a picture that can be read"):
        read_picture(tmp_path / "a.png", 8, 1)


@pytest.mark.parametrize(("shape", "size", "want"), [
    ((6, 9, 1), 9, (6, 9)), ((6, 9, 3), 6, (4, 6)), ((6, 9, 2), 18, (12, 18)),
    ((50, 7, 1), 13, (13, 2)), ((1, 40, 1), 8, (1, 8))])
def test_resize_preserves_shape_mean_and_constants(shape, size, want, rng):
    a = rng.random(shape)
    out = resize(a, size)
    assert out.shape == (*want, shape[2]) and out.dtype == np.float32
    np.testing.assert_allclose(out.mean((0, 1)), a.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(resize(np.full(shape, 0.3), size), 0.3, rtol=1e-6)


def test_resize_to_half_is_the_mean_of_four(rng):
    a = rng.random((6, 4, 2))
    np.testing.assert_allclose(resize(a, 3), a.reshape(3, 2, 2, 2, 2).mean((1, 3)), rtol=1e-5)


def test_boxes_come_back_in_the_files_own_pixels(tmp_path):
    image = np.zeros((20, 40, 3), np.uint8)             # becomes 4 x 8, in rows 2 to 5 of 8 x 8
    imageio.imwrite(tmp_path / "wide.png", image)
    _, to_picture = read_picture(tmp_path / "wide.png", 8, 1)
    assert to_picture([0, 2, 8, 6]) == [0, 0, 40, 20] and to_picture([1, 3, 2, 4]) == [5, 5, 10, 10]
