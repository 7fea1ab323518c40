"""Parts of our server: what is said of errors, the memory it may take, keys and values of rows, and draws of tokens."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from torch import nn
from transformers import DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper

from http_server import eventually, serving
from logo.api.errors import ApiError, NotReady, failed
from logo.api.guards import GuardSettings, response
from logo.api.layers import guard
from logo.api.logs import RequestIds
from logo.errors import AdapterError, DataError, NotFinite, PoolError, StorageError, UsageError, is_out_of_memory
from logo.mixing.cache import ADAPTER_SHARE
from logo.plugins import running
from logo.serve import memory
from logo.serve.batched_cache import BatchedCache
from logo.serve.memory import Memory, MemoryPlan
from logo.serve.sampling import Draw, Sampling, next_tokens
from logo.serve.turns import Turns
from tolerances import PATIENCE

VOCABULARY = 12
SAMPLING = st.builds(
    Sampling,
    max_tokens=st.just(4),
    temperature=st.sampled_from([0.0, 1e-7, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["", "ok.test", "https://ok.test/"])
def test_keys_and_origins_that_are_none_are_refused(origin: str) -> None:
    for key, found in (("a b", "one with other characters"), ("", "a blank one"), (" ", "a blank one")):
        with pytest.raises(UsageError, match=f"--api-key or LOGO_API_KEY: expected keys of .*, found {found}; give"):
            GuardSettings(api_keys=("fine", key))
    with pytest.raises(UsageError, match="--cors: expected"):
        GuardSettings(cors_origins=("*", "http://localhost:3000", origin))


def test_a_crash_is_answered_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A stream that crashes is cut, so that the client notices."""

    async def crash(request: Request) -> Response:
        raise RuntimeError("secret")

    async def stream(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"data: 0\n\n"
            raise RuntimeError("secret")

        return StreamingResponse(pieces(), media_type="text/event-stream")

    def log() -> list[logging.LogRecord]:
        ours = [record for record in caplog.records if record.name.startswith("logo.")]
        return [record for record in ours if record.__dict__.get("request_id") == "mine-1"]

    app = guard(Starlette(routes=[Route("/crash", crash), Route("/stream", stream)]), GuardSettings())
    with caplog.at_level(logging.INFO), caplog.filtering(RequestIds()), serving(app) as url:
        answer = httpx.get(f"{url}/crash", headers={"X-Request-Id": "mine-1"})
        assert "secret" not in answer.text and answer.status_code == 500
        assert answer.headers["x-content-type-options"] == "nosniff"
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{url}/stream", headers={"X-Request-Id": "mine-1"})
        eventually(lambda: len(log()) == 4)
    crashes = [record for record in log() if record.name != "logo.access"]
    assert all(record.exc_info and isinstance(record.exc_info[1], RuntimeError) for record in crashes)
    assert [r.__dict__["fields"].get("incomplete") for r in log() if r.name == "logo.access"] == [None, True]


def test_websockets_are_turned_away() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/models", "headers": [], "query_string": b""}
    asyncio.run(guard(Starlette(), GuardSettings())(scope, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def missing() -> StorageError:
    found = StorageError("adapters/x: no such folder")
    found.__cause__ = FileNotFoundError("adapters/x")
    return found


EXHAUSTED = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory: secret"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
)


def test_every_failure_has_an_answer() -> None:
    """Exhausted memory is one thing for requests, batches, plugins and the command line."""
    for cause, status, said in (
        (UsageError("k: expected 1 or more"), 400, "k: expected 1 or more"),
        (PoolError("no adapter 'x'\n(did you mean 'y'?)"), 400, "no adapter 'x' (did you mean 'y'?)"),
        (AdapterError("x", "rank " + "9" * 5000), 500, "adapter 'x': rank 99"),
        (StorageError("adapters/x: not readable"), 400, "adapters/x: not readable"),
        (missing(), 404, "adapters/x: no such folder"),
        (NotFinite("the model's output is not finite"), 500, "the model's output is not finite"),
        (DataError("/srv/secret/data is broken"), 500, "the server failed to answer (request id r1)"),
        (KeyError("secret"), 500, "the server failed to answer (request id r1)"),
        (ValueError("out of memory: secret"), 500, "the server failed to answer (request id r1)"),
        *((error, 503, "out of memory for this request") for error in EXHAUSTED),
        (failed("too long", "timeout", 504), 504, "too long"),
    ):
        found = ApiError.of(cause, "r1")
        assert found.status == status and found.message.startswith(said)
        assert len(found.message) <= 500 and "secret" not in response(found).body.decode() and "\n" not in found.message
        assert is_out_of_memory(cause) == (cause in EXHAUSTED)
        if cause in EXHAUSTED:
            with pytest.raises(type(cause)), running("signal 'x'"):
                raise cause


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_told_in_a_line_and_refused_where_it_is_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 10**9)
    model = nn.Linear(1000, 1000, bias=False)
    plan = MemoryPlan.of(model, int(ADAPTER_SHARE * 10**9), Memory())  # the defaults fit beside each other
    assert (plan.model, plan.kv, plan.free) == (4_000_000, 300_000_000, 10**9)
    elsewhere = MemoryPlan.of(model.to("meta"), plan.adapters, Memory())  # also while keys and values are copied
    assert plan.adapters + 2 * elsewhere.kv < plan.free
    assert plan.line == (
        "Memory: model 0.00 GB · up to 0.30 GB of adapters · up to 0.30 GB of keys and values · 1.00 GB free beside "
        "the model"
    )
    with pytest.raises(UsageError, match=r"0\.70 GB of adapters · up to 0\.40 GB.*--adapter-memory-gb or --kv-cache"):
        MemoryPlan.of(nn.Linear(2, 2), 700_000_000, Memory(kv_cache_gb=0.4))
    assert MemoryPlan.of(nn.Linear(2, 2), 600_000_000, Memory(kv_cache_gb=0.4)).kv == 400_000_000


# -- keys and values -------------------------------------------------------------------------------------------------


def read(*lengths: int) -> DynamicCache:
    """A batch of prompts, padded on the left, whose keys and values are their lengths."""
    rows = torch.zeros(len(lengths), 1, max(lengths), 2)
    for row, length in zip(rows, lengths, strict=True):
        row[:, row.shape[1] - length :] = length
    cache = DynamicCache()
    cache.update(rows, rows.clone(), 0)
    return cache


def seen(cache: BatchedCache, rows: int) -> list[tuple[int, list[float]]]:
    """The position of each row's next token, and what the row holds."""
    mask, positions, layers = cache.seen(0, rows)
    keys = layers.layers[0].keys[:, 0, : cache.columns, 0]
    return [(int(at), row[keep.bool()].tolist()) for at, row, keep in zip(positions, keys, mask[:, :-1], strict=True)]


def test_a_row_for_which_there_is_no_memory_leaves_the_others_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BatchedCache(read(1), 10**6)
    cache.join(read(4, 3), [4, 3], [0, 1])
    before = seen(cache, 2)
    assert before == [(4, [4.0] * 4), (3, [3.0] * 3)]

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_zeros", full)
        with pytest.raises(torch.OutOfMemoryError):
            cache.join(read(40), [40], [2])
    assert seen(cache, 2) == before
    cache.join(read(40), [40], [2])
    cache.drop(0)  # the last one takes its place
    assert seen(cache, 2) == [(40, [40.0] * 40), before[1]]


def test_rows_that_have_left_take_no_memory_once_others_grow() -> None:
    cache = BatchedCache(read(1), 10**6)
    cache.join(read(*[4] * 64), [4] * 64, range(64))
    for row in reversed(range(1, 64)):
        cache.drop(row)
    for _ in range(500):
        cache.make_room()
        cache.columns += 1
    _, _, layers = cache.seen(0, 1)
    held = layers.layers[0].keys.untyped_storage().nbytes()
    assert held <= 2 * (504 + 32) * 2 * 4  # two rows: one may come without a copy of all


def test_the_mask_of_a_step_is_made_where_the_rows_are() -> None:
    with torch.device("meta"):
        cache = BatchedCache(read(1), 10**6)
        cache.join(read(4, 3), [4, 3], [0, 1])
    mask, positions, _ = cache.seen(0, 2)
    assert mask.is_meta and positions.is_meta
    assert mask.shape == (2, 5) and positions.shape == (2, 1)


@pytest.mark.parametrize("most", [400, 700, 1000])
def test_keys_and_values_take_what_they_may_and_no_more(most: int) -> None:
    """Ten rows of up to forty tokens come one by one, while the first ones grow."""
    cache, count = BatchedCache(read(1), most), 0
    for _ in range(30):
        if count < 10:
            cache.join(read(10), [10], [count])
            count += 1
        cache.make_room()
        rows, _, columns, _ = cache._layers[0][0].shape
        assert count <= rows and cache.columns < columns and rows * columns <= most
        cache.columns += 1
    assert [at for at, _ in seen(cache, 10)] == list(range(40, 30, -1))


# -- turns -----------------------------------------------------------------------------------------------------------


def test_between_two_pauses_there_is_a_step_and_none_is_made_in_a_pause() -> None:
    """However many selections there are, answers go on."""
    steps: list[bool] = []  # whether somebody paused meanwhile
    pausing: set[int] = set()
    seen: list[int] = []  # how many steps there were at each pause
    turns = Turns(lambda: len(steps) < 200)

    def step() -> None:
        while turns.next_step():
            steps.append(bool(pausing))

    def pause() -> None:
        while len(steps) < 200:
            with turns.pause():
                pausing.add(threading.get_ident())
                seen.append(len(steps))
                pausing.remove(threading.get_ident())

    with ThreadPoolExecutor(3) as threads:
        stepping = threads.submit(step)
        for future in [threads.submit(pause) for _ in range(2)]:
            future.result(PATIENCE)
        turns.stop()
        stepping.result(PATIENCE)
    assert len(steps) == 200 and not any(steps)
    # Two that pause may do so together, but not one of them twice.
    assert all(seen.count(number) <= 2 for number in set(seen) - {200})
    with pytest.raises(NotReady, match="generation has stopped"), turns.pause():
        pass


# -- draws -----------------------------------------------------------------------------------------------------------


def draw(scores: torch.Tensor, ways: list[Sampling], number: int = 0) -> list[int]:
    tokens: list[int] = next_tokens(scores, [Draw(way, number) for way in ways]).tolist()
    return tokens


def steps(seed: int, count: int, rows: int) -> torch.Tensor:
    return torch.randn(count, rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


@given(st.lists(SAMPLING, min_size=1, max_size=5), st.integers(0, 1000), st.data())
def test_a_sequence_draws_the_same_alone_as_in_company(ways: list[Sampling], seed: int, data: st.DataObject) -> None:
    scores = steps(seed, 4, len(ways))
    drawn = [draw(step, ways, number) for number, step in enumerate(scores)]
    row = data.draw(st.integers(0, len(ways) - 1))
    alone = [draw(step[row : row + 1], [ways[row]], number)[0] for number, step in enumerate(scores)]
    assert alone == [tokens[row] for tokens in drawn]


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    counts = torch.zeros(3)
    for number in range(4000):
        counts[draw(scores, [Sampling(1, temperature=0.5, seed=7)], number)] += 1
    torch.testing.assert_close(counts / 4000, (scores[0] / 0.5).softmax(0), rtol=0, atol=0.03)


@given(st.lists(SAMPLING.filter(lambda way: not way.greedy), min_size=1, max_size=5), st.integers(0, 1000))
def test_the_nucleus_is_the_one_of_transformers(ways: list[Sampling], seed: int) -> None:
    [scores] = steps(seed, 1, len(ways))
    for row, way in zip(scores, ways, strict=True):
        warped = TemperatureLogitsWarper(way.temperature)(None, row[None])
        warped = TopPLogitsWarper(way.top_p)(None, warped) if way.top_p < 1 else warped
        noise = torch.empty(VOCABULARY)
        Draw(way, 0).add_noise(noise)
        assert draw(row[None], [way]) == [int((warped[0].softmax(0) / noise).argmax())]
