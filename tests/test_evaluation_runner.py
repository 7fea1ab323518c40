"""The run over one dataset, with an engine that answers from a dictionary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo.errors import UsageError
from logo.evaluation.datasets import Row, load_rows
from logo.evaluation.runner import Engine, answers, collect, evaluate

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Selection:
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    scores: dict[str, float]


@dataclass(frozen=True)
class Generation:
    text: str
    selection: Selection
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"
    seconds: dict[str, float] = field(default_factory=lambda: {"probe": 0.25, "generate": 0.5})


class FakeEngine:
    """Answers each prompt by a function and remembers how it was asked."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.calls: list[list[str]] = []
        self.options: dict[str, int] = {}

    def generate(
        self, prompts: list[str], *, max_new_tokens: int, batch_size: int, **options: object
    ) -> list[Generation]:
        assert len(prompts) <= batch_size
        self.calls.append(prompts)
        self.options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        scores = {"a": 1.0, "b": 3.0}
        return [Generation(self.answer(prompt), Selection(("b", "a"), (0.75, 0.25), scores)) for prompt in prompts]


def rows(count: int) -> list[Row]:
    return [Row(f"prompt {index}", str(index % 3)) for index in range(count)]


@given(count=st.integers(1, 20), batch_size=st.integers(1, 25))
def test_order_and_results_do_not_depend_on_the_batch_size(count: int, batch_size: int) -> None:
    engine = FakeEngine(lambda prompt: f" {prompt[7:]} \nmore")
    done: list[int] = []
    result = evaluate(
        engine, rows(count), dataset="bbh.x", batch_size=batch_size, max_new_tokens=4, on_progress=done.append
    )
    assert [prompt for call in engine.calls for prompt in call] == [f"prompt {index}" for index in range(count)]
    assert result.predictions == tuple(f"{index} " for index in range(count))
    assert result.eval_results == tuple(int(index % 3 == index) for index in range(count))
    assert done == [*range(batch_size, count, batch_size), count]
    assert {len(column) for column in (result.selected, result.weights, result.scores)} == {count}


def test_every_field() -> None:
    engine: Engine = FakeEngine(lambda prompt: "True.")
    data = load_rows(DATA, "bbh.boolean_expressions", 4)
    result = evaluate(engine, data, dataset="bbh.boolean_expressions", batch_size=3, max_new_tokens=8)
    assert result.dataset == "bbh.boolean_expressions"
    assert result.eval_results == tuple(int(row.completion == "True") for row in data)
    assert result.predictions == ("True.",) * 4
    assert result.selected == (("b", "a"),) * 4
    assert result.weights == ((0.75, 0.25),) * 4
    assert result.scored == ("a", "b")
    assert result.scores == ((1.0, 3.0),) * 4
    assert result.seconds.pop("inference") > 0
    assert result.seconds == {"probe": 1.0, "generate": 2.0}


@pytest.mark.parametrize(
    ("dataset", "completion", "value"),
    [
        ("bbh.x", "Yes", 1),
        ("nq.x", ("no", "YES"), 1),
        ("wmt14.fr-en", "no", 0.0),
        ("gem.dart", "yes", {"rouge-1": 1.0, "rouge-2": 0.0, "rouge-L": 1.0}),
        ("mine.x", ("no", "yes"), 1),
    ],
)
def test_the_metric_follows_the_dataset(dataset: str, completion: str | tuple[str, ...], value: object) -> None:
    result = evaluate(FakeEngine(lambda prompt: "yes"), [Row("q", completion)], dataset=dataset)
    assert result.eval_results == (value,)


def test_a_base_model_without_adapters() -> None:
    class Base(FakeEngine):
        def generate(
            self, prompts: list[str], *, max_new_tokens: int, batch_size: int, **options: object
        ) -> list[Generation]:
            return [Generation("2", Selection((), (), {})) for _ in prompts]

    result = evaluate(Base(str), rows(3), dataset="bbh.x")
    assert (result.selected, result.weights, result.scored, result.scores) == (((),) * 3, ((),) * 3, (), ((),) * 3)


def test_options_reach_the_engine() -> None:
    engine = FakeEngine(str)
    evaluate(engine, rows(3), dataset="bbh.x", batch_size=2, max_new_tokens=7)
    assert engine.options == {"max_new_tokens": 7, "batch_size": 2}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_half_way_is_passed_on(error: type[BaseException]) -> None:
    done: list[int] = []

    def answer(prompt: str) -> str:
        if prompt == "prompt 3":
            raise error
        return ""

    with pytest.raises(error):
        evaluate(FakeEngine(answer), rows(5), dataset="bbh.x", batch_size=2, on_progress=done.append)
    assert done == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size 0: expected at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens -1: expected at least 1"),
        ({"rows": []}, "dataset 'bbh.x': expected at least one row, found none"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    engine = FakeEngine(str)
    with pytest.raises(UsageError, match=message):
        evaluate(engine, **({"rows": rows(2), "dataset": "bbh.x"} | arguments))  # type: ignore[arg-type]
    assert engine.calls == []


def test_an_engine_that_loses_an_answer_is_found_out() -> None:
    class Loses(FakeEngine):
        def generate(
            self, prompts: list[str], *, max_new_tokens: int, batch_size: int, **options: object
        ) -> list[Generation]:
            return super().generate(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)[1:]

    with pytest.raises(RuntimeError, match="expected 2 generations, one per prompt, found 1"):
        evaluate(Loses(str), rows(2), dataset="bbh.x", batch_size=2)


def test_a_run_can_be_put_together_from_parts() -> None:
    """What a journal or shards will do: instances from anywhere, in dataset order, make the same result."""
    whole = evaluate(FakeEngine(str), rows(5), dataset="bbh.x")

    def part(some: Sequence[Row]) -> list:  # type: ignore[type-arg]
        batches = answers(FakeEngine(str), some, dataset="bbh.x", batch_size=2, max_new_tokens=1)
        return [instance for batch in batches for instance in batch]

    parts = collect("bbh.x", part(rows(5)[:3]) + part(rows(5)[3:]), inference=whole.seconds["inference"])
    assert parts == whole


def test_instances_without_common_columns_are_refused() -> None:
    class Grows(FakeEngine):
        def generate(
            self, prompts: list[str], *, max_new_tokens: int, batch_size: int, **options: object
        ) -> list[Generation]:
            self.calls.append(prompts)
            scores = {f"adapter {index}": 1.0 for index in range(len(self.calls))}
            return [Generation("", Selection((), (), scores)) for _ in prompts]

    with pytest.raises(RuntimeError, match="instance 1 scored other adapters than instance 0"):
        evaluate(Grows(str), rows(2), dataset="bbh.x")
