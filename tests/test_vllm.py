"""The parts of the vLLM backend that need no vLLM: products over slots, slots, mixtures of requests, options, taps."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logo.adapters.activation import EVERYWHERE, Activation
from logo.adapters.pool import open_pool
from logo.errors import LoGoError, UsageError
from logo.selection import signals
from logo.selection.points import Point
from logo.selection.reference import both_means, emphasis
from logo.vllm import patches
from logo.vllm.batched import Batched
from logo.vllm.blocks import clear, clearing, new_blocks
from logo.vllm.gates import StepGates, gated, turned
from logo.vllm.options import OPTIONS, POOL, VllmOptions
from logo.vllm.pool import rank_of, slots_of, targets_of
from logo.vllm.requests import Mix, ProbeRequest, parse, prompt_number
from logo.vllm.slots import Slots
from logo.vllm.taps import Span, Taps, TextReader

CPU = torch.device("cpu")
KEYS = st.text("0123456789abcdef", min_size=16, max_size=16)
ACTIVATIONS = st.one_of(
    st.just(EVERYWHERE),
    st.builds(lambda last: Activation(last=last), st.integers(1, 40)),
    st.builds(lambda tokens: Activation(tuple(tokens)), st.lists(st.integers(0, 2), min_size=1, max_size=2)),
)


# -- products ---------------------------------------------------------------------------------------------------------


def factors(slots: int, rank: int, inside: int, outside: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A as vLLM keeps it, B as `turned` lays it out; the same values both ways."""
    torch.manual_seed(seed)
    a, b = torch.randn(slots, 1, rank, inside), torch.randn(slots, 1, outside, rank)
    kept = turned(b)
    kept.copy_(b)
    assert kept.shape == b.shape and kept[:, 0].transpose(1, 2).is_contiguous()
    return a[:, 0], kept[:, 0].transpose(1, 2)


@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    slots=st.integers(1, 5),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_token_gets_its_own_mixture(counts: list[int], slots: int, rank: int, seed: int) -> None:
    """Of requests that are read, some longer than others, and of some that have no adapter."""
    a, b = factors(slots, rank, 6, 7, seed)
    tokens = sum(counts)
    x, y = torch.randn(tokens, 6), torch.randn(tokens, 7)
    gate, rows, at = torch.zeros(tokens, slots), [], 0
    for number, count in enumerate(counts):
        if number % 3:
            gate[at : at + count] = torch.rand(count, slots) * (torch.rand(count, slots) > 0.5)
            rows.append((at, gate[at : at + count].clone()))
        at += count
    gates = StepGates(128, 16, slots, CPU, torch.float32, eager=True)
    gates.write(rows, ())
    expected = y + torch.einsum("ts,srd,td,sro->to", gate, a, x, b)
    found = y.clone()
    for group in gates.groups:
        group.add(found, x, a, b)
    assert torch.allclose(found, expected, atol=1e-4)
    base = ~(gate != 0).any(dim=1)
    assert torch.equal(found[base], y[base])  # to the bit
    assert torch.allclose(y + gated(x, a, b, gate), expected, atol=1e-4)  # as compiled layers multiply


@pytest.mark.parametrize(
    ("ranks", "rows"),
    [
        pytest.param((64, 0, 0, 0, 0, 64), 3, id="apart"),
        pytest.param((64, 64, 64, 0, 64, 64), 3, id="together"),
        pytest.param((4,) * 12, 3, id="copied"),
        pytest.param((0, 0, 0), 3, id="none acts"),
        pytest.param((64, 16, 0, 4, 8, 64), 200, id="many rows"),
    ],
)
def test_only_the_columns_that_adapters_have_in_a_layer_count(ranks: tuple[int, ...], rows: int) -> None:
    """Slots have the rank of the largest adapter, and hold zeros behind an adapter's own."""
    slots, rank, d = len(ranks), 64, 1000
    a, b = factors(slots, rank, d, d)
    a = a / d
    for slot, own in enumerate(ranks):
        a[slot, own:] = 0
        b[slot, own:] = 0
    gate = torch.rand(rows, slots)
    gate[0] = 0
    x, y = torch.randn(rows, d), torch.randn(rows, d)
    gates = StepGates(256, 16, slots, CPU, torch.float32, eager=True)
    gates.write([(0, gate)], ())
    found = y.clone()
    for group in gates.groups:
        group.add(found, x, a, b, ranks)
    expected = y + torch.einsum("ts,srd,td,sro->to", gate, a, x, b)
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)


