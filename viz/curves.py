"""Learning curves and count confusions, from the JSONL that training runs leave behind."""

import json
from pathlib import Path

import numpy as np

from common.errors import Fail
from viz.style import GREY, INK, RUN, figure


def read_jsonl(path):
    """The objects of a JSONL file; a last line torn by a crash is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise Fail(f"cannot read {path} ({e.strerror})") from None
    records = []
    for i, line in enumerate(lines):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError:
            if i < len(lines) - 1:
                raise Fail(f"{path}, line {i + 1}: not JSON") from None
    return records


def curves(path, runs, fields, x="step", references=None, title=None):
    """One panel per (key, label) of `fields`, one colour per run; returns whether it drew any.

    `runs` maps a name to a metrics.jsonl or to a list of them (seeds: thin lines and their mean);
    `references` maps a key to (value, label) pairs drawn as dashed lines. A key that nobody logged
    has no panel.
    """
    from matplotlib.ticker import MaxNLocator

    logs = {name: [read_jsonl(f) for f in ([files] if isinstance(files, (str, Path)) else files)]
            for name, files in runs.items()}
    drawn = [(key, label, {name: lines for name, seeds in logs.items()
                           if (lines := [xy for log in seeds if (xy := series(log, x, key)).size])})
             for key, label in fields]
    drawn = [panel for panel in drawn if panel[2]]
    if not drawn:
        return False
    with figure(path, 40 + 900 * len(drawn), 720, layout="constrained") as fig:
        fig.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04)
        axes = fig.subplots(1, len(drawn), squeeze=False)[0]
        colours = {name: RUN[i % len(RUN)] for i, name in enumerate(logs)}
        for ax, (key, label, of_run) in zip(axes, drawn, strict=True):
            for name, lines in of_run.items():
                draw_run(ax, lines, colours[name], name)
            ax.set_title(label, loc="left", size=9.5, weight="bold", pad=8)
            ax.set_xlabel({"step": "training steps", "seconds": "seconds of training"}.get(x, x))
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}".replace(",", "\u2009"))
            ax.margins(x=0.01)
            ax.grid(axis="y", color=GREY, alpha=0.18, linewidth=0.6)
            draw_references(ax, (references or {}).get(key, ()))
        if len(logs) > 1:
            handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
            fig.legend(handles=handles.values(), loc="outside lower center", ncols=len(handles),
                       handlelength=1.4)
        if title:
            fig.suptitle(title, size=11, weight="bold", x=0.01, ha="left")
    return True


def series(log, x, key):
    """(2, points) of the records that hold finite numbers for both."""
    def good(v):
        return isinstance(v, (int, float)) and np.isfinite(v)

    return np.array([(r[x], r[key]) for r in log if good(r.get(x)) and good(r.get(key))]).T


def draw_run(ax, lines, colour, name):
    """A run's curve; with several seeds each of them thinly, and their mean where all have data."""
    if len(lines) > 1:
        for xs, ys in lines:
            ax.plot(xs, ys, color=colour, linewidth=0.7, alpha=0.35)
        grid = np.unique(np.concatenate([xs for xs, _ in lines]))
        grid = grid[(grid >= max(xs.min() for xs, _ in lines))
                    & (grid <= min(xs.max() for xs, _ in lines))]
        lines = [(grid, np.mean([np.interp(grid, xs, ys) for xs, ys in lines], 0))]
    ax.plot(*lines[0], color=colour, linewidth=1.8, label=name, solid_capstyle="round")


def draw_references(ax, references):
    """Dashed lines, named at the right of the panel; close names move apart."""
    for value, _ in references:
        ax.axhline(value, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    low, high = ax.get_ylim()
    at = -np.inf
    for value, label in sorted(references):
        at = max((value - low) / (high - low), at + 0.06)
        ax.annotate(label, (1.015, at), xycoords="axes fraction", va="center", size=8)


def confusion(path, matrix, title=None):
    """Inferred against true counts (true, inferred): the share of each row, and the number."""
    from matplotlib.colors import LinearSegmentedColormap

    matrix = np.asarray(matrix)
    total = matrix.sum(1, keepdims=True)
    share = matrix / np.maximum(total, 1)
    K, M = matrix.shape
    cell, left, top, low = 190, 110, 90 if title else 30, 104
    width, height = left + M * cell + 30, top + K * cell + low
    with figure(path, width, height) as fig:
        ax = fig.add_axes((left / width, low / height, M * cell / width, K * cell / height))
        shades = LinearSegmentedColormap.from_list("share", ["#F4F7F9", RUN[0]])
        ax.pcolormesh(np.arange(M + 1) - 0.5, np.arange(K + 1) - 0.5, share, cmap=shades, vmin=0,
                      vmax=1, edgecolors="white", linewidth=2)
        ax.invert_yaxis()
        for t, i in np.ndindex(K, M):
            colour = "white" if share[t, i] > 0.5 else INK if matrix[t, i] else GREY
            percent = f"{share[t, i]:.1%}".replace("%", " %") if total[t, 0] else "–"
            ax.text(i, t - 0.08, percent, ha="center", va="center", size=10, color=colour)
            ax.text(i, t + 0.22, f"{matrix[t, i]:,.0f}".replace(",", "\u2009"), ha="center",
                    va="center", size=7.5, color=colour, alpha=0.85)
        ax.set_xticks(range(M))
        ax.set_yticks(range(K))
        ax.tick_params(length=0, labelsize=9)
        ax.spines[:].set_visible(False)
        ax.set_xlabel("inferred count")
        ax.set_ylabel("true count")
        if title:
            fig.text(left / width, 1 - 28 / height, title, size=11, weight="bold", va="top")
