"""The pictures of a report as scenes: scores, differences, time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from logo.evaluation.intervals import Interval
from logo.evaluation.report.analysis import Analysis
from logo.evaluation.report.numbers import NAMES, Cell, Line
from logo.evaluation.report.scene import Dot, Label, Rect, Scene, SceneMark, Stroke, series, short, text_width, ticks

PLOT = 760.0  # width of what is plotted, without names
PAD = 8.0


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


def cell_text(cell: Cell, line: Line) -> str:
    """A cell in words: `accuracy 71.3 [65.0, 77.1], 150 instances`."""
    ends = f" [{', '.join(f'{line.scale * end:.1f}' for end in cell.interval)}]" if cell.interval else ""
    return f"{NAMES.get(line.metric, line.metric)} {line.scale * cell.value:.1f}{ends}, {cell.rows} instances"


class _Axis:
    """From values to pixels, from `left` on, with ticks at round numbers."""

    def __init__(self, low: float, high: float, left: float) -> None:
        self._ticks, self._left = ticks(low, high, 6), left
        self._low, self._high = self._ticks[0], self._ticks[-1]

    def __call__(self, value: float) -> float:
        return self._left + PLOT * (value - self._low) / (self._high - self._low)

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


def _margin(names: Sequence[str], longest: int = 40) -> float:
    return max((text_width(short(name, longest)) for name in names), default=0.0) + 12


def _stage(stage: str, number: int) -> str:
    return "t5" if stage == "other" else f"t{number % 5}"


def _signed(value: float) -> str:
    """A number with its sign; zero has none."""
    text = f"{round(value, 1) + 0.0:+.1f}".removesuffix(".0").replace("-", "−")
    return text.lstrip("+") if text == "+0" else text
