"""Taps of the vLLM backend: prompts that are run in chunks, put back, and found in vLLM's cache."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logo.backends.vllm.marks import WHOLE, marked, reads_whole, span
from logo.backends.vllm.prefixes import Prefixes, digests
from logo.backends.vllm.sums import PromptSums, Span, Step
from logo.backends.vllm.taps import CHANGED, UNKNOWN_PREFIX, Taps
from logo.selection import signals
from logo.selection.emphasis import emphasised, late_along
from logo.selection.points import Point
from logo.selection.settings import SelectionSettings

CPU = torch.device("cpu")
BLOCK = 4


class Index:
    """Two adapters that respond with the first two numbers of a vector."""

    def __init__(self, point: Point) -> None:
        self.point = point


class Scorer:
    """The mean response of each adapter, followed by the number of tokens that were read."""

    def __init__(self, *modules: str) -> None:
        self.points = tuple(Point(0, "layers.0", module) for module in modules)
        self.indices = tuple(map(Index, self.points))
        self.names = ("one", "two")
        self.signatures: Any = None

    def among(self, names: Any) -> Tensor | None:
        return None if names == [None] else torch.tensor([[name in names[0] for name in self.names]])

    def scores(self, per_point: Any, descriptions: Any, tokens: Tensor, among: Tensor | None = None) -> Tensor:
        if among is not None:
            per_point = [torch.where(among, response, -torch.inf) for response in per_point]
        return torch.cat([torch.stack(list(per_point)).mean(dim=0), tokens[:, None]], dim=1)


class Describing(Scorer):
    """Whose scores are followed by the description of the prompt at the second point."""

    def __init__(self, *modules: str) -> None:
        super().__init__(*modules)
        self.signatures = SimpleNamespace(points=(1,))

    def scores(self, per_point: Any, descriptions: Any, tokens: Any, among: Tensor | None = None) -> Tensor:
        [description] = descriptions
        return torch.cat([super().scores(per_point, [], tokens, among), description.flatten(1)], dim=1)


@pytest.fixture
def taps(monkeypatch: pytest.MonkeyPatch, late: bool = False) -> Taps:
    reads = signals.SIGNALS["calibrated"]
    plain = signals.Signal(lambda index, hidden: hidden[:, :2], input="projection", token="each", late=late)
    monkeypatch.setitem(signals.SIGNALS, "calibrated", plain)
    assert reads.token == plain.token
    made = Taps(lambda point, read: point.module, CPU, lambda: BLOCK, 1_000_000)
    made.score("calibrated", Scorer("a", "b"), SelectionSettings())  # type: ignore[arg-type]
    return made


def test_each_prompt_is_scored_among_its_own_adapters(taps: Taps) -> None:
    taps.begin([Span("p", "calibrated", 0, 0, 3, 3), Span("q", "calibrated", 3, 0, 3, 3)])
    step = torch.rand(6, 4)
    for place in ("a", "b"):
        taps.tap(place, step)
    found = taps.take(["p", "q"], {"q": ["two"]})
    assert found["p"] == pytest.approx([*step[1:3].mean(dim=0)[:2].tolist(), 2], rel=1e-5)
    assert found["q"] == pytest.approx([-torch.inf, step[4:, 1].mean().item(), 2], rel=1e-5)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.lists(st.integers(1, 59), max_size=5),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_sums_with_emphasis_on_the_end_are_those_of_the_whole(lengths: list[int], cuts: list[int], cached: int) -> None:
    """Prompts in chunks of any size, of which some begin with blocks that are in the cache."""
    with pytest.MonkeyPatch.context() as patch:
        made = taps.__wrapped__(patch, late=True)  # type: ignore[attr-defined]
        scorer = Scorer("a", "b")
        scorer.scores = lambda per_point, *_: torch.cat(list(per_point), dim=1)  # type: ignore[method-assign]
        made.score("calibrated", scorer, SelectionSettings())  # type: ignore[arg-type]
        shared = torch.rand(cached * BLOCK, 4)
        for number, length in enumerate(lengths):
            prompt, total = torch.cat([shared, torch.rand(length, 4)]), len(shared) + length
            ids = [*range(len(shared)), *range(1000 * (number + 1), 1000 * (number + 1) + length)]
            begin = len(shared) if number else 0  # the first prompt has left its blocks in the cache
            for start, end in itertools.pairwise(sorted({begin, *(c for c in cuts if begin < c < total), total})):
                made.begin([Span(f"{number}", "calibrated", 0, start, end - start, total, ids)])
                for place in ("a", "b"):
                    made.tap(place, prompt[start:end])
            read = prompt[int(total > 1) :, :2]
            owners = torch.zeros(len(read), dtype=torch.int64)
            want = [emphasised(read, owners, 1, late)[0] for late in (0, 0, 1, 1)]
            assert made.take([f"{number}"])[f"{number}"] == pytest.approx(torch.cat(want).tolist(), rel=1e-4)


@given(cuts=st.lists(st.integers(1, 9), max_size=4))
def test_chunks_are_summed_to_the_whole(cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        made = taps.__wrapped__(patch)  # type: ignore[attr-defined]
        prompt, other = torch.rand(10, 4), torch.rand(6, 4)
        edges = sorted({0, *cuts, 10})
        for start, end in itertools.pairwise(edges):
            spans = [Span("p", "calibrated", 6, start, end - start, 10)]
            if start == 0:
                spans.append(Span("q", "calibrated", 0, 0, 6, 6))
            made.begin(spans)
            step = torch.cat([other, prompt[start:end]])
            for place in ("a", "b"):
                assert made.active(place)
                made.tap(place, step)
        found = made.take(["p", "q"])
        assert found["p"] == pytest.approx([*prompt[1:].mean(dim=0)[:2].tolist(), 9], rel=1e-5)
        assert found["q"] == pytest.approx([*other[1:].mean(dim=0)[:2].tolist(), 5], rel=1e-5)
        assert made.take(["p"])["p"] == "the prompt was not run as a probe"  # what is taken is forgotten


def test_what_cannot_be_scored_says_why(taps: Taps) -> None:
    taps.begin([Span("cached", "calibrated", 0, 4, 2, 6), Span("half", "calibrated", 2, 0, 3, 6)])
    taps.tap("a", torch.rand(5, 4))
    taps.tap("b", torch.rand(5, 4))
    taps.begin([Span("unknown", "nosignal", 0, 0, 1, 1), Span("wide", "calibrated", 1, 0, 2, 2)])
    taps.tap("a", torch.rand(2, 4))  # one row too few: an index error, which must not leave the tap
    found = taps.take(["cached", "half", "unknown", "wide"])
    assert found["cached"] == UNKNOWN_PREFIX
    assert found["half"] == "only 3 of 6 tokens were run"
    assert "nosignal" in str(found["unknown"])
    assert "IndexError" in str(found["wide"]) or "RuntimeError" in str(found["wide"])
    assert not taps.active("nowhere")


def test_a_prompt_that_was_put_back_is_read_again(taps: Taps) -> None:
    first, again = torch.rand(3, 4), torch.rand(3, 4)
    for step in (first, again):
        taps.begin([Span("p", "calibrated", 0, 0, 3, 3)])
        taps.tap("a", step)
        taps.tap("b", step)
    assert taps.take(["p"])["p"] == pytest.approx([*again[1:].mean(dim=0)[:2].tolist(), 2], rel=1e-5)


def test_the_rows_of_a_request() -> None:
    class Parameters:
        extra_args = marked("k", "norm")

    prompt = [1, 5, 6, 7]
    assert span(Parameters(), prompt, 3, 0, 2) == Span("k", "norm", 3, 0, 2, 4, prompt)
    assert span(Parameters(), prompt, 0, 2, 5) == Span("k", "norm", 0, 2, 2, 4, prompt)  # the rest is answer
    assert span(Parameters(), prompt, 3, 0, 2, pictures=True) == Span("k", "norm", 3, 0, 2, 4, prompt, True)
    assert span(Parameters(), prompt, 0, 4, 1) is None
    assert span(object(), prompt, 0, 0, 4) is None


# -- prompts whose beginning is in vLLM's cache -----------------------------------------------------------------------


def hidden(prompt: Sequence[int]) -> Tensor:
    """What a model without randomness computes: a vector per token that depends on all tokens up to it."""
    digest, rows = hashlib.blake2b(), []
    for token in prompt:
        digest.update(bytes([token]))
        rows.append([byte / 255 for byte in digest.digest()[:4]])
    return torch.tensor(rows)


class Cache:
    """The taps behind a model with a cache of whole blocks, in which everything stays that was ever run."""

    def __init__(self, made: Taps) -> None:
        self.taps, self.blocks, self.computed = made, set[tuple[int, ...]](), 0

    def remember(self, prompt: Sequence[int]) -> None:
        self.blocks |= {tuple(prompt[:end]) for end in range(BLOCK, len(prompt) + 1, BLOCK)}

    def found(self, prompt: Sequence[int]) -> int:
        """As vLLM: the last token is always computed."""
        hits = (end for end in range(BLOCK, len(prompt), BLOCK))
        return max(itertools.takewhile(lambda end: tuple(prompt[:end]) in self.blocks, hits), default=0)

    def step(self, *chunks: tuple[str, Sequence[int], int, int], signal: str = "calibrated") -> None:
        """Runs tokens `start` to `end` of some prompts, one after the other."""
        spans, rows = [], 0
        for key, prompt, start, end in chunks:
            spans.append(Span(key, signal, rows, start, end - start, len(prompt), prompt))
            rows += end - start
        self.taps.begin(spans)
        entering = torch.cat([hidden(prompt)[start:end] for _, prompt, start, end in chunks])
        for place in ("a", "b"):
            if self.taps.active(place):
                self.taps.tap(place, entering)
        for _, prompt, _, end in chunks:
            self.remember(prompt[: end // BLOCK * BLOCK])
        self.computed += rows

    def score(self, key: str, prompt: Sequence[int], *cuts: int, whole: bool = False) -> Any:
        start = 0 if whole else self.found(prompt)
        edges = [start, *sorted({cut for cut in cuts if start < cut < len(prompt)}), len(prompt)]
        for first, end in itertools.pairwise(edges):
            self.step((key, prompt, first, end))
        return self.taps.take([key])[key]


def expected(prompt: Sequence[int], described: bool = False) -> Any:
    read = hidden(prompt)[int(len(prompt) > 1) :]
    mean = read.mean(dim=0).tolist()
    scores = [*mean[:2], len(read)]
    late = emphasised(read, torch.zeros(len(read), dtype=torch.int64), 1, 1)[0].tolist()
    return pytest.approx([*scores, *mean, *late] if described else scores, rel=1e-5)


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@given(
    beginning=st.lists(st.integers(0, 2), max_size=13),
    endings=st.lists(PROMPTS, min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 25), max_size=5),
    plain=st.lists(st.integers(0, 5), max_size=3),
    described=st.booleans(),
)
def test_scores_do_not_depend_on_what_is_cached(
    beginning: list[int], endings: list[list[int]], cuts: list[int], plain: list[int], described: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cache = Cache(taps.__wrapped__(patch))  # type: ignore[attr-defined]
        if described:
            cache.taps.score("calibrated", Describing("a", "b"), SelectionSettings())  # type: ignore[arg-type]
        for i, ending in enumerate(endings):
            prompt = beginning + ending
            if i in plain:  # somebody asks the base model alone, so that the cache has what was never probed
                cache.remember(prompt)
            found = cache.score(f"p{i}", prompt, *cuts)
            if found == UNKNOWN_PREFIX:
                assert plain
                found = cache.score(f"p{i}", prompt, *cuts, whole=True)
            assert found == expected(prompt, described)
            assert cache.score(f"again{i}", prompt) == expected(prompt, described)


def test_a_prefix_that_was_probed_is_not_read_again(taps: Taps) -> None:
    cache = Cache(taps)
    first, second = [0, *[1] * 15, 2, 2], [0, *[1] * 15, 3]
    assert cache.score("p", first) == expected(first)
    assert cache.computed == 18
    assert cache.score("q", second) == expected(second)
    assert cache.computed == 19
    assert cache.score("r", first) == expected(first)
    assert cache.computed == 21


def test_a_prefix_is_known_while_its_prompt_is_still_running(taps: Taps) -> None:
    cache = Cache(taps)
    first, second = [1] * 12, [1] * 8 + [2, 2]
    cache.step(("p", first, 0, 9))
    cache.step(("p", first, 9, 12), ("q", second, 8, 10))
    found = taps.take(["p", "q"])
    assert found == {"p": expected(first), "q": expected(second)}


def test_a_prompt_that_was_put_back_goes_on_where_the_cache_ends(taps: Taps) -> None:
    taps.score("calibrated", Describing("a", "b"), SelectionSettings())  # type: ignore[arg-type]
    cache = Cache(taps)
    prompt, other = [0, 1, 2, 1, 0, 2, 1, 1, 2, 2], [2, 1, 2]
    cache.step(("p", prompt, 0, 6))
    cache.step(("q", other, 0, 3), ("p", prompt, 4, 10))
    assert taps.take(["p", "q"]) == {"p": expected(prompt, True), "q": expected(other, True)}


@pytest.mark.parametrize("token", ["last", "mean"])
def test_what_is_read_alone_is_described_alone(taps: Taps, monkeypatch: pytest.MonkeyPatch, token: Any) -> None:
    """As the library does: where one vector of a prompt is read, it is both of its means."""
    alone = signals.Signal(lambda index, hidden: hidden[:, :2], input="projection", token=token)
    monkeypatch.setitem(signals.SIGNALS, "norm", alone)
    taps.score("norm", Describing("a", "b"), SelectionSettings(signal="norm"))  # type: ignore[arg-type]
    cache, prompt = Cache(taps), [1, 2, 0, 2, 1]
    cache.step(("p", prompt, 0, 3), signal="norm")
    cache.step(("p", prompt, 3, 5), signal="norm")
    count = 1 if token == "last" else 5
    read = (hidden(prompt)[-1] if token == "last" else hidden(prompt).mean(dim=0)).tolist()
    assert taps.take(["p"])["p"] == pytest.approx([*read[:2], count, *read, *read], rel=1e-5)


def test_a_tap_that_was_left_out_is_noticed(taps: Taps) -> None:
    for start in (0, 3):
        taps.begin([Span("p", "calibrated", 0, start, 3, 6)])
        taps.tap("a", torch.rand(3, 4))
        if start == 0:  # in the second chunk, the model runs as a graph that was captured without it
            taps.tap("b", torch.rand(3, 4))
    assert taps.take(["p"])["p"] == "the model was run without reading 0.b"


def test_a_step_that_could_not_be_begun_is_missed(taps: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores without its tokens would look like any other."""

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    for key, failing in (("middle", 3), ("last", 6)):
        for start in (0, 3, 6):
            with monkeypatch.context() as patch:
                if start == failing:
                    patch.setattr(Step, "of", fails)
                with pytest.raises(RuntimeError) if start == failing else nullcontext():
                    taps.begin([Span(key, "calibrated", 0, start, 3, 9)])
            for place in ("a", "b"):
                taps.tap(place, torch.rand(3, 4))
    assert taps.take(["middle", "last"]) == {"middle": UNKNOWN_PREFIX, "last": "only 6 of 9 tokens were run"}


