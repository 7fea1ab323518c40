"""Pictures of a sweep: for every axis, the score against it.

A panel per group of datasets: lines with 95 % bands over numbers, bars over anything else, one line or bar for every
value of a second axis. Where there are more than two axes, each combination of the others has its own row of panels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logo.drawing import SERIES, as_png, new_figure
from logo.evaluation.groups import grouped
from logo.evaluation.metrics import LABELS
from logo.evaluation.sweep.grid import Axis, Value, label, numbers, product
from logo.evaluation.sweep.means import Mean, datasets_of, means
from logo.evaluation.sweep.running import Cell, Outcome

MARKS = "osD^vPX*"
SHADES = ("#a9c9e8", "#2563a8", "#0c2444")  # of values that have an order
GRID, INK = "#dfe2e6", "#1c2024"
PANEL = (3.5, 2.7)  # inches
LEGEND = 1.3  # inches beside the panels
ACROSS = 4  # panels beside each other
DOWN = 10  # rows of panels in one picture
DPI = 130
FONT = 8.0
EVERYTHING = "all datasets"
_WIDE = 8.0  # from this ratio of the largest number to the smallest, the axis is logarithmic
_TICKS = 12  # values that are all written below the axis


@dataclass(frozen=True)
class Panel:
    """One group of datasets under one combination of the axes that are not drawn: points[line][x]."""

    title: str
    group: str
    measure: str
    points: Mapping[Value | None, Mapping[Value, Mean]]


def plots(axes: Sequence[Axis], outcomes: Sequence[Outcome], *, seed: int = 0) -> dict[str, bytes]:
    """PNGs by file name, `k.png`, `k-2.png`, ...: every axis of which more than one value was run.

    Args:
        seed: of the intervals.
    """
    run = {axis.name: {outcome.cell.values[axis.name] for outcome in outcomes} for axis in axes}
    varied = [
        Axis(axis.name, tuple(value for value in axis.values if value in run[axis.name]))
        for axis in axes
        if len(run[axis.name]) > 1
    ]
    groups = grouped(datasets_of(outcomes))
    if len(groups) > 1:
        groups = {EVERYTHING: datasets_of(outcomes), **groups}
    found = {group: means(outcomes, names, seed=seed) for group, names in groups.items()}
    measures = {group: _measure([o for o in outcomes if o.dataset in names]) for group, names in groups.items()}
    pictures = {}
    for axis in varied:
        others = [other for other in varied if other is not axis]
        second = others[0] if others else None
        across = math.ceil(len(groups) / math.ceil(len(groups) / ACROSS)) if groups else 1
        panels: list[Panel | None] = []
        for fixed in product(others[1:]):
            some = list(_panels(axis, second, fixed, groups, found, measures))
            panels += [*some, *[None] * (-len(some) % across)]
        size = across * DOWN
        for number, start in enumerate(range(0, len(panels), size), start=1):
            name = f"{axis.name}.png" if number == 1 else f"{axis.name}-{number}.png"
            pictures[name] = _drawn(axis, second, panels[start : start + size], across)
    return pictures


def _panels(
    axis: Axis,
    second: Axis | None,
    fixed: Mapping[str, Value],
    groups: Mapping[str, Sequence[str]],
    found: Mapping[str, Sequence[tuple[Cell, Mean]]],
    measures: Mapping[str, str],
) -> Iterator[Panel]:
    """One panel for each group; none if no cell has these values of the other axes."""
    for group, names in groups.items():
        points: dict[Value | None, dict[Value, Mean]] = {}
        for cell, mean in found[group]:
            if all(cell.values[name] == value for name, value in fixed.items()):
                line = None if second is None else cell.values[second.name]
                points.setdefault(line, {})[cell.values[axis.name]] = mean
        if points:
            head = f"{group} ({len(names)})" if len(names) > 1 else names[0]
            yield Panel(f"{head}\n{label(fixed)}" if fixed else head, group, measures[group], points)


def _measure(outcomes: Sequence[Outcome]) -> str:
    """The label of a panel's y axis: the primary measure that the outcomes share."""
    keys = {outcome.result.primary for outcome in outcomes}
    names = {LABELS.get(key, key) for key in keys}
    return f"{names.pop()}, %" if len(names) == 1 else "primary measure, %"


