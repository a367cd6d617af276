"""The analyses of IODINE's slots, and the sweeps: what they count is what they say."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import iodine_tetris as iodine
import vae_scenes
from bench import iodine_study as study
from bench import iodine_sweep as sweep
from common.errors import Fail
from common.params import Params
from common.store import save_weights
from viz import latents

SMALL = {"latents": 4, "rank": 3, "decoder_units": 6, "refine_features": 4, "units": 5,
         "test_iterations": 2}


@pytest.fixture
def model(monkeypatch):
    for name, value in (("SCENES", (6, 4)), ("DILEMMAS", 2), ("READINGS", 4)):
        monkeypatch.setattr(study, name, value)

    def made(**changes):
        cfg = iodine.Config(**SMALL | changes)
        return Params(iodine.init(cfg, 0)), cfg

    return made


# ---------------------------------------------------------------- reading factors off

def test_a_linear_map_tells_what_is_linear_and_nothing_else(rng):
    z, there = rng.standard_normal((2, 400, 5)).astype(np.float32)

    def factors(z):
        return {"class": z[:, :3].argmax(1), "sum": z[:, :1] + 2 * z[:, 1:2] + 3,
                "product": z[:, 3:4] * z[:, 4:5]}

    shares = study.told(z, factors(z), there, factors(there))
    assert shares["class"] > 0.95 and shares["sum"] > 0.999 and shares["product"] < 0.1
    blind = study.told(z[::-1], factors(z), there, factors(there))
    assert blind["class"] < 0.5 and blind["sum"] < 0.1


def test_objects_come_with_their_own_slots(model, monkeypatch):
    """With masks as true as the truth, each object's latent is its slot's."""
    p, cfg = model(slots=4)
    drawn = iodine.draw_scenes(cfg, 7, 0, 2)
    guess = iodine.infer_scenes(p, cfg, drawn.images)
    guess.owners[-1] = (drawn.masks + 1) % 4                        # object k + 1 is slot k + 2
    monkeypatch.setattr(iodine, "infer_scenes", lambda *a: guess)
    lam, factors = study.read_objects(p, cfg, 7, 2)
    for b, k in np.ndindex(2, 3):
        np.testing.assert_array_equal(lam[3 * b + k], guess.lam[-1, b, (k + 2) % 4])
    np.testing.assert_array_equal(factors["centre"], drawn.centres.reshape(-1, 2))


@pytest.mark.parametrize(("data", "canvas", "names"), [
    ("tetris", 35, {"shape", "colour", "x", "y"}), ("shapes", 28, {"shape", "x", "y"}),
    ("dsprites", 24, {"shape", "colour", "x", "y", "size"}),
    ("binary", 24, {"shape", "x", "y", "size"})])
def test_every_data_set_has_its_factors(model, tmp_path, data, canvas, names):
    p, cfg = model(data=data, canvas=canvas)
    record = study.probe(p, cfg, tmp_path / "probe.png")
    assert record.keys() == names | {"objects"}
    study.pca(p, cfg, tmp_path / "pca.png")


# ---------------------------------------------------------------- several right answers

def cut(text):
    """Pieces drawn as letters."""
    rows = text.split()
    return frozenset(frozenset((i, j) for i, row in enumerate(rows) for j, c in enumerate(row)
                               if c == letter) for letter in {*"".join(rows)} - {"."})


def test_all_ways_to_cut_a_rectangle():
    ways = study.tilings(frozenset(np.ndindex(2, 4)))
    assert {*ways} == {cut("aabb aabb"), cut("aaaa bbbb"), cut("aaab abbb"), cut("abbb aaab")}
    assert len(ways) == 4 and study.tilings(frozenset({(0, 0), (0, 1)})) == []


def test_an_answer_names_no_slots():
    cells = {*np.ndindex(2, 4)}
    owners = np.kron(np.array([[0, 0, 3, 3], [0, 0, 3, 3]]), np.ones((5, 5), int))
    owners[0, 0] = 2                                                # a stray pixel
    assert study.answer(owners, cells) == cut("aabb aabb") == study.answer(3 - owners, cells)
    shown = study.as_owners(cut("aabb aabb"), 4)[:10]
    assert study.answer(shown, cells) == cut("aabb aabb")


def test_dilemmas_look_like_tetris(model, rng):
    """Their pictures are what the data show: each cut's pieces, stamped, give the same picture."""
    cells, third, ways = study.dilemma(rng)
    assert len(cells) == 8 and len(third) == 4 and len(ways) > 1
    image = study.arrangement([(cells, [1, 0, 0]), (third, [0, 0, 1])])
    scene = iodine.draw_scenes(iodine.Config(), 3, 0, 1)
    piece = scene.images[0][:, scene.masks[0] == 1]
    assert {*np.unique(image[0])} == {0, *np.unique(piece[piece.max(1) > 0])}
    for i, j in np.ndindex(7, 7):
        lit = image[:, 5 * i:5 * i + 5, 5 * j:5 * j + 5].max((1, 2)) > 0
        assert lit.tolist() == [(i, j) in cells, False, (i, j) in third]


def test_ambiguous_pictures_are_of_tetrominoes(model, tmp_path):
    p, cfg = model()
    record = study.ambiguous(p, cfg, tmp_path / "a.png")
    assert 0 <= record["right readings"] <= 1 and record["pictures"] == 2
    with pytest.raises(Fail, match="tetrominoes"):
        study.ambiguous(*model(data="shapes", canvas=28), tmp_path / "a.png")


