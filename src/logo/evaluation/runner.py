"""One dataset through one engine: prompts in dataset order, a judged answer per row.

An engine is used only through `logo.evaluation.batches`, so a test, a baseline or another backend works as well as
`logo.LoGo`. The only file that is written is a journal, if one is given. The unit is one `Instance`. `answers` yields
instances as they come, `Answered` collects them in any order, and `collect` makes the result from any list of them,
also of an interrupted run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from logo.errors import UsageError
from logo.evaluation.batches import Batch, Engine, Failure, in_batches
from logo.evaluation.journal import Journal
from logo.evaluation.metrics import Kind, Value, first_line, judged, load, measure, metric_kind
from logo.rows import Row

if TYPE_CHECKING:
    from logo.core import Generation


@dataclass(frozen=True)
class Instance:
    """One answered and judged row, or the `error` because of which it has no answer and scores zero.

    Attributes:
        value: 0 or 1, a BLEU, or the three ROUGE numbers.
        prediction: the first line of the answer.
        selected: names, best first; `weights` are parallel to it.
        scores: by adapter, in pool order; empty for a row without an answer.
        seconds: this row's share of each stage.
        error: one line; None for a row with an answer.
        form: how its mixture was applied (see `logo.Generation`); "" for a row without an answer.
        confidence: of its selection, see `logo.Selection`.
    """

    value: Value
    prediction: str
    selected: tuple[str, ...]
    weights: tuple[float, ...]
    scores: Mapping[str, float]
    seconds: Mapping[str, float]
    error: str | None = None
    form: str = ""
    confidence: float | None = None


@dataclass(frozen=True)
class DatasetResult:
    """One dataset, all tuples in dataset order.

    Attributes:
        dataset: its name; `metric`: by which it was judged.
        eval_results: 0 or 1, a BLEU, or {"rouge-1", "rouge-2", "rouge-L"} per instance.
        predictions: the first line of each answer.
        selected: names, best first.
        weights: parallel to `selected`.
        scored: names of the columns of `scores`, in pool order.
        scores: one number per column; None where an adapter was not scored, and in rows without an answer.
        seconds: "inference" is the wall time; the engine's own stages are summed over the instances.
        errors: by index, why a row has no answer.
        forms: how many rows' mixtures acted in each form.
        confidences: of each selection; empty where no row's selection has one.
    """

    dataset: str
    metric: Kind
    eval_results: tuple[Value, ...]
    predictions: tuple[str, ...]
    selected: tuple[tuple[str, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    scored: tuple[str, ...]
    scores: tuple[tuple[float | None, ...], ...]
    seconds: dict[str, float]
    errors: dict[int, str] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    confidences: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class AnsweredBatch:
    """Some consecutive rows with their answers.

    Attributes:
        first: index of the first row in the dataset.
        instances: of the rows, in order.
        seconds: duration.
    """

    first: int
    instances: tuple[Instance, ...]
    seconds: float


class Answered:
    """The answered rows of a dataset, in any order.

    Args:
        dataset: its name.
        rows: its rows.
        batch_size: number of rows answered at once.
        metric: its metric; None: by its name.
        journal: of these rows under these settings: recorded rows are not answered again, only judged, and new ones are
            recorded.

    Attributes:
        seconds: total duration.
    """

    def __init__(
        self,
        dataset: str,
        rows: Sequence[Row],
        batch_size: int,
        metric: Kind | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._dataset, self._rows, self._metric = dataset, rows, metric or metric_kind(dataset)
        self._batch_size, self._journal = batch_size, journal
        self._instances: dict[int, Instance] = {}
        self.seconds = 0.0
        for record in [] if journal is None else journal.records:
            if "instances" in record:  # and not what a method has learnt
                pairs = zip(rows[record["first"] :], record["instances"], strict=False)
                instances = tuple(_recorded(self._metric, row, one) for row, one in pairs)
                self._take(AnsweredBatch(record["first"], instances, record["seconds"]))

    def __len__(self) -> int:
        return len(self._instances)

    @property
    def proven(self) -> bool:
        """Whether any row has an answer, so that an error concerns its row and not the run."""
        return any(instance.error is None for instance in self._instances.values())

    @property
    def missing(self) -> list[range]:
        """The unanswered rows, as ranges of consecutive rows."""
        stretches: list[range] = []
        for row in range(len(self._rows)):
            if row in self._instances:
                continue
            if stretches and stretches[-1].stop == row:
                stretches[-1] = range(stretches[-1].start, row + 1)
            else:
                stretches.append(range(row, row + 1))
        return stretches

    def add(self, batch: AnsweredBatch) -> None:
        """Records rows.

        Raises:
            StorageError: the journal cannot be written.
        """
        if self._journal is not None:
            instances = [asdict(instance) for instance in batch.instances]
            self._journal.append({"first": batch.first, "instances": instances, "seconds": batch.seconds})
        self._take(batch)

    def complete(self, engine: Engine, max_new_tokens: int, on_progress: Callable[[int], None]) -> None:
        """Answers the missing rows; errors as of `logo.evaluation.batches.in_batches`.

        Args:
            max_new_tokens: of each answer.
            on_progress: gets the number of rows done so far, after each batch and at the start of a run that is
                continued.
        """
        if len(self):
            on_progress(len(self))
        for stretch in self.missing:
            batches = answers(
                engine,
                self._rows[stretch.start : stretch.stop],
                metric=self._metric,
                batch_size=self._batch_size,
                max_new_tokens=max_new_tokens,
                proven=self.proven,
            )
            for batch in placed(stretch.start, batches):
                self.add(batch)
                on_progress(len(self))

    def result(self) -> DatasetResult:
        """The result, when all rows are answered."""
        instances = [self._instances[row] for row in range(len(self._rows))]
        return collect(self._dataset, instances, inference=self.seconds, metric=self._metric)

    def _take(self, batch: AnsweredBatch) -> None:
        self._instances.update(enumerate(batch.instances, start=batch.first))
        self.seconds += batch.seconds


def answers(
    engine: Engine,
    rows: Sequence[Row],
    *,
    metric: Kind,
    batch_size: int,
    max_new_tokens: int,
    proven: bool = False,
) -> Iterator[list[Instance]]:
    """The rows' instances, a batch at a time and in order (`probe_context=carry` depends on the order). The metric is
    loaded at once and not with the first row, since `placed` times the rows.

    Raises:
        UsageError: a batch size or token limit below 1.
        LoGoError, RuntimeError: as `logo.evaluation.batches.in_batches`, which has the arguments too.
    """
    for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if number < 1:
            raise UsageError(f"{name} {number}: expected at least 1")
    load(metric)
    prompts = [row.prompt for row in rows]
    batches = in_batches(engine, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens, proven=proven)
    return _judged_batches(metric, rows, batches)


def placed(first: int, batches: Iterable[Sequence[Instance]]) -> Iterator[AnsweredBatch]:
    """Batches as `answers` makes them, from the row `first` of a dataset on, with the time that each takes."""
    began = time.perf_counter()
    for instances in batches:
        took, began = time.perf_counter() - began, time.perf_counter()
        yield AnsweredBatch(first, tuple(instances), took)
        first += len(instances)


def collect(
    dataset: str, instances: Sequence[Instance], *, inference: float, metric: Kind | None = None
) -> DatasetResult:
    """The result of a dataset from its instances, in dataset order.

    Args:
        inference: wall seconds they took.
        metric: by which they were judged; None: by the dataset's name.
    """
    answered = [instance for instance in instances if instance.error is None]
    scored = _common_columns([tuple(instance.scores) for instance in answered])
    confidences = tuple(instance.confidence for instance in instances)
    return DatasetResult(
        dataset=dataset,
        metric=metric or metric_kind(dataset),
        eval_results=tuple(instance.value for instance in instances),
        predictions=tuple(instance.prediction for instance in instances),
        selected=tuple(instance.selected for instance in instances),
        weights=tuple(instance.weights for instance in instances),
        scored=scored,
        scores=tuple(tuple(instance.scores.get(name) for name in scored) for instance in instances),
        seconds=summed([{"inference": inference}, *(instance.seconds for instance in instances)]),
        errors={index: instance.error for index, instance in enumerate(instances) if instance.error is not None},
        forms=dict(sorted(Counter(instance.form for instance in answered).items())),
        confidences=() if all(one is None for one in confidences) else confidences,
    )


def summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums of numbers by name."""
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0.0) + value
    return found


