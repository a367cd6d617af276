"""The four verbs, as a shell sees them."""

import json
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import numpy as np
import pytest

import toy_script
from common import cli
from common.errors import Fail
from common.store import load_weights, save_weights
from toy_script import Config


def call(capsys, *words):
    """(status, last line of stdout as JSON, stderr) of the toy with these words."""
    status = 0
    try:
        cli.main(toy_script.__doc__, Config, toy_script.PRESETS, train=toy_script.train,
                 evaluate=toy_script.evaluate, infer=toy_script.infer, figures=toy_script.figures,
                 adjustable=("noise",), argv=[str(w) for w in words])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if out.startswith("{") else out, err


@pytest.fixture
def weights(tmp_path):
    save_weights(tmp_path / "w.npz", {"w": np.ones(65)}, Config(steps=7), "rows")
    return tmp_path / "w.npz"


def test_training_leaves_a_folder_and_one_line(tmp_path, capsys):
    status, result, err = call(capsys, "--preset", "quick", "--seed", 3, "--widths", 4, 5, 6,
                               "--limits", 0, 9.5, "--no-bias", "--out", tmp_path)
    assert status == 0 and "step 20/20" in err
    assert (result["preset"], result["seed"], result["steps"]) == ("quick", 3, 20)
    assert result["empty"] is None                                  # JSON has no NaN
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"]["widths"] == [4, 5, 6] and config["config"]["lr"] == 0.05
    assert config["config"]["limits"] == [0.0, 9.5]
    assert config["config"]["bias"] is False and config["seed"] == 3
    assert {"python", "numpy", "commit", "threads", "device", "preset"} < set(config)
    assert config["command"] == ("python toy_script.py --preset quick --seed 3 --widths 4 5 6 "
                                 f"--limits 0 9.5 --no-bias --out {tmp_path}")
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert set(lines[0]) == {"step", "seconds", "loss", "gradient", "norm"}
    assert cli.from_dict(Config, load_weights(tmp_path / "weights.npz")[0], "").widths == (4, 5, 6)


def test_default_folder_names_script_preset_and_seed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "--preset", "quick", "--seed", 4)[0] == 0
    assert Path("runs/toy_script/quick-seed4/weights.npz").exists()
    status, _, err = call(capsys, "--preset", "quick", "--seed", 4)
    assert status == 2 and err.startswith("error: ") and "--resume" in err and "--out" in err


@pytest.mark.parametrize(("words", "line"), [
    (["--bogus"], "unrecognized arguments: --bogus"),
    (["--step", "5"], "unrecognized arguments: --step 5"),
    (["--steps", "0"], "argument --steps: 0 is below 1"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--lr", "11"], "argument --lr: 11 is above 10.0"),
    (["--lr", "nan"], "argument --lr: nan is not a finite number"),
    (["--widths", "2", "0"], "argument --widths: 0 is below 1"),
    (["--widths"], "argument --widths: expected at least one argument"),
    (["--limits", "2"], "argument --limits: expected 2 arguments"),
    (["--limits", "1", "2", "3"], "unrecognized arguments: 3"),
    (["--noise", "pink"], "argument --noise: invalid choice: 'pink'"),
    (["--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
    (["--seed", "-1"], "argument --seed: -1 is below 0"),
    (["--threads", "0"], "argument --threads: 0 is below 1"),
    (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    (["evaluate", "--scenes", "x", "--lr", "1"], "unrecognized arguments: --lr 1"),
    (["infer"], "the following arguments are required: FILE"),
    (["figures"], "the following arguments are required: --run"),
    (["figures", "--run", "/nowhere"], "no weights at /nowhere/weights.npz")])
def test_wrong_words_get_one_line_and_status_2(capsys, words, line):
    status, out, err = call(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: " + line) and err.count("\n") == 1


def test_evaluate_uses_the_weights_own_config(weights, tmp_path, capsys):
    x = np.eye(3, 64, dtype=np.float32)
    np.savez(tmp_path / "rows.npz", x=x, y=np.full(3, 2.5, np.float32))
    status, result, _ = call(capsys, "evaluate", "--scenes", tmp_path / "rows.npz",
                             "--weights", weights)
    assert status == 0 and result["mse"] == pytest.approx(0.25) and result["steps"] == 7
    assert result["trained_on"] == "rows" and result["noise"] == "normal"
    result = call(capsys, "evaluate", "--scenes", tmp_path / "rows.npz", "--weights", weights,
                  "--noise", "none")[1]
    assert result["noise"] == "none"


def test_infer_and_figures(weights, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([1.0] * 64))
    status, result, _ = call(capsys, "infer", tmp_path / "a.json", "--weights", weights,
                             "--out", tmp_path / "out" / "deep")
    assert status == 0 and result["guesses"] == {str(tmp_path / "a.json"): 65.0}
    assert (tmp_path / "out" / "deep" / "a.txt").exists()
    status, _, err = call(capsys, "infer", "x", "--weights", weights, "--out", weights / "sub")
    assert status == 2 and err.startswith("error: cannot make the folder")
    weights.rename(tmp_path / "weights.npz")
    status, result, _ = call(capsys, "figures", "--run", tmp_path)
    assert status == 0 and result == {"run": str(tmp_path), "figures": ["curve.png"]}


def test_weights_of_another_script_are_refused(tmp_path, capsys):
    Other = make_dataclass("Other", [("depth", int)])
    save_weights(tmp_path / "w.npz", {"w": np.ones(3)}, Other(3), "rows")
    status, _, err = call(capsys, "evaluate", "--scenes", "x", "--weights", tmp_path / "w.npz")
    assert status == 2 and "belongs to another script or version" in err and err.count("\n") == 1
    with pytest.raises(Fail):
        cli.from_dict(Config, [1], "x")


def test_missing_default_weights_say_what_to_do(capsys):
    status, _, err = call(capsys, "evaluate", "--scenes", "x")
    assert status == 2 and "results/toy_script/weights.npz: train first, or give --weights" in err


def test_help_tells_defaults_presets_and_verbs(capsys):
    status, out, _ = call(capsys, "--help")
    text = " ".join(out.split())
    assert status == 0 and "learning rate (default 0.01; quick: 0.05)" in text
    assert "add 100 % of a constant (default True)" in text and "evaluate --scenes F.npz" in text
    for flag in ("preset seed steps batch-size device threads out resume data-dir widths "
                 "bias save-every").split():
        assert f"--{flag}" in text
    assert "--noise" in call(capsys, "evaluate", "--help")[1]


def test_a_bug_keeps_its_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy_script, "draw", None)
    status, out, err = call(capsys, "--out", tmp_path)
    assert (status, out) == (1, "") and "TypeError" in err and "Traceback" in err


def test_ctrl_c_outside_the_loop_is_one_line(tmp_path, capsys, monkeypatch):
    def impatient(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_script, "save_weights", impatient)
    status, out, err = call(capsys, "--steps", 3, "--out", tmp_path)
    assert (status, out) == (130, "") and err.splitlines()[-1].startswith("interrupted")


def test_only_the_last_line_of_stdout_is_json_in_a_shell(tmp_path):
    root = Path(toy_script.__file__).parents[1]
    done = subprocess.run([sys.executable, "tests/toy_script.py", "--steps", "3", "--out",
                           str(tmp_path)], cwd=root, env={"PYTHONPATH": str(root)}, text=True,
                          capture_output=True, timeout=50)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["steps"] == 3
