"""Scenes taken apart by slots: who owns which pixel, what each slot draws, how they agree on it.

Images are (B, C, H, W) in [0, 1]; masks (B, K, H, W) sum to 1 over the slots; means are
(B, K, C, H, W).
"""

import numpy as np

from common.errors import Fail
from viz.gif import EDGE, SPACE, _font, gif, tile
from viz.style import FAINT, GREY, INK, RUN, STEP, figure, panels, rgb, show, step_colour

PAPER = 0.95            # the grey on which a slot's own part of the scene is shown


def slot_labels(K):
    """(name, colour) of each slot, dark enough to be read as text on white."""
    return [(f"slot {k + 1}", tuple(0.72 * rgb(step_colour(k)))) for k in range(K)]


def segmentation(masks):
    """Who owns each pixel, as colours (B, 3, H, W); undecided pixels are mixtures."""
    colours = np.stack([rgb(step_colour(k)) for k in range(masks.shape[1])])
    return np.einsum("bkhw,kc->bchw", masks, colours)


def masked(masks, means):
    """Each slot's part of the scene on grey paper: (B, K, 3, H, W)."""
    m = masks[:, :, None]
    return m * np.clip(means, 0, 1) + (1 - m) * PAPER * np.ones((3, 1, 1))


def decomposition(path, images, recon, masks, means, title=None):
    """A scene per row: input, reconstruction, segmentation, and what each slot draws of it."""
    B, K, H, W = masks.shape
    columns = [("input", INK), ("reconstruction", INK), ("slots", INK), *slot_labels(K)]
    parts, owners = masked(masks, means), segmentation(masks)
    with panels(path, B, 3 + K, (H, W), column_labels=columns, title=title,
                cell=200 if B > 1 else 250) as (_, axes):
        for b in range(B):
            for ax, image in zip(axes[b], [images[b], recon[b], owners[b], *parts[b]],
                                 strict=True):
                show(ax, image)


def negotiation(path, images, recon, masks, means, fps=2, hold=3.0, width=900):
    """A GIF: refinement after refinement, a scene per column (arrays as above, after (T+1, ..)).

    Rows: input, reconstruction, who owns what, and each slot's part.
    """
    if not len(masks):
        raise Fail(f"no frames to draw {path} from")
    T, B, K, H, W = masks.shape
    zoom = max(1, (width - 2 * EDGE) // (B * W))
    frames = [page(images, recon[t], masks[t], means[t], zoom,
                   "before the first refinement" if t == 0 else f"refinement {t} of {T - 1}")
              for t in range(T)]
    gif(path, frames, fps, hold, fixed=["#ffffff", "#000000", INK, GREY, FAINT, RUN[0], *STEP[:K]])


def page(images, recon, masks, means, zoom, caption):
    """One frame as (height, width, 3) uint8."""
    from PIL import Image, ImageDraw

    parts = masked(masks, means).swapaxes(0, 1)
    rows = [tile(np.clip(a, 0, 1), zoom) for a in (images, recon, segmentation(masks), *parts)]
    names = ["input", "drawn", "owners", *(f"slot {k + 1}" for k in range(len(parts)))]
    (h, w), left, line = rows[0].shape[:2], 74, 40
    image = Image.new("RGB", (left + w + EDGE, EDGE + len(rows) * (h + SPACE) + line), "white")
    draw = ImageDraw.Draw(image)
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = EDGE + r * (h + SPACE)
        image.paste(Image.fromarray(row), (left, top))
        colour = step_colour(r - 3) if r > 2 else INK
        draw.text((left - 10, top + h / 2), name, colour, font=_font(14), anchor="rm")
    draw.text((left, image.height - line / 2), caption, INK, font=_font(16), anchor="lm")
    return np.asarray(image)


def against(path, curves, fields, x, x_label, mark=None, marks=None):
    """One panel per (key, label): curves {name: {key: values}} over x.

    As trained: `mark` draws a line there, `marks` a dot for each of the names.
    """
    from matplotlib.ticker import MaxNLocator

    with figure(path, 40 + 760 * len(fields), 640, layout="constrained") as fig:
        axes = fig.subplots(1, len(fields), squeeze=False)[0]
        for ax, (key, label) in zip(axes, fields, strict=True):
            for i, (name, values) in enumerate(curves.items()):
                colour = RUN[i % len(RUN)]
                ax.plot(x, values[key], color=colour, linewidth=1.8, label=name, marker="o",
                        markersize=3)
                if marks:
                    at = list(x).index(marks[name])
                    ax.plot(marks[name], values[key][at], "o", color=colour, markersize=8)
            if mark is not None:
                ax.axvline(mark, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
            ax.set_title(label, loc="left", size=9.5, weight="bold", pad=8)
            ax.set_xlabel(x_label)
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            ax.grid(axis="y", color=GREY, alpha=0.18, linewidth=0.6)
        if len(curves) > 1:
            fig.legend(handles=axes[0].get_legend_handles_labels()[0], loc="outside lower center",
                       ncols=len(curves), handlelength=1.4)


def dots(path, found, labels):
    """One panel per label: {test: {model: [values by label, ..]}}, a dot for each such list."""
    models = list(next(iter(found.values())))
    with figure(path, 240 + 640 * len(labels), 220 + 70 * len(models), layout="constrained") as fig:
        axes = fig.subplots(1, len(labels), squeeze=False, sharey=True)[0]
        for c, (ax, label) in enumerate(zip(axes, labels, strict=True)):
            for i, (test, rows) in enumerate(found.items()):
                points = [(v[c], models.index(name)) for name, runs in rows.items() for v in runs]
                ax.plot(*zip(*points, strict=True), "o", color=RUN[i], markersize=6, label=test)
            ax.set_title(label, loc="left", size=9.5, weight="bold", pad=8)
            ax.set_yticks(range(len(models)), models)
            ax.set_ylim(len(models) - 0.5, -0.5)
            ax.grid(color=GREY, alpha=0.18, linewidth=0.6)
        if len(found) > 1:
            fig.legend(handles=axes[0].get_legend_handles_labels()[0], loc="outside lower center",
                       ncols=len(found))