def _common_columns(scored: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The adapters that any instance scored, in pool order; not every selection has the same ones."""
    different = list(dict.fromkeys(map(tuple, scored)))
    return different[0] if len(different) == 1 else tuple(sorted({name for names in different for name in names}))


def _judged_batches(kind: Kind, rows: Sequence[Row], batches: Iterable[Batch]) -> Iterator[list[Instance]]:
    done = 0
    for batch in batches:
        some = rows[done : done + len(batch)]
        done += len(some)
        yield [_judged(kind, row, answer) for row, answer in zip(some, batch, strict=True)]


def _judged(kind: Kind, row: Row, answer: Generation | Failure) -> Instance:
    if isinstance(answer, Failure):
        return Instance(judged(kind, "", row.completion, failed=True), "", (), (), {}, {}, answer.message)
    prediction = first_line(answer.text)
    selection = answer.selection
    return Instance(
        value=measure(kind, prediction, row.completion),
        prediction=prediction,
        selected=tuple(selection.adapters),
        weights=tuple(selection.weights),
        scores=dict(selection.scores),
        seconds=dict(answer.seconds),
        form=answer.form,
        confidence=selection.confidence,
    )


def _recorded(kind: Kind, row: Row, values: Mapping[str, Any]) -> Instance:
    """An instance as a journal stores it, judged by the present metric."""
    value = judged(kind, values["prediction"], row.completion, failed=values["error"] is not None)
    lists = {name: tuple(values[name]) for name in ("selected", "weights")}
    return Instance(**{**values, **lists, "value": value})
