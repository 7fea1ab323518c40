"""The output of a finished evaluation: the official lines, intervals, a table, and the rows without an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from logo.cli.output import err, note, print_json, rich_table, screen
from logo.evaluation.metrics import LABELS, recorded_kind, summary_line
from logo.evaluation.tables import Column, Table, number, numbers, row, words

if TYPE_CHECKING:
    from logo.evaluation.resume import Plan

SHOWN = 20  # rows without an answer that are named; metrics.json has all
WIDTH = 100  # of the table, if there is no terminal


@dataclass(frozen=True)
class Score:
    """One dataset's result.

    Attributes:
        dataset: its name.
        folder: where the result is; `files`: what it holds, by name.
        skipped: whether it was finished before this command.
    """

    dataset: str
    folder: Path
    files: Mapping[str, Any]
    skipped: bool = False

    @classmethod
    def of(cls, plan: Plan, files: Mapping[str, Any]) -> Score:
        """The score of a dataset that this command has just answered."""
        return cls(plan.job.name, plan.folder, files)

    @property
    def rows(self) -> int:
        return len(self.files["predictions.json"])

    @property
    def seconds(self) -> float:
        return float(self.files["time_dict.json"]["inference"])

    @property
    def line(self) -> str:
        """As the official script prints it: `Accuracy: 71.33`."""
        return summary_line(recorded_kind(self.files["run.json"], self.dataset), self.files["eval_results.json"])

    @property
    def errors(self) -> list[tuple[int, str]]:
        """Row (from 1, in the dataset) and message of each row without an answer."""
        return [(error["index"] + 1, error["message"]) for error in self.files["metrics.json"]["errors"]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        metrics = self.files["metrics.json"]
        return {
            "dataset": self.dataset,
            **metrics["official"],
            "intervals": metrics["official_intervals"],
            **{key: metrics[key] for key in ("extra", "extra_intervals", "signatures")},
            "rows": self.rows,
            "errors": [{"row": row, "message": message} for row, message in self.errors],
            "seconds": self.seconds,
            "skipped": self.skipped,
            "folder": str(self.folder),
        }


def show(scores: Sequence[Score], *, json: bool) -> None:
    """Prints the table that follows the official lines, or everything as JSON.

    Raises:
        typer.Exit: rows without an answer: exit code 1.
    """
    if json:
        print_json([score.as_dict() for score in scores])
    elif len(scores) > 1:
        screen(WIDTH, stderr=True).print(rich_table(table(scores)))
    else:
        say_intervals(scores[0])
    if say_errors(scores):
        raise typer.Exit(1)


def say_intervals(score: Score) -> None:
    """Prints the intervals of the official measures to stderr, in one line."""
    intervals = score.files["metrics.json"]["official_intervals"]
    if intervals:
        ends = {LABELS.get(key, key): f"{100 * low:.2f} to {100 * high:.2f}" for key, (low, high) in intervals.items()}
        shown = ", ".join(f"{label} {text}" if len(ends) > 1 else text for label, text in ends.items())
        note(f"95 % interval: {shown} · {score.rows} row{'' if score.rows == 1 else 's'}")


def table(scores: Sequence[Score]) -> Table:
    """A line for each dataset and official metric, in percent."""
    failed = any(score.errors for score in scores)
    columns = (
        Column("dataset", numeric=False, wraps=True),
        *numbers("rows"),
        *words("metric"),
        Column("score", interval="95 % interval"),
        *numbers("seconds", *(["no answer"] if failed else [])),
    )
    rows = []
    for score in scores:
        official = score.files["metrics.json"]["official"]
        intervals = score.files["metrics.json"]["official_intervals"]
        begin: list[object] = [score.dataset, score.rows]
        end: list[object] = [f"{score.seconds:.1f}", *([len(score.errors) or ""] if failed else [])]
        shown = [(LABELS.get(key, key), number(value, interval=intervals.get(key))) for key, value in official.items()]
        for label, cell in shown:
            rows.append(row(*begin, label, cell, *end))
            begin, end = ["", ""], [""] * len(end)
    return Table(columns, tuple(rows))


def say_errors(scores: Sequence[Score]) -> bool:
    """Names the rows without an answer on stderr; returns whether there are any."""
    found = [(score, place, message) for score in scores for place, message in score.errors]
    for score, place, message in found[:SHOWN]:
        err.print(f"logo: error: {score.dataset} row {place} has no answer: {message}", markup=False)
    if len(found) > SHOWN:
        err.print(f"logo: error: and {len(found) - SHOWN} more rows; metrics.json in each folder names all")
    return bool(found)