def test_an_adapter_that_overflows_spoils_no_other_row() -> None:
    a, b = factors(2, 2, 4, 4)
    a[1] = torch.inf
    gates = StepGates(8, 8, 2, CPU, torch.float32, eager=True)
    gates.write([(0, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))], ())
    y = torch.zeros(2, 4)
    for group in gates.groups:
        group.add(y, torch.ones(2, 4), a, b)
    assert y[0].isfinite().all() and not y[1].isfinite().all()


# -- slots ------------------------------------------------------------------------------------------------------------


def awaited(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that runs a coroutine."""
    return lambda: asyncio.run(test())


class Loaded:
    """What is in the slots, as vLLM's workers would have it."""

    def __init__(self) -> None:
        self.slots: dict[int, str] = {}
        self.bad: set[str] = set()

    async def __call__(self, into: list[tuple[int, str]]) -> None:
        await asyncio.sleep(0)
        for slot, key in into:
            if key in self.bad:
                raise LoGoError(f"{key} cannot be read")
            self.slots[slot] = key


@given(count=st.integers(2, 5), most=st.integers(1, 2), seed=st.integers(0, 10_000))
def test_a_mixture_has_its_slots_as_long_as_it_answers(count: int, most: int, seed: int) -> None:
    drawn, loaded, inside = random.Random(seed), Loaded(), list[frozenset[str]]()

    async def answer(slots: Slots) -> None:
        keys = frozenset(drawn.sample("abcdefgh", drawn.randint(0, most)))
        async with slots.held(keys):
            inside.append(keys)
            for _ in range(drawn.randint(0, 4)):
                assert keys <= set(loaded.slots.values())
                assert len(frozenset().union(*inside)) <= count
                await asyncio.sleep(0)
            inside.remove(keys)

    async def whole() -> None:
        slots = Slots(count, loaded)
        await asyncio.wait_for(asyncio.gather(*(answer(slots) for _ in range(40))), 30)
        async with slots.held(frozenset("abcdefgh"[:count])):  # nothing is held any more
            pass

    asyncio.run(whole())
    asyncio.run(leaving(count, drawn))


async def leaving(count: int, drawn: random.Random) -> None:
    """Clients leave while they wait, load or answer; others are served all the same."""
    slots = Slots(count, Loaded())

    async def answer() -> None:
        async with slots.held(frozenset(drawn.sample("abcdefgh", 2))):
            await asyncio.sleep(0.001)

    tasks = [asyncio.create_task(answer()) for _ in range(30)]
    for task in drawn.sample(tasks, 15):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    async with slots.held(frozenset("abcdefgh"[:count])):
        pass


@awaited
async def test_the_first_that_waits_is_not_passed_for_ever() -> None:
    slots, order = Slots(2, Loaded()), list[str]()

    async def answer(keys: str, name: str) -> None:
        async with slots.held(frozenset(keys)):
            order.append(name)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(answer("ab", "first"))]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(answer("cd", "waits"))]
    tasks += [asyncio.create_task(answer("a", f"{i}")) for i in range(100)]
    await asyncio.wait_for(asyncio.gather(*tasks), 30)
    assert order.index("waits") <= 40


@awaited
async def test_the_base_model_alone_waits_for_nobody() -> None:
    slots = Slots(1, Loaded())

    async def answer(keys: str) -> None:
        async with slots.held(keys):
            pass

    async with slots.held("a"):
        waits = asyncio.create_task(answer("b"))
        await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.wait_for(answer(""), 30)
        assert not waits.done()
    await asyncio.wait_for(waits, 30)


@awaited
async def test_an_adapter_that_cannot_be_loaded_fails_alone() -> None:
    loaded = Loaded()
    loaded.bad = {"a"}
    slots = Slots(2, loaded)

    async def answer(keys: str) -> str:
        async with slots.held(frozenset(keys)):
            return keys

    found = await asyncio.gather(answer("a"), answer("b"), answer("a"), answer("c"), return_exceptions=True)
    assert [str(one) for one in found] == ["a cannot be read", "b", "a cannot be read", "c"]
    # Whoever wants one that is loaded beside it has to have it all the same.
    found = await asyncio.gather(answer("ad"), answer("d"), return_exceptions=True)
    assert [str(one) for one in found] == ["a cannot be read", "d"]
    assert "d" in loaded.slots.values()
    loaded.bad = set()
    assert await answer("a") == "a"
    with pytest.raises(UsageError, match="this mixture has 3 adapters, and vLLM has 2 slots"):
        await answer("abc")


