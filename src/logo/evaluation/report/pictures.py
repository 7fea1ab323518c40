"""The pictures of a report as scenes: scores, differences, weights, similarity, spread of scores, time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from logo.evaluation.intervals import Interval, Values
from logo.evaluation.report.adapters import Similarity, Spread, Weights, own_adapter
from logo.evaluation.report.analysis import Analysis
from logo.evaluation.report.numbers import NAMES, Cell, Line
from logo.evaluation.report.scene import (
    Dot,
    Label,
    Raster,
    Rect,
    Scene,
    SceneMark,
    Stroke,
    series,
    short,
    text_width,
    ticks,
)

PLOT = 760.0  # width of what is plotted, without names
PAD = 8.0
MAP = 780.0  # width that a heat map may fill before its fields get smaller
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NAMED = 14.0  # fields of at least this size have names beside them


def pictures(analysis: Analysis) -> list[Scene]:
    """All pictures: first those of all runs together, then those of each run."""
    every = [scores(analysis), differences(analysis), time(analysis)]
    found = [scene for scene in every if scene is not None]
    return found + [scene for number in range(len(analysis.runs)) for scene in of_run(analysis, number)]


def of_run(analysis: Analysis, number: int) -> list[Scene]:
    """The pictures of one run, as far as it selected adapters and scored them."""
    found = (weights(analysis, number), similarity(analysis, number), spread(analysis, number))
    return [scene for scene in found if scene is not None]


def scores(analysis: Analysis) -> Scene:
    """Every dataset's primary measure with its interval, a point per run."""
    lines = {line.dataset: line for line in analysis.lines}.values()  # the last one of each is its primary measure
    step = max(22.0, 8.0 * len(analysis.runs) + 8.0)
    marks: list[SceneMark] = []
    left = _margin([line.dataset or "" for line in lines]) + 8
    values = [bound for line in lines for cell in line.cells if cell for bound in (cell.value, *(cell.interval or ()))]
    x = _Axis(0.0, max(values, default=1.0), left)
    top = _legend(analysis, marks, 0.0) if len(analysis.runs) > 1 else 0.0
    y, axis = top + 26.0, top + 18.0
    group = None
    rows: list[tuple[float, Line]] = []
    for line in lines:
        if line.group != group:
            y += 12.0 if group is not None else 0.0
            group = line.group
            marks.append(Label(0, y + 10, group, "muted", bold=True))
            y += 18
        rows.append((y, line))
        y += step
    marks += x.grid(axis, axis + 4, y, lambda tick: f"{100 * tick:.3g}")
    for start, line in rows:
        name = line.dataset or ""
        marks.append(Stroke(left, start, left + PLOT, start, "grid", 0.6))
        marks.append(_name(left, start + step / 2 + 4, name))
        first = start + step / 2 - 4.0 * (len(line.cells) - 1)
        for number, cell in enumerate(line.cells):
            if cell is not None:
                hint = f"{name}, {analysis.labels[number]}: {cell_text(cell, line)}"
                height = first + 8.0 * number
                marks += _measured(x, height, cell.value, cell.interval, number, hint, width=1.6, r=3.4)
    best = [line for line in lines if any(line.cells)]
    return Scene(
        "scores",
        "Scores by dataset",
        f"One row for each of {len(best)} datasets, one point per run with its 95 % interval; the same numbers are in "
        "the table of datasets.",
        left + PLOT + PAD + 16,
        y + PAD,
        tuple(marks),
    )


