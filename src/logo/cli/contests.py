"""The contest of a study, made from options: methods beside the signals, protocols, training rows, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from logo.cli.choices import Variant
from logo.cli.methods import MethodOptions, make_method
from logo.cli.output import err
from logo.errors import DataError, UsageError
from logo.evaluation.metrics import checked_kind, metric_kind
from logo.hub import is_hub_id
from logo.rows import Row, read_rows

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.evaluation.contest import Contest
    from logo.evaluation.study import Task

ALWAYS = ("logo", "uniform", "base", "oracle")  # methods that every study has, as signals and as mixtures


def tasks_of(rows: str, request: str, prompt_end: str, names: Callable[[], Sequence[str]]) -> list[Task]:
    """The tasks of a folder, or of a dataset repository on the Hub, with all their rows.

    Args:
        request: names or patterns of tasks; empty: all.
        prompt_end: put after every prompt of a repository, with `\\n` for a new line.
        names: returns the names of the pool's adapters, after which tasks of a repository are renamed.

    Raises:
        DataError, HubError: they cannot be used, or not be fetched.
        UsageError: `prompt_end` is given for a folder.
    """
    from logo.evaluation.study import find_tasks

    if Path(rows).exists() or not is_hub_id(rows.partition("@")[0]):
        if prompt_end:
            raise UsageError(f"--prompt-end is only for datasets of the Hub, and {rows!r} is none; leave it out")
        return find_tasks(rows, request)
    from logo.evaluation.sources.many import hub_tasks, named_like

    return named_like(hub_tasks(rows, request, prompt_end=prompt_end.replace("\\n", "\n")), names())


def methods_of(
    options: MethodOptions, k: int | None, seed: int, held: Mapping[str, Sequence[Row]]
) -> dict[str, Method]:
    """Label -> method, for each entry of `--method`, such as `loraretriever/selection`; methods that every study
    includes are skipped.

    Args:
        k: adapters per prompt; None: each method's own number.

    Raises:
        UsageError: a method or variant that does not exist.
    """
    made: dict[str, Method] = {}
    for entry in (part.strip() for part in options.method.split(",") if part.strip()):
        name, slash, variant = entry.partition("/")
        if name in ALWAYS and not slash:
            continue
        own = replace(options, method=name)
        if slash:
            if name != "loraretriever" or variant not in get_args(Variant):
                raise UsageError(
                    f"method {entry!r}: expected a name, or loraretriever/VARIANT with one of "
                    f"{', '.join(get_args(Variant))}"
                )
            own = replace(own, retriever_variant=cast(Variant, variant))
        method = make_method(own, k=k, seed=seed, held=held)
        method.check()  # before hours are spent
        made[entry] = method
    return made


def contest_of(
    tasks: Sequence[Task],
    protocol: str,
    new_tokens: int | None,
    methods: Mapping[str, Method],
    metric: str | None,
    train_rows: Path | None,
    held: Mapping[str, Sequence[Row]],
) -> Contest:
    """The comparison that the options ask for.

    Args:
        held: labelled rows of every task; methods learn from them where no folder (`train_rows`) is named.

    Raises:
        UsageError: an option that cannot be used.
        DataError: a task without the training rows that a method needs.
    """
    from logo.baselines.method import Learned
    from logo.baselines.method import Task as MethodTask
    from logo.evaluation.contest import PROTOCOLS, Contest
    from logo.evaluation.jobs import declared_metric, overlap

    if metric is not None and new_tokens is None:
        raise UsageError(
            f"--metric {metric}: judges generated answers, and without --generate gold answers are scored; add "
            "--generate N or leave it out"
        )
    asked = {part.strip() for part in protocol.split(",") if part.strip()}
    learning = [label for label, method in methods.items() if isinstance(method, Learned)]
    train: Mapping[str, Sequence[Row]] = held if train_rows is None else {}
    if learning and not train:
        train = _train(tasks, train_rows, learning)
    for task in tasks if learning else ():
        if said := overlap(f"task {task.name!r}", train.get(task.name, ()), task.rows, learning):
            err.print(f"logo: warning: {said}", markup=False)
    known = {
        task.name: MethodTask(task.name, [row.context for row in task.rows], train.get(task.name, ())) for task in tasks
    }
    kinds = {
        task.name: task.metric or declared_metric(task.file) or metric_kind(task.name)
        if metric is None
        else checked_kind(metric, "--metric")
        for task in tasks
    }
    unknown = tuple(sorted(asked - set(PROTOCOLS)))
    return Contest(tuple(one for one in PROTOCOLS if one in asked) + unknown, new_tokens, methods, known, kinds)


def _train(tasks: Sequence[Task], folder: Path | None, methods: Sequence[str]) -> dict[str, tuple[Row, ...]]:
    """The training rows of every task.

    Raises:
        UsageError: no folder of them is named.
        DataError: a task has none.
    """
    if folder is None:
        raise UsageError(
            f"method {methods[0]!r} learns from labelled rows: name a folder that has TASK.jsonl for every task with "
            "--train-rows"
        )
    found: dict[str, tuple[Row, ...]] = {}
    for task in tasks:
        file = folder / f"{task.name}.jsonl"
        if not file.is_file():
            raise DataError(
                f"task {task.name!r}: method {methods[0]!r} learns from labelled rows, expected the file {file}, found "
                "none; put it there, name another folder with --train-rows, or leave the task out with --tasks"
            )
        found[task.name] = tuple(read_rows(file))
    return found
