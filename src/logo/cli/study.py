"""`logo eval study`: which signal or method finds the right adapters of a pool, and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter
from rich.text import Text

from logo.cli.opening import MODEL_DIR, placed, quiet_transformers
from logo.cli.options import PoolOptions, method_arguments, positive, said, written
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
from logo.errors import UsageError
from logo.recorded import without_secrets

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


def study(
    *,
    rows: Annotated[Path, Parameter(group=ROWS)],
    save: Annotated[Path, Parameter(group=ROWS)],
    tasks: Annotated[str, said("all", of=ROWS)] = "",
    limit: Annotated[int | None, said("all", of=ROWS, validator=positive)] = None,
    train_rows: Annotated[Path | None, Parameter(group=ROWS)] = None,
    overwrite: Annotated[bool, Parameter(group=ROWS)] = False,
    signals: str = "calibrated,norm,entropy",
    methods: str = "",
    method_args: str | None = None,
    protocols: str = "in-pool,removed,out-of-pool",
    generate: Annotated[int | None, said("gold texts are scored only", validator=positive)] = None,
    json: bool = False,
    pool: PoolOptions = PoolOptions(),
) -> None:
    """Does it work on my adapters? How often the right one is found, and what the answers are worth.

    Rows may be prompts alone: then nothing is scored. Repeat the command to continue an interrupted study.

    Example: logo eval study --base-model M --adapters DIR --rows prompts/ --save study

    Args:
        rows: Folder of NAME.jsonl; NAME is the adapter whose rows they are.
        save: Folder to write run.json and rows.jsonl to.
        tasks: Names or patterns, `a,b*`.
        limit: Only the first rows of each task.
        train_rows: Folder of NAME.jsonl with training rows, for methods that learn.
        overwrite: Begin again, and replace what is there.
        signals: Signals to compare, `a,b`.
        methods: Methods to compare them with, `loraretriever,lorahub`.
        method_args: Options of those methods that have them, `rows=16,budget=40`.
        protocols: in-pool: each row's target adapter is there; removed: it is left out; out-of-pool: tasks without one.
        generate: Also generate answers of up to N new tokens, and judge them by the metric in NAME.yaml beside
            NAME.jsonl, else by the task's name.
        json: Print the report as JSON.
    """
    given = {name: value for name, value in locals().items() if name not in ("json", "pool") and value is not None}
    from logo.baselines import get_methods
    from logo.evaluation.answer import Opening
    from logo.evaluation.datasets import find_datasets
    from logo.evaluation.study import ALWAYS, Contest, Measurer
    from logo.evaluation.study import study as run_study
    from logo.selection.signals import get_signal

    compared = get_methods([name for name in listed(methods) if name not in ALWAYS], method_arguments(method_args))
    for name in listed(signals):
        get_signal(name)
    contest = Contest(tuple(listed(signals)), compared, tuple(listed(protocols)), generate)
    found = find_datasets(rows, tasks, limit=limit, train_rows=train_rows, answers=False)
    if save.is_file() or save.name in ("", ".."):
        what = "a file" if save.is_file() else "the current folder or one above it"
        raise UsageError(f"--save {save}: expected a folder of the study's own, found {what}; name another one")
    check_writable(save.parent)
    quiet_transformers()
    base_model = or_demo(pool)
    options = {"signal": contest.signals[0], "model_dir": MODEL_DIR, **placed(pool.device)}
    command = written("eval study", pool)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    command["options"] |= without_secrets(plain)
    opening = Opening(base_model, pool.sources, options)
    with closing(Measurer(opening(), contest)) as measurer, progress(disable=not err.is_terminal) as bar:
        names = list(measurer.facts.identity["pool"])
        total, own = sum(len(task.rows) for task in found), sum(task.name in names for task in found)
        note(f"adapters: {len(names)} · tasks: {len(found)}, {own} with an adapter of their own · rows: {total}")
        measured = bar.add_task("rows", total=total)
        how: dict[str, Any] = {"overwrite": overwrite, "command": command}
        how["tell"] = lambda name: bar.update(measured, advance=1, description=name)
        try:
            report = run_study(found, save, measurer, **how)
        except KeyboardInterrupt:
            again = " without --overwrite" if overwrite else ""
            note(f"Finished rows are kept: repeat the command{again} to continue.")
            raise
    if json:
        print_json(report)
    else:
        _show(report)
        note(str(save))


def listed(text: str) -> list[str]:
    """The names of a list `a,b`, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _show(report: Mapping[str, Any]) -> None:
    """A table for each protocol, what a selection costs, the confidence of each signal, and what is confused most."""
    from logo.evaluation.study import ALWAYS
    from logo.selection.selector import UNSURE

    for protocol, arms in report["protocols"].items():
        metrics = [name for name in COLUMNS if any(name in found for found in arms.values())]
        table = plain_table(protocol, *(f">{COLUMNS[name]}" for name in metrics))
        for arm, found in arms.items():
            table.add_row(arm, *(_cell(found.get(name)) for name in metrics))
        screen(natural_width(table)).print(table, "")
    shown = [found for arms in report["protocols"].values() for arm in arms.values() for found in arm.values()]
    few = "no intervals, since there are few tasks"
    many = "95 % intervals, over tasks, in brackets"
    note(f"Means of the tasks' means; {many if any(found['interval'] for found in shown) else few}.")
    times = [
        f"{name} {value:.{0 if value >= 10 else 2}f} ms"
        for name, value in report["milliseconds"].items()
        if name not in ALWAYS
    ]
    out.print(f"median time of a selection: {', '.join(times)}", markup=False)
    for signal, found in report["confidence"].items():
        values = [f"AUROC {value:.2f} against {name}" for name, value in found["auroc"].items()]
        error = [] if found["error"] is None else [f"reliability error {found['error']:.2f}"]
        out.print(f"confidence of {signal}: {', '.join([*values, *error]) or 'nothing to compare with'}", markup=False)
        shares = [f"{share:.0%} of {name}" for name, share in found["sure"].items()]
        out.print(f"confidence of {signal} is {UNSURE} or more: {', '.join(shares)} rows", markup=False)
    for arm, pairs in report["confusions"].items():
        out.print(Text(f"{arm} puts another adapter first: {_confused(pairs)}"))
    for arm, pairs in report["mistaken"].items():
        out.print(Text(f"{arm} is not unsure where no adapter fits: {_confused(pairs)}"))


def _confused(pairs: Sequence[Mapping[str, Any]]) -> str:
    said = [f"{one_line(p['task'])} → {one_line(p['first'])} ({p['rows']} of {p['of']})" for p in pairs[:SHOWN]]
    return ", ".join(said) + (f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else "")


def _cell(found: Mapping[str, Any] | None) -> Text:
    if found is None or found["value"] is None:
        return Text("-", style="dim")
    ends = "" if found["interval"] is None else " [{:.2f}, {:.2f}]".format(*found["interval"])
    return Text.assemble(f"{found['value']:.2f}", (ends, "dim"))
