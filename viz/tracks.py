"""Pictures and GIFs of videos: who is where, what each identity draws, what the model expects.

Videos are (B, T, 1, S, S) in [0, 1], boxes (B, T, N, 4) as x0, y0, x1, y1 in pixels with NaN where
absent, names (B, T, N) the identities, -1 where absent; an identity keeps its colour.
"""

from contextlib import contextmanager

import numpy as np

from viz.gif import EDGE, SPACE, _font, gif, tile
from viz.scenes import INPUT, NOTHING
from viz.style import DPI, GREY, INK, STEP, outline, panels, rgb, show, step_colour, visible

CELL, CLOSE, APART = 150, 8, 34         # pixels: a frame, between frames, between videos
WIDTH, OVERLAY = 960, 480               # pixels of a GIF of many videos, of a small one
SHARP, TAIL, TAG = 2, 5, 13             # GIFs: painted so much larger; frames, pixels of text


# ---------------------------------------------------------------- figures

@contextmanager
def film(path, groups, T, shape, title=None, columns=None):
    """For each group, a list of (text, colour) labels, axes (rows, T): frames side by side."""
    columns = columns or [("t = 1", GREY), *((str(t + 1), GREY) for t in range(1, T))]
    ends = np.cumsum([len(rows) for rows in groups])
    with panels(path, ends[-1], T, shape, [("", INK)] * ends[-1], columns, title,
                (len(groups) - 1) * APART, CELL, CLOSE) as (fig, axes):
        groups_axes = np.split(axes, ends[:-1])
        for k, (rows, group) in enumerate(zip(groups, groups_axes, strict=True)):
            for ax in group.flat:
                place, down = ax.get_position(), k * APART / (fig.get_figheight() * DPI)
                ax.set_position(place.translated(0, -down))
            for (text, colour), ax in zip(rows, group[:, 0], strict=True):
                ax.text(-0.1, 0.5, text, color=colour, transform=ax.transAxes, rotation=90,
                        ha="right", va="center")
        yield fig, groups_axes


def sheet(path, videos, guesses, title=None):
    """Each video over time, and below it each guess: a dict of label -> (recon, boxes, names)."""
    B, T, _, *shape = videos.shape
    rows = [INPUT, *((label, INK) for label in guesses)]
    with film(path, [rows] * B, T, shape, title) as (_, groups):
        for b, t in np.ndindex(B, T):
            show(groups[b][0, t], videos[b, t])
            for ax, (recon, boxes, names) in zip(groups[b][1:, t], guesses.values(), strict=True):
                show(ax, recon[b, t])
                for box, name in zip(boxes[b, t], names[b, t], strict=True):
                    if name >= 0:
                        outline(ax, box, name, shape)


def glimpses(path, videos, drawn, names, title=None, most=4):
    """Each video, and below it what its identities draw (B, T, N, 1, S, S), each in its colour.

    At most `most` of them: those that live longest.
    """
    B, T, _, *shape = videos.shape
    lives = [sorted(longest(names[b], most)) for b in range(B)]
    rows = [[INPUT, *((f"object {m + 1}", tuple(0.72 * rgb(step_colour(m)))) for m in of)]
            for of in lives]
    with film(path, rows, T, shape, title) as (_, groups):
        for b, t in np.ndindex(B, T):
            show(groups[b][0, t], videos[b, t])
            for ax, name in zip(groups[b][1:, t], lives[b], strict=True):
                own = drawn[b, t][names[b, t] == name]              # one, or none
                show(ax, own[0] * rgb(step_colour(name))[:, None, None] if len(own) else NOTHING)


def longest(names, most):
    """The identities of a video (T, N) that are there in most frames."""
    known, frames = np.unique(names[names >= 0], return_counts=True)
    return known[np.argsort(-frames, kind="stable")][:most].tolist()


def generation(path, videos, imagined, given, title=None):
    """What the model imagines after the `given` frames it saw, below what happened.

    Without videos: what it imagines from nothing.
    """
    B, T, _, *shape = imagined.shape
    rows = [("", INK)] if videos is None else [("true", INK), ("model", INK)]
    columns = [("", INK)] * T if 0 < given < T else None
    with film(path, [rows] * B, T, shape, title, columns) as (fig, groups):
        for b, t in np.ndindex(B, T):
            show(groups[b][-1, t], imagined[b, t])
            if videos is not None:
                show(groups[b][0, t], videos[b, t])
        if 0 < given < T:
            bracket(fig, groups[0][0, :given], "seen", GREY)
            bracket(fig, groups[0][0, given:], "imagined", STEP[2])


