"""A scene as a PNG, through matplotlib, in the page's light colours."""

from __future__ import annotations

from typing import Any

from logo.drawing import SERIES, as_png, new_figure
from logo.evaluation.report.scene import SMALL, Dot, Label, Raster, Rect, Scene, SceneMark, Stroke, coloured

DPI = 72.0  # one figure unit per CSS pixel
LARGEST = 20_000  # pixels of a side
COLOURS = {  # as in the page's style
    "ink": "#1c2024",
    "muted": "#646c75",
    "grid": "#dfe2e6",
    "paper": "#ffffff",
    **{f"s{number}": colour for number, colour in enumerate(SERIES)},
    "own": "#c2386b",
    "t0": "#9aa3ad",
    "t1": "#d99a2b",
    "t2": "#3f7fbf",
    "t3": "#77a88d",
    "t4": "#b58bc4",
    "t5": "#c4cad0",
}
_SHAPES = ("o", "D", "s", "^")


def png(scene: Scene, *, scale: float = 2.0) -> bytes:
    """The picture with `scale` pixels per CSS pixel, fewer where a side would be longer than `LARGEST`."""
    scale = min(scale, LARGEST / max(scene.width, scene.height))
    figure = new_figure(scene.width / DPI, scene.height / DPI, dpi=DPI * scale, facecolor=COLOURS["paper"])
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    axes.axis("off")
    for order, mark in enumerate(scene.marks):
        _draw(axes, mark, order)
    return as_png(figure, metadata={"Software": None})


def _draw(axes: Any, mark: SceneMark, order: int) -> None:
    from matplotlib.patches import Rectangle

    if isinstance(mark, Rect):
        colour = COLOURS[mark.role]
        paint: dict[str, Any] = (
            {"fill": False, "edgecolor": colour} if mark.outline else {"facecolor": colour, "linewidth": 0}
        )
        axes.add_patch(Rectangle((mark.x, mark.y), mark.width, mark.height, zorder=order, **paint))
    elif isinstance(mark, Stroke):
        axes.plot((mark.x1, mark.x2), (mark.y1, mark.y2), color=COLOURS[mark.role], linewidth=mark.width, zorder=order)
    elif isinstance(mark, Dot):
        axes.plot(
            [mark.x],
            [mark.y],
            marker=_SHAPES[mark.shape],
            markersize=2 * mark.r * (0.9 if mark.shape in (1, 2) else 1.0),
            color=COLOURS[mark.role],
            markeredgecolor=COLOURS["paper"],
            markeredgewidth=0.6,
            zorder=order,
        )
    elif isinstance(mark, Label):
        axes.text(
            mark.x,
            mark.y,
            mark.text,
            color=COLOURS[mark.role],
            fontsize=SMALL * 0.94,  # the font at hand is wider than most screens' are
            fontweight="bold" if mark.bold else "normal",
            ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor] if not mark.up else "right",
            va="baseline" if not mark.up else {"start": "bottom", "middle": "center", "end": "top"}[mark.anchor],
            rotation=90 if mark.up else 0,
            parse_math=False,
            zorder=order,
        )
    else:
        _raster(axes, mark, order)


def _raster(axes: Any, raster: Raster, order: int) -> None:
    from matplotlib.patches import Rectangle

    extent = (raster.x, raster.x + raster.width, raster.y + raster.height, raster.y)
    axes.imshow(coloured(raster.values), extent=extent, aspect="auto", interpolation="nearest", zorder=order)
    corner = (raster.x, raster.y)
    axes.add_patch(Rectangle(corner, raster.width, raster.height, fill=False, edgecolor=COLOURS["grid"], zorder=order))