def differences(analysis: Analysis) -> Scene | None:
    """Each pair of runs: mean difference with its interval, beside a line at zero; None without pairs."""
    if not analysis.versus:
        return None
    names = [f"{analysis.labels[v.b]} − {analysis.labels[v.a]}" for v in analysis.versus]
    left = _margin(names, 48) + 8
    bounds = [b for v in analysis.versus for b in (v.difference.value, *(v.difference.interval or ()))]
    x = _Axis(min(0.0, *bounds), max(0.0, *bounds), left)
    step, y = 26.0, 28.0
    bottom = y + step * len(names)
    marks = [*x.grid(16, 22, bottom, lambda tick: _signed(100 * tick))]
    marks.append(Stroke(x(0.0), 22, x(0.0), bottom, "muted", 1.5))
    for number, (name, pair) in enumerate(zip(names, analysis.versus, strict=True)):
        middle = y + step * number + step / 2
        found = pair.difference
        hint = f"{name}: {_signed(100 * found.value)}"
        if found.interval:
            hint += f" [{', '.join(_signed(100 * end) for end in found.interval)}]"
        marks.append(_name(left, middle + 4, name, 48))
        marks += _measured(x, middle, found.value, found.interval, pair.b, hint, width=2.0, r=4.5)
    return Scene(
        "differences",
        "One run against another",
        f"Mean paired difference over shared datasets, in points, with its 95 % interval, for {len(names)} pairs of "
        "runs; the same numbers are in the table of pairs.",
        left + PLOT + PAD + 16,
        bottom + PAD,
        tuple(marks),
    )


def time(analysis: Analysis) -> Scene:
    """Times of each run: a bar per run, a part per stage."""
    stages = list(dict.fromkeys(["loading", *(name for s in analysis.seconds for name in s.stages)]))
    left = _margin(analysis.labels) + 8
    longest = max((s.total for s in analysis.seconds), default=0.0) or 1.0
    marks: list[SceneMark] = []
    at = left
    for number, stage in enumerate(stages):
        marks += [Rect(at, 2, 11, 11, _stage(stage, number)), Label(at + 16, 12, stage)]
        at += 16 + text_width(stage) + 18
    x = _Axis(0.0, longest, left)
    bottom = 46.0 + 30.0 * len(analysis.runs)
    marks += x.grid(34, 40, bottom, lambda tick: f"{tick:g} s")
    for row, (label, spent) in enumerate(zip(analysis.labels, analysis.seconds, strict=True)):
        top, done = 46.0 + 30.0 * row, 0.0
        marks.append(_name(left, top + 14, label))
        for number, stage in enumerate(stages):
            part = spent.loading if stage == "loading" else spent.stages.get(stage, 0.0)
            if part > 0:
                width = x(done + part) - x(done)
                marks.append(Rect(x(done), top, width, 20, _stage(stage, number), f"{label}, {stage}: {part:.2f} s"))
                done += part
    text = "; ".join(f"{label}: {s.total:.1f} s" for label, s in zip(analysis.labels, analysis.seconds, strict=True))
    return Scene("time", "Time by stage", text, left + PLOT + PAD + 30, bottom + PAD, tuple(marks))


def weights(analysis: Analysis, number: int) -> Scene | None:
    """Mean weight of every adapter on every dataset of one run."""
    found = analysis.weights[number]
    if found is None:
        return None
    most = float(np.abs(found.values).max())
    return heat_map(
        f"weights-{number}",
        f"Mean weight by dataset and adapter: {analysis.labels[number]}",
        _words_of_weights(found),
        found.datasets,
        found.adapters,
        found.values / most,
        ("0", f"{most:.2f}", "mean weight"),
        own=[own_adapter(name, found.adapters) for name in found.datasets],
    )


def similarity(analysis: Analysis, number: int) -> Scene | None:
    """The rank correlation of the adapters' scores in one run, as a heat map; None without scores."""
    found = analysis.similarity[number]
    if found is None:
        return None
    return heat_map(
        f"similarity-{number}",
        f"Adapters that respond alike: {analysis.labels[number]}",
        _words_of_similarity(found),
        found.adapters,
        found.adapters,
        found.values,
        ("−1", "1", "rank correlation of scores"),
        square=True,
    )


