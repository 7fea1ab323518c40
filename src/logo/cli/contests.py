"""The contest of a study, made from options: methods beside the signals, protocols, training rows, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast, get_args

from logo.cli.choices import Variant
from logo.cli.methods import MethodOptions, make_method
from logo.cli.output import err
from logo.errors import UsageError
from logo.evaluation.metrics import checked_kind
from logo.rows import Row

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.evaluation.contest import Contest
    from logo.evaluation.datasets import Dataset

ALWAYS = ("logo", "uniform", "base", "oracle")  # methods that every study has, as signals and as mixtures


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
    tasks: Sequence[Dataset],
    protocol: str,
    new_tokens: int | None,
    methods: Mapping[str, Method],
    metric: str | None,
    held: Mapping[str, Sequence[Row]],
) -> Contest:
    """The comparison that the options ask for.

    Args:
        held: labelled rows of every task, from which methods learn; empty: they learn from the tasks' training rows.

    Raises:
        UsageError: an option that cannot be used.
        DataError: a task without the training rows that a method needs.
    """
    from logo.baselines.method import Learned, overlap
    from logo.baselines.method import Task as MethodTask
    from logo.evaluation.contest import PROTOCOLS, Contest

    if metric is not None and new_tokens is None:
        raise UsageError(
            f"--metric {metric}: judges generated answers, and without --generate gold answers are scored; add "
            "--generate N or leave it out"
        )
    asked = {part.strip() for part in protocol.split(",") if part.strip()}
    learning = [label for label, method in methods.items() if isinstance(method, Learned)]
    train: Mapping[str, Sequence[Row]] = held
    if learning and not held:
        train = {task.name: task.train for task in tasks}
    for task in tasks if learning else ():
        if said := overlap(f"task {task.name!r}", train.get(task.name, ()), task.rows, learning):
            err.print(f"logo: warning: {said}", markup=False)
    known = {
        task.name: MethodTask(task.name, [row.context for row in task.rows], train.get(task.name, ())) for task in tasks
    }
    kinds = {task.name: task.metric if metric is None else checked_kind(metric, "--metric") for task in tasks}
    unknown = tuple(sorted(asked - set(PROTOCOLS)))
    return Contest(tuple(one for one in PROTOCOLS if one in asked) + unknown, new_tokens, methods, known, kinds)
