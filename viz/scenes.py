"""Pictures of scenes: what was found, how it was built up, what the model imagines.

Images are (B, C, H, W) in [0, 1], one or three channels; boxes (B, N, 4) as x0, y0, x1, y1 in
pixels, NaN where absent.
"""

import numpy as np

from viz.style import GAP, INK, LINE, outline, panels, rgb, show, step_colour, step_labels

INPUT, NOTHING = ("input", INK), np.full((3, 1, 1), 0.93)           # NOTHING: a step not taken


def boxes_on_scenes(path, images, boxes, recon=None, title=None):
    """The scenes with the boxes found in them, and below what the model makes of each."""
    from matplotlib.patches import Patch

    B, _, *shape = images.shape
    rows = [INPUT] + ([] if recon is None else [("reconstruction", INK)])
    with panels(path, len(rows), B, shape, rows, title=title, below=LINE,
                cell=250 if B > 2 else 450) as (_, axes):
        for b in range(B):
            show(axes[0, b], images[b])
            for n, box in enumerate(boxes[b]):
                outline(axes[0, b], box, n, shape)
            if recon is not None:
                show(axes[1, b], recon[b])
        steps = [Patch(color=step_colour(n), label=f"step {n + 1}") for n in range(boxes.shape[1])]
        axes[-1, 0].legend(handles=steps, loc="upper left", bbox_to_anchor=(0, -0.08),
                           ncols=len(steps), handlelength=0.9, handleheight=0.9,
                           handletextpad=0.5, columnspacing=1.3, borderpad=0, borderaxespad=0)


def step_by_step(path, images, canvases, boxes, present, title=None):
    """A scene per row: the input, then the canvas (N+1, B, C, H, W) before and after each step.

    `present` (N, B) tells which steps were taken.
    """
    N, B = present.shape
    shape = images.shape[2:]
    columns = [INPUT, ("start", INK), *step_labels(N)]
    with panels(path, B, N + 2, shape, column_labels=columns, title=title) as (_, axes):
        for b in range(B):
            show(axes[b, 0], images[b])
            show(axes[b, 1], canvases[0, b])
            for n in range(N):
                show(axes[b, n + 2], canvases[n + 1, b] if present[n, b] else NOTHING)
                if present[n, b]:
                    outline(axes[b, n + 2], boxes[b, n], n, shape)


def patches(path, images, patches, present, title=None):
    """A scene per column: the input, and below it what each step decoded (N, B, C, G, G)."""
    N, B = present.shape
    shape = patches.shape[3:]
    with panels(path, N + 1, B, images.shape[2:], [INPUT, *step_labels(N)],
                title=title) as (_, axes):
        for b in range(B):
            show(axes[0, b], images[b])
            for n in range(N):
                show(axes[n + 1, b], patches[n, b] if present[n, b] else NOTHING)
                if present[n, b]:
                    outline(axes[n + 1, b], (0, 0, *shape[::-1]), n, shape)


def samples(path, images, title=None):
    """A grid of pictures dreamt by the prior."""
    B, _, *shape = images.shape
    columns = min(B, int(np.ceil(np.sqrt(1.6 * B))))
    with panels(path, -(-B // columns), columns, shape, title=title, cell=160) as (_, axes):
        for ax, image in zip(axes.flat, images, strict=False):
            show(ax, image)


def scanning(path, heat, names, title=None):
    """Where each step looks, per run (R, N, H, W): all steps blended, and each step alone below."""
    R, N, H, W = heat.shape
    heat = heat / np.maximum(heat.max((2, 3), keepdims=True), 1e-12)
    colours = np.stack([rgb(step_colour(n)) for n in range(N)])[:, :, None, None]
    light = heat[:, :, None] * colours                              # (R, N, 3, H, W)
    blend = 1 - np.prod(1 - light, 1)                               # (R, 3, H, W)
    gap = 0.027                                                     # of the blended picture
    side = (1 + gap) / N - gap
    labels = [(name, INK) for name in names]
    with panels(path, 1, R, (H, W), column_labels=labels, title=title, cell=450,
                gap=3 * GAP, below=round(450 * H / W * side) + LINE) as (_, axes):
        for r, ax in enumerate(axes[0]):
            show(ax, blend[r], smooth=True)
            for n, (name, colour) in enumerate(step_labels(N)):
                small = ax.inset_axes((n * (side + gap), -side - gap, side, side))
                small.set_axis_off()
                show(small, light[r, n], smooth=True)
                small.text(W / 2, H * (1 + 0.02 / side), name, ha="center", va="top", color=colour)
