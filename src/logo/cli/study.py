"""`logo eval study`: which signal or method finds the right adapters of a pool, and what that is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from rich.progress import Progress
from rich.text import Text

from logo.cli.opening import MODEL_DIR, QUIET, note_dtype, placed, quiet_transformers
from logo.cli.options import SelectionOptions, command_record, in_words, method_arguments, positive
from logo.cli.output import (
    check_writable,
    err,
    natural_width,
    note,
    one_line,
    out,
    plain_table,
    print_json,
    progress,
    screen,
)
from logo.cli.prompts import or_demo
from logo.errors import UsageError, listed

if TYPE_CHECKING:
    from logo.evaluation.contest import Contest
    from logo.evaluation.datasets import Dataset

ROWS = Group("Rows and results", sort_key=2)
COLUMNS = {
    "top1": "top-1",
    "top3": "top-3",
    "mrr": "MRR",
    "exact_match": "EM",
    "score": "score",
    "of_target": "of target",
    "nll": "NLL",
    "confidence": "confidence",
}
SHOWN = 10  # confusions that are printed
AUROC = "AUROC of the confidence"
ERROR = "reliability error"
BY_WORDING = (  # what a study of several wordings shows of each: protocols and metrics
    *(("in-pool", metric) for metric in ("top1", "exact_match", "score", "of_target", "nll")),
    *(("removed", metric) for metric in ("nll", AUROC)),
    *(("out-of-pool", metric) for metric in ("exact_match", "score", "nll", AUROC)),
    ("all", ERROR),
)


@Parameter(name="*", group=ROWS)
@dataclass(frozen=True, kw_only=True)
class StudyRows:
    """Which rows, and where the study is written."""

    rows: list[str]
    """Folder of NAME.jsonl; NAME is the adapter whose rows they are. Several with commas: the same tasks in other
    wordings."""

    save: Path
    """Folder to write run.json and rows.jsonl to."""

    tasks: Annotated[str, in_words("all")] = ""
    """Names or patterns, `a,b*`."""

    limit: Annotated[int | None, in_words("all", validator=positive)] = None
    """Only the first rows of each task."""

    train_rows: Path | None = None
    """Folder of NAME.jsonl with training rows, for methods that learn."""

    overwrite: bool = False
    """Begin again, and replace what is there."""

    @property
    def folders(self) -> dict[str, Path]:
        """The folders by wording, which is the last part of the name of each, or "" if there is one; raises
        UsageError."""
        folders = [Path(part) for part in parts(",".join(self.rows))]
        if len(folders) == 1:
            return {"": folders[0]}
        by_wording = {folder.resolve().name: folder for folder in folders}
        if len(by_wording) < len(folders) or not folders:
            found = listed([str(folder) for folder in folders]) or "none"
            raise UsageError(f"--rows: expected folders of different names, each a wording of the tasks, found {found}")
        return by_wording

    def datasets(self) -> list[Dataset]:
        """The tasks, every row checked; raises UsageError for a `--save` that is no folder of the study's own."""
        from logo.evaluation.datasets import find_datasets

        tasks = [
            replace(task, wording=wording)
            for wording, folder in self.folders.items()
            for task in find_datasets(folder, self.tasks, limit=self.limit, train_rows=self.train_rows, answers=False)
        ]
        there = ""
        if self.save.is_file():
            there = "a file"
        elif self.save.name in ("", ".."):
            there = "the current folder or one above it"
        else:
            own = "rows.jsonl" if (self.save / "run.json").exists() else ""
            beside = sorted(file.name for file in self.save.glob("*.jsonl") if file.name != own)
            if beside:  # beside a run.json they would no longer count as rows
                there = f"one with rows, {listed(beside, 3)}"
        if there:
            raise UsageError(
                f"--save {self.save}: expected a folder of the study's own, found {there}; name another one"
            )
        return tasks


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ContestOptions:
    """What is compared on every row, and how."""

    signals: str = "calibrated,norm,entropy"
    """Signals to compare, `a,b`, or kinds of evidence: responses, examples, encoder, and sums, `responses+encoder`."""

    methods: str = ""
    """Methods to compare them with, `loraretriever,lorahub`."""

    method_args: str | None = None
    """Options of those methods that have them, `k=3,rows=16`."""

    protocols: str = "in-pool,removed,out-of-pool"
    """in-pool: each row's target adapter is there; removed: it is left out; out-of-pool: tasks without one."""

    generate: Annotated[int | None, in_words("gold texts are scored only", validator=positive)] = None
    """Also generate answers of up to N new tokens, and judge them by the metric in NAME.yaml beside NAME.jsonl, else by
    the task's name."""

    def contest(self, k: int | None) -> Contest:
        """The contest, in which methods that have a number of adapters have at most `k` (None: their own); raises
        UsageError for a signal, method, option or protocol that does not exist."""
        from logo.baselines import get_methods
        from logo.evaluation.contest import ALWAYS, Contest, evidence_in
        from logo.selection.signals import get_signal

        names = [name for name in parts(self.methods) if name not in ALWAYS]
        methods = get_methods(names, method_arguments(self.method_args), k=k)
        signals = parts(self.signals)
        for name in signals:
            if not evidence_in(name):
                get_signal(name)
        return Contest(tuple(signals), methods, tuple(parts(self.protocols)), self.generate)