def _drawn(axis: Axis, second: Axis | None, panels: Sequence[Panel | None], across: int) -> bytes:
    from matplotlib.text import Text

    down = math.ceil(len(panels) / across)
    beside = 0.0 if second is None else LEGEND
    figure = new_figure(PANEL[0] * across + beside, PANEL[1] * down, dpi=DPI, layout="constrained")
    lines: tuple[Value | None, ...] = (None,) if second is None else second.values
    colours = _colours(second)
    ordered = numbers(axis.values) is not None
    first: dict[str, Any] = {}
    for number, panel in enumerate(panels, start=1):
        if panel is None:
            continue
        # All panels of a group have one scale.
        at = figure.add_subplot(down, across, number, sharey=first.get(panel.group))
        first.setdefault(panel.group, at)
        (_lines if ordered else _bars)(at, axis, panel, lines, colours)
        at.set_title(panel.title, fontsize=FONT + 1, loc="left", color=INK)
        at.set_ylabel(panel.measure, fontsize=FONT)
        at.set_xlabel(axis.name, fontsize=FONT)
        at.tick_params(labelsize=FONT, length=0, pad=4)
        at.spines[["top", "right"]].set_visible(False)
        at.spines[["left", "bottom"]].set_color(GRID)
        at.grid(axis="y", color=GRID, linewidth=0.6)
        at.set_axisbelow(True)
    for at in first.values():
        at.set_ylim(bottom=max(0.0, at.get_ylim()[0]) if ordered else 0.0)
    if second is not None:
        _legend(figure, second, colours, ordered)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return as_png(figure)


def _lines(at: Any, axis: Axis, panel: Panel, lines: Sequence[Value | None], colours: Sequence[Any]) -> None:
    """Draws lines over numbers, in their order; a missing cell breaks its line."""
    known = numbers(axis.values) or []
    order = sorted(zip(known, axis.values, strict=True))
    for number, line in enumerate(lines):
        points = panel.points.get(line, {})
        if not points:
            continue
        found = [(x, points.get(value)) for x, value in order]
        xs = [x for x, _ in found]
        value = [100 * mean.value if mean else math.nan for _, mean in found]
        low, high = (
            [100 * mean.interval[end] if mean and mean.interval else math.nan for _, mean in found] for end in (0, 1)
        )
        at.fill_between(xs, low, high, color=colours[number], alpha=0.13, linewidth=0)
        look = {"marker": MARKS[number % len(MARKS)], "markersize": 4, "linewidth": 1.5, "zorder": 3}
        at.plot(xs, value, color=colours[number], clip_on=False, **look)
    xs = [x for x, _ in order]
    if xs[0] > 0 and xs[-1] / xs[0] >= _WIDE and len(xs) > 2:
        at.set_xscale("log")
    if len(xs) <= _TICKS:
        at.set_xticks(xs, [f"{x:g}" for x in xs])
        at.minorticks_off()


def _bars(at: Any, axis: Axis, panel: Panel, lines: Sequence[Value | None], colours: Sequence[Any]) -> None:
    """Draws a bar for each value, those of the second axis beside each other."""
    width = 0.8 / len(lines)
    size = min(3.0, 72 * PANEL[0] * width / len(axis.values) / 4)  # points: a quarter of a bar
    for number, line in enumerate(lines):
        points = panel.points.get(line, {})
        for place, value in enumerate(axis.values):
            mean = points.get(value)
            if mean is None:
                continue
            x = place + (number - (len(lines) - 1) / 2) * width
            at.bar(x, 100 * mean.value, 0.92 * width, color=colours[number], linewidth=0)
            # White below, so that it is seen on a dark bar; the point shows where a bar of no height is.
            for colour, more in (("white", 1.6), (INK, 0.0)):
                ends = [100 * end for end in mean.interval or (mean.value, mean.value)]
                at.plot(
                    [x, x],
                    ends,
                    color=colour,
                    linewidth=size / 3 + more,
                    solid_capstyle="butt",
                    zorder=3,
                    clip_on=False,
                )
                at.plot([x], [100 * mean.value], "o", color=colour, markersize=size + more, zorder=3, clip_on=False)
    at.set_xlim(-0.6, len(axis.values) - 0.4)
    texts = [str(value) for value in axis.values]
    crowded = sum(len(text) for text in texts) > 34 or len(texts) > 6
    at.set_xticks(range(len(texts)), texts, rotation=35 if crowded else 0, ha="right" if crowded else "center")


def _colours(second: Axis | None) -> list[Any]:
    """Colours of the second axis's values: from light to dark if they have an order, else as distinct as possible."""
    if second is None:
        return [SERIES[0]]
    known = numbers(second.values)
    if known is None and len(second.values) <= len(SERIES):
        return list(SERIES[: len(second.values)])
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shades", SHADES)
    places = range(len(second.values)) if known is None else [sorted(known).index(value) for value in known]
    return [shades(place / max(1, len(second.values) - 1)) for place in places]


def _legend(figure: Any, second: Axis, colours: Sequence[Any], lines: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color=colour, marker=MARKS[number % len(MARKS)], markersize=4, label=str(value))
        if lines
        else Patch(color=colour, label=str(value))
        for number, (value, colour) in enumerate(zip(second.values, colours, strict=True))
    ]
    figure.legend(
        handles=handles,
        title=second.name,
        loc="outside right upper",
        fontsize=FONT,
        title_fontsize=FONT,
        frameon=False,
        alignment="left",
    )