def test_another_pool_knows_no_prefix(taps: Taps) -> None:
    cache = Cache(taps)
    prompt = [1] * 9
    cache.step(("p", prompt, 0, 8))
    taps.score("calibrated", Scorer("a", "b"), SelectionSettings())  # type: ignore[arg-type]
    cache.step(("p", prompt, 8, 9), ("q", prompt, 8, 9))
    assert taps.take(["p", "q"]) == {"p": CHANGED, "q": UNKNOWN_PREFIX}
    assert cache.score("q", prompt, whole=True) == expected(prompt)
    assert cache.score("r", prompt) == expected(prompt)


def test_pictures_are_never_taken_for_text(taps: Taps) -> None:
    prompt, seen = [1] * 9, torch.rand(9, 4)
    for rows in (seen, torch.rand(9, 4)):
        taps.begin([Span("p", "calibrated", 0, 0, 9, 9, prompt, True)])
        taps.tap("a", rows)
        taps.tap("b", rows)
    taps.begin([Span("q", "calibrated", 0, 8, 1, 9), Span("r", "calibrated", 1, 8, 1, 9, prompt, True)])
    assert taps.take(["q", "r"]) == {"q": UNKNOWN_PREFIX, "r": UNKNOWN_PREFIX}


def test_a_signal_of_the_last_token_needs_no_beginning(taps: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    last = signals.Signal(lambda index, hidden: hidden[:, :2], input="projection", token="last")
    monkeypatch.setitem(signals.SIGNALS, "norm", last)
    taps.score("norm", Scorer("a", "b"), SelectionSettings(signal="norm"))  # type: ignore[arg-type]
    cache = Cache(taps)
    prompt = [1, 2] * 5
    cache.step(("p", prompt, 8, 10), signal="norm")
    assert taps.take(["p"])["p"] == pytest.approx([*hidden(prompt)[-1, :2].tolist(), 1])


def test_which_probes_read_everything() -> None:
    class Parameters:
        def __init__(self, mark: dict[str, str]) -> None:
            self.extra_args = mark

    assert not reads_whole(Parameters(marked("k", "norm"))) and not reads_whole(object())
    assert reads_whole(Parameters(marked("k", "norm", whole=True))) and reads_whole(Parameters(marked("k", "")))
    assert not reads_whole(Parameters({WHOLE: "1"}))


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 6))
def test_a_prefix_is_known_by_its_tokens(prompt: list[int], block: int) -> None:
    found = digests(prompt, block, "calibrated")
    assert len(found) == len(set(found)) == len(prompt) // block
    assert digests(prompt[: len(found) * block], block, "calibrated") == found
    assert not set(found) & set(digests(prompt, block, "norm"))
    changed = [(prompt[0] + 1) % 6, *prompt[1:]] if prompt else []
    assert not set(found) & set(digests(changed, block, "calibrated"))


@pytest.mark.parametrize("late", [False, True])
def test_the_sum_of_a_prompt_keeps_no_blocks(late: bool) -> None:
    sums = PromptSums("calibrated", 400)
    for _ in range(2):
        parts = torch.rand(50, 4)
        sums.add(0, parts, 50, late_along(torch.ones(50)) if late else None)
        sums.ended.clear()  # as the taps do at the end of the step
        assert sums.by_point[0].untyped_storage().nbytes() == 4 * 4


def test_prefixes_that_were_not_used_for_longest_leave() -> None:
    kept = Prefixes(budget=2 * 4 * 4)  # four beginnings of two numbers
    for name in (b"a", b"b"):
        kept.put((name, name * 2), [torch.full((2, 2), float(name[0]))])
    assert kept.get(b"a") is not None  # used just now
    kept.put((b"b", b"c"), [torch.zeros(2, 2)])
    assert kept.get(b"bb") is None and kept.get(b"b") is None
    assert [float(kept.get(b"aa")[0][0]), float(kept.get(b"c")[0][0])] == [97.0, 0.0]  # type: ignore[index]
    kept.clear()
    assert kept.get(b"a") is None
