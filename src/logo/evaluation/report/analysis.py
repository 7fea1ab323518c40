"""The analysis of a report, computed once for page, tables and JSON summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logo.evaluation.report import adapters, numbers, runs
from logo.evaluation.report.adapters import Selected, Weights
from logo.evaluation.report.numbers import Cell, Line
from logo.evaluation.report.runs import Seconds
from logo.evaluation.report.versus import Pairing, Versus
from logo.evaluation.runs import Run


@dataclass(frozen=True)
class Analysis:
    """The numbers of some runs; values per run are parallel to `runs`.

    Attributes:
        runs: the runs; `labels`: their short names, all different.
        differing: the options in which they differ.
        datasets: every dataset of any run, grouped as in the paper.
        unlike: the datasets that runs judge by different measures.
        groups, lines, extra: official measures by group and by dataset, and the measures beside them.
        overall: the mean over all datasets without `unlike`.
        versus: every run against every earlier one.
        weights, selected: of each run, None if it has none.
        seconds: times of each run by stage.
    """

    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    differing: dict[str, tuple[str, ...]]
    datasets: tuple[str, ...]
    unlike: tuple[str, ...]
    groups: tuple[Line, ...]
    overall: Line
    lines: tuple[Line, ...]
    extra: tuple[Line, ...]
    versus: tuple[Versus, ...]
    weights: tuple[Weights | None, ...]
    selected: tuple[Selected | None, ...]
    seconds: tuple[Seconds, ...]

    @property
    def left_out(self) -> str:
        """A sentence about the datasets that runs judge by different measures; '' if there are none."""
        if not self.unlike:
            return ""
        return (
            f"Judged by different measures in different runs, and therefore left out of the mean over all datasets and "
            f"of comparisons between these runs: {', '.join(self.unlike)}."
        )

    @property
    def instances(self) -> int:
        """Number of answers of all runs together."""
        return sum(len(result) for run in self.runs for result in run.results.values())


def analyse(found: Sequence[Run], *, seed: int = 0) -> Analysis:
    """All numbers of at least one run. `seed`: of the intervals and tests."""
    pairing = Pairing(tuple(found), seed)
    groups, datasets = numbers.group_lines(pairing), numbers.dataset_lines(pairing)
    every = [numbers.overall(pairing), *groups, *datasets]
    compared = numbers.compared(pairing, every)
    overall, *every = numbers.marked(every, pairing.marks(compared))
    return Analysis(
        runs=tuple(found),
        labels=tuple(runs.labels(found)),
        differing=runs.differing(found),
        datasets=tuple(pairing.datasets),
        unlike=tuple(pairing.unlike),
        groups=tuple(every[: len(groups)]),
        overall=overall,
        lines=tuple(every[len(groups) :]),
        extra=tuple(numbers.extra_lines(pairing)),
        versus=tuple(pairing.versus(compared)),
        weights=tuple(adapters.weights(run) for run in found),
        selected=tuple(adapters.selected(run) for run in found),
        seconds=tuple(runs.seconds(run) for run in found),
    )


def summary(analysis: Analysis) -> dict[str, Any]:
    """The numbers as JSON: fractions as in the result files, sacrebleu's measures as that library gives them."""
    labels = analysis.labels
    return {
        "runs": [
            {
                "label": label,
                "folder": str(run.folder),
                "base_model": run.base,
                "method": run.method,
                "k": run.k,
                "seed": run.seed,
                "datasets": len(run.results),
                "instances": sum(map(len, run.results.values())),
                "errors": sum(len(result.errors) for result in run.results.values()),
                "mean": _cell(cell),
                "selected": None if chosen is None else asdict(chosen),
                "seconds": {"loading": times.loading, **times.stages},
            }
            for label, run, cell, chosen, times in zip(
                labels, analysis.runs, analysis.overall.cells, analysis.selected, analysis.seconds, strict=True
            )
        ],
        "groups": [_line(line, labels) for line in analysis.groups],
        "datasets": [_line(line, labels) for line in analysis.lines],
        "unlike": list(analysis.unlike),
        "extra": [_line(line, labels) for line in analysis.extra],
        "versus": [
            {
                "run": labels[pair.b],
                "against": labels[pair.a],
                "difference": pair.difference.value,
                "interval": pair.difference.interval,
                **asdict(pair.significance),
                "p_holm": pair.p_holm,
                "instances": asdict(pair.record),
                "datasets": asdict(pair.datasets),
            }
            for pair in analysis.versus
        ],
    }


def _line(line: Line, labels: Sequence[str]) -> dict[str, Any]:
    cells = {label: _cell(cell) for label, cell in zip(labels, line.cells, strict=True) if cell is not None}
    return {"group": line.group, "dataset": line.dataset, "metric": line.metric, "runs": cells}


def _cell(cell: Cell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {
        "value": cell.value,
        "interval": cell.interval,
        "instances": cell.rows,
        "datasets": cell.datasets,
        "mark": cell.mark,
    }
