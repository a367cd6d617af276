"""The script as a user meets it: what the README promises, and what happens to bad input."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

import air_multimnist as air
from common import data, scenes, store
from common.params import Params
from common.store import read_npz, save_weights

ROOT = Path(air.__file__).parent
SCRIPT = ROOT / "air_multimnist.py"
ALONE = {k: v for k, v in os.environ.items() if k != "SCENES_DATA"}
ALONE |= {"OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
NET = "--canvas 24 --glimpse 8 --hidden 16 --what 4 --units 16 --eval-scenes 8 --test-scenes 20"
TINY = f"{NET} --steps 6 --batch-size 4 --eval-every 2".split()
DIGITS = "--data drawn --digit-low 8 --digit-high 12".split()
SMALL = air.Config(canvas=24, glimpse=8, hidden=16, what=4, units=16, data="drawn",
                   digit_low=8, digit_high=12, test_scenes=20)
FIGURES = {"boxes.png", "steps.png", "patches.png", "samples.png", "scanning.png", "confusion.png",
           "curves.png", "attention.gif"}


def start(*words, launcher=(), **env):
    """The script in a process of its own."""
    return subprocess.Popen([*launcher, sys.executable, SCRIPT, *map(str, words)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ALONE | env)


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def shell(capsys, monkeypatch):
    """The script in this process, which saves the seconds that starting one takes."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def result(shell):
    """What a command that works prints: one line of JSON."""
    def call(*words):
        status, out, err = shell(*words)
        assert status == 0, err
        assert out.count("\n") == 1
        return json.loads(out)
    return call


@pytest.fixture
def refused(shell):
    """A command that gets one clear line, and nothing else."""
    def call(line, *words):
        status, out, err = shell(*words)
        *before, last = err.splitlines()
        assert (status, out) == (2, ""), err
        assert re.search(line, last) and last.startswith("error: "), err
        assert all(re.match("run folder: |continuing at |step ", b) for b in before), err
    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(folder, stdout, stderr) of a tiny training run, which nobody may change."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    status, out, err = finish(start(*TINY, *DIGITS, "--save-every", 3, "--out", folder))
    assert status == 0, err
    return folder, out, err


@pytest.fixture
def copy(trained, tmp_path):
    """That run's folder, for those who change it."""
    return shutil.copytree(trained[0], tmp_path / "copy")


def weights_file(path, cfg=SMALL, **changes):
    """Weights that nobody has trained."""
    cfg = replace(cfg, **changes)
    save_weights(path, {k: np.asarray(a) for k, a in air.init(cfg, 0).items()}, cfg, "nothing")
    return path


