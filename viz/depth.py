"""Pictures of scenes in layers: each object complete, who is in front, the scene pulled apart.

Images are (B, C, H, W) in [0, 1]; layers (B, K, 4, H, W) are colour and alpha, nearest first.
"""

import numpy as np

from viz.style import GAP, GREY, INK, RUN, figure, panels, rgb, show, step_colour

LIGHT, DARK, TILE = 1.0, 0.86, 8                                    # the checkerboard


def checkerboard(shape):
    """Grey tiles (3, H, W) that show where a picture is transparent."""
    i, j = np.indices(shape) // TILE
    return np.broadcast_to(np.where((i + j) % 2, DARK, LIGHT), (3, *shape))


def over(layer, behind):
    """A layer (4, H, W) over a picture (3, H, W)."""
    return layer[3] * layer[:3] + (1 - layer[3]) * behind


def segmentation(modal):
    """Visible masks (K, H, W) as one picture (3, H, W), each object in its own colour."""
    picture = np.zeros((3, *modal.shape[1:]))
    for k, mask in enumerate(modal):
        picture[:, mask] = rgb(step_colour(k))[:, None]
    return picture


def ordinal(k):
    return ["nearest", "second", "third", "fourth", "fifth", "sixth"][k]


def decomposition(path, images, recon, modal, layers, background, title=None):
    """A scene per row: input, reconstruction, segmentation, every object alone, background."""
    B, K, _, H, W = layers.shape
    board = checkerboard((H, W))
    objects = [(ordinal(k), tuple(0.72 * rgb(step_colour(k)))) for k in range(K)]
    columns = [("input", INK), ("reconstruction", INK), ("segmentation", INK), *objects,
               ("background", INK)]
    with panels(path, B, len(columns), (H, W), column_labels=columns, title=title,
                cell=192) as (_, axes):
        for b in range(B):
            pictures = [images[b], recon[b], segmentation(modal[b]),
                        *[over(layer, board) for layer in layers[b]], background[b]]
            for ax, picture in zip(axes[b], pictures, strict=True):
                show(ax, picture)


def interpolations(path, rows, title=None):
    """Each row a walk between two scenes: (label, pictures (T, C, H, W))."""
    T, _, *shape = rows[0][1].shape
    labels = [(label, INK) for label, _ in rows]
    with panels(path, len(rows), T, shape, labels, title=title, cell=192,
                gap=GAP // 2) as (_, axes):
        for r, (_, pictures) in enumerate(rows):
            for ax, picture in zip(axes[r], pictures, strict=True):
                show(ax, picture)


def overlay(path, image, modal, layers):
    """One picture: itself, whose its pixels are, and each object complete."""
    K, _, H, W = layers.shape
    columns = [("input", INK), ("segmentation", INK),
               *[(ordinal(k), tuple(0.72 * rgb(step_colour(k)))) for k in range(K)]]
    board = checkerboard((H, W))
    with panels(path, 1, len(columns), (H, W), column_labels=columns) as (_, axes):
        seen = segmentation(modal)
        marked = np.where(modal.any(0), 0.45 * image + 0.55 * seen, image)
        for ax, picture in zip(axes[0], [image, marked, *[over(a, board) for a in layers]],
                               strict=True):
            show(ax, picture)


def overlap_curves(path, runs):
    """How often depths are in order, the more two objects overlap, with them matched by whole masks
    and (dashed) by what is seen: {name: [overlap, share, share, pairs]}."""
    with figure(path, 1100, 720, layout="constrained") as fig:
        ax = fig.subplots()
        for k, (name, points) in enumerate(runs.items()):
            overlap, share, modal, pairs = np.transpose(points)
            look = {"marker": "o", "markersize": 3.5, "linewidth": 1.6, "color": RUN[k % len(RUN)]}
            ax.plot(overlap, share, **look,
                    label=f"{name} ({pairs[0]:.0f} pairs, {pairs[-1]:.0f} at the end)")
            ax.plot(overlap, modal, **look, linestyle="--")
        ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
        ax.text(ax.get_xlim()[1], 0.51, "chance", color=GREY, ha="right", va="bottom", size=8)
        ax.set(ylim=(0.45, 1.02), xlabel="pixels that a pair shares at least")
        ax.set_title("pairs whose depth order is right", loc="left", size=9.5, weight="bold", pad=8)
        ax.grid(axis="y", color=GREY, alpha=0.18, linewidth=0.6)
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.12))


# ---------------------------------------------------------------- a scene pulled apart

ZOOM, TURN, TILT, DISTANCE = 3, 0.72, 0.42, 0.55    # of a pixel, radians, of the canvas' side
FINE = 4                                            # panes are enlarged: their edges are slanted


def apart_gif(path, layers, background, fps=14):
    """The camera turns, the layers come apart by depth, nearest to the front, and go back."""
    from viz.gif import gif

    ease = 0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, 22))
    times = [0.0] * 8 + [*ease] + [1.0] * 16 + [*ease[::-1]]
    gif(path, [exploded(layers, background, t) for t in times], fps, hold=0.5,
        fixed=["#ffffff", "#000000", INK])


def exploded(layers, background, t):
    """All scenes side by side at time t: 0 is flat, 1 is apart. (height, width, 3) uint8."""
    pictures = [explode(scene, back, t) for scene, back in zip(layers, background, strict=True)]
    return np.concatenate(pictures, 1)


def explode(layers, background, t):
    """One scene: every layer a pane of glass, seen from the side as t grows."""
    from PIL import Image

    H, W = background.shape[1:]
    side = round(1.5 * ZOOM * max(H, W))
    page = Image.new("RGBA", (side, side), "white")
    turn, tilt, K = TURN * t, TILT * t, len(layers)
    for k in range(K, -1, -1):                          # K is the background
        z = DISTANCE * W * t * ((K / 2 - k) if K else 0)
        pane = glass(background, 1.0) if k == K else glass(layers[k][:3], layers[k][3], t)
        # a point (x, y, z) of the scene is turned about the vertical, then tilted
        ax, bx = np.cos(turn), np.sin(turn) * z
        ay, by, cy = np.sin(tilt) * np.sin(turn), np.cos(tilt), -np.sin(tilt) * np.cos(turn) * z
        M = ZOOM * np.array([[ax, 0.0], [ay, by]])
        middle = np.array([side / 2 + ZOOM * bx, side / 2 + ZOOM * cy])
        inverse = FINE * np.linalg.inv(M)               # from the page back to the pane
        start = FINE * np.array([W / 2, H / 2]) - inverse @ middle
        fine = pane.resize((W * FINE, H * FINE), Image.Resampling.NEAREST)
        page.alpha_composite(fine.transform(
            (side, side), Image.Transform.AFFINE, [*inverse[0], start[0], *inverse[1], start[1]],
            Image.Resampling.BILINEAR))
    return np.asarray(page.convert("RGB"))


def glass(colour, alpha, frame=0.0):
    """A picture and its alpha as an image with a thin frame, as visible as `frame` says."""
    from PIL import Image

    H, W = colour.shape[1:]
    pane = np.empty((H, W, 4))
    pane[..., :3] = np.moveaxis(colour, 0, 2)
    pane[..., 3] = alpha
    if frame:
        edge = np.zeros((H, W), bool)
        edge[[0, -1]] = edge[:, [0, -1]] = True
        empty = pane[..., 3] < 0.02
        pane[empty] = [0.6, 0.7, 0.8, 0.10 * frame]
        pane[edge] = [0.35, 0.42, 0.5, 0.8 * frame]
    return Image.fromarray((pane * 255).round().clip(0, 255).astype(np.uint8), "RGBA")