def spread(analysis: Analysis, number: int) -> Scene | None:
    """Each adapter's scores over all instances of one run: median, middle half, middle nine tenths."""
    found = analysis.spread[number]
    if found is None:
        return None
    step = 18.0 if len(found.adapters) <= 80 else 5.0
    left = _margin(found.adapters) + 8 if step > NAMED else 12.0
    low, high = float(found.values[:, 0].min()), float(found.values[:, -1].max())
    logarithmic = low > 0 and high / low > 200
    x = _Axis(low, high, left, logarithmic)
    bottom = 28.0 + step * len(found.adapters)
    marks = [*x.grid(16, 22, bottom, _power if logarithmic else lambda tick: f"{tick:.4g}")]
    for row, (name, at) in enumerate(zip(found.adapters, found.values, strict=True)):
        y = 28.0 + step * (row + 0.5)
        hint = f"{name}: median {at[2]:.4g}, half in {at[1]:.4g} to {at[3]:.4g}, 90 % in {at[0]:.4g} to {at[4]:.4g}"
        if step > NAMED:
            marks.append(_name(left, y + 4, name))
        marks.append(Stroke(x(at[0]), y, x(at[4]), y, "s0", 1.2, hint))
        marks.append(Stroke(x(at[1]), y, x(at[3]), y, "s0", min(6.0, step - 1), hint))
        marks.append(Dot(x(at[2]), y, min(3.4, step / 2), "ink", 0, hint))
    return Scene(
        f"spread-{number}",
        f"Distribution of scores: {analysis.labels[number]}",
        f"For each of {len(found.adapters)} adapters the median (point), the middle half (thick) and the middle 90 % "
        f"(thin) of its scores{', on a logarithmic axis' if logarithmic else ''}. Highest median: {found.adapters[0]}.",
        left + PLOT + PAD + 24,
        bottom + PAD,
        tuple(marks),
    )


def cell_text(cell: Cell, line: Line) -> str:
    """A cell in words: `accuracy 71.3 [65.0, 77.1], 150 instances`."""
    ends = f" [{', '.join(f'{line.scale * end:.1f}' for end in cell.interval)}]" if cell.interval else ""
    return f"{NAMES.get(line.metric, line.metric)} {line.scale * cell.value:.1f}{ends}, {cell.rows} instances"


class _Axis:
    """From values to pixels, from `left` on, with ticks at round numbers."""

    def __init__(self, low: float, high: float, left: float, logarithmic: bool = False) -> None:
        self._place: Callable[[float], float] = math.log10 if logarithmic else float
        if logarithmic:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            step = max(1, round((last - first) / 6))
            self._ticks = [10.0**power for power in range(first, last + step, step)]
        else:
            self._ticks = ticks(low, high, 6)
        self._low, self._high = self._place(self._ticks[0]), self._place(self._ticks[-1])
        self._left = left

    def __call__(self, value: float) -> float:
        return self._left + PLOT * (self._place(value) - self._low) / (self._high - self._low)

    def grid(self, label: float, top: float, bottom: float, text: Callable[[float], str]) -> Iterator[SceneMark]:
        """A line at each tick, from `top` to `bottom`, and its value at the height of `label`."""
        for tick in self._ticks:
            yield Stroke(self(tick), top, self(tick), bottom, "grid")
            yield Label(self(tick), label, text(tick), "muted", "middle")


def _name(left: float, y: float, name: str, longest: int = 40) -> Label:
    """The name of a row, beside what is plotted."""
    return Label(left - 10, y, short(name, longest), anchor="end", title=name)


def _measured(
    x: _Axis, y: float, value: float, interval: Interval | None, run: int, hint: str, *, width: float, r: float
) -> Iterator[SceneMark]:
    """A value as the point of a run, with its interval."""
    role, shape = series(run)
    if interval:
        yield Stroke(x(interval.low), y, x(interval.high), y, role, width, hint)
    yield Dot(x(value), y, r, role, shape, hint)


def _legend(analysis: Analysis, marks: list[SceneMark], left: float) -> float:
    """Adds the runs' names with their points; returns its height."""
    x, y = left, 10.0
    for number, label in enumerate(analysis.labels):
        width = text_width(label) + 34
        if x > left and x + width > PLOT + 140:
            x, y = left, y + 20
        role, shape = series(number)
        marks += [Dot(x + 5, y, 4, role, shape), Label(x + 14, y + 4, label)]
        x += width
    return y + 12