def study(
    *,
    rows: StudyRows,
    contest: ContestOptions = ContestOptions(),
    json: bool = False,
    pool: SelectionOptions = SelectionOptions(),
) -> None:
    """Does it work on my adapters? How often the right one is found, and what the answers are worth.

    Rows may be prompts alone: then nothing is scored. Repeat the command to continue an interrupted study.

    Example: logo eval study --base-model M --adapters DIR --rows prompts/ --save study

    Args:
        json: Print the report as JSON.
    """
    from logo.evaluation.answer import Opening
    from logo.evaluation.study import Measurer, run_study

    compared = contest.contest(pool.n_selected_modules)
    tasks = rows.datasets()
    check_writable(rows.save.parent)
    quiet_transformers()
    base_model = or_demo(pool)
    options = {
        "signal": compared.signal,
        "k": pool.n_selected_modules,
        "prior": pool.prior,
        "encoder": pool.encoder,
        "dtype": pool.dtype,
        "model_dir": MODEL_DIR,
        **placed(pool.device),
    }
    opening = Opening(base_model, pool.sources, options)
    command = command_record("eval study", rows, contest, pool)
    with closing(Measurer(opening(), compared)) as measurer, progress(disable=not err.is_terminal) as bars:
        if pool.dtype == "auto":
            note_dtype(measurer.facts.device, str(measurer.facts.identity["dtype"]))
        names = list(measurer.facts.identity["pool"])
        of_tasks = {task.name for task in tasks}
        in_pool = len(of_tasks.intersection(names))
        total = sum(len(task.rows) for task in tasks)
        note(f"adapters: {len(names)} · tasks: {len(of_tasks)}, {in_pool} with an adapter of their own · rows: {total}")
        tell = _shown_in(bars, total)
        try:
            report = run_study(tasks, rows.save, measurer, overwrite=rows.overwrite, command=command, tell=tell)
        except KeyboardInterrupt:
            again = " without --overwrite" if rows.overwrite else ""
            note(f"Finished rows are kept: repeat the command{again} to continue.")
            raise
    if json:
        print_json(report)
    else:
        _show(report, list(rows.folders))
        note(str(rows.save))


def _shown_in(bars: Progress, total: int) -> Callable[[str], None]:
    """Shows how many of the rows are done, by a bar on a terminal and by a line for every tenth of them in a log."""
    bar = bars.add_task("rows", total=total)
    began = time.monotonic()

    def tell(task: str) -> None:
        bars.update(bar, advance=1, description=task)
        done = int(bars.tasks[0].completed)
        seconds = time.monotonic() - began
        is_tenth = 10 * done // total > 10 * (done - 1) // total
        if is_tenth and seconds > QUIET and not err.is_terminal:
            note(f"rows: {done} of {total} after {seconds:.0f} s")

    return tell


