"""One dataset through one engine: prompts in dataset order, a judged answer per row.

Knows an engine only by the few things it reads from it (the protocols below), so a test, a baseline or another
backend fits as well as `logo.LoGo`. Writes nothing: a run that is interrupted or fails leaves no file behind. The unit
is one `Instance`; `answers` yields them as they come, which is where a journal or a shard can be put in between, and
`collect` makes the result of any list of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from logo.errors import UsageError
from logo.evaluation.datasets import Row
from logo.evaluation.metrics import Value, first_line, measure, metric_kind


class SelectionLike(Protocol):
    """What is read of a `Selection`."""

    @property
    def adapters(self) -> tuple[str, ...]: ...
    @property
    def weights(self) -> tuple[float, ...]: ...
    @property
    def scores(self) -> Mapping[str, float]: ...


class GenerationLike(Protocol):
    """What is read of a `Generation`."""

    @property
    def text(self) -> str: ...
    @property
    def selection(self) -> SelectionLike: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...


class Engine(Protocol):
    """Anything that answers prompts, one generation each, in their order."""

    def generate(self, prompts: list[str], *, max_new_tokens: int, batch_size: int) -> Sequence[GenerationLike]: ...


@dataclass(frozen=True)
class Instance:
    """One row answered and judged. `scores` are in pool order; `seconds` is this row's share of each stage."""

    value: Value
    prediction: str
    selected: tuple[str, ...]  # best first
    weights: tuple[float, ...]  # parallel to `selected`
    scores: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class DatasetResult:
    """One dataset, all tuples in dataset order.

    Attributes:
        dataset: its name.
        eval_results: 0 or 1, a BLEU, or {"rouge-1", "rouge-2", "rouge-L"} per instance.
        predictions: the first line of each answer.
        selected: names, best first.
        weights: parallel to `selected`.
        scored: names of the columns of `scores`, in pool order.
        scores: one number per scored adapter.
        seconds: "inference" is the wall time; the engine's own stages are summed over the instances.
    """

    dataset: str
    eval_results: tuple[Value, ...]
    predictions: tuple[str, ...]
    selected: tuple[tuple[str, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    scored: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    seconds: dict[str, float]


def evaluate(
    engine: Engine,
    rows: Sequence[Row],
    *,
    dataset: str,
    batch_size: int = 1,
    max_new_tokens: int = 256,
    on_progress: Callable[[int], None] | None = None,
) -> DatasetResult:
    """Answer and judge every row.

    Args:
        batch_size: how many rows the engine gets at once.
        max_new_tokens: of each answer.
        on_progress: gets the number of rows done so far, after each batch.

    Raises:
        UsageError: no rows, or a batch size or token limit below 1.
    """
    start = time.perf_counter()
    instances: list[Instance] = []
    for batch in answers(engine, rows, dataset=dataset, batch_size=batch_size, max_new_tokens=max_new_tokens):
        instances.extend(batch)
        if on_progress is not None:
            on_progress(len(instances))
    return collect(dataset, instances, inference=time.perf_counter() - start)


def answers(
    engine: Engine, rows: Sequence[Row], *, dataset: str, batch_size: int, max_new_tokens: int
) -> Iterator[list[Instance]]:
    """The rows' instances, a batch at a time and in order (`probe_context=carry` depends on the order).

    Raises:
        UsageError: a batch size or token limit below 1.
        RuntimeError: the engine does not return one generation per prompt.
    """
    for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if number < 1:
            raise UsageError(f"{name} {number}: expected at least 1")
    kind = metric_kind(dataset)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        generations = engine.generate(
            [row.context for row in batch], max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        if len(generations) != len(batch):
            raise RuntimeError(f"engine: expected {len(batch)} generations, one per prompt, found {len(generations)}")
        instances = []
        for row, generation in zip(batch, generations, strict=True):
            prediction = first_line(generation.text)
            selection = generation.selection
            instances.append(
                Instance(
                    value=measure(kind, prediction, row.completion),
                    prediction=prediction,
                    selected=tuple(selection.adapters),
                    weights=tuple(selection.weights),
                    scores=dict(selection.scores),
                    seconds=dict(generation.seconds),
                )
            )
        yield instances


def collect(dataset: str, instances: Sequence[Instance], *, inference: float) -> DatasetResult:
    """The result of a dataset from its instances, in dataset order. `inference`: wall seconds they took.

    Raises:
        UsageError: no instances.
        RuntimeError: instances that scored different adapters, so that they have no common columns.
    """
    if not instances:
        raise UsageError(f"dataset {dataset!r}: expected at least one row, found none")
    scored = tuple(instances[0].scores)
    for index, instance in enumerate(instances):
        if tuple(instance.scores) != scored:
            raise RuntimeError(f"dataset {dataset!r}: instance {index} scored other adapters than instance 0")
    seconds = {"inference": inference}
    for instance in instances:
        for stage, share in instance.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + share
    return DatasetResult(
        dataset=dataset,
        eval_results=tuple(instance.value for instance in instances),
        predictions=tuple(instance.prediction for instance in instances),
        selected=tuple(instance.selected for instance in instances),
        weights=tuple(instance.weights for instance in instances),
        scored=scored,
        scores=tuple(tuple(instance.scores.values()) for instance in instances),
        seconds=seconds,
    )
