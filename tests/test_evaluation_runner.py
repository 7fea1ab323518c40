"""The run over one dataset, with an engine that answers from a function, runs out of memory, refuses, and stops."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from answering import evaluate, load_rows
from logo.errors import HubError, StorageError, UsageError
from logo.evaluation.journal import Journal
from logo.evaluation.runner import DatasetResult, Engine, answers, collect
from logo.rows import Row

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Selection:
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    scores: dict[str, float]
    confidence: float | None = None


@dataclass(frozen=True)
class Generation:
    text: str
    selection: Selection
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"
    seconds: dict[str, float] = field(default_factory=lambda: {"probe": 0.25, "generate": 0.5})
    form: str = "gated"


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


@settings(deadline=None)
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
    """What a journal or workers do: instances from anywhere, in dataset order, make the same result."""
    whole = evaluate(FakeEngine(str), rows(5), dataset="bbh.x")

    def part(some: Sequence[Row]) -> list:  # type: ignore[type-arg]
        batches = answers(FakeEngine(str), some, metric="em", batch_size=2, max_new_tokens=1)
        return [instance for batch in batches for instance in batch]

    parts = collect("bbh.x", part(rows(5)[:3]) + part(rows(5)[3:]), inference=whole.seconds["inference"])
    assert parts == whole


def test_columns_are_what_any_instance_scored() -> None:
    """A plugin's method may score other adapters for each prompt."""

    class Wanders(FakeEngine):
        def generate(
            self, prompts: list[str], *, max_new_tokens: int, batch_size: int, **options: object
        ) -> list[Generation]:
            self.calls.append(prompts)
            scores = {f"adapter {index}": float(index) for index in (len(self.calls) % 2, 2)}
            return [Generation("", Selection((), (), scores)) for _ in prompts]

    result = evaluate(Wanders(str), rows(2), dataset="bbh.x")
    assert result.scored == ("adapter 0", "adapter 1", "adapter 2")
    assert result.scores == ((None, 1.0, 2.0), (0.0, None, 2.0))


# --- out of memory


class Small(FakeEngine):
    """Has memory for so many prompts at once, and for none of some."""

    def __init__(self, fits: int, never: frozenset[str] = frozenset()) -> None:
        super().__init__(lambda prompt: prompt[7:])
        self.fits, self.never = fits, never
        self.tried: list[int] = []

    def generate(
        self, prompts: list[str], *, max_new_tokens: int, batch_size: int, **options: object
    ) -> list[Generation]:
        self.tried.append(len(prompts))
        if len(prompts) > self.fits or self.never.intersection(prompts):
            if len(self.tried) % 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            torch.empty(2**55, dtype=torch.int8)  # what a host without memory says
        return super().generate(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)


def test_a_row_that_does_not_fit_alone_is_a_bad_row() -> None:
    engine = Small(4, frozenset({"prompt 5"}))
    with pytest.warns(UserWarning, match="out of memory with 4 prompts at once: going on one by one"):
        result = evaluate(engine, rows(12), dataset="bbh.x", batch_size=4)
    assert [len(call) for call in engine.calls] == [4, 1, 1, 1, 4]
    assert list(result.errors) == [5] and result.errors[5].startswith("out of memory with this prompt alone")
    assert result.predictions == ("0", "1", "2", "3", "4", "", *map(str, range(6, 12)))


def test_a_model_that_fits_nothing_ends_the_run() -> None:
    with (
        pytest.warns(UserWarning, match="going on one by one"),
        pytest.raises((torch.OutOfMemoryError, RuntimeError), match=r"out of memory|can't allocate"),
    ):
        evaluate(Small(0), rows(8), dataset="bbh.x", batch_size=4)


def test_other_errors_of_torch_are_passed_on() -> None:
    def answer(prompt: str) -> str:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        evaluate(FakeEngine(answer), rows(3), dataset="bbh.x", batch_size=2)


# --- bad rows


def refusing(bad: Collection[int], reason: str = "prompt {}: not this one\nplease") -> FakeEngine:
    def answer(prompt: str) -> str:
        if int(prompt[7:]) in bad:
            raise UsageError(reason.format(prompt[7:]))
        return prompt[7:]

    return FakeEngine(answer)


