"""Our pages are true: commands are understood, flags, presets and make targets exist."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from common import cli, store

ROOT = Path(cli.__file__).parent.parent
SCRIPTS = sorted(p for p in ROOT.glob("*.py") if "cli.main(" in p.read_text(encoding="utf-8"))
PAGES = {page: page.read_text(encoding="utf-8")
         for page in (ROOT / "README.md", *sorted(ROOT.glob("results/*/README.md")))}
ALL = "\n".join(PAGES.values())
COMMANDS = sorted({(script, words) for script in SCRIPTS for words in
                   re.findall(rf"python {script.name}((?: [^\s`|]+)*)", ALL)})


class Accepted(BaseException):
    """The words were understood."""


@pytest.fixture
def shell(capsys, monkeypatch):
    """A script in this process: what it prints."""
    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        out, err = capsys.readouterr()
        assert not stop.value.code, err
        return out
    return call


@pytest.mark.parametrize(("script", "words"), COMMANDS, ids=lambda x: getattr(x, "stem", x))
def test_commands_are_understood(script, words, shell, monkeypatch):
    def accept(*args, **options):
        raise Accepted

    for place, name in ((cli, "Run"), (cli, "load_weights"), (store, "load_weights")):
        monkeypatch.setattr(place, name, accept)
    with pytest.raises(Accepted):
        shell(script, *words.replace(" N", " 2").replace("...", "").split())


def test_flags_presets_and_targets_exist(shell):
    helps = " ".join(shell(script, *words, "--help") for script in SCRIPTS
                     for words in ([], ["evaluate"], ["infer"], ["figures"]))
    spans = [s for s in re.findall(r"`([^`\n]+)`", ALL) if not s.startswith("python -m")]
    for flag in {flag for s in spans for flag in re.findall(r"--[a-z][a-z-]+", s)}:
        assert flag in helps, flag
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)", ALL):
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_every_preset_is_told(script):
    presets = runpy.run_path(str(script))["PRESETS"]
    page = PAGES[ROOT / "results" / script.stem / "README.md"] + PAGES[ROOT / "README.md"]
    for name in presets:
        assert f"`{name}`" in page or f"--preset {name}" in page, name