@awaited
async def test_a_slot_that_is_being_filled_is_not_given_away() -> None:
    """Its client has left, and others ask for the slot, and for the adapter again."""
    loaded, go = Loaded(), asyncio.Event()

    async def slowly(into: list[tuple[int, str]]) -> None:
        await go.wait()
        await loaded(into)

    slots = Slots(1, slowly)

    async def answer(key: str) -> str:
        async with slots.held({key}):
            return loaded.slots[0]

    left = asyncio.create_task(answer("a"))
    await asyncio.sleep(0)
    left.cancel()
    others = [asyncio.create_task(answer(key)) for key in "bab"]
    await asyncio.sleep(0)
    go.set()
    assert await asyncio.wait_for(asyncio.gather(*others), 30) == ["b", "a", "b"]


def test_slots_follow_from_the_pool() -> None:
    pool = open_pool(None, "demo")  # 16 adapters of rank 8
    assert (slots_of(pool, 3), rank_of(pool), targets_of(pool)) == (16, 8, ("q_proj", "v_proj"))
    assert (slots_of(pool, 3, grows=True), slots_of(pool, 99, grows=True)) == (64, 99)
    with pytest.raises(UsageError, match="adapter 'add_numbers' has rank 8: pass --max-lora-rank 8 or more"):
        rank_of(pool, 4)


# -- calls that are shared --------------------------------------------------------------------------------------------


@awaited
async def test_those_who_wait_share_the_next_call() -> None:
    """Also its error; whoever has left before is not asked for, and whoever leaves meanwhile takes nobody along."""
    batches: list[list[int]] = []
    going = asyncio.Event()

    async def negative(items: list[int]) -> list[int]:
        batches.append(items)
        await going.wait()
        if 5 in items:
            raise LoGoError("no five")
        return [-item for item in items]

    batched = Batched(negative)

    async def asked(*items: int) -> list[asyncio.Task[int]]:
        tasks = [asyncio.create_task(batched(item)) for item in items]
        for _ in range(3):  # until they wait
            await asyncio.sleep(0)
        return tasks

    first, leaves_meanwhile = await asked(1, 2)
    second, third, left_before = await asked(3, 4, 0)
    left_before.cancel()
    leaves_meanwhile.cancel()
    going.set()
    assert await asyncio.gather(first, second, third) == [-1, -3, -4]
    found = await asyncio.gather(*await asked(5, 6), return_exceptions=True)
    assert [str(error) for error in found] == ["no five"] * 2
    assert await batched(7) == -7
    assert batches == [[1, 2], [3, 4], [5, 6], [7]] and left_before.cancelled() and leaves_meanwhile.cancelled()


# -- requests ---------------------------------------------------------------------------------------------------------


@given(st.dictionaries(KEYS, st.tuples(st.floats(-16, 16, width=32), ACTIVATIONS), min_size=1, max_size=20))
def test_a_mixture_is_read_as_it_was_written(mixture: dict[str, tuple[float, Activation]]) -> None:
    made = Mix.of((key, weight, where) for key, (weight, where) in mixture.items())
    assert parse(made.path) == made
    written = {key: (torch.tensor(weight).item(), where) for key, weight, where in made.parts}
    assert written == {key: found for key, found in mixture.items() if found[0]}  # every float32 survives
    assert Mix.of((key, weight, where) for key, (weight, where) in reversed(mixture.items())).path == made.path
    key, (_, where) = next(iter(mixture.items()))  # adapters with equal content are one
    twice = Mix.of([(key, 1.0, where), (key, 2.0, where)])
    assert twice.parts == ((key, 3.0, where),)
    probe = ProbeRequest(key, "pool", "norm", ("a", "b"), True, True)
    assert parse(probe.path) == probe and parse("/a/folder") is None


def request(path: str, prompt: list[int]) -> Any:
    """vLLM's `Request`, as far as its blocks are keyed by it."""
    return SimpleNamespace(lora_request=Lora("logo", 1, path), prompt_token_ids=prompt, num_prompt_tokens=len(prompt))


