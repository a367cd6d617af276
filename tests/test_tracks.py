"""Identities on made-up videos whose story is known: the bookkeeping, and the pictures of them."""

import numpy as np
import pytest
from PIL import Image

from common.tracks import BARELY, crossing, follow, judged, kept, matched, summary
from viz import style, tracks

FAR, SIDE = 20, 10
NOWHERE = [np.nan] * 4


def at(x, y=0, side=SIDE):
    return [x, y, x + side, y + side]


def video(*objects):
    """Each object's boxes over time as one video of boxes (1, T, K, 4)."""
    return np.array(objects, np.float32).transpose(1, 0, 2)[None]


def named(*rows):
    """The identity in each slot over time as (1, T, N)."""
    return np.array(rows).T[None]


def tell(true, found, identities):
    return summary([follow(true, found, identities)])


STILL = [at(0)] * 6
MOVING = [at(FAR + 3 * t) for t in range(6)]
APPROACH = [at(30 - 6 * t) for t in range(6)]           # onto STILL, and there at last
GOES = [at(0), at(0), NOWHERE, NOWHERE, at(0), at(0)]


def test_all_is_well():
    true = video(STILL, MOVING)
    says = tell(true, true[:, :, ::-1], named([4] * 6, [7] * 6))
    assert says == {"identity_accuracy": 1, "identity_through_overlaps": None,
                    "rediscoveries_per_sequence": 0, "late_births_per_sequence": 0,
                    "switches_per_sequence": 0, "mota": 1}
    assert matched(true, true[:, :, ::-1], named([4] * 6, [7] * 6))[0, 2].tolist() == [7, 4]


def test_an_object_may_leave_and_return_under_its_name():
    true = video(GOES, MOVING)
    assert tell(true, true, named([0] * 6, [1] * 6))["identity_accuracy"] == 1
    gone = named([0, 0, -1, -1, 0, 0], [1] * 6)             # forgotten while it is away
    assert tell(true, true, gone)["identity_accuracy"] == 1


def test_another_name_on_return_is_a_rediscovery():
    true = video(GOES, MOVING)
    says = tell(true, true, named([0, 0, -1, -1, 5, 5], [1] * 6))
    assert says["identity_accuracy"] == 0.5 and says["mota"] == 1 - 1 / 10
    assert says["rediscoveries_per_sequence"] == says["late_births_per_sequence"] == 1
    assert says["switches_per_sequence"] == 1


def test_a_rediscovery_counts_once_however_often_it_changes():
    true = video(STILL)
    says = tell(true, true, named([0, 5, 0, 5, 5, 0]))
    assert says["rediscoveries_per_sequence"] == 1 and says["switches_per_sequence"] == 4


def test_a_new_name_each_frame_is_no_tracking():
    true = video(STILL)
    says = tell(true, true, named(range(6)))
    assert says["identity_accuracy"] == 0 and says["rediscoveries_per_sequence"] == 5


def test_a_late_discovery_is_born_late_but_is_no_rediscovery():
    true = video(STILL)
    says = tell(true, true, named([-1, 3, 3, 3, 3, 3]))
    assert says["late_births_per_sequence"] == 1 and says["rediscoveries_per_sequence"] == 0
    assert says["identity_accuracy"] == 0 and says["mota"] == 5 / 6     # it was missed once


def test_a_second_name_for_a_tracked_object_is_a_ghost():
    true = video(STILL)
    says = tell(true, np.repeat(true, 2, 2), named([0] * 6, [-1, 1, 1, 1, 1, 1]))
    assert says["identity_accuracy"] == 1 and says["mota"] == pytest.approx(1 / 6)
    assert says["late_births_per_sequence"] == 1 and says["rediscoveries_per_sequence"] == 0


def test_a_swap_is_punished_for_both():
    true = video(STILL, MOVING)
    says = tell(true, true, named([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]))
    assert says["identity_accuracy"] == 0 and says["switches_per_sequence"] == 2
    assert says["rediscoveries_per_sequence"] == says["late_births_per_sequence"] == 0