def heat_map(
    name: str,
    title: str,
    text: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Values,
    scale: tuple[str, str, str],
    *,
    own: Sequence[str | None] = (),
    square: bool = False,
) -> Scene:
    """A heat map; fields shrink with their number, and names that do not fit are left out."""
    cell = max(2.5, min(20.0, MAP / max(1, len(columns))))
    tall = cell if square else max(cell, 16.0)
    left = _margin(rows) + 8 if tall >= NAMED else 12.0
    named = cell >= NAMED
    width, height = cell * len(columns), tall * len(rows)
    top = 30.0
    marks: list[SceneMark] = [
        Label(left, 13, scale[0], "muted"),
        Raster(left + 24, 4, 80, 11, np.linspace(-1.0 if scale[0] != "0" else 0.0, 1.0, 56)[None, :]),
        Label(left + 110, 13, f"{scale[1]}   {scale[2]}", "muted"),
    ]
    if any(own):
        at = left + 110 + text_width(f"{scale[1]}   {scale[2]}") + 24
        marks += [Rect(at, 4, 11, 11, "own", outline=True), Label(at + 17, 13, "own adapter", "muted")]
    marks.append(Raster(left, top, width, height, values, key=name))
    for number, row in enumerate(rows):
        if tall >= NAMED:
            marks.append(Label(left - 8, top + tall * (number + 0.5) + 4, short(row), anchor="end", title=row))
    place = {column: number for number, column in enumerate(columns)}
    for number, adapter in enumerate(own):
        if adapter is not None:
            corner = (left + cell * place[adapter], top + tall * number)
            marks.append(Rect(*corner, cell, tall, "own", f"{rows[number]}, {adapter}", outline=True))
    below = top + height
    if named:
        for number, column in enumerate(columns):
            x = left + cell * (number + 0.5) + 4
            marks.append(Label(x, below + 8, short(column), anchor="end", up=True, title=column))
        below += 8 + max(text_width(short(column)) for column in columns)
    least = left + 120 + text_width(f"{scale[1]}   {scale[2]}") + (110 if any(own) else 0)
    return Scene(name, title, text, max(left + width + PAD, least), below + PAD + 4, tuple(marks))


def _margin(names: Sequence[str], longest: int = 40) -> float:
    return max((text_width(short(name, longest)) for name in names), default=0.0) + 12


def _stage(stage: str, number: int) -> str:
    return "t5" if stage == "other" else f"t{number % 5}"


def _signed(value: float) -> str:
    """A number with its sign; zero has none."""
    text = f"{round(value, 1) + 0.0:+.1f}".removesuffix(".0").replace("-", "−")
    return text.lstrip("+") if text == "+0" else text


def _power(value: float) -> str:
    """A power of ten, in full if it is short."""
    power = round(math.log10(value))
    return f"{value:g}" if -3 <= power <= 3 else "10" + str(power).translate(_RAISED)


def _words_of_weights(found: Weights) -> str:
    row, column = np.unravel_index(int(np.argmax(found.values)), found.values.shape)
    return (
        f"{len(found.datasets)} datasets by {len(found.adapters)} adapters. The largest mean weight is "
        f"{found.values[row, column]:.2f}, of {found.adapters[column]} on {found.datasets[row]}."
    )


def _words_of_similarity(found: Similarity) -> str:
    apart = found.values - 2.0 * np.eye(len(found.adapters))
    a, b = np.unravel_index(int(np.argmax(apart)), apart.shape)
    return (
        f"{len(found.adapters)} adapters over {found.instances} instances, ordered so that alike ones are neighbours. "
        f"The most alike are {found.adapters[a]} and {found.adapters[b]} ({found.values[a, b]:.2f})."
    )


def spread_words(found: Spread) -> str:
    """The adapters with the highest and the lowest median score, in words."""
    return (
        f"Medians go from {found.values[-1, 2]:.4g} ({found.adapters[-1]}) to {found.values[0, 2]:.4g} "
        f"({found.adapters[0]})."
    )