class Lora:
    """vLLM's `LoRARequest`, as far as it is read."""

    def __init__(self, name: str, number: int, path: str) -> None:
        self.lora_name, self.lora_int_id, self.lora_path = name, number, path


def block_key(asked: Any, end: int) -> str | None:
    """The path by which a block is keyed; None: as the base model's."""

    def original(one: Any, start: int, end: int) -> str | None:
        return None if one.lora_request is None else str(one.lora_request.lora_path)

    found: str | None = patches._block_hash(original, asked, end - 16, end)
    assert asked.lora_request is not None
    return found


def test_blocks_before_adapters_act_are_the_base_models() -> None:
    late = Mix.of([("a", 0.7, Activation(last=4)), ("b", 0.3, Activation(last=4))])  # from position 36 on
    asked, other = request(late.path, [1] * 40), request(late.path, [1] * 41)
    assert [block_key(asked, end) for end in (16, 32, 36)] == [None] * 3
    assert block_key(asked, 37) not in (None, late.path)
    # The same tokens, but a prompt that ends elsewhere: other keys and values behind the beginning.
    assert block_key(asked, 48) != block_key(other, 48)
    silent = Mix.of([("a", 1.0, Activation((9,)))])
    assert block_key(request(silent.path, [1] * 40), 48) is None
    plain = Mix.of([("a", 1.0, EVERYWHERE)])
    assert block_key(request(plain.path, [1] * 40), 16) == plain.path
    assert block_key(request(ProbeRequest("k", "p", "norm").path, [1] * 40), 48) is None
    alone = ProbeRequest("k", "p", "norm", alone=True).path  # whose key nobody else has
    assert block_key(request(alone, [1] * 40), 16) == alone
    assert block_key(request("/a/folder", [1] * 40), 16) == "/a/folder"
    scored = Mix.of([("a", 1.0, Activation(last=2))], prompt=6)  # three tokens of a completion follow
    assert scored.begins([1] * 9) == (4,)


def test_the_prompts_of_a_request_have_numbers() -> None:
    assert [prompt_number(name) for name in ("cmpl-8f3a-0", "cmpl-8f3a-a1b2-12", "my-own-id-7-3")] == [0, 12, 3]


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_new_blocks_are_cleared_and_never_those_that_hold_computed_tokens() -> None:
    """Of two groups, with blocks of 16 and of 8 tokens."""
    fresh = SimpleNamespace(num_computed_tokens=0, block_ids=([1, 2], [3, 4, 5]))
    found = SimpleNamespace(num_computed_tokens=32, block_ids=([6, 7, 8], [9, 10, 11, 12, 13]))  # in the prefix cache
    loaded = SimpleNamespace(num_computed_tokens=17, block_ids=([14, 15], [16, 17, 18]))  # from elsewhere, in part
    running = SimpleNamespace(
        req_ids=["grows", "waits", "resumed"],
        num_computed_tokens=[32, 5, 16],
        new_block_ids=[([19], []), None, ([20, 21], [22, 23, 24])],
        resumed_req_ids={"resumed"},
    )
    step = SimpleNamespace(scheduled_new_reqs=[fresh, found, loaded], scheduled_cached_reqs=running)
    assert new_blocks(step, (16, 8)) == [1, 2, 3, 4, 5, 8, 13, 19, 21, 24]


def test_vllm_clears_blocks_itself_where_it_always_does() -> None:
    def runner(**config: Any) -> Any:
        specs = [SimpleNamespace(block_size=16, dcp_sharded=True), SimpleNamespace(block_size=8, dcp_sharded=False)]
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
        parallel = SimpleNamespace(decode_context_parallel_size=2)
        return SimpleNamespace(
            device=CPU,
            kv_cache_config=SimpleNamespace(kv_cache_groups=groups, **config),
            vllm_config=SimpleNamespace(parallel_config=parallel),
        )

    assert clearing(runner(needs_kv_cache_zeroing=True)) is None
    assert clearing(runner(needs_kv_cache_zeroing=False)) == (32, 8)