def log(folder):
    """metrics.jsonl without the seconds, the only part that may differ."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def bits(folder):
    return {name: a.tobytes() for name, a in read_npz(folder / "weights.npz")[0].items()}


# ---------------------------------------------------------------- train, figures

def test_training_prints_one_line_and_leaves_a_folder(trained):
    folder, out, err = trained
    result = json.loads(out)
    assert out.count("\n") == 1 and "step 6/6" in err and "Traceback" not in err
    assert result["run"] == str(folder) and result["trained_on"].startswith("drawn digits")
    assert (result["preset"], result["seed"], result["steps"]) == ("default", 0, 6)
    assert result["train_seconds"] > 0 and np.sum(result["count_confusion"]) == 20
    assert {"script", "command", "count_accuracy", "mse", "elbo", "mean_iou"} < result.keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["canvas"] == 24 and config["command"] == result["command"]
    assert [line["step"] for line in log(folder)] == [2, 4, 6]
    assert {"loss", "count_accuracy", "mse", "elbo"} < log(folder)[0].keys()
    assert {f.name for f in folder.iterdir()} == FIGURES | {
        "config.json", "metrics.jsonl", "checkpoint.npz", "checkpoint.previous.npz", "weights.npz",
        "frames"}


def check_figures(folder):
    for name in FIGURES:
        picture = imageio.imread(folder / name)
        assert min(picture.shape[-3:-1]) > 50 and picture.std() > 5, name


def test_figures_can_be_seen(trained):
    check_figures(trained[0])
    assert len(imageio.imread(trained[0] / "attention.gif")) >= 6      # one for each kept moment


def test_figures_are_drawn_again_and_compared(copy, trained, result):
    other = shutil.copytree(copy, copy.with_name("other"))
    lines = [{**line, "seconds": 1.0, "elbo": -9.0} for line in log(other)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in FIGURES:
        (copy / name).unlink()
        (other / name).unlink()
    assert result("figures", "--run", copy) == {"run": str(copy), "figures": sorted(FIGURES)}
    check_figures(copy)
    same = {name: (copy / name).read_bytes() for name in FIGURES - {"curves.png", "scanning.png"}}
    for name, content in same.items():
        assert content == (trained[0] / name).read_bytes(), name
    alone = {name: imageio.imread(copy / name) for name in ("curves.png", "scanning.png")}
    result("figures", "--run", copy, other)
    check_figures(copy)
    for name, picture in alone.items():
        assert not np.array_equal(imageio.imread(copy / name), picture), name
    assert not FIGURES & {f.name for f in other.iterdir()}
    for name, content in same.items():
        assert content == (copy / name).read_bytes(), name


@pytest.mark.parametrize("words", ["--counts 0", "--steps 1 --eval-every 2", "--canvas 25",
                                   "--max-steps 2 --counts 5 --batch-size 1"])
def test_unusual_configs_train_and_draw(tmp_path, result, words):
    result(*TINY, "--steps", 2, "--data", "sprites", *words.split(), "--out", tmp_path)
    check_figures(tmp_path)


# ---------------------------------------------------------------- evaluate

def scene_file(path, count=270, bright=255, **changes):
    """Drawn digits as the README describes scene files; None leaves an array out."""
    made = scenes.multi_digits(data.digits("test", drawn=True), 0, 0, count, 24, 8, 12)
    arrays = {"images": np.rint(made.images[:, 0] * 255).astype(np.uint8), "counts": made.counts,
              "boxes": made.boxes} | changes
    np.savez(path, **{k: a for k, a in arrays.items() if a is not None})
    return path


def test_evaluate_scores_a_scene_file(trained, tmp_path, result):
    weights = trained[0] / "weights.npz"
    file = scene_file(tmp_path / "bytes.npz")
    images = np.load(file)["images"]
    first = result("evaluate", "--scenes", file, "--weights", weights)
    assert first["scenes"] == str(file) and first["trained_on"].startswith("drawn digits")
    table = np.array(first["count_confusion"])
    assert table.shape == (3, 4) and table.sum() == 270
    assert first["count_accuracy"] == pytest.approx(np.trace(table) / 270)
    assert 0 <= first["mean_iou"] <= 1 and first["mse"] > 0 and first["elbo"] < 1e4
    for change, gone in [({"images": images / np.float32(255)}, set()),
                         ({"boxes": None}, {"mean_iou"})]:
        again = result("evaluate", "--scenes", scene_file(tmp_path / "x.npz", **change),
                       "--weights", weights)
        assert again.keys() == first.keys() - gone
        for name in again.keys() - {"scenes"}:
            assert again[name] == first[name], name


def test_evaluate_knows_colours_and_fresh_scenes(tmp_path, result):
    weights = weights_file(tmp_path / "w.npz", data="sprites", canvas=26)
    made = scenes.sprites(0, 0, 9, 26)
    file = scene_file(tmp_path / "x.npz", images=np.moveaxis(made.images, 1, 3),
                      counts=made.counts, boxes=made.boxes)
    given = result("evaluate", "--scenes", file, "--weights", weights)
    assert np.sum(given["count_confusion"]) == 9
    fresh = result("evaluate", "--counts", 1, 3, "--test-scenes", 7, "--weights", weights)
    zero, one, two, three = np.sum(fresh["count_confusion"], 1)
    assert fresh["scenes"] == "sprites" and one + three == 7 and one and three


# ---------------------------------------------------------------- infer

def test_infer_takes_any_picture(trained, tmp_path, result):
    ink = np.zeros((60, 90), np.uint8)
    ink[20:40, 30:36] = ink[20:26, 30:60] = 255
    grey = np.full((60, 90), 255, np.uint8)
    pictures = {"dark.png": ink, "bright.png": 255 - ink, "bright.jpg": 255 - ink,
                "colours.png": np.stack([ink] * 3, 2), "clear.png": np.stack([grey] * 3 + [ink], 2),
                "deep.png": ink.astype(np.uint16) * 257,
                "large.png": ink.repeat(2, axis=0).repeat(2, axis=1)}
    files = [tmp_path / name for name in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        imageio.imwrite(file, picture)
    found = result("infer", *files, "--weights", trained[0] / "weights.npz", "--out",
                   tmp_path / "found")
    assert [p["file"] for p in found["pictures"]] == [str(f) for f in files]
    assert len({p["overlay"] for p in found["pictures"]}) == len(files)     # bright.png, bright.jpg
    first = found["pictures"][0]
    for p in found["pictures"]:
        assert imageio.imread(p["overlay"]).std() > 5
        assert p["count_probabilities"] == pytest.approx(first["count_probabilities"], abs=0.02)
        assert np.sum(p["count_probabilities"]) == pytest.approx(1, abs=1e-3)
        assert len(p["objects"]) == p["count"] == np.argmax(p["count_probabilities"])
        scale = 2 if "large" in p["file"] else 1                    # all are in their own pixels
        for thing, expected in zip(p["objects"], first["objects"], strict=True):
            assert len(thing["box"]) == 4
            assert np.divide(thing["window"], scale) == pytest.approx(expected["window"], abs=2)


# ---------------------------------------------------------------- the same again, and resuming

LONG = [*f"{NET} --data sprites --steps 20 --batch-size 256 --eval-every 5".split(),
        "--save-every", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    status, _, err = finish(start(*LONG, "--out", folder))
    assert status == 0, err
    return folder


def stop(folder, number, *words):
    """Train until there are two new checkpoints, send a signal; (status, stdout, stderr)."""
    seen, process = {saved_at(folder)}, start(*LONG, "--out", folder, *words)
    while process.poll() is None and len(seen) < 3:
        seen.add(saved_at(folder))
        time.sleep(0.001)
    process.send_signal(number)
    return finish(process)


def saved_at(folder):
    try:
        return (folder / "checkpoint.npz").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_kill_9_then_ctrl_c_then_resume_is_bit_for_bit(tmp_path, whole):
    folder = tmp_path / "run"
    status, out, _ = stop(folder, signal.SIGKILL)
    assert (status, out) == (-signal.SIGKILL, "") and not (folder / "weights.npz").exists()
    status, out, err = stop(folder, signal.SIGINT, "--resume")
    assert (status, out) == (130, "") and "Traceback" not in err
    step = int(re.search(r"stopped at step (\d+); continue with --resume\n$", err)[1])
    assert 2 < step < 20
    status, out, err = finish(start(*LONG, "--out", folder, "--resume"))
    assert status == 0 and f"continuing at step {step} of 20" in err
    assert bits(folder) == bits(whole) and log(folder) == log(whole)
    for frame in (whole / "frames").iterdir():
        assert frame.read_bytes() == (folder / "frames" / frame.name).read_bytes()


def test_the_seed_decides(tmp_path, result):
    words = [*TINY, "--data", "sprites", "--steps", 3]
    one, same, other = (result(*words, "--seed", seed, "--out", tmp_path / name)
                        for name, seed in (("one", 1), ("same", 1), ("other", 2)))
    assert bits(tmp_path / "one") == bits(tmp_path / "same")
    assert bits(tmp_path / "one") != bits(tmp_path / "other")
    assert one["elbo"] == same["elbo"] != other["elbo"]


MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


MPI = {"launcher": (MPIEXEC, "-n", "2")}


@pytest.mark.parametrize(("more", "how"), [
    pytest.param(["--threads", 1], MPI, marks=pytest.mark.skipif(
        not (MPIEXEC and importlib.util.find_spec("mpi4py")), reason="no mpiexec or no mpi4py")),
    pytest.param(["--threads", 2], {}, marks=pytest.mark.skipif(
        sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="no cores to share"))])
def test_two_processes_train_as_one(tmp_path, more, how):
    words = [*TINY, "--data", "sprites", "--threads", 1]
    status, out, err = finish(start(*words, *more, "--out", tmp_path / "two", **how))
    assert status == 0 and out.count("\n") == 1 and err.count("run folder") == 1, err
    one = json.loads(finish(start(*words, "--out", tmp_path / "one"))[1])
    assert json.loads(out)["elbo"] == pytest.approx(one["elbo"], rel=1e-5)
    two, one = (read_npz(tmp_path / run / "checkpoint.npz")[0]["params"] for run in ("two", "one"))
    assert np.abs(two - one).max() < 1e-5 * np.abs(one).max()


# ---------------------------------------------------------------- bad words

@pytest.mark.parametrize(("words", "line"), [
    ("--bogus", "unrecognized arguments: --bogus"),
    ("--max-steps 0", "argument --max-steps: 0 is below 1"),
    ("--batch-size 0", "argument --batch-size: 0 is below 1"),
    ("--counts -1 2", "argument --counts: -1 is below 0"),
    ("--counts 2 9", "argument --counts: 9 is above 8"),         # 9! ways to match boxes
    ("--counts", "expected at least one argument"),
    ("--threads 0", "argument --threads: 0 is below 1"),
    ("--threads two", "argument --threads: invalid int value: 'two'"),
    ("--rates 0.5 1.5", "argument --rates: 1.5 is above 0.999"),
    ("--std 0", "argument --std: 0 is below 0.001"),
    ("--seed 1e3", "argument --seed: invalid int value"),
    ("evaluate --hidden 3", "unrecognized arguments: --hidden 3"),
    ("infer", "the following arguments are required: FILE"),
    ("--data drawn --canvas 20", "digits of 28 pixels do not fit a canvas of 20"),
    ("--data sprites --canvas 10", "sprites of 20 pixels do not fit a canvas of 10"),
    ("--data drawn --digit-low 9 --digit-high 8", "digit sizes must obey 1 <= low <= high"),
    ("--data drawn --canvas 28 --counts 4", "found no disjoint places for 4 digits"),
    ("--data sprites --estimator relaxed --max-steps 4", "rates"),
    ("--data digits --data-dir {tmp}/none", "no train-images-idx3-ubyte.gz in .*none"),
    ("--data digits --data-dir {tmp}", "no train-images-idx3-ubyte.gz in "),
    ("--data omniglot --data-dir {tmp}", "no images_background.zip in "),
    ("--out {tmp}/file/run", "cannot write to .*file/run: Not a directory"),
    ("--out {tmp}/file", "cannot write to .*file: File exists"),
    ("evaluate --weights {tmp}/none.npz", "no weights at .*none.npz: train first"),
    ("figures --run {tmp}", "no weights at .*weights.npz"),
    ("figures --run {tmp}/file", "no weights at .*weights.npz"),
])
def test_bad_words(tmp_path, refused, words, line):
    (tmp_path / "file").write_text("")
    words = words.format(tmp=tmp_path).split()
    verbs = ("evaluate", "infer", "figures")
    out = [] if words[0] in verbs or "--out" in words else ["--out", tmp_path / "run"]
    refused(line, *words, *out)


def test_a_gpu_without_cupy(tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError")
    status, out, err = finish(start("--device", "gpu", "--out", tmp_path / "run",
                                    PYTHONPATH=str(tmp_path)))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: --device gpu: CuPy is not installed (pip install -r requirements")


# ---------------------------------------------------------------- bad files

@pytest.mark.parametrize(("change", "line"), [
    ({"counts": None}, "has no array 'counts'"),
    ({"images": None}, "has no array 'images'"),
    ({"images": np.zeros((3, 20, 20), np.uint8)}, r"images has shape \(3, 20, 20\), expected"),
    ({"images": np.zeros((3, 24, 24, 3), np.uint8)}, "images has shape"),
    ({"images": np.zeros((0, 24, 24)), "counts": np.zeros(0, int), "boxes": None}, "no scenes"),
    ({"images": np.zeros((3, 24, 24), int)}, "images has dtype int64, expected uint8"),
    ({"images": np.full((3, 24, 24), "a")}, "images has dtype <U1, expected numbers"),
    ({"images": np.full((3, 24, 24), None)}, "not a readable npz file"),
    ({"images": np.full((3, 24, 24), np.nan)}, "images has values that are NaN or infinite"),
    ({"images": np.full((3, 24, 24), 255.0)}, "images has values from 255 to 255"),
    ({"images": np.full((3, 24, 24), -0.1)}, "images has values from -0.1 to -0.1"),
    ({"counts": np.array([0, 1])}, r"counts has shape \(2,\), expected \(N,\) with N = 3"),
    ({"counts": np.array([0, 1, -1])}, "counts must be whole numbers from 0"),
    ({"counts": np.array([0, 1, 0.5])}, "counts must be whole numbers from 0"),
    ({"counts": np.array([0, 1, np.nan])}, "counts must be whole numbers from 0"),
    ({"boxes": np.zeros((3, 2, 5))}, "boxes has shape"),
    ({"boxes": np.zeros((3, 9, 4))}, "boxes has room for 9 objects a scene, at most 8"),
])
def test_bad_scene_files(trained, tmp_path, refused, change, line):
    file = scene_file(tmp_path / "scenes.npz", 3, **change)
    refused(line, "evaluate", "--scenes", file, "--weights", trained[0] / "weights.npz")


@pytest.mark.parametrize(("content", "line"), [
    (None, "no scene file .*x.npz"), (b"", "not a readable npz file"),
    (b"PK\3\4 and so on", "not a readable npz file"), (b"some words", "not a readable npz file")])
def test_no_scene_file(trained, tmp_path, refused, content, line):
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    refused(line, "evaluate", "--scenes", tmp_path / "x.npz", "--weights",
            trained[0] / "weights.npz")


@pytest.mark.parametrize(("content", "line"), [
    (None, "no such file: .*x.png"), (b"", "not a picture"), (b"some words", "not a picture"),
    (b"\x89PNG\r\n\x1a\n", "not a picture")])
def test_no_picture(trained, tmp_path, refused, content, line):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    refused(line, "infer", tmp_path / "x.png", "--weights", trained[0] / "weights.npz",
            "--out", tmp_path / "found")


def older_version(path):
    config = {**asdict(SMALL), "momentum": 0.9}
    store.write_npz(path, {}, {"config": config, "about": "nothing"})


def other_layers(path):
    save_weights(path, {"core.W": np.ones((3, 4))}, SMALL, "nothing")


def one_layer_less(path):
    save_weights(path, {k: a for k, a in air.init(SMALL, 0).items() if k != "head.b"}, SMALL, "")


def other_sizes(path):
    save_weights(path, air.init(replace(SMALL, hidden=7), 0), SMALL, "nothing")


@pytest.mark.parametrize(("make", "line"), [
    (lambda path: np.savez(path, w=np.zeros(3)), "damaged or a foreign file"),
    (lambda path: path.write_bytes(b"some words"), "damaged or a foreign file"),
    (older_version, "belongs to another script or version"),
    (other_layers, "weights do not fit the config"),
    (one_layer_less, "weights do not fit the config"),
    (other_sizes, "weights do not fit the config"),
])
def test_foreign_weights(tmp_path, refused, make, line):
    make(tmp_path / "w.npz")
    refused(line, "evaluate", "--weights", tmp_path / "w.npz")


@pytest.mark.parametrize(("model", "words"), [("air", "--data sprites"),
                                              ("heads", "--max-steps 5")])
def test_weights_that_cannot_do_what_is_asked(tmp_path, refused, model, words):
    weights = weights_file(tmp_path / "w.npz", model=model)
    refused("weights do not fit the config", "evaluate", "--weights", weights, *words.split())


@pytest.mark.parametrize("changes", [{"data": "sprites"}, {"max_steps": 4}, {"canvas": 26}])
def test_runs_that_cannot_be_compared(copy, tmp_path, refused, changes):
    (tmp_path / "other").mkdir()
    weights_file(tmp_path / "other" / "weights.npz", **changes)
    (tmp_path / "other" / "metrics.jsonl").write_text("")
    refused("cannot be compared", "figures", "--run", copy, tmp_path / "other")


@pytest.mark.parametrize("how", ["corrupt", "truncated", "raw"])
def test_bad_mnist(tmp_path, refused, how):
    name = "train-images-idx3-ubyte" + ("" if how == "raw" else ".gz")
    (tmp_path / name).write_bytes({"corrupt": b"some words", "truncated": b"\x1f\x8b\x08\0\0",
                                   "raw": b"\0\0\x08\x03\0\0\0\x01"}[how])
    for rest in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / rest).write_bytes(b"\0\0\x08\x01\0\0\0\0")
    refused(f"{name} is (corrupt|truncated)", "--data-dir", tmp_path, "--out", tmp_path / "run")


# ---------------------------------------------------------------- bad runs

def test_a_folder_with_a_run_in_it(copy, refused):
    refused("already holds a run: continue it with --resume", *TINY, *DIGITS, "--out", copy)
    refused("another config: hidden is 16 in the checkpoint and 17 here", *TINY, *DIGITS,
            "--hidden", 17, "--resume", "--out", copy)
    refused("another config: seed is 0", *TINY, *DIGITS, "--seed", 4, "--resume", "--out", copy)
    for name in ("checkpoint.npz", "checkpoint.previous.npz"):
        (copy / name).write_bytes((copy / name).read_bytes()[:-100])
    refused(r"checkpoint.npz is damaged .*previous.npz is damaged", *TINY, *DIGITS, "--resume",
            "--out", copy)


def test_numbers_that_explode(tmp_path):
    status, out, err = finish(start(*TINY, "--data", "sprites", "--lr", "1e30", "--out", tmp_path))
    assert (status, out) == (2, "") and "Traceback" not in err, err
    assert re.search(r"\nerror: (loss|gradient) is (nan|inf) at step [1-5]; no checkpoint was "
                     r"written yet\n$", err), err
    assert not (tmp_path / "weights.npz").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("name", ["config.json", "checkpoint.npz", "frames/0000002.npz",
                                  "weights.npz", "boxes.png", "attention.gif"])
def test_a_full_disk(tmp_path, refused, name):
    """A link makes the disk full for one file, whether or not it is written by way of a draft."""
    (tmp_path / "run" / "frames").mkdir(parents=True)
    (tmp_path / "run" / f"{name}.tmp").symlink_to("/dev/full")
    if name.startswith("frames"):
        (tmp_path / "run" / name).symlink_to("/dev/full")
    refused(f"cannot write .*{name}: No space left on device", *TINY, "--data", "sprites",
            "--out", tmp_path / "run")


@pytest.mark.parametrize("preset", air.PRESETS)
def test_presets_are_whole(preset):
    cfg = replace(air.Config(), **air.PRESETS[preset])
    for f in fields(cfg):
        values = getattr(cfg, f.name)
        for value in values if isinstance(values, tuple) else [values]:
            limits = f.metadata
            assert limits["choices"] is None or value in limits["choices"], f.name
            assert limits["low"] is None or value >= limits["low"], f.name
            assert limits["high"] is None or value <= limits["high"], f.name
    p, noise = Params(air.init(cfg, 0)), air.draw_noise(cfg, 2, 0, 0)
    x = np.random.default_rng(0).random((2, air.channels(cfg), cfg.canvas, cfg.canvas), np.float32)
    loss, back = air.objective(p, cfg, x, noise, air.schedule(cfg, 0))
    g = p.grads()
    back(g)
    assert np.isfinite(loss) and np.isfinite(g.flat).all() and g.flat.any()
