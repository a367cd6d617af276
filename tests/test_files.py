"""Good files come in as they are; bad ones get one clear line."""

import imageio.v3 as imageio
import numpy as np
import pytest

from common.errors import Fail
from common.files import as_picture, read_picture, read_scenes, read_video, resize
from common.metrics import ink_boxes

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


# ---------------------------------------------------------------- videos

def square(frames=5, shape=(20, 40), paper=0):
    """A square that moves to the right by 4 pixels a frame."""
    video = np.full((frames, *shape), paper, np.uint8)
    for t in range(frames):
        video[t, 5:9, 5 + 4 * t:9 + 4 * t] = 255 - paper
    return video


def save_folder(folder, video, name="{}.png"):
    folder.mkdir()
    for t, frame in enumerate(video):
        imageio.imwrite(folder / name.format(t), frame)
    return folder


@pytest.mark.parametrize("paper", [0, 255])
def test_a_gif_and_a_folder_are_the_same_video(tmp_path, paper):
    video = square(12, (20, 60), paper)                             # 10.png comes after 9.png
    imageio.imwrite(tmp_path / "a.gif", video)
    for path in (tmp_path / "a.gif", save_folder(tmp_path / "frames", video)):
        frames, images, to_video = read_video(path, 20)
        np.testing.assert_array_equal(frames, video[..., None].repeat(3, 3))
        assert frames.dtype == np.uint8 and images.dtype == np.float32
        assert images.shape == (12, 1, 20, 20) and images[:, :, :6].max() == 0
        boxes = to_video(ink_boxes(images, 0.05))                   # a pixel is 3 of the video's
        true = ink_boxes(square(12, (20, 60))[:, None], 0)
        assert boxes.shape == (12, 4) and abs(boxes - true).max() <= 3


def test_frames_in_the_middle_keep_their_own_pixels(tmp_path, rng):
    video = (square(3, (16, 16)) * 0.3).astype(np.uint8)
    imageio.imwrite(tmp_path / "a.gif", video)
    _, images, to_video = read_video(tmp_path / "a.gif", 16)
    np.testing.assert_allclose(images[:, 0], video / 255, atol=1e-6)
    assert to_video(np.array([[1.0, 2, 3, 4]])).tolist() == [[1, 2, 3, 4]]
    assert np.isnan(to_video(np.full((3, 2, 4), np.nan))).all()


def test_all_frames_are_turned_dark_together(tmp_path):
    video = square(6, (10, 10), 255)
    video[2] = 0                                                    # dark among bright ones
    _, images, _ = read_video(save_folder(tmp_path / "a", video), 10)
    np.testing.assert_allclose(images[:, 0], 1 - video / 255, atol=1e-6)


def test_transparent_grey_and_deep_frames_are_understood(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[..., 3] = 51
    imageio.imwrite(folder / "0.png", pixels)
    imageio.imwrite(folder / "1.png", np.full((8, 8), 40, np.uint8))
    imageio.imwrite(folder / "2.png", np.full((8, 8), 40 * 257, np.uint16))
    imageio.imwrite(folder / "3.png", np.full((8, 8, 3), 40, np.uint8))
    assert (read_video(folder, 8)[0] == 40).all()


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    imageio.imwrite(tmp_path / "a.png", square(1)[0])
    assert read_video(tmp_path / "a.png", 20)[1].shape == (1, 1, 20, 20)


def test_bad_videos_get_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.png").write_bytes(b"")
    sizes = save_folder(tmp_path / "sizes", square(3))
    imageio.imwrite(sizes / "9.png", np.zeros((20, 41), np.uint8))
    mixed = save_folder(tmp_path / "mixed", square(2))
    (mixed / "notes.txt").write_text("no picture", encoding="utf-8")
    (tmp_path / "text.gif").write_text("no video", encoding="utf-8")
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(500))
    imageio.imwrite(tmp_path / "whole.gif", square())
    torn = (tmp_path / "whole.gif").read_bytes()
    (tmp_path / "torn.gif").write_bytes(torn[:len(torn) // 2])
    for name, says in (("empty", "empty holds no frames"), ("none.gif", "no such file"),
                       ("sizes", "9.png has 41 x 20 pixels, but .*0.png has 40 x 20"),
                       ("mixed", "notes.txt cannot be read as picture or video"),
                       ("text.gif", "cannot be read"), ("torn.gif", "cannot be read"),
                       ("a.mp4", "a folder of pictures, or install")):
        with pytest.raises(Fail, match=says) as e:
            read_video(tmp_path / name, 20)
        assert "\n" not in str(e.value)