def test_on_cpus_blocks_of_layers_with_a_window_are_cleared_too() -> None:
    """Which vLLM's model runner for CPUs passes over."""
    caches = {name: torch.full((4, 2, 16, 8), torch.nan) for name in ("full", "window")}
    groups = [SimpleNamespace(layer_names=[name]) for name in caches]
    runner = SimpleNamespace(
        device=CPU,
        kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
        compilation_config=SimpleNamespace(
            static_forward_context={name: SimpleNamespace(kv_cache=cache) for name, cache in caches.items()}
        ),
    )
    fresh = SimpleNamespace(num_computed_tokens=0, block_ids=([1], [3]))
    running = SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set())
    clear(runner, SimpleNamespace(scheduled_new_reqs=[fresh], scheduled_cached_reqs=running), (16, 16))
    for cache in caches.values():  # groups share tensors, and a block is of one group alone
        assert [bool(block.isnan().all()) for block in cache] == [True, False, True, False]
        assert bool((cache[[1, 3]] == 0).all())


# -- options ----------------------------------------------------------------------------------------------------------


def test_options_come_from_both_places() -> None:
    assert VllmOptions.of(None, {}) is None and VllmOptions.of({"other": 1}, {}) is None
    given = {"k": 2, "signal": "norm", "prior": 0.5}
    made = VllmOptions.of({"logo": {"k": 3}}, {POOL: "pool", OPTIONS: json.dumps(given)})
    assert made is not None
    assert (made.pool, made.settings.k, made.settings.signal, made.settings.prior) == ("pool", 3, "norm", 0.5)
    assert made.all_signals == ("norm",)


def test_options_that_cannot_be_used() -> None:
    for additional, environment, expected in (
        ({"logo": {"pol": "x"}}, {}, "unknown option 'pol' of LoGo (did you mean 'pool'?)"),
        ({"logo": 3}, {}, "expected 'logo' to be an object, found int"),
        ({"logo": {"k": 2}}, {}, "LoGo needs a pool: set LOGO_POOL"),
        ({}, {OPTIONS: "{", POOL: "p"}, "LOGO_OPTIONS: expected a JSON object"),
        ({"logo": {"adapter_changes": "yes"}}, {POOL: "p"}, "adapter_changes"),
        ({"logo": {"signals": ["nosuch"]}}, {POOL: "p"}, "unknown signal 'nosuch'"),
        ({"logo": {"probe_context": "pool", "signal": "norm"}}, {POOL: "p"}, "unknown option"),
    ):
        with pytest.raises(UsageError) as error:
            VllmOptions.of(additional, environment)
        assert expected in str(error.value)