def test_parts_have_colours():
    picture = latents.parts(np.array([[-1, 0], [1, 1]]))
    assert picture.shape == (3, 2, 2) and not picture[:, 0, 0].any()
    np.testing.assert_array_equal(picture[:, 1, 0], picture[:, 1, 1])
    assert np.abs(picture[:, 0, 1] - picture[:, 1, 1]).max() > 0.1


# ---------------------------------------------------------------- traversals, the command line

def test_a_traversal_moves_one_slot_through_its_prior(model, tmp_path, monkeypatch):
    p, cfg = model()
    seen = []
    draw = study.drawn_by
    monkeypatch.setattr(study, "drawn_by", lambda p, cfg, z: seen.append(z) or draw(p, cfg, z))
    study.traversals(p, cfg, tmp_path / "t.png")
    for z in seen:
        moving = z.std(0) > 1e-6
        assert moving.sum() == 1
        np.testing.assert_allclose(z[[0, -1]][:, moving].ravel(), [-study.REACH, study.REACH])


def test_what_latents_draw_is_what_was_inferred(model):
    """Means and masks decoded from the last latents, which have no noise, are what was seen."""
    p, cfg = model()
    images = iodine.draw_scenes(cfg, 1, 0, 2).images
    guess = iodine.infer_scenes(p, cfg, images)
    z = guess.lam[-1, ..., :4]
    np.testing.assert_allclose(study.drawn_by(p, cfg, z), guess.recon[-1], atol=1e-5)


def test_slots_beside_a_vae(model, tmp_path):
    """Both are asked for the same factors, the VAE for those of the largest object first."""
    p, cfg = model(data="dsprites", canvas=32, slots=4)
    other = vae_scenes.Config(data="dsprites", canvas=32, latent=3, halvings=(4,) * 4,
                              mixings=(4,) * 3, seeds=4, widths=(4,) * 3)
    q = Params(vae_scenes.init(other, 0))
    save_weights(tmp_path / "vae.npz", q.host(), other, about="dsprites")
    record = study.beside_vae(p, cfg, tmp_path / "vae.png", tmp_path / "vae.npz")
    names = {"shape", "colour", "x", "y", "size"}
    assert record.keys() == {"vae", *names, *(f"{name}, vae" for name in names)}
    assert (tmp_path / "vae.png").stat().st_size > 1000
    z, ranked = study.read_scenes(q, other, replace(cfg, objects=(3,)), 5, 4)
    assert z.shape == (4, 3) and len(ranked) == 3
    assert (ranked[0]["size"] >= ranked[1]["size"]).all()
    with pytest.raises(Fail, match="other scenes"):
        study.beside_vae(p, replace(cfg, canvas=48), tmp_path / "vae.png", tmp_path / "vae.npz")


def test_places_alone_part_what_lies_apart(monkeypatch, rng):
    at = np.concatenate([rng.normal(c, 0.5, (40, 2)) for c in (0, 9, 30)])
    error, nearest = min((study.k_means(at, 3, rng) for _ in range(5)), key=lambda r: r[0])
    assert sorted(np.bincount(nearest)) == [40, 40, 40] and error < 120
    monkeypatch.setattr(study, "SCENES", (4, 4))
    cfg = iodine.Config(data="binary", canvas=32, objects=(1,))
    assert study.places(None, cfg, None) == {"ari_foreground": 1.0}


def test_forms_fail_only_where_one_hides_another(monkeypatch):
    monkeypatch.setattr(study, "SCENES", (40, 40))
    assert study.forms(None, iodine.Config(), None) == {"ari_foreground": 1.0}      # tetris: apart
    cfg = iodine.Config(data="binary", canvas=32, objects=(3,))
    assert 0.5 < study.forms(None, cfg, None)["ari_foreground"] < 1


def test_the_studies_from_the_command_line(model, tmp_path, capsys):
    p, cfg = model()
    save_weights(tmp_path / "w.npz", p.host(), cfg, about=cfg.data)
    study.main(["--weights", str(tmp_path / "w.npz"), "--out", str(tmp_path)])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert [r["study"] for r in printed] == study.FIRST == [r["study"] for r in kept]
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in study.FIRST)
    with pytest.raises(SystemExit) as stop:
        study.main(["pca", "--weights", str(tmp_path / "none.npz")])
    assert stop.value.code == 2 and "no weights" in capsys.readouterr().err


# ---------------------------------------------------------------- sweeps

@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_a_sweep_continues_where_it_was(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(iodine, "LONG", 12)
    config = iodine.Config
    small = {"latents": 4, "rank": 3, "decoder_units": 6, "refine_features": 4, "units": 5,
             "batch_size": 2, "eval_scenes": 2, "test_scenes": 2, "warmup": 0}
    monkeypatch.setattr(iodine, "Config", lambda **changes: config(**small | changes))
    models = [*sweep.SWEEPS[name]][:2]
    monkeypatch.setitem(sweep.SWEEPS, name, {m: sweep.SWEEPS[name][m] for m in models})
    made = []
    learn = iodine.learn
    monkeypatch.setattr(iodine, "learn", lambda cfg, run: made.append(cfg) or learn(cfg, run))
    for words in (["--names", models[1]], []):
        monkeypatch.setattr(sys, "argv", ["sweep", name, "--steps", "1", *words])
        sweep.main()
    lines = (tmp_path / f"sweep-{name}.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == models[::-1] and len(made) == 2
    assert (tmp_path / f"sweep-{name}.png").stat().st_size > 1000
