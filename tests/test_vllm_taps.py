"""Taps of the vLLM backend: prompts that are run in chunks, put back, and aborted."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logo.selection import signals
from logo.selection.points import Point
from logo.selection.reference import both_means, emphasis
from logo.vllm import taps as module
from logo.vllm.requests import Probe
from logo.vllm.taps import Span, Taps, TextReader

CPU = torch.device("cpu")
READING = signals.Signal(lambda index, hidden: hidden[:, :2], input="projection", token="each")
POOL = "d1"  # the digest of the pool


class Index:
    """Two adapters that respond with the first two numbers of a vector."""

    def __init__(self, point: Point) -> None:
        self.point = point


class Scorer:
    """The mean response of each adapter, followed by the number of tokens that were read."""

    def __init__(self, *modules: str, **signal: Any) -> None:
        self.signal = replace(READING, **signal)
        self.points = tuple(Point(0, "layers.0", module) for module in modules)
        self.indices = tuple(map(Index, self.points))
        self.names = ("one", "two")
        self.described: tuple[int, ...] = ()

    def scores(self, per_point: Any, descriptions: Any, tokens: Tensor, among: Any = (None,)) -> Tensor:
        if among[0] is not None:
            asked = torch.tensor([[name in among[0] for name in self.names]])
            per_point = [torch.where(asked, response, -torch.inf) for response in per_point]
        return torch.cat([torch.stack(list(per_point)).mean(dim=0), tokens[:, None]], dim=1)


class Describing(Scorer):
    """Whose scores are followed by the description of the prompt at the second point."""

    def __init__(self, *modules: str, **signal: Any) -> None:
        super().__init__(*modules, **signal)
        self.described = (1,)

    def scores(self, per_point: Any, descriptions: Any, tokens: Any, among: Any = (None,)) -> Tensor:
        [description] = descriptions
        return torch.cat([super().scores(per_point, [], tokens, among), description.flatten(1)], dim=1)


def scored(made: Taps, signal: str, scorer: Any) -> Taps:
    made.read_by({(POOL, signal): scorer})
    return made


@pytest.fixture
def taps() -> Taps:
    return scored(Taps(lambda point, read: point.module, CPU), "calibrated", Scorer("a", "b"))


def span(key: str, row: int, start: int, count: int, total: int, signal: str = "calibrated", among: Any = None) -> Span:
    return Span(Probe(key, POOL, signal, among), range(total), row, start, count)


def step(made: Taps, entering: Tensor, *spans: Span, places: str = "ab") -> None:
    """Runs a step, in which these rows enter every place."""
    made.begin(spans)
    for place in places:
        made.tap(place, entering)


def test_each_prompt_is_scored_among_its_own_adapters(taps: Taps) -> None:
    rows = torch.rand(6, 4)
    step(taps, rows, span("p", 0, 0, 3, 3), span("q", 3, 0, 3, 3, among=("two",)))
    found = taps.take(["p", "q"])
    assert found["p"] == pytest.approx([*rows[1:3].mean(dim=0)[:2].tolist(), 2], rel=1e-5)
    assert found["q"] == pytest.approx([-torch.inf, rows[4:, 1].mean().item(), 2], rel=1e-5)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 29), max_size=5),
    late=st.booleans(),
    described=st.booleans(),
)
@settings(deadline=None)
def test_chunks_are_summed_to_the_whole(lengths: list[int], cuts: list[int], late: bool, described: bool) -> None:
    """Prompts that run at the same time, in chunks of any size."""
    made = Taps(lambda point, read: point.module, CPU)
    scorer = (Describing if described else Scorer)("a", "b", late=late)
    if late:
        scorer.scores = lambda per_point, *_: torch.cat(list(per_point), dim=1)  # type: ignore[method-assign]
    scored(made, "calibrated", scorer)
    prompts = [torch.rand(length, 4) for length in lengths]
    for start, end in itertools.pairwise(sorted({0, *(c for c in cuts if c < max(lengths)), max(lengths)})):
        spans, rows = [], 0
        for number, prompt in enumerate(prompts):
            count = min(end, len(prompt)) - start
            if count > 0:
                spans.append(span(f"{number}", rows, start, count, len(prompt)))
                rows += count
        step(made, torch.cat([prompts[int(one.probe.key)][start:end] for one in spans]), *spans)
    found = made.take([f"{number}" for number in range(len(prompts))])
    for number, prompt in enumerate(prompts):
        read = prompt[int(len(prompt) > 1) :]
        owners = torch.zeros(len(read), dtype=torch.int64)
        even, last = both_means(read, owners, *emphasis(owners, 1))[0].tolist()
        expected = [*even[:2] * 2, *last[:2] * 2] if late else [*even[:2], len(read)]
        expected += [*even, *last] if described and not late else []
        assert found[f"{number}"] == pytest.approx(expected, rel=1e-4)
    assert made.take(["0"])["0"] == "the prompt was not run as a probe"  # what is taken is forgotten


def test_what_cannot_be_scored_says_why(taps: Taps) -> None:
    step(
        taps,
        torch.rand(5, 4),
        span("cached", 0, 4, 2, 6),
        span("half", 2, 0, 3, 6),
    )
    # One row too few: an index error, which must not leave the tap.
    spans = [span("unknown", 0, 0, 1, 1, "nosignal"), span("wide", 1, 0, 2, 2)]
    step(taps, torch.rand(2, 4), *spans, places="a")
    found = taps.take(["cached", "half", "unknown", "wide"])
    assert found["cached"] == "the model was run without the first 4 tokens of the prompt"
    assert found["half"] == "only 3 of 6 tokens were run"
    assert "nosignal" in str(found["unknown"])
    assert "IndexError" in str(found["wide"]) or "RuntimeError" in str(found["wide"])
    assert not taps.active("nowhere")


def test_the_texts_of_a_calibration_are_kept_as_they_are_read(taps: Taps) -> None:
    taps.read_by({**taps.readers, (POOL, ""): TextReader((Point(0, "layers.0", "c"),), READING)})
    text, short = torch.rand(5, 4), torch.rand(1, 4)
    step(
        taps,
        torch.cat([text[:3], short]),
        span("long", 0, 0, 3, 5, ""),
        span("short", 3, 0, 1, 1, ""),
        places="abc",
    )
    step(taps, text[3:], span("long", 0, 3, 2, 5, ""), places="abc")
    long, alone = taps.take(["long", "short"]).values()
    assert isinstance(long, dict) and isinstance(alone, dict)
    assert list(long) == list(alone) == ["c"] and not taps.active("c")
    assert torch.equal(long["c"], text[1:]) and torch.equal(alone["c"], short)


def test_a_prompt_that_was_put_back_is_read_again(taps: Taps) -> None:
    first, again = torch.rand(2, 4), torch.rand(3, 4)
    step(taps, first, span("p", 0, 0, 2, 3))
    step(taps, again, span("p", 0, 0, 3, 3))
    assert taps.take(["p"])["p"] == pytest.approx([*again[1:].mean(dim=0)[:2].tolist(), 2], rel=1e-5)


def test_what_is_known_of_an_aborted_probe_is_freed(taps: Taps) -> None:
    step(taps, torch.rand(8, 4), span("aborted", 0, 0, 4, 6), span("whole", 4, 0, 4, 4))
    taps.drop("aborted")
    taps.drop("whole")  # has ended, and its scores were not taken yet
    taps.begin([])
    found = taps.take(["aborted", "whole"])
    assert found["aborted"] == "the prompt was not run as a probe" and isinstance(found["whole"], list)


def test_a_prompt_is_scored_by_the_pool_that_it_names(taps: Taps) -> None:
    other = Scorer("a")
    taps.read_by({(POOL, "calibrated"): Scorer("a", "b"), ("d2", "calibrated"): other})  # type: ignore[dict-item]
    rows = torch.rand(4, 4)
    step(taps, rows, span("p", 0, 0, 2, 2), replace(span("q", 2, 0, 2, 2), probe=Probe("q", "d2", "calibrated")))
    found = taps.take(["p", "q"])
    assert found["p"] == pytest.approx([*rows[1, :2].tolist(), 1]) and not isinstance(found["q"], str)
    assert "nothing is read" in str(_gone(taps)["r"])


def _gone(taps: Taps) -> dict[str, Any]:
    step(taps, torch.rand(2, 4), replace(span("r", 0, 0, 2, 2), probe=Probe("r", "d3", "calibrated")))
    return taps.take(["r"])


@pytest.mark.parametrize("token", ["last", "mean"])
def test_what_is_read_alone_is_described_alone(taps: Taps, token: Any) -> None:
    """As the library does: where one vector of a prompt is read, it is both of its means."""
    scored(taps, "norm", Describing("a", "b", token=token))
    prompt = torch.rand(5, 4)
    step(taps, prompt[:3], span("p", 0, 0, 3, 5, "norm"))
    step(taps, prompt[3:], span("p", 0, 3, 2, 5, "norm"))
    read = (prompt[-1] if token == "last" else prompt.mean(dim=0)).tolist()
    count = 1 if token == "last" else 5
    assert taps.take(["p"])["p"] == pytest.approx([*read[:2], count, *read, *read], rel=1e-5)


def test_a_tap_that_was_left_out_is_noticed(taps: Taps) -> None:
    for start, places in ((0, "ab"), (3, "a")):  # in the second chunk, the model runs as a graph without it
        step(taps, torch.rand(3, 4), span("p", 0, start, 3, 6), places=places)
    assert taps.take(["p"])["p"] == "the model was run without reading 0.b"


def test_a_step_that_could_not_be_begun_is_missed(taps: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores without its tokens would look like any other."""

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    for key, failing in (("middle", 3), ("last", 6)):
        for start in (0, 3, 6):
            with monkeypatch.context() as patch:
                if start == failing:
                    patch.setattr(module.torch, "full", fails)
                with pytest.raises(RuntimeError) if start == failing else nullcontext():
                    taps.begin([span(key, 0, start, 3, 9)])
            for place in ("a", "b"):
                taps.tap(place, torch.rand(3, 4))
    middle = "the model was run without the first 6 tokens of the prompt"
    assert taps.take(["middle", "last"]) == {"middle": middle, "last": "only 6 of 9 tokens were run"}