def parts(text: str) -> list[str]:
    """The names of a list `a,b`, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _show(report: Mapping[str, Any], wordings: Sequence[str]) -> None:
    """A table for each protocol, or for each metric of all wordings; what a selection costs, the confidence of each
    signal, and what is confused most."""
    from logo.evaluation.contest import ALWAYS

    if "wordings" in report:
        _show_wordings(report, wordings)
    else:
        _show_protocols(report["protocols"])
    note(f"Means of the tasks' means; {_about_intervals(report)}.")
    if report.get("cut"):  # those of earlier versions do not have it
        note(
            f"{report['cut']} of {report['rows']} prompts were cut to fit; `cut` in rows.jsonl says by how many tokens."
        )
    times = [
        f"{name} {milliseconds:.{0 if milliseconds >= 10 else 2}f} ms"
        for name, milliseconds in report["milliseconds"].items()
        if name not in ALWAYS
    ]
    out.print(f"median time of a selection: {', '.join(times)}", markup=False)
    _show_confidence(report["confidence"])
    for arm, pairs in report["confusions"].items():
        out.print(Text(f"{arm} puts another adapter first: {_confused(pairs)}"))
    for arm, pairs in report["mistaken"].items():
        out.print(Text(f"{arm} is not unsure where no adapter fits: {_confused(pairs)}"))


def _show_protocols(protocols: Mapping[str, Mapping[str, Any]]) -> None:
    """A table for each protocol: a row for each arm, and a column for each metric."""
    for protocol, arms in protocols.items():
        metrics = [name for name in COLUMNS if any(name in numbers for numbers in arms.values())]
        table = plain_table(protocol, *(f">{COLUMNS[name]}" for name in metrics))
        for arm, numbers in arms.items():
            table.add_row(arm, *(_cell(numbers.get(name)) for name in metrics))
        screen(natural_width(table)).print(table, "")


def _show_wordings(report: Mapping[str, Any], wordings: Sequence[str]) -> None:
    """A table for each metric: a row for each arm, a column for each wording, and one for all of them."""
    there = [wording for wording in wordings if wording in report["wordings"]]
    reports = [*(report["wordings"][wording] for wording in there), report]
    for protocol, metric in BY_WORDING:
        columns = [_by_arm(one, protocol, metric) for one in reports]
        arms = columns[-1]
        if arms:
            what = COLUMNS.get(metric, metric)
            table = plain_table(f"{protocol}, {what}", *(f">{wording}" for wording in there), ">all")
            for arm, of_all in arms.items():
                table.add_row(arm, *(_cell(column.get(arm), bare=True) for column in columns[:-1]), _cell(of_all))
            screen(natural_width(table)).print(table, "")


def _by_arm(report: Mapping[str, Any], protocol: str, metric: str) -> dict[str, dict[str, Any]]:
    """A metric of each arm that has it; of the confidence, the AUROC against a protocol, or the error."""
    if metric not in (AUROC, ERROR):
        arms = report["protocols"].get(protocol, {})
        return {arm: numbers[metric] for arm, numbers in arms.items() if metric in numbers}
    confidence = report["confidence"].items()
    values = {arm: one["auroc"].get(protocol) if metric == AUROC else one["error"] for arm, one in confidence}
    return {arm: {"value": value, "interval": None} for arm, value in values.items() if value is not None}


def _about_intervals(report: Mapping[str, Any]) -> str:
    """What the brackets of the tables are, in words."""
    numbers = [number for arms in report["protocols"].values() for arm in arms.values() for number in arm.values()]
    if any(number["interval"] for number in numbers):
        return "95 % intervals, over tasks, in brackets"
    return "no intervals, since there are few tasks"


def _show_confidence(confidence: Mapping[str, Mapping[str, Any]]) -> None:
    """How well the confidence of each signal tells rows whose adapter is in the pool from others."""
    from logo.selection.selector import UNSURE

    for signal, numbers in confidence.items():
        separations = [f"AUROC {auroc:.2f} against {protocol}" for protocol, auroc in numbers["auroc"].items()]
        if numbers["error"] is not None:
            separations.append(f"reliability error {numbers['error']:.2f}")
        out.print(f"confidence of {signal}: {', '.join(separations) or 'nothing to compare with'}", markup=False)
        shares = [f"{share:.0%} of {protocol}" for protocol, share in numbers["sure"].items()]
        out.print(f"confidence of {signal} is {UNSURE} or more: {', '.join(shares)} rows", markup=False)


def _confused(pairs: Sequence[Mapping[str, Any]]) -> str:
    words = [
        f"{one_line(pair['task'])} → {one_line(pair['first'])} ({pair['rows']} of {pair['of']})"
        for pair in pairs[:SHOWN]
    ]
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    return ", ".join(words) + more


def _cell(number: Mapping[str, Any] | None, *, bare: bool = False) -> Text:
    """A number with its interval, if it is not to be bare."""
    if number is None or number["value"] is None:
        return Text("-", style="dim")
    ends = "" if bare or number["interval"] is None else " [{:.2f}, {:.2f}]".format(*number["interval"])
    return Text.assemble(f"{number['value']:.2f}", (ends, "dim"))
