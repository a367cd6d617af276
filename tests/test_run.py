"""A run that is killed, stopped, broken or starved ends as if nothing had happened."""

import errno
import importlib.util
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import toy_script
from common import run as runs
from common import store
from common.errors import Fail
from common.run import Run
from common.store import load_weights, read_npz, save_weights
from toy_script import Config

TOY = Path(toy_script.__file__)
ALONE = {k: v for k, v in os.environ.items() if k != "COVERAGE_PROCESS_START"}
ALONE |= {"PYTHONPATH": str(TOY.parents[1]), "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def start(*words, launcher=(), gpu=False):
    """The toy in a process of its own, or in several; `gpu`: on the stand-in for CuPy."""
    script = [TOY.with_name("strict_cupy.py"), TOY, "--device", "gpu"] if gpu else [TOY]
    return subprocess.Popen([*launcher, sys.executable, *map(str, [*script, *words])], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ALONE)


def finish(process):
    out, err = process.communicate(timeout=50)
    return process.returncode, out, err


def toy(*words):
    return finish(start(*words))


def bits(out):
    return json.loads(out.splitlines()[-1])["bits"]


def log(folder):
    """metrics.jsonl without the seconds, the only part that may differ."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def fit(folder, resume=False, seed=0, save_every=5, **config):
    """The toy in this process; returns its final weights."""
    cfg = Config(**{"steps": 23, "eval_every": 4, **config})
    run = Run(folder, cfg, seed, resume=resume, save_every=save_every)
    return toy_script.train(cfg, run)["bits"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder)


def stopped_at(folder, step, monkeypatch, **config):
    """A run that ended without a word after `step` updates."""
    class Gone(BaseException):
        pass

    real = Run.watch

    def watch_and_go(run, **numbers):
        if run.step == step:
            raise Gone
        return real(run, **numbers)

    with monkeypatch.context() as m, pytest.raises(Gone):
        m.setattr(Run, "watch", watch_and_go)
        fit(folder, **config)


# ---------------------------------------------------------------- kills, crashes, signals

@pytest.mark.parametrize("threads", [1, 2])
def test_kill_9_at_twenty_moments(tmp_path, threads):
    words = ["--steps", 300, "--save-every", 1, "--eval-every", 7, "--pause", 0.001,
             "--threads", threads]
    code, out, _ = toy(*words, "--out", tmp_path / "whole")
    assert code == 0
    rng, killed = random.Random(0), tmp_path / "killed"
    for _ in range(20):
        process = start(*words, "--out", killed, "--resume")
        while "run folder" not in process.stderr.readline():
            pass
        time.sleep(rng.uniform(0, 0.06))
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
    code, resumed, err = toy(*words, "--out", killed, "--resume")
    assert code == 0 and "continuing at step" in err
    assert bits(resumed) == bits(out)
    assert log(killed) == log(tmp_path / "whole")
    assert not list(killed.glob("*.tmp"))


def test_crash_at_every_stage_of_a_checkpoint(tmp_path, whole, monkeypatch):
    class Crash(BaseException):
        pass

    def mortal(real, calls):
        """Once there are no calls left the process is dead: it cleans nothing up either."""
        def call(*args, **options):
            if not calls:
                raise Crash
            calls.pop()
            return real(*args, **options)
        return call

    finished, n = False, 0
    while not finished:
        folder = tmp_path / str(n)
        with monkeypatch.context() as m:
            calls = [None] * n
            for module, name in ((os, "replace"), (os, "fsync"), (np, "savez"), (Path, "unlink")):
                m.setattr(module, name, mortal(getattr(module, name), calls))
            try:
                fit(folder)
                finished = True
            except Crash:
                pass
        assert fit(folder, resume=True) == whole[1], n
        assert log(folder) == log(whole[0]), n
        n += 1
    assert n > 30


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_end_cleanly(tmp_path, number, status):
    words = ["--steps", 60, "--pause", 0.01, "--eval-every", 7]
    whole = start(*words, "--out", tmp_path / "whole")
    process = start(*words, "--out", tmp_path / "stopped")
    while not (tmp_path / "stopped" / "metrics.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == status and out == ""
    assert "Traceback" not in err and "continue with --resume" in err.splitlines()[-1]
    step = int(err.split("stopped at step ")[1].split(";")[0])
    assert 7 <= step < 60
    assert read_npz(tmp_path / "stopped" / "checkpoint.npz")[1]["step"] == step
    code, resumed, err = toy(*words, "--out", tmp_path / "stopped", "--resume")
    assert code == 0 and f"continuing at step {step} of 60" in err
    assert bits(resumed) == bits(finish(whole)[1])
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")


def test_seconds_add_up_over_resumes(tmp_path, monkeypatch):
    stopped_at(tmp_path, 20, monkeypatch, pause=0.005)
    before = read_npz(tmp_path / "checkpoint.npz")[1]["seconds"]
    fit(tmp_path, resume=True, pause=0.005)
    after = read_npz(tmp_path / "checkpoint.npz")[1]["seconds"]
    assert before >= 0.1 and before + 0.01 < after < before + 1


def test_saves_by_the_clock(tmp_path, monkeypatch):
    saved, ticks = [], itertools.count()
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(Run, "save", lambda run, state: saved.append(run.step))
    fit(tmp_path, save_every=None)
    assert saved[-1] == 23 and 3 <= len(saved) <= 5     # of 23 steps, with 15 ticks in between


# ---------------------------------------------------------------- resuming

def test_resuming_a_finished_run_only_scores(tmp_path, whole, monkeypatch, capsys):
    shutil.copytree(whole[0], tmp_path / "again")
    monkeypatch.setattr(toy_script, "draw", None)                   # any further update would fail
    assert fit(tmp_path / "again", resume=True) == whole[1]
    assert log(tmp_path / "again") == log(whole[0])
    assert "continuing at step 23 of 23" in capsys.readouterr().err


def test_a_folder_with_a_run_is_only_continued(tmp_path, whole):
    before = {f.name: f.read_bytes() for f in whole[0].iterdir()}
    with pytest.raises(Fail, match="already holds a run: continue it with --resume"):
        fit(whole[0])
    assert before == {f.name: f.read_bytes() for f in whole[0].iterdir()}
    shutil.copy(whole[0] / "weights.npz", tmp_path)
    with pytest.raises(Fail, match="holds weights but no checkpoint"):
        fit(tmp_path, resume=True)


def test_resume_without_checkpoint_begins(tmp_path, whole, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')        # killed before the first save
    assert fit(tmp_path, resume=True) == whole[1]
    assert log(tmp_path) == log(whole[0])
    assert "no checkpoint in" in capsys.readouterr().err


def test_log_is_cut_back_to_the_checkpoint(tmp_path, whole, monkeypatch):
    stopped_at(tmp_path, 14, monkeypatch)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 16, "nor')
    assert [line.get("step") for line in log_lines(tmp_path)] == [4, 8, 12, None]
    fit(tmp_path, resume=True)
    assert log(tmp_path) == log(whole[0])


def log_lines(folder):
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            yield {}


@pytest.mark.parametrize(("change", "message"), [
    ({"batch_size": 32}, "batch_size is 16 in the checkpoint and 32 here"),
    ({"widths": (3, 4)}, "widths is 1 2 in the checkpoint and 3 4 here"),
    ({"steps": 99}, "steps is 23 in the checkpoint and 99 here"),
    ({"seed": 5}, "seed is 0 in the checkpoint and 5 here")])
def test_another_config_is_refused(whole, change, message):
    with pytest.raises(Fail, match=message):
        fit(whole[0], resume=True, **change)


def test_another_model_is_refused(whole, monkeypatch):
    monkeypatch.setattr(toy_script, "D", 5)
    with pytest.raises(Fail, match="of another model: w does not fit"):
        fit(whole[0], resume=True)


def test_state_on_the_gpu_resumes_bit_for_bit(tmp_path):
    words = ["--steps", 20, "--save-every", 5, "--out", tmp_path]
    code, whole, err = finish(start(*words, gpu=True))
    assert code == 0, err
    (tmp_path / "checkpoint.npz").unlink()                          # back to step 15
    code, resumed, err = finish(start(*words, "--resume", gpu=True))
    assert code == 0 and "continuing at step 15 of 20" in err, err
    assert bits(resumed) == bits(whole)


# ---------------------------------------------------------------- damage

def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickled":
        path.write_bytes(pickle.dumps({"step": 3}))
    elif how == "objects":
        np.savez(path, facts=np.array([{"step": 3}]), w=np.zeros(3))
    elif how == "foreign":
        np.savez(path, w=np.zeros(3))
    else:
        with open(path, "wb") as f:
            np.save(f, np.zeros(3))


HOW = ["truncated", "empty", "pickled", "objects", "foreign", "npy"]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
        tmp_path, whole, how, monkeypatch, capsys):
    stopped_at(tmp_path, 14, monkeypatch)
    damage(tmp_path / "checkpoint.npz", how)
    assert fit(tmp_path, resume=True) == whole[1]
    err = capsys.readouterr().err
    assert "damaged or not a checkpoint; continuing from" in err and "step 5 of 23" in err
    assert log(tmp_path) == log(whole[0])
    assert (tmp_path / "checkpoint.damaged.npz").exists()


def test_two_damaged_checkpoints_are_refused_and_kept(tmp_path, monkeypatch):
    stopped_at(tmp_path, 14, monkeypatch)
    for name in ("checkpoint.npz", "checkpoint.previous.npz"):
        damage(tmp_path / name, "truncated")
    with pytest.raises(Fail, match=r"checkpoint\.npz is damaged.*previous\.npz is damaged"):
        fit(tmp_path, resume=True)
    assert (tmp_path / "checkpoint.npz").exists() and (tmp_path / "metrics.jsonl").exists()


def test_no_flipped_byte_and_no_cut_goes_unnoticed(tmp_path, whole):
    good, facts = read_npz(whole[0] / "checkpoint.npz")
    data, path = (whole[0] / "checkpoint.npz").read_bytes(), tmp_path / "x.npz"
    noticed = 0
    for at in range(0, len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1:])
        try:
            arrays, found = read_npz(path)
            assert found == facts and arrays.keys() == good.keys()  # a byte that nobody reads
            assert all(np.array_equal(arrays[k], good[k]) for k in good)
        except Fail:
            noticed += 1
        path.write_bytes(data[:at])
        with pytest.raises(Fail):
            read_npz(path)
    assert noticed > len(data) / 5 / 2


# ---------------------------------------------------------------- numbers, disks

def test_nan_stops_with_step_and_quantity_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(Fail, match="loss is nan at step 12; the checkpoint of step 10 is kept"):
        fit(tmp_path, nan_at=12)
    assert read_npz(tmp_path / "checkpoint.npz")[1]["step"] == 10
    with pytest.raises(Fail, match="no checkpoint was written yet"):
        fit(tmp_path / "early", nan_at=2)


def test_weights_that_overflow_are_never_saved(tmp_path, monkeypatch):
    real = Run.save

    def save(run, state):
        state["m"][3] = np.inf if run.step == 10 else 0
        real(run, state)

    monkeypatch.setattr(Run, "save", save)
    with pytest.raises(Fail, match="m is not finite after step 9; the checkpoint of step 5"):
        fit(tmp_path)
    assert read_npz(tmp_path / "checkpoint.npz")[1]["step"] == 5


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Fail, match=r"^cannot write to .*file/run: Not a directory$"):
        fit(tmp_path / "file" / "run")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path, mode="r", **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(store, "open", refuse, raising=False)
    with pytest.raises(Fail, match=r"^cannot write .*config\.json: Permission denied$"):
        fit(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, whole, monkeypatch):
    real = Run.watch

    def fill(run, **numbers):
        if run.step == 12:
            (tmp_path / "checkpoint.npz.tmp").symlink_to("/dev/full")
        return real(run, **numbers)

    with monkeypatch.context() as m, pytest.raises(
            Fail, match=r"^cannot write .*checkpoint\.npz: No space left on device; "
                        "the checkpoint of step 10 is kept$"):
        m.setattr(Run, "watch", fill)
        fit(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    assert fit(tmp_path, resume=True) == whole[1]


# ---------------------------------------------------------------- weights

def test_weights_round_trip(tmp_path):
    w = np.linspace(-3, 3, 7, dtype=np.float32).astype(np.float16).astype(np.float32)
    save_weights(tmp_path / "weights.npz", {"a.W": w}, Config(steps=3), "rows")
    config, arrays, about = load_weights(tmp_path / "weights.npz")
    assert config["steps"] == 3 and about == "rows" and list(arrays) == ["a.W"]
    assert arrays["a.W"].dtype == np.float32 and np.array_equal(arrays["a.W"], w)


@pytest.mark.parametrize("how", HOW)
def test_foreign_weights_are_refused(tmp_path, how):
    save_weights(tmp_path / "w.npz", {"a": np.zeros(3)}, Config(), "rows")
    damage(tmp_path / "w.npz", how)
    with pytest.raises(Fail, match=r"w\.npz is damaged or a foreign file"):
        load_weights(tmp_path / "w.npz")


def test_a_checkpoint_is_no_weights_file(whole, tmp_path):
    with pytest.raises(Fail, match="not a weights file"):
        load_weights(whole[0] / "checkpoint.npz")
    with pytest.raises(Fail, match="no weights at"):
        load_weights(tmp_path / "none.npz")
    with pytest.raises(Fail, match="half precision"):
        save_weights(tmp_path / "w.npz", {"a": np.full(2, 1e6)}, Config(), "")


# ---------------------------------------------------------------- several processes

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needs_mpi = pytest.mark.skipif(not (MPIEXEC and importlib.util.find_spec("mpi4py")),
                               reason="no mpiexec or no mpi4py")
needs_cores = pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2,
                                 reason="runs fork on Linux, where there are two cores")
ways = pytest.mark.parametrize("way", [pytest.param("mpiexec", marks=needs_mpi),
                                       pytest.param("fork", marks=needs_cores)])


def together(way, *words, gpu=False):
    if way == "fork":
        return start(*words, "--threads", 2)
    return start(*words, launcher=(MPIEXEC, "-n", "2"), gpu=gpu)


@pytest.mark.parametrize(("way", "gpu"), [pytest.param("mpiexec", False, marks=needs_mpi),
                                          pytest.param("mpiexec", True, marks=needs_mpi),
                                          pytest.param("fork", False, marks=needs_cores)])
def test_two_processes_train_as_one(tmp_path, way, gpu):
    code, out, err = finish(together(way, "--steps", 40, "--out", tmp_path / "two", gpu=gpu))
    assert code == 0, err
    assert len(out.splitlines()) == 1 and err.count("run folder") == 1
    one = toy("--steps", 40, "--out", tmp_path / "one")[1]
    two, one = (np.frombuffer(bytes.fromhex(bits(o)), np.float32) for o in (out, one))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    assert (two != one).any()                                       # summed in another order
    for a, b in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@ways
def test_two_processes_resume_bit_for_bit(tmp_path, way):
    words = ["--steps", 80, "--eval-every", 7, "--pause", 0.01]
    process = together(way, *words, "--out", tmp_path / "stopped")
    while not (tmp_path / "stopped" / "metrics.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)                              # mpiexec passes it on
    _, _, err = finish(process)
    assert err.count("stopped at step") == 1 and "Traceback" not in err, err
    code, resumed, err = finish(together(way, *words, "--out", tmp_path / "stopped", "--resume"))
    assert code == 0 and "continuing at step" in err
    code, whole, _ = finish(together(way, *words, "--out", tmp_path / "whole"))
    assert bits(resumed) == bits(whole) and log(tmp_path / "stopped") == log(tmp_path / "whole")


@ways
@pytest.mark.parametrize(("words", "line"), [
    (["--nan-at", "5"], "error: loss is nan at step 5"),
    (["--out", "/dev/null/x"], "error: cannot write to /dev/null/x")])
def test_an_error_ends_all_processes(tmp_path, way, words, line):
    code, out, err = finish(together(way, "--out", tmp_path, *words))
    assert code != 0 and out == "" and line in err and "Traceback" not in err
    assert way == "mpiexec" or err.count("error:") == 1


@needs_mpi
def test_a_batch_that_mpi_cannot_share_is_refused(tmp_path):
    _, _, err = finish(together("mpiexec", "--out", tmp_path, "--batch-size", 15))
    assert "error: a batch of 15 cannot be shared equally by 2 processes" in err


@needs_cores
def test_a_batch_that_cores_cannot_share_is_not_shared(tmp_path):
    words = ["--steps", 9, "--batch-size", 15, "--out"]
    (_, two, _), (_, one, _) = (finish(together("fork", *words, tmp_path / "two")),
                                toy(*words, tmp_path / "one"))
    assert bits(two) == bits(one)


def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def forked(folder, *words):
    """A run that has forked, and the process that it has forked."""
    process = together("fork", "--steps", 200, "--pause", 0.01, "--save-every", 1, "--out", folder,
                       *words)
    while not (folder / "checkpoint.npz").exists() or not children(process.pid):
        time.sleep(0.005)
    return process, children(process.pid)[0]


@needs_cores
def test_a_process_that_is_lost_ends_the_run_and_it_resumes(tmp_path):
    process, other = forked(tmp_path)
    os.kill(other, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 2 and "a process of this run was ended from outside" in err
    assert finish(together("fork", "--steps", 200, "--out", tmp_path, "--pause", 0.01,
                           "--save-every", 1, "--resume"))[0] == 0


@needs_cores
def test_no_process_outlives_the_first(tmp_path):
    process, other = forked(tmp_path)
    process.kill()
    finish(process)                                                 # waits until all have let go
    assert not Path(f"/proc/{other}/cmdline").exists() \
        or not Path(f"/proc/{other}/cmdline").read_bytes()
