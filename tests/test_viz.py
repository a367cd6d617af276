"""Figures, GIFs and tables: files of the right size, showing what they were given."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import Fail
from common.store import whole_file
from viz import curves, gif, scenes, style, table

B, N, S = 3, 2, 20
README = Path(__file__).parents[1] / "README.md"
RNG = np.random.default_rng(0)


def read(path):
    """A PNG as an array; nothing else may have been left beside it."""
    assert [f.name for f in path.parent.iterdir() if f.suffix == ".tmp"] == []
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share_of(image, colour):
    """The share of pixels that have exactly this colour."""
    return (image == (255 * style.rgb(colour)).round()).all(-1).mean()


def some_scenes(C):
    boxes = np.full((B, N, 4), np.nan, np.float32)
    boxes[0, 0], boxes[1, 0] = (2, 3, 9, 12), (-4, 5, 30, 15)
    images = (0.3 * RNG.random((B, C, S, S))).astype(np.float32)
    return images, boxes, ~np.isnan(boxes[..., 0]).T


@pytest.mark.parametrize("C", [1, 3])
def test_boxes_have_the_colour_of_their_step_and_nan_draws_none(tmp_path, C):
    images, boxes, _ = some_scenes(C)
    path = tmp_path / "new" / "boxes.png"
    scenes.boxes_on_scenes(path, images, boxes, recon=images, title="Title")
    image = read(path)
    side = 240                                                      # 20 pixels, 12 times each
    assert image.shape[1] == 3 * (side + style.GAP) - style.GAP + 2 * style.MARGIN + style.LINE
    legend = image[-style.MARGIN - style.LINE:]
    pictures = image[:-style.MARGIN - style.LINE - 20]
    assert share_of(pictures, style.STEP[0]) > 0.005 and share_of(pictures, style.STEP[1]) == 0
    assert share_of(legend, style.STEP[0]) > 0 and share_of(legend, style.STEP[1]) > 0


@pytest.mark.parametrize("C", [1, 3])
def test_steps_not_taken_are_blank(tmp_path, C):
    images, boxes, present = some_scenes(C)
    canvases = np.stack([0 * images, images, images])
    patches = RNG.random((N, B, C, 7, 7))
    faint = "#ededed"
    for taken in (present, np.ones_like(present)):
        scenes.step_by_step(tmp_path / "steps.png", images, canvases, boxes, taken)
        scenes.patches(tmp_path / "patches.png", images, patches, taken)
        steps, decoded = read(tmp_path / "steps.png"), read(tmp_path / "patches.png")
        assert (share_of(steps, faint) > 0.2) == (taken is present)
        assert (share_of(decoded, faint) > 0.2) == (taken is present)
    assert share_of(decoded, style.STEP[1]) > 0.005


def test_pixels_of_a_picture_stay_what_they_are(tmp_path):
    image = np.zeros((1, 3, 4, 4))
    image[0, 0, 1, 2] = 1
    scenes.samples(tmp_path / "one.png", image)
    drawn = read(tmp_path / "one.png")
    assert drawn.shape == (160 + 2 * style.MARGIN,) * 2 + (3,)
    red = np.zeros((160, 160), bool)
    red[40:80, 80:120] = True
    inside = drawn[style.MARGIN:-style.MARGIN, style.MARGIN:-style.MARGIN]
    assert ((inside == (255, 0, 0)).all(-1) == red).all()
    scenes.samples(tmp_path / "many.png", RNG.random((7, 1, S, S)), title="Dreams")
    assert read(tmp_path / "many.png").shape[1] == 4 * 160 + 3 * style.GAP + 2 * style.MARGIN


def test_scanning_blends_the_steps(tmp_path):
    heat = np.zeros((2, N, 5, 5))
    heat[:, 0, :, :2], heat[:, 1, :, 3:] = 7, 2                     # nothing is at the centre
    scenes.scanning(tmp_path / "scan.png", heat, ["seed 0", "seed 1"])
    image = read(tmp_path / "scan.png")
    big = image[style.MARGIN + style.LINE + 225, style.MARGIN:style.MARGIN + 450]
    for at, colour in ((40, style.STEP[0]), (225, "#000000"), (410, style.STEP[1])):
        assert abs(big[at] - 255 * style.rgb(colour)).max() <= 1
    scenes.scanning(tmp_path / "scan.png", 0 * heat[:1], ["never looks"])


def write(path, records, end=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return path


def test_jsonl_forgives_only_a_torn_last_line(tmp_path):
    records = [{"step": 0, "é": 1.5}, {"step": 1}]
    assert curves.read_jsonl(write(tmp_path / "a", records)) == records
    assert curves.read_jsonl(write(tmp_path / "a", records, '{"step": 2, "los')) == records
    with pytest.raises(Fail, match="line 3"):
        curves.read_jsonl(write(tmp_path / "a", records, '{"st\n{"step": 3}\n'))
    with pytest.raises(Fail, match="cannot read"):
        curves.read_jsonl(tmp_path / "nowhere")


def test_curves_skip_what_nobody_logged(tmp_path):
    logs = [write(tmp_path / f"{seed}.jsonl",
                  [{"step": s, "seconds": s / 7, "acc": 0.1 * s, "elbo": None if s else -3.0}
                   for s in range(5 + seed)], "{") for seed in (0, 1)]
    path = tmp_path / "curves.png"
    fields = [("acc", "Accuracy"), ("elbo", "ELBO"), ("nothing", "Nothing")]
    assert curves.curves(path, {"a": logs, "b": logs[0]}, fields, x="seconds", title="Curves",
                         references={"acc": [(0.3, "close"), (0.301, "to it")]})
    image = read(path)
    assert image.shape == (720, 40 + 2 * 900, 3)
    assert share_of(image, style.RUN[0]) > 0 and share_of(image, style.RUN[1]) > 0
    assert not curves.curves(tmp_path / "none.png", {"a": logs}, fields[2:])
    assert not (tmp_path / "none.png").exists()


def test_mean_of_seeds_is_drawn_where_all_have_data():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    curves.draw_run(ax, [np.array([[0, 2, 4], [0, 2, 4.]]), np.array([[1, 3], [3, 5.]])], "k", "")
    np.testing.assert_allclose(ax.lines[-1].get_xydata(), [(1, 2), (2, 3), (3, 4)])


def test_confusion_draws_rows_without_scenes(tmp_path):
    curves.confusion(tmp_path / "c.png", [[8, 2, 0], [0, 9, 1], [0, 0, 0]], "Counts")
    assert share_of(read(tmp_path / "c.png"), "#F4F7F9") > 0.1


@pytest.mark.parametrize("C", [1, 3])
def test_attention_gif_has_every_frame_and_holds_the_last(tmp_path, C):
    images, boxes, _ = some_scenes(C)
    frames = [{"step": 100 * i, "seconds": 1.5 * i, "images": images, "boxes": boxes,
               "recon": images * i / 4, "accuracy": i / 4 if i else None} for i in range(5)]
    gif.attention_gif(tmp_path / "a.gif", frames, hold=3.0)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0 and 900 < film.size[0] <= 980
        film.seek(4)
        last, times = np.asarray(film.convert("RGB")).astype(int), film.info["duration"]
    assert times == 3000
    assert share_of(last, style.STEP[0]) > 0.002 and share_of(last, style.STEP[1]) == 0
    assert (last[0, 0] == 255).all()
    assert gif.caption(frames[4]) == "step 400 · 6 s · count accuracy 100 %"
    assert gif.caption(frames[0]) == "step 0 · 0 s"


def test_plain_gif(tmp_path):
    frames = np.zeros((3, 8, 9), np.uint8)
    frames[1] = 200
    gif.gif(tmp_path / "a.gif", frames, fps=5)
    with Image.open(tmp_path / "a.gif") as film:
        film.seek(1)
        assert film.size == (9, 8) and film.info["duration"] == 200
        assert film.convert("L").getpixel((4, 4)) == 200
    with pytest.raises(Fail, match="no frames"):
        gif.gif(tmp_path / "b.gif", [])


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "kept", [])
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [f.name for f in tmp_path.iterdir()] == ["kept"] and path.read_text() == ""


@pytest.mark.parametrize(("seconds", "text"), [
    (0.2, "0 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (7510, "2 h 05 min")])
def test_duration(seconds, text):
    assert style.duration(seconds) == text


@pytest.fixture
def readme(tmp_path):
    """A README with two tables beside a results folder that describes them."""
    folder = tmp_path / "results" / "some_script"
    folder.mkdir(parents=True)
    row = {"label": "digits", "filter": {"row": "default"}, "metric": "acc", "format": ".1%"}
    (folder / "tables.json").write_text(json.dumps({
        "counts": [dict(row, paper="98 %"), dict(row, label="paper's", filter={"row": "paper"})],
        "times": [dict(row, metric="mse", format=".3f", command="make times")]}))
    write(folder / "runs.jsonl", [
        {"row": "default", "seed": s, "acc": acc, "mse": 0.01, "train_seconds": 30 + 10 * s,
         "command": "python some_script.py | tee", "machine": "laptop"}
        for s, acc in ((0, 0.5), (1, 0.97), (0, 0.99))])
    path = tmp_path / "README.md"
    path.write_text("# Été\n<!-- table:counts -->\nold\n<!-- end -->\ntext\n"
                    "<!-- table:times -->\n<!-- end -->\nlast\n", encoding="utf-8")
    return path


def test_tables_are_rewritten_and_checked(readme):
    assert table.main([str(readme), "--check"]) == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert table.main([str(readme)]) == 0
    assert table.main([str(readme), "--check"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Été\n<!-- table:counts -->\n")
    assert text.endswith("<!-- end -->\nlast\n")
    assert ("| digits | 98 % | 98.0 % (97.0 % – 99.0 %, 2 seeds) | 35 s (30 s – 40 s) | laptop "
            "| `python some_script.py \\| tee` |\n") in text        # the first seed 0 was run again
    assert "| paper's |  | not run |  |  |  |\n" in text
    assert "| digits | 0.010 (2 seeds) | 35 s (30 s – 40 s) | laptop | `make times` |\n" in text
    assert "Public best" not in text and "old" not in text
    write(readme.parent / "results/some_script/more.jsonl", [{"row": "paper", "acc": 1.0}])
    assert table.main([str(readme), "--check"]) == 1


@pytest.mark.parametrize("page", [README, *README.parent.glob("results/*/README.md")],
                         ids=lambda page: page.parent.name)
def test_numbers_on_our_pages_are_those_of_the_records(page):
    assert table.main([str(page), "--check"]) == 0


@pytest.mark.parametrize(("old", "new", "says"), [
    ("table:times", "table:speeds", "speeds"), ("old\n<!-- end -->", "old", "no <!-- end -->")])
def test_table_errors_are_one_line(readme, capsys, old, new, says):
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace(old, new), encoding="utf-8")
    assert table.main([str(readme)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert readme.read_text(encoding="utf-8") == text.replace(old, new)


def test_nothing_of_matplotlib_is_loaded_before_it_draws():
    import subprocess
    import sys

    code = ("import sys, viz.scenes, viz.curves, viz.gif, viz.table;"
            "sys.exit('matplotlib' in sys.modules or 'PIL' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