def test_crossing_objects_are_judged_apart():
    right = [at(FAR - 8 * t) for t in range(6)]             # crosses STILL between frames 1 and 4
    true = video(STILL, right, [at(0, 40)] * 6)
    assert crossing(true).tolist() == [[True, True, False]]
    swapped = named([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [2] * 6)
    for names, all_, through in ((named([0] * 6, [1] * 6, [2] * 6), 1, 1), (swapped, 1 / 3, 0)):
        says = tell(true, true, names)
        assert says["identity_accuracy"] == pytest.approx(all_)
        assert says["identity_through_overlaps"] == through


def test_a_pixel_is_no_reason_to_change_partners():
    true = video(STILL, APPROACH)
    found = true.copy()
    found[0, -1] = [at(1), at(0)]                           # one upon the other, and a pixel off
    found[0, -1, 0], true[0, -1, 1] = at(1), at(1)
    assert kept(true, matched(true, found, named([0] * 6, [1] * 6))).all()
    apart = true.copy()
    apart[0, 3:] = apart[0, 3:, ::-1]                       # but a swap in plain sight is one
    assert not kept(true, matched(true, apart, named([0] * 6, [1] * 6))).any()


def test_a_missed_object_is_not_kept():
    true = video(STILL, MOVING)
    nothing = tell(true, true, named([0] * 6, [-1] * 6))
    assert nothing["identity_accuracy"] == 0.5 and nothing["mota"] == 0.5
    off = true.copy()
    off[0, 2, 1] = at(FAR + 6 + 7)                          # IoU 3/17: somewhere else for a frame
    says = tell(true, off, named([0] * 6, [1] * 6))
    assert says["identity_accuracy"] == 0.5 and says["mota"] == 1 - 2 / 12


def test_two_appear_at_once_and_are_told_apart():
    true = video([NOWHERE, *STILL[1:]], [NOWHERE, *MOVING[1:]])
    names = named([-1, 0, 0, 0, 0, 0], [-1, 1, 1, 1, 1, 1])
    says = tell(true, true, names)
    assert says["identity_accuracy"] == 1 and says["late_births_per_sequence"] == 2
    assert says["rediscoveries_per_sequence"] == 0


def test_no_verdict_while_hardly_anything_is_seen():
    sliver = [0, 0, 2, SIDE]
    true = video([at(0), at(0), sliver, sliver, at(0), at(0)])
    assert judged(true)[0, :, 0].tolist() == [True, True, False, False, True, True]
    assert tell(true, true, named([0, 0, -1, -1, 0, 0]))["identity_accuracy"] == 1
    true[0, 2:4, 0, 2] = SIDE * BARELY
    assert tell(true, true, named([0, 0, -1, -1, 0, 0]))["identity_accuracy"] == 0


@pytest.mark.parametrize(("K", "N"), [(0, 2), (2, 0), (0, 0), (2, 3)])
def test_nothing_there_or_nothing_found(K, N):
    true, found = np.full((3, 4, K, 4), np.nan), np.full((3, 4, N, 4), np.nan)
    says = tell(true, found, np.full((3, 4, N), -1))
    assert says == {"identity_accuracy": None, "identity_through_overlaps": None,
                    "rediscoveries_per_sequence": 0, "late_births_per_sequence": 0,
                    "switches_per_sequence": 0, "mota": None}
    true = np.broadcast_to(at(0.0), true.shape)
    if K:
        assert tell(true, found, np.full((3, 4, N), -1))["identity_accuracy"] == 0


def test_boxes_without_an_identity_are_not_there():
    true = video(STILL)
    assert tell(true, true, named([-1] * 6))["mota"] == 0


def test_parts_add_up():
    true, names = video(STILL, MOVING), named([0] * 6, [1] * 6)
    swapped = named([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    twice = np.concatenate([true, true])
    whole = follow(twice, twice, np.concatenate([names, swapped]))
    parts = [follow(true, true, names), follow(true, true, swapped)]
    assert summary([whole]) == summary(parts) and summary(parts)["identity_accuracy"] == 0.5


def test_random_videos_obey_bounds(rng):
    """Whatever is found, the sums fit together; the truth itself is found without a fault."""
    low = rng.uniform(0, 40, (60, 8, 2, 2))
    true = np.concatenate([low, low + rng.uniform(5, 10, low.shape)], -1)
    true[rng.random(true.shape[:3]) < 0.3] = np.nan
    names = np.where(rng.random((60, 8, 3)) < 0.3, -1, rng.permuted(
        np.broadcast_to(np.arange(3), (60, 8, 3)), axis=2))
    found = np.concatenate([true, np.roll(true[:, :, :1], 1, 0)], 2)
    n = follow(true, found, names)
    assert n.objects >= n.kept >= n.crossing_kept and n.objects >= n.crossing > 20
    assert n.boxes >= n.missed > 0 and n.born_late >= n.rediscovered > 0 < n.switches
    best = summary([follow(true, true, np.broadcast_to([0, 1], (60, 8, 2)))])
    assert best["identity_accuracy"] == 1 and best["switches_per_sequence"] == 0


# ---------------------------------------------------------------- pictures and GIFs

S, T = 50, 4
STEP = [(255 * style.rgb(colour)).round() for colour in style.STEP]


@pytest.fixture
def seen():
    """Two grey videos; in the first, object 1 is there throughout, object 2 from the third frame.

    Images, boxes, names, and what each of three slots draws; a slot holds no object for long.
    """
    images = np.full((2, T, 1, S, S), 0.2, np.float32)
    boxes = np.full((2, T, 3, 4), np.nan, np.float32)
    names = np.full((2, T, 3), -1)
    for t in range(T):
        boxes[0, t, t % 3], names[0, t, t % 3] = at(5 + 2 * t, 30), 0
        if t > 1:
            boxes[0, t, t - 2], names[0, t, t - 2] = at(30, 5), 1
    drawn = np.zeros((2, T, 3, 1, S, S), np.float32)
    drawn[names >= 0] = 1
    return images, boxes, names, drawn


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def play(path):
    with Image.open(path) as film:
        frames = []
        for t in range(film.n_frames):
            film.seek(t)
            frames.append(np.asarray(film.convert("RGB")).astype(float))
    return frames


def has(image, n):
    """The share of pixels in the colour of identity n."""
    return (abs(image - STEP[n]) <= 1).all(-1).mean()


def cells(image, rows):
    """The frames of a sheet of videos with so many rows each, (video, row, t, pixels..)."""
    top, left = style.MARGIN + style.LINE, style.MARGIN + style.LINE
    row, column = tracks.CELL + tracks.CLOSE, tracks.CELL + tracks.CLOSE
    return [[[image[y:y + tracks.CELL, x:x + tracks.CELL]
              for x in range(left, left + T * column, column)]
             for y in range(above, above + n * row, row)]
            for n, above in zip(rows, top + np.cumsum([0, *(n * row + tracks.APART for n in rows)]),
                                strict=False)]


def test_a_sheet_shows_each_identity_in_its_colour(tmp_path, seen):
    images, boxes, names, _ = seen
    tracks.sheet(tmp_path / "a.png", images, {"A": (images / 2, boxes, names),
                                              "B": (images, boxes, -np.ones_like(names))})
    image = read(tmp_path / "a.png")
    assert image.shape[1] == T * (tracks.CELL + tracks.CLOSE) - tracks.CLOSE + 2 * style.MARGIN \
        + style.LINE
    (true, a, b), empty = cells(image, (3, 3))
    for t in range(T):
        assert (true[t] == 51).all() and (b[t] == 51).all()         # no names, no boxes
        assert has(a[t], 0) > 0.01 and (has(a[t], 1) > 0.01) == (t > 1)
        assert (a[t][75, 75] == round(25.5)).all() or (a[t][75, 75] == 25).all()
        assert all((row[t] == row[t][0, 0]).all() for row in empty)
        y, x = np.nonzero((a[t] == STEP[0]).all(-1))
        centre = np.array([x.min() + x.max(), y.min() + y.max()]) / 2
        np.testing.assert_allclose(centre / 3, [10 + 2 * t, 35], atol=0.7)


def test_glimpses_have_a_row_for_each_identity_and_blanks_without_it(tmp_path, seen):
    images, _, names, drawn = seen
    tracks.glimpses(tmp_path / "a.png", images, drawn, names)
    (_, one, two), (_,) = cells(read(tmp_path / "a.png"), (3, 1))
    for t in range(T):
        assert has(one[t], 0) == 1
        assert has(two[t], 1) == (t > 1) and ((two[t] == 237).mean() == 1) == (t <= 1)
    assert tracks.longest(names[0], 1) == [0] and tracks.longest(names[0], 9) == [0, 1]


def test_generation_tells_seen_from_imagined(tmp_path, seen):
    images = seen[0]
    tracks.generation(tmp_path / "a.png", images, 2 * images, given=1)
    image = read(tmp_path / "a.png")
    for true, model in cells(image, (2, 2)):
        assert all((frame == 51).all() for frame in true)
        assert all((frame == 102).all() for frame in model)
    columns = np.nonzero((image == STEP[2]).all(-1).any(0))[0]
    start = style.MARGIN + style.LINE + tracks.CELL + tracks.CLOSE
    assert start - 1 <= columns.min() <= start + 1 and columns.max() >= image.shape[1] - 30
    for given in (0, T):                                            # nothing to tell apart
        tracks.generation(tmp_path / "b.png", None, images, given=given)
        assert has(read(tmp_path / "b.png"), 2) == 0
        assert len(cells(read(tmp_path / "b.png"), (1, 1))) == 2


def test_track_gifs_show_every_frame(tmp_path, seen):
    images, boxes, names, _ = seen
    tracks.track_gif(tmp_path / "a.gif", images, images / 2, boxes, names)
    frames = play(tmp_path / "a.gif")
    assert len(frames) == T and frames[0].shape[1] <= 960
    assert [has(f, 0) > 0.0005 for f in frames] == [True] * T
    assert [has(f, 1) > 0.0005 for f in frames] == [False, False, True, True]
    none = np.zeros((2, T, 0))
    tracks.track_gif(tmp_path / "b.gif", images, images, none[..., None][..., [0] * 4], none)
    assert max(has(f, n) for f in play(tmp_path / "b.gif") for n in range(6)) == 0
    with Image.open(tmp_path / "a.gif") as film:
        assert film.info["duration"] == 250


@pytest.mark.parametrize(("shape", "zoom"), [((S, S), 9), ((S, 960), 1)])
def test_overlays_are_in_the_video_s_own_pixels(tmp_path, seen, shape, zoom):
    _, boxes, names, _ = seen
    video = np.full((T, *shape, 3), 200, np.uint8)
    tracks.overlay_gif(tmp_path / "a.gif", video, boxes[0], names[0])
    frames = play(tmp_path / "a.gif")
    assert len(frames) == T
    for t, frame in enumerate(frames):
        assert frame.shape == (shape[0] * zoom, shape[1] * zoom, 3)
        row, column = int(39.5 * zoom), int((6 + 2 * t) * zoom)     # under its lower edge's middle
        assert (frame[int(40 * zoom) - 1, column] == STEP[0]).all()
        assert (frame[min(row + zoom, len(frame) - 1), column] == 200).all()
        assert (has(frame, 1) > 0) == (t > 1)


def test_a_video_may_have_one_frame_and_no_object(tmp_path):
    nothing = np.full((1, 1, 2, 4), np.nan), np.full((1, 1, 2), -1)
    image, frame = np.zeros((1, 1, 1, S, S), np.float32), np.zeros((1, S, S, 3), np.uint8)
    tracks.sheet(tmp_path / "a.png", image, {"A": (image, *nothing)})
    tracks.glimpses(tmp_path / "a.png", image, np.zeros((1, 1, 2, 1, S, S)), nothing[1])
    tracks.track_gif(tmp_path / "a.gif", image, image, *nothing)
    tracks.overlay_gif(tmp_path / "b.gif", frame, *(a[0] for a in nothing))
    assert len(play(tmp_path / "a.gif")) == len(play(tmp_path / "b.gif")) == 1
