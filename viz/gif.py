"""Attention being learned, as a GIF painted with Pillow; one palette for all its frames."""

import numpy as np

from common.errors import Fail
from common.store import whole_file
from viz.style import FAINT, GREY, INK, RUN, STEP, duration, rgb, step_colour, visible

EDGE, SPACE, CAPTION, CURVE = 18, 6, 44, 84                         # pixels


def gif(path, frames, fps=10, hold=2.0, fixed=()):
    """Frames (H, W) or (H, W, 3) of uint8 as an endless GIF; the last is held for `hold` seconds.

    `fixed` are colours ("#rrggbb") that must come out exactly.
    """
    from PIL import Image

    if not len(frames):
        raise Fail(f"no frames to draw {path} from")
    frames = [Image.fromarray(np.ascontiguousarray(f)).convert("RGB") for f in frames]
    palette = shared_palette(frames, fixed)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    times = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * hold)]
    with whole_file(path) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:],
                       duration=times, loop=0, disposal=1, optimize=False)


def shared_palette(frames, fixed):
    """The fixed colours and the most useful others of a few frames; one index stays free."""
    from PIL import Image

    some = np.concatenate([np.asarray(frames[i]) for i in
                           np.unique(np.linspace(0, len(frames) - 1, 8).astype(int))])
    adaptive = Image.fromarray(some).quantize(255 - len(fixed)).getpalette()
    adaptive = np.array(adaptive).reshape(-1, 3)[:255 - len(fixed)]
    exact = np.array([255 * rgb(colour) for colour in fixed]).reshape(-1, 3).round().astype(int)
    near = (abs(adaptive[:, None] - exact).max(2) < 8).any(1)       # would be taken in its place
    palette = Image.new("P", (1, 1))
    palette.putpalette([*exact.flat, *adaptive[~near].flat])
    return palette


def attention_gif(path, frames, fps=8, hold=3.0, width=960):
    """Scenes with their boxes above, reconstructions below, and the accuracy as it grows.

    `frames` are dicts of step, seconds, images (B, C, H, W), boxes (B, N, 4), recon (B, C, H, W)
    and accuracy (None where it was not measured).
    """
    if not frames:
        raise Fail(f"no frames to draw {path} from")
    B, _, _, W = frames[0]["images"].shape
    zoom = max(1, (width - 2 * EDGE) // (B * W))
    measured = [(f["step"], f["accuracy"]) for f in frames if f["accuracy"] is not None]
    painted = [paint(f, zoom, measured, frames[-1]["step"]) for f in frames]
    gif(path, painted, fps, hold, fixed=["#ffffff", "#000000", INK, GREY, FAINT, RUN[0], *STEP])


def paint(frame, zoom, measured, last_step):
    """One frame as (height, width, 3) uint8."""
    from PIL import Image, ImageDraw

    scenes, recon = tile(frame["images"], zoom), tile(frame["recon"], zoom)
    h, w = scenes.shape[:2]
    under = EDGE + 2 * h + SPACE
    height = under + CAPTION + (CURVE if measured else 0)
    page = Image.new("RGB", (w + 2 * EDGE, height), "white")
    page.paste(Image.fromarray(scenes), (EDGE, EDGE))
    page.paste(Image.fromarray(recon), (EDGE, EDGE + h + SPACE))
    draw = ImageDraw.Draw(page)
    H, W = frame["images"].shape[2:]
    for b, n in np.ndindex(frame["boxes"].shape[:2]):
        if (corners := visible(frame["boxes"][b, n], (H, W))) is not None:
            x0, y0, x1, y1 = np.rint(np.multiply(corners, zoom)) + EDGE
            shift = b * (W * zoom + SPACE)
            draw.rectangle((x0 + shift, y0, max(x0, x1 - 1) + shift, max(y0, y1 - 1)),
                           outline=step_colour(n), width=3)
    draw.text((EDGE, under + CAPTION / 2), caption(frame), INK, font=_font(17), anchor="lm")
    if measured:
        upto = [point for point in measured if point[0] <= frame["step"]]
        page.paste(curve(upto, last_step, w), (EDGE, under + CAPTION))
    return np.asarray(page)


def caption(frame):
    """step 400 · 4 s · count accuracy 93 %"""
    words = [f"step {frame['step']:,}".replace(",", "\u2009"), duration(frame["seconds"])]
    if frame["accuracy"] is not None:
        words.append(f"count accuracy {frame['accuracy']:.0%}".replace("%", " %"))
    return " · ".join(words)


def tile(images, zoom):
    """(B, C, H, W) in [0, 1] side by side as uint8, every pixel a square of `zoom`."""
    images = (np.broadcast_to(images, (len(images), 3, *images.shape[2:])) * 255).round()
    images = images.clip(0, 255).astype(np.uint8).repeat(zoom, 2).repeat(zoom, 3)
    images = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, SPACE)), constant_values=255)
    return np.concatenate(list(images.transpose(0, 2, 3, 1)), 1)[:, :-SPACE]


def curve(points, last_step, width):
    """The accuracy so far, between a line at 0 and one at 100 %; drawn large, then shrunk."""
    from PIL import Image, ImageDraw

    scale, height, right = 4, CURVE - EDGE, 64
    image = Image.new("RGB", (width * scale, height * scale), "white")
    draw = ImageDraw.Draw(image)

    def at(step, accuracy):
        x = 6 + (width - right - 12) * step / max(last_step, 1)
        return x * scale, (8 + (height - 16) * (1 - accuracy)) * scale

    for level, label in ((0, "0"), (0.5, ""), (1, "100 %")):
        draw.line((*at(0, level), *at(last_step, level)), FAINT if level else GREY, scale)
        x, y = at(last_step, level)
        draw.text((x + 12 * scale, y), label, GREY, font=_font(12 * scale), anchor="lm")
    line = [at(*point) for point in points]
    if line:
        draw.line(line, RUN[0], 3 * scale, joint="curve")
        (x, y), r = line[-1], 5 * scale
        draw.ellipse((x - r, y - r, x + r, y + r), RUN[0])
    return image.reduce(scale)


def _font(size):
    """Matplotlib's own copy of DejaVu Sans: there wherever the figures are."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
