"""A picture of mean weights: adapters (columns) on the prompts of tasks (rows)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from logo.drawing import as_png, new_figure

CELL = 0.19  # inches: names in small print still fit beside every row at 50 x 50
SIDE = 8.0  # inches: few names get larger cells, until the map has this size or cells the largest one
LARGEST_CELL = 0.6  # inches
LARGEST_SIDE = 60.0  # inches: more names than fit get smaller cells and smaller print
FONT = 7.0  # points
DPI = 160
OWN = "#d1495b"


def ordered(tasks: Sequence[str], adapters: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tasks and adapters in an order with every task's own adapter on the diagonal; others come last."""
    both = [name for name in adapters if name in set(tasks)]
    return both + [t for t in tasks if t not in set(both)], both + [a for a in adapters if a not in set(both)]


def heatmap(weights: Mapping[str, Mapping[str, float]], adapters: Sequence[str], title: str) -> bytes:
    """A PNG.

    Args:
        weights: task -> adapter -> mean weight; adapters that are absent have weight 0.
        adapters: the names of all adapters of the pool.
        title: above the picture, such as the signal's name.
    """
    from matplotlib.patches import Patch, Rectangle

    rows, columns = ordered(list(weights), adapters)
    values = np.array([[weights[task].get(name, 0.0) for name in columns] for task in rows])
    longest = max(values.shape)
    cell = min(max(CELL, min(LARGEST_CELL, SIDE / longest)), LARGEST_SIDE / longest)
    small = FONT * min(1.0, cell / CELL)
    width = cell * len(columns)
    figure = new_figure(width, cell * len(rows), dpi=DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))  # all of the figure: names and legend are added around it
    image = axes.imshow(values, cmap="Blues", vmin=0.0, vmax=max(float(values.max()), 1e-9))
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=small, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize=small, parse_math=False)
    axes.set_xticks(np.arange(0.5, len(columns)), minor=True)
    axes.set_yticks(np.arange(0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="#e4e4e4", linewidth=0.4)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("adapter", fontsize=FONT + 1)
    axes.set_ylabel("task of the prompt", fontsize=FONT + 1)
    axes.set_title(title, fontsize=FONT + 3, loc="left", pad=16, parse_math=False)
    for spot in range(sum(row == column for row, column in zip(rows, columns, strict=False))):
        corner = (spot - 0.5, spot - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=OWN, linewidth=0.9, clip_on=False, zorder=3))
    bar = figure.colorbar(image, cax=axes.inset_axes((1 + 0.15 / width, 0.0, 0.15 / width, 1.0)))
    bar.set_label("mean weight", fontsize=FONT + 1)
    bar.ax.tick_params(labelsize=FONT)
    own = Patch(fill=False, edgecolor=OWN, label="the task's own adapter")
    axes.legend(handles=[own], loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=FONT, frameon=False, borderpad=0)
    return as_png(figure, bbox_inches="tight", pad_inches=0.15)
