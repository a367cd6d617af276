"""What latents know: points on a plane, how well factors are read off, one picture read many times.
"""

import numpy as np

from viz.style import GREY, INK, RUN, figure, panels, rgb, show, step_colour


def planes(path, points, factors):
    """The same points (n, 2) once for each factor: {name: values (n,) or colours (n, 3)}."""
    with figure(path, 40 + 620 * len(factors), 640, layout="constrained") as fig:
        axes = fig.subplots(1, len(factors), squeeze=False)[0]
        for ax, (name, values) in zip(axes, factors.items(), strict=True):
            shades = {"cmap": "viridis"} if np.ndim(values) == 1 else {}
            ax.scatter(*points.T, c=values, s=3, linewidths=0, **shades)
            ax.set_title(name, loc="left", size=9.5, weight="bold", pad=8)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[0].set_xlabel("first component")
        axes[0].set_ylabel("second component")


def bars(path, found, label):
    """How well each factor is read: {name: {factor: share in [0, 1]}}, a colour for each name."""
    factors = list(next(iter(found.values())))
    with figure(path, 120 + 260 * len(factors), 700, layout="constrained") as fig:
        ax, width = fig.subplots(), 0.8 / len(found)
        for i, (name, values) in enumerate(found.items()):
            x = np.arange(len(factors)) + (i - (len(found) - 1) / 2) * width
            drawn = ax.bar(x, [values[f] for f in factors], 0.92 * width, color=RUN[i], label=name)
            ax.bar_label(drawn, fmt="%.2f", size=8)
        ax.set_xticks(range(len(factors)), factors)
        ax.set_ylim(0, 1.08)
        ax.set_ylabel(label)
        ax.grid(axis="y", color=GREY, alpha=0.18, linewidth=0.6)
        if len(found) > 1:
            fig.legend(loc="outside lower center", ncols=len(found))


def readings(path, rows):
    """Pictures and what they were taken for: rows of (picture, [(owners (H, W), label), ..])."""
    columns, shape = 1 + max(len(found) for _, found in rows), rows[0][0].shape[1:]
    with panels(path, len(rows), columns, shape, cell=210, gap=60, below=20) as (_, axes):
        for own, (picture, found) in zip(axes, rows, strict=True):
            show(own[0], picture)
            own[0].text(0.5, -0.06, "input", color=INK, transform=own[0].transAxes, ha="center",
                        va="top")
            for ax, (owners, label) in zip(own[1:], found, strict=False):
                show(ax, parts(owners))
                ax.text(0.5, -0.06, label, color=INK, transform=ax.transAxes, ha="center", va="top")


def parts(owners):
    """A colour for each part; -1 is nobody's and black: (3, H, W)."""
    colours = np.stack([np.zeros(3), *(rgb(step_colour(k)) for k in range(owners.max() + 1))])
    return np.moveaxis(colours[owners + 1], 2, 0)