def test_a_pool_that_was_left_in_the_environment_is_nothing_to_a_server_without_our_routes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a server that is started as before LoGo would answer for its named adapters with the base model alone."""
    monkeypatch.setenv(POOL, "pool")
    for plugins_of_vllm, is_ours in ((None, False), ("mine", False), ("mine,logo", True)):
        if plugins_of_vllm is None:
            monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("VLLM_PLUGINS", plugins_of_vllm)
        assert (patches.options_of(SimpleNamespace(additional_config={})) is not None) == is_ours
        asked = SimpleNamespace(additional_config={"logo": {"pool": "offline"}})
        assert getattr(patches.options_of(asked), "pool", None) == "offline"


def test_vllm_is_not_imported_by_what_everybody_imports() -> None:
    source = Path(__file__).parent.parent / "src" / "logo"
    files = [path for path in source.rglob("*.py") if "vllm" not in path.parts]
    lines = [line for path in files for line in path.read_text().splitlines()]
    assert not any(line.startswith(("import vllm", "from vllm")) for line in lines)


# -- taps: prompts that are run in chunks, put back, and aborted -------------------------------------------------------


READING = signals.Signal(lambda index, hidden: hidden[:, :2], input="projection", token="each")
DIGEST = "d1"  # the digest of the pool


class Index:
    """Two adapters that respond with the first two numbers of a vector."""

    def __init__(self, point: Point) -> None:
        self.point = point


class Scorer:
    """The mean response of each adapter, the number of tokens that were read, and the description of the prompt at the
    last point if it is described."""

    def __init__(self, *modules: str, described: bool = False, **signal: Any) -> None:
        self.signal = replace(READING, **signal)
        self.points = tuple(Point(0, "layers.0", module) for module in modules)
        self.indices = tuple(map(Index, self.points[: len(modules) - described]))
        self.names = ("one", "two")
        self.described = (len(modules) - 1,) if described else ()

    def score_responses(
        self, per_point: Any, descriptions: Any, tokens: Tensor, among: Any = (None,), encoded: Any = None
    ) -> Tensor:
        if among[0] is not None:
            asked = torch.tensor([[name in among[0] for name in self.names]])
            per_point = [torch.where(asked, response, -torch.inf) for response in per_point]
        described = [one.flatten(1) for one in descriptions]
        return torch.cat([torch.stack(list(per_point)).mean(dim=0), tokens[:, None], *described], dim=1)


def scored(made: Taps, signal: str, scorer: Any) -> Taps:
    made.read_by({(DIGEST, signal): scorer})
    return made


@pytest.fixture
def taps() -> Taps:
    return scored(Taps(lambda point, read: point.module, CPU), "calibrated", Scorer("a", "b"))


def span(key: str, row: int, start: int, count: int, total: int, signal: str = "calibrated", among: Any = None) -> Span:
    return Span(ProbeRequest(key, DIGEST, signal, among), range(total), row, start, count)


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
def test_chunks_are_summed_to_the_whole(lengths: list[int], cuts: list[int], late: bool, described: bool) -> None:
    """Prompts that run at the same time, in chunks of any size."""
    made = Taps(lambda point, read: point.module, CPU)
    scorer = Scorer("a", "b", described=described, late=late)
    if late:
        scorer.score_responses = lambda per_point, *_: torch.cat(list(per_point), dim=1)  # type: ignore[method-assign]
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
        responses = 1 if described else 2  # places at which adapters are scored
        expected = [*even[:2] * responses, *last[:2] * responses] if late else [*even[:2], len(read)]
        expected += [*even, *last] if described and not late else []
        assert found[f"{number}"] == pytest.approx(expected, rel=1e-4)
    assert made.take(["0"])["0"] == "the prompt was not run as a probe"  # what is taken is forgotten


def test_what_cannot_be_scored_says_why(taps: Taps) -> None:
    step(taps, torch.rand(5, 4), span("cached", 0, 4, 2, 6), span("half", 2, 0, 3, 6))
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
    taps.read_by({**taps.readers, (DIGEST, ""): TextReader((Point(0, "layers.0", "c"),), READING)})
    text, short = torch.rand(5, 4), torch.rand(1, 4)
    both = torch.cat([text[:3], short])
    step(taps, both, span("long", 0, 0, 3, 5, ""), span("short", 3, 0, 1, 1, ""), places="abc")
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
    taps.read_by({(DIGEST, "calibrated"): Scorer("a", "b"), ("d2", "calibrated"): other})  # type: ignore[dict-item]
    rows = torch.rand(4, 4)
    step(taps, rows, span("p", 0, 0, 2, 2), replace(span("q", 2, 0, 2, 2), probe=ProbeRequest("q", "d2", "calibrated")))
    found = taps.take(["p", "q"])
    assert found["p"] == pytest.approx([*rows[1, :2].tolist(), 1]) and not isinstance(found["q"], str)
    step(taps, rows[:2], replace(span("r", 0, 0, 2, 2), probe=ProbeRequest("r", "d3", "calibrated")))
    assert "nothing is read" in str(taps.take(["r"])["r"])


def test_what_is_read_alone_is_described_alone(taps: Taps) -> None:
    """As the library does: where one vector of a prompt is read, it is both of its means."""
    scored(taps, "norm", Scorer("a", "b", described=True, token="last"))
    prompt = torch.rand(5, 4)
    step(taps, prompt[:3], span("p", 0, 0, 3, 5, "norm"))
    step(taps, prompt[3:], span("p", 0, 3, 2, 5, "norm"))
    last = prompt[-1].tolist()
    assert taps.take(["p"])["p"] == pytest.approx([*last[:2], 1, *last, *last], rel=1e-5)


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
                    patch.setattr(torch, "full", fails)
                with pytest.raises(RuntimeError) if start == failing else nullcontext():
                    taps.begin([span(key, 0, start, 3, 9)])
            for place in ("a", "b"):
                taps.tap(place, torch.rand(3, 4))
    middle = "the model was run without the first 6 tokens of the prompt"
    assert taps.take(["middle", "last"]) == {"middle": middle, "last": "only 6 of 9 tokens were run"}
