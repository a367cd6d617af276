"""One look for every figure: colours, type, layout in exact pixels, files written whole."""

from contextlib import contextmanager

import numpy as np

from common.store import whole_file

# Colours of step 1, 2, ...: bright on black scenes; the colour-blind can tell the first four apart.
STEP = ["#E8502F", "#19C396", "#3D93F0", "#F2C12E", "#F7A8CF", "#8A6FD1"]
RUN = ["#22577A", "#C2477A", "#B59B5B", "#6FB1B8", "#3A3F47"]         # one per curve, none a step's
INK, GREY, FAINT = "#1F2933", "#7B8794", "#EDF0F3"
DPI = 200
RC = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
      "axes.edgecolor": GREY, "axes.linewidth": 0.7, "axes.spines.top": False,
      "axes.spines.right": False, "xtick.color": GREY, "ytick.color": GREY,
      "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": 8,
      "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8.5}
MARGIN, GAP, LINE = 28, 12, 46                                      # pixels


def step_colour(n):
    """The colour of step n, counted from 0."""
    return STEP[n % len(STEP)]


def step_labels(N):
    """(name, colour) of each step; the colour is dark enough to be read as text on white."""
    return [(f"step {n + 1}", tuple(0.72 * rgb(step_colour(n)))) for n in range(N)]


def rgb(colour):
    """"#rrggbb" as three numbers in [0, 1]."""
    return np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255


def duration(seconds):
    """Seconds as people say them: 4 s, 3 min 20 s, 2 h 05 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


@contextmanager
def figure(path, width, height, **options):
    """A matplotlib figure of so many pixels, written as a PNG when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window, no state, nothing to close

    with matplotlib.rc_context(RC):
        fig = Figure((width / DPI, height / DPI), dpi=DPI, facecolor="white", **options)
        yield fig
        with whole_file(path) as file:
            fig.savefig(file, format="png", dpi=DPI, metadata={"Software": None})


@contextmanager
def panels(path, rows, columns, shape, row_labels=(), column_labels=(), title=None, below=0,
           cell=250, gap=GAP):
    """A grid of bare axes for pictures of `shape` (H, W); labels are (text, colour) pairs.

    A pixel of the picture becomes a whole number of pixels of the figure where it fits in `cell`.
    `below` keeps so many pixels free under the grid.
    """
    H, W = shape
    w = W * round(cell / W) if cell >= W else cell
    h = round(H * w / W)
    left = MARGIN + (LINE if row_labels else 0)
    top = MARGIN + (LINE + 14 if title else 0) + (LINE if column_labels else 0)
    width = left + columns * (w + gap) - gap + MARGIN
    height = top + rows * (h + gap) - gap + below + MARGIN
    with figure(path, width, height) as fig:
        def text(x, y, s, **options):
            fig.text(x / width, 1 - y / height, s, **options)

        axes = np.empty((rows, columns), object)
        for r, c in np.ndindex(rows, columns):
            x, y = left + c * (w + gap), top + r * (h + gap)
            axes[r, c] = fig.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))
            axes[r, c].set_axis_off()
        for r, (s, colour) in enumerate(row_labels):
            text(left - 18, top + r * (h + gap) + h / 2, s, color=colour, rotation=90,
                 ha="right", va="center")
        for c, (s, colour) in enumerate(column_labels):
            text(left + c * (w + gap) + w / 2, top - 14, s, color=colour, ha="center", va="bottom")
        if title:
            text(left, MARGIN, title, size=11, weight="bold", va="top")
        yield fig, axes


def show(ax, image, smooth=False):
    """One picture (C, H, W) in [0, 1] on bare axes, its pixel edges at whole numbers."""
    H, W = image.shape[1:]
    ax.imshow(np.moveaxis(np.broadcast_to(image, (3, H, W)), 0, 2).clip(0, 1), aspect="auto",
              extent=(0, W, H, 0), interpolation="bilinear" if smooth else "auto")


def visible(box, shape):
    """The part of a box that lies in the picture; None where it is NaN or empty."""
    x0, y0, x1, y1 = np.clip(box, 0, (*shape[::-1], *shape[::-1]))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def outline(ax, box, n, shape):
    """The box of step n, in image pixels; nothing where there is none."""
    from matplotlib.patches import Rectangle

    if (corners := visible(box, shape)) is not None:
        x0, y0, x1, y1 = corners
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=step_colour(n),
                               linewidth=1.8, joinstyle="miter", clip_on=False))