@settings(deadline=None)
@given(data=st.data(), count=st.integers(1, 12), batch_size=st.integers(1, 6))
def test_bad_rows_are_told_and_the_rest_is_answered(data: st.DataObject, count: int, batch_size: int) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1)))
    result = evaluate(refusing(bad), rows(count), dataset="bbh.x", batch_size=batch_size)
    assert result.errors == {index: f"prompt {index}: not this one please" for index in sorted(bad)}
    for index in range(count):
        if index in bad:
            row = (result.eval_results[index], result.predictions[index], result.selected[index], result.weights[index])
            assert row == (0, "", (), ())
            assert set(result.scores[index]) <= {None}
        else:
            assert result.predictions[index] == str(index) and result.scores[index] == (1.0, 3.0)
    assert len({len(scores) for scores in result.scores}) == 1


def test_a_bad_row_is_worth_nothing_under_every_metric() -> None:
    data = [Row("prompt 0", "0"), Row("prompt 1", ".")]  # an empty answer would equal this gold text
    for dataset, nothing in (
        ("bbh.x", 0),
        ("nq.x", 0),
        ("wmt14.x", 0),
        ("gem.x", {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-L": 0.0}),
    ):
        result = evaluate(refusing({1}), data, dataset=dataset)
        assert result.eval_results[1] == nothing


@pytest.mark.parametrize(("batch_size", "asked"), [(1, 2), (4, 4), (100, 6)])
def test_what_concerns_the_run_stops_it_at_once(batch_size: int, asked: int) -> None:
    """All of the first rows fail alike: an option that cannot be used, not a matter of any row."""
    engine = refusing(range(6), "max_new_tokens is 5000, but the context holds 512 tokens")
    alone = [0]
    generate = engine.generate

    def counting(prompts: list[str], **options: int) -> list[Generation]:
        alone[0] += len(prompts) == 1
        return generate(prompts, **options)

    engine.generate = counting  # type: ignore[assignment,method-assign]
    done: list[int] = []
    with pytest.raises(UsageError, match="the context holds 512"):
        evaluate(engine, rows(6), dataset="bbh.x", batch_size=batch_size, on_progress=done.append)
    assert (alone[0], done) == (asked, [])


def test_the_same_failure_after_an_answer_is_a_matter_of_the_rows() -> None:
    result = evaluate(refusing(range(1, 9), "refused"), rows(9), dataset="bbh.x", batch_size=3)
    assert list(result.errors) == list(range(1, 9))


@pytest.mark.parametrize("error", [StorageError("adapter a: cannot be read"), HubError("no network")])
def test_what_the_machine_refuses_is_no_bad_row(error: Exception) -> None:
    def answer(prompt: str) -> str:
        if prompt == "prompt 3":
            raise error
        return ""

    with pytest.raises(type(error)):
        evaluate(FakeEngine(answer), rows(5), dataset="bbh.x", batch_size=2)


# --- journals


@settings(deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 10),
    batch_size=st.integers(1, 4),
    fits=st.integers(1, 4),
)
def test_an_interrupted_run_goes_on(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, count: int, batch_size: int, fits: int
) -> None:
    """Stopped after any batch, however often: the same result, no row asked twice, and batches as without a stop."""
    bad = frozenset(f"prompt {i}" for i in data.draw(st.sets(st.integers(0, count - 1), max_size=2)))
    file = tmp_path_factory.mktemp("run") / "journal"
    dataset = data.draw(st.sampled_from(["bbh.x", "gem.x"]))

    def run(engine: FakeEngine, journal: Journal | None, stop: int | None = None) -> DatasetResult:
        def report(done: int) -> None:
            nonlocal stop
            if stop is not None:
                stop -= 1
                if stop < 0:
                    raise KeyboardInterrupt

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return evaluate(
                engine, rows(count), dataset=dataset, batch_size=batch_size, journal=journal, on_progress=report
            )

    def unless_out_of_memory(engine: FakeEngine, journal: Journal | None) -> DatasetResult | str:
        try:
            return run(engine, journal)
        except RuntimeError as error:
            return type(error).__name__

    whole_engine = Small(fits, bad)
    whole = unless_out_of_memory(whole_engine, None)
    engine = Small(fits, bad)
    for stop in data.draw(st.lists(st.integers(0, 3), max_size=3)):
        with Journal(file, {"run": 1}) as journal, contextlib.suppress(KeyboardInterrupt, RuntimeError):
            run(engine, journal, stop)
    with Journal(file, {"run": 1}) as journal:
        again = unless_out_of_memory(engine, journal)
    if isinstance(whole, str) or isinstance(again, str):
        assert isinstance(again, str) and isinstance(whole, str)
        return
    assert replace(again, seconds={}) == replace(whole, seconds={})
    assert again.seconds.keys() == whole.seconds.keys()
    if not bad:  # the first bad rows are held back until the next ones have shown that the run can work
        assert engine.calls == whole_engine.calls