def bracket(fig, axes, text, colour):
    """A line over neighbouring axes, and a word on it."""
    from matplotlib.lines import Line2D

    left, right = axes[0].get_position(), axes[-1].get_position()
    pixel = 1 / (fig.get_figheight() * DPI)
    y = left.y1 + 10 * pixel
    fig.add_artist(Line2D([left.x0, right.x1], [y, y], color=colour, linewidth=2,
                          solid_capstyle="butt"))
    fig.text((left.x0 + right.x1) / 2, y + 8 * pixel, text, color=colour, ha="center", va="bottom")


# ---------------------------------------------------------------- GIFs

def track_gif(path, videos, recon, boxes, names, fps=4):
    """The videos side by side with the objects found in them, and below what the model draws."""
    B, T, *_, S = videos.shape
    zoom = min(max(1, (WIDTH - 2 * EDGE) // (B * S)), 300 // S or 1)
    painted = [paint(videos[:, t], recon[:, t], boxes[:, :t + 1], names[:, :t + 1], zoom,
                     f"frame {t + 1} of {T} · above the input, below the reconstruction")
               for t in range(T)]
    gif(path, painted, fps, hold=1.0, fixed=["#ffffff", "#000000", INK, *STEP])


def paint(images, recon, boxes, names, zoom, caption):
    """One frame of all videos as (height, width, 3) uint8; boxes and names (B, t, ..) up to it."""
    from PIL import Image, ImageDraw

    above, below = (Image.fromarray(larger(tile(a, zoom), SHARP)) for a in (images, recon))
    edge, space, (w, h) = EDGE * SHARP, SPACE * SHARP, above.size
    under = edge + 2 * h + space
    page = Image.new("RGB", (w + 2 * edge, under + 2 * edge), "white")
    page.paste(above, (edge, edge))
    page.paste(below, (edge, edge + h + space))
    draw, shape, zoom = ImageDraw.Draw(page), images.shape[2:], zoom * SHARP
    for b in range(len(images)):
        mark(draw, boxes[b], names[b], shape, zoom, 2 * SHARP,
             (edge + b * (shape[1] * zoom + space), edge))
    draw.text((edge, under + edge), caption, INK, font=_font(15 * SHARP), anchor="lm")
    return np.asarray(page.reduce(SHARP))


def larger(image, zoom):
    """(h, w, 3) with every pixel a square of `zoom`."""
    return image.repeat(zoom, 0).repeat(zoom, 1)


def mark(draw, boxes, names, shape, zoom, width, corner=(0, 0)):
    """The last of boxes (t, N, 4) in the colours of their names (t, N); dots where they were."""
    for box, name in zip(boxes[-1], names[-1], strict=True):
        if name < 0 or (corners := visible(box, shape)) is None:
            continue
        own = boxes[-TAIL:][names[-TAIL:] == name]
        own = own[~np.isnan(own[:, 0])]
        way = (own[:, :2] + own[:, 2:]) / 2 * zoom + corner
        for k, (x, y) in enumerate(way[:-1], TAIL - len(way)):
            r = width * (k + 3) / TAIL
            draw.ellipse((x - r, y - r, x + r, y + r), step_colour(name))
        x0, y0, x1, y1 = np.rint(np.multiply(corners, zoom) + [*corner, *corner])
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=step_colour(name),
                       width=width)


def overlay_gif(path, frames, boxes, names, fps=8):
    """A video (T, h, w, 3) uint8 with the objects found, boxes (T, N, 4) in its own pixels."""
    from PIL import Image, ImageDraw

    shape, painted = frames.shape[1:3], []
    zoom = SHARP * max(1, OVERLAY // max(shape))
    width = max(2 * SHARP, min(shape) * zoom // 120)
    for t, frame in enumerate(frames):
        page = Image.fromarray(larger(frame, zoom))
        draw = ImageDraw.Draw(page)
        mark(draw, boxes[:t + 1], names[:t + 1], shape, zoom, width)
        for box, name in zip(boxes[t], names[t], strict=True):
            if name >= 0 and (corners := visible(box, shape)) is not None:
                tag(draw, np.rint(np.multiply(corners, zoom)), name)
        painted.append(np.asarray(page.reduce(SHARP)))
    gif(path, painted, fps, hold=1.0, fixed=STEP)


def tag(draw, corners, name):
    """The number of an identity above its box, or inside where above is off the picture."""
    font, text = _font(TAG * SHARP), str(name)
    (x, y, *_), w, h = corners, draw.textlength(text, font) + 6 * SHARP, (TAG + 4) * SHARP
    y -= h if y >= h else 0
    draw.rectangle((x, y, x + w, y + h), step_colour(name))
    draw.text((x + w / 2, y + h / 2), text, "black", font=font, anchor="mm")
