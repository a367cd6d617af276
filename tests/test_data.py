"""Pictures are found, checked, fetched and, when all else fails, drawn. No test needs a network."""

import gzip
import hashlib
import io
import zipfile

import imageio.v3 as imageio
import numpy as np
import pytest

from common import data
from common.errors import Fail


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """An empty cache, no mirrors, no SCENES_DATA."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "MIRRORS", {"mnist": (), "omniglot": ()})
    monkeypatch.delenv("SCENES_DATA", raising=False)


def idx(a):
    return bytes([0, 0, 8, a.ndim]) + np.array(a.shape, ">u4").tobytes() + a.tobytes()


@pytest.fixture
def mnist(rng):
    """Contents of a small MNIST test set by file name, without .gz."""
    names = data.MNIST["test"]
    return dict(zip(names, (idx(rng.integers(0, 256, (6, 28, 28)).astype(np.uint8)),
                            idx(np.arange(6, dtype=np.uint8))), strict=True))


def put(folder, files, gz=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in files.items():
        path = folder / (name + ".gz" if gz else name)
        path.write_bytes(gzip.compress(blob, mtime=0) if gz else blob)
    return folder


def trust(monkeypatch, folder):
    """Make the files that lie in a folder the official ones."""
    sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    monkeypatch.setattr(data, "MD5", data.MD5 | sums)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("place", ["given", "given/mnist", "cache", "cache/mnist", "env/mnist"])
def test_mnist_is_found_wherever_it_lies(monkeypatch, tmp_path, mnist, place, gz):
    folder = put(tmp_path / place, mnist, gz)
    trust(monkeypatch, folder)
    if place.startswith("env"):
        monkeypatch.setenv("SCENES_DATA", str(tmp_path / "env"))
    g = data.digits("test", tmp_path / "given" if place.startswith("given") else None)
    assert g.source == "MNIST test" and g.images.shape == (6, 28, 28) and g.images.flags.writeable
    assert g.images.tobytes() == mnist["t10k-images-idx3-ubyte"][16:]
    np.testing.assert_array_equal(g.labels, np.arange(6))


def test_missing_files_are_named(tmp_path, monkeypatch, mnist):
    with pytest.raises(Fail, match=f"no train-images.*{tmp_path}"):
        data.digits("train", tmp_path)
    mnist.pop("t10k-labels-idx1-ubyte")
    with pytest.raises(Fail, match="no t10k-labels"):
        data.digits("test", put(tmp_path / "half", mnist))
    with pytest.raises(Fail, match=r"no images_background\.zip"):
        data.omniglot("train", tmp_path)
    monkeypatch.setenv("SCENES_DATA", str(tmp_path / "typo"))
    with pytest.raises(Fail, match=r"SCENES_DATA names .*typo"):
        data.digits("test")


@pytest.mark.parametrize("place", ["given", "cache"])
def test_a_file_that_is_not_the_official_one_is_refused(tmp_path, mnist, place):
    put(tmp_path / place, mnist, gz=True)
    with pytest.raises(Fail, match=r"t10k-images-idx3-ubyte\.gz is corrupt or truncated"):
        data.digits("test", tmp_path / "given" if place == "given" else None)


@pytest.mark.parametrize("damage, says", [
    (lambda blob: blob[:-1], "truncated or too long"),
    (lambda blob: blob + b"x", "truncated or too long"),
    (lambda blob: blob[:9], "truncated or too long"),
    (lambda blob: b"", "not an idx file"),
    (lambda blob: b"\0\0\x0d" + blob[3:], "not an idx file"),
    (lambda blob: blob[:4] + b"\xff" * 12 + blob[16:], "truncated or too long"),
    (lambda blob: idx(np.zeros((5, 28, 28), np.uint8)), "do not fit together"),
    (lambda blob: idx(np.zeros((6, 27, 28), np.uint8)), "do not fit together"),
])
def test_damaged_idx_files_are_refused(tmp_path, mnist, damage, says):
    mnist["t10k-images-idx3-ubyte"] = damage(mnist["t10k-images-idx3-ubyte"])
    with pytest.raises(Fail, match=f"t10k-images-idx3-ubyte.*{says}"):
        data.digits("test", put(tmp_path, mnist))


def test_a_truncated_gzip_is_refused_even_with_the_right_checksum(monkeypatch, tmp_path, mnist):
    folder = put(tmp_path / "given", mnist, gz=True)
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    trust(monkeypatch, folder)
    with pytest.raises(Fail, match="corrupt or truncated"):
        data.digits("test", folder)


def test_download_skips_a_bad_mirror_and_fills_the_cache(monkeypatch, tmp_path, mnist, capsys):
    good = put(tmp_path / "good", mnist, gz=True)
    bad = put(tmp_path / "bad", dict.fromkeys(mnist, b"<html>"), gz=True)
    trust(monkeypatch, good)
    mirrors = tuple(folder.as_uri() + "/" for folder in (tmp_path / "gone", bad, good))
    monkeypatch.setattr(data, "MIRRORS", {"mnist": mirrors})
    g = data.digits("test")
    assert g.source == "MNIST test" and "downloading" in capsys.readouterr().err
    cached = sorted(p.name for p in (data.CACHE / "mnist").iterdir())
    assert cached == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    monkeypatch.setattr(data, "MIRRORS", {"mnist": ()})
    np.testing.assert_array_equal(data.digits("test").images, g.images)


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(monkeypatch, tmp_path, mnist, capsys):
    good = put(tmp_path / "good", mnist, gz=True)
    trust(monkeypatch, good)
    monkeypatch.setattr(data, "MIRRORS", {"mnist": (good.as_uri() + "/",)})
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(data, "CACHE", tmp_path / "file")
    assert data.digits("test").source == "MNIST test"
    assert "cannot keep" in capsys.readouterr().err


def test_drawn_digits_are_announced_unless_asked_for(capsys):
    fallen_back = data.digits("test")
    assert "No MNIST" in (said := capsys.readouterr().err) and "--data-dir" in said
    asked_for = data.digits("test", drawn=True)
    assert not capsys.readouterr().err
    assert fallen_back.source == asked_for.source == "drawn digits test"
    np.testing.assert_array_equal(fallen_back.images, asked_for.images)


def test_drawn_digits_look_like_mnist():
    test, train = data.digits("test", drawn=True), data.digits("train", drawn=True)
    assert test.images.shape == (2000, 28, 28) and train.images.shape == (10_000, 28, 28)
    assert hashlib.sha256(test.images.tobytes()).hexdigest()[:16] == "e172133d3320dd68"
    assert np.bincount(train.labels).min() > 900
    assert not {a.tobytes() for a in test.images} & {a.tobytes() for a in train.images}
    ink = test.images.astype(float) / 255
    assert 0.11 < ink.mean() < 0.16             # MNIST: 0.131
    tall = (test.images > 25).any(2).sum(1)
    assert 18 <= np.median(tall) <= 21
    mass = ink.sum((1, 2))
    for axis in (1, 2):
        centre = (ink.sum(axis) * (np.arange(28) + 0.5)).sum(1) / mass
        away = np.abs(centre - 14)
        assert away.max() < 2 and away.mean() < 0.5         # MNIST: 1.0 and 0.51


def test_drawn_digits_can_be_told_apart():
    """A nearest-mean classifier knows most test digits; unreadable ones would fail it."""
    train, test = data.digits("train", drawn=True), data.digits("test", drawn=True)
    flat = train.images.reshape(len(train.images), -1).astype(np.float32)
    means = np.stack([flat[train.labels == d].mean(0) for d in range(10)])
    x = test.images.reshape(len(test.images), -1).astype(np.float32)
    guess = (x @ means.T - (means**2).sum(1) / 2).argmax(1)
    assert (guess == test.labels).mean() > 0.75


def test_drawn_characters(capsys):
    train, test = data.omniglot("train"), data.omniglot("test")
    assert "No Omniglot" in capsys.readouterr().err
    assert train.images.shape == (4000, 50, 50) and test.images.shape == (1000, 50, 50)
    assert (train.images.max((1, 2)) > 200).all() and len(np.unique(train.labels)) == 200


@pytest.fixture
def paper(rng):
    """Three characters, written twice each; True is white."""
    paper = np.ones((3, 2, 105, 105), bool)
    for k in range(3):
        for m in range(2):
            paper[k, m, 20:80, 30 + 10 * k:40 + 10 * k + m] = False
    return paper


def zipped(paper, folders=("A/character01", "A/character02", "B/character01")):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("__MACOSX/readme.txt", "not a picture")
        for k, folder in enumerate(folders):
            for m in range(paper.shape[1]):
                png = imageio.imwrite("<bytes>", paper[k, m].astype(np.uint8) * 255,
                                      extension=".png")
                z.writestr(f"images_evaluation/{folder}/{k:04}_{m:02}.png", png)
    return file.getvalue()


def test_omniglot_reads_zip_and_npz_alike(monkeypatch, tmp_path, paper):
    folder = put(tmp_path / "zip" / "omniglot", {"images_evaluation.zip": zipped(paper)})
    trust(monkeypatch, folder)
    (tmp_path / "npz").mkdir()
    np.savez_compressed(tmp_path / "npz" / "images_evaluation.npz", images=paper)
    a, b = (data.omniglot("test", tmp_path / kind) for kind in ("zip", "npz"))
    assert a.source == "Omniglot test" and a.images.shape == (6, 50, 50)
    for g in (a, b):
        np.testing.assert_array_equal(g.labels, [0, 0, 1, 1, 2, 2])
        np.testing.assert_array_equal(g.images, a.images)
    np.testing.assert_allclose(a.images.mean((1, 2)) / 255,
                               1 - paper.reshape(6, -1).mean(1), atol=2e-3)


def test_damaged_omniglot_is_refused(monkeypatch, tmp_path, paper):
    blob = zipped(paper)
    for k, wrong in enumerate((b"", blob[:len(blob) // 2], zipped(paper[..., :90]),
                               zipped(paper, ("x", "y", "z")))):
        folder = put(tmp_path / f"zip{k}", {"images_background_small1.zip": wrong})
        with pytest.raises(Fail, match=r"images_background_small1\.zip"):
            data.omniglot("train", folder)
    (tmp_path / "npz").mkdir()
    path = tmp_path / "npz" / "images_evaluation.npz"
    np.savez(path, images=paper.astype(np.float32))
    with pytest.raises(Fail, match="not bool"):
        data.omniglot("test", path.parent)
    for wrong in (b"", b"PK\x03\x04", path.read_bytes()[:500], b"\x93NUMPY"):
        path.write_bytes(wrong)
        with pytest.raises(Fail, match="corrupt"):
            data.omniglot("test", path.parent)
    folder = put(tmp_path / "other", {"images_evaluation.zip": blob})
    with pytest.raises(Fail, match="MD5"):
        data.omniglot("test", folder)
