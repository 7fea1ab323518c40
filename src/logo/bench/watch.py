"""Observations during a load: the server's memory and cache each second, and a temporary adapter."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from logo.bench.figures import metric, second_half, slope
from logo.bench.wire import Answer, said

MEMORY = "process_resident_memory_bytes"
KV_BLOCKS = "logo:kv_blocks_used"
RUNNING = ("logo:num_requests_running", "logo:num_requests_waiting")

_PATIENCE = 60.0  # seconds; timeout of requests that are not part of the load


@dataclass(frozen=True)
class Sample:
    """A server at one moment; None: not reported.

    Attributes:
        seconds: since the load began.
        resident: bytes of memory.
        kv_blocks: blocks of the KV cache in use.
        requests: running or waiting requests.
    """

    seconds: float
    resident: float | None
    kv_blocks: float | None
    requests: float | None


@dataclass(frozen=True)
class Churn:
    """An adapter that is added and removed again once every `seconds` seconds."""

    seconds: float
    folder: Path
    name: str


@dataclass(frozen=True)
class Watched:
    """One load, the server before, during and after it, and the CPU seconds of the clients."""

    answers: Sequence[Answer]
    seconds: float
    before: Sample | None = None
    after: Sample | None = None
    samples: Sequence[Sample] = ()
    changes: int = 0
    failed_changes: Sequence[str] = ()
    client_cpu: float | None = None

    def server(self) -> dict[str, object] | None:
        """Memory in bytes, blocks of the KV cache, and the drift of memory in 10⁶ bytes per minute, as JSON."""
        if self.before is None or self.after is None:
            return None
        seen = [one for one in (self.before, *self.samples, self.after) if one.resident is not None]
        line = slope(second_half([(one.seconds, one.resident or 0.0) for one in self.samples]))
        return {
            "resident_before": self.before.resident,
            "resident_max": max((one.resident or 0.0 for one in seen), default=None),
            "resident_after": self.after.resident,
            "resident_mb_per_minute": None if line is None else line * 60 / 1e6,
            "kv_blocks_before": self.before.kv_blocks,
            "kv_blocks_max": max((one.kv_blocks or 0.0 for one in self.samples), default=None),
            "kv_blocks_after": self.after.kv_blocks,
            "adapter_changes": self.changes,
            "samples": [[round(one.seconds, 2), one.resident, one.kv_blocks] for one in self.samples],
        }


async def sample(client: httpx.AsyncClient, started: float) -> Sample | None:
    """The state of the server now; None where it has no metrics or is gone."""
    try:
        response = await client.get("/metrics", timeout=_PATIENCE)
    except httpx.HTTPError:
        return None
    if response.status_code != 200:
        return None
    text = response.text
    requests = [value for name in RUNNING if (value := metric(text, name)) is not None]
    seconds = time.perf_counter() - started
    return Sample(seconds, metric(text, MEMORY), metric(text, KV_BLOCKS), sum(requests) if requests else None)


async def samples(client: httpx.AsyncClient, started: float, stop: asyncio.Event, every: float = 1.0) -> list[Sample]:
    """One sample at the beginning, and one every `every` seconds until `stop` is set."""
    found: list[Sample] = []

    async def look() -> None:
        one = await sample(client, started)
        if one is not None:
            found.append(one)

    await look()
    await _each(every, stop, look)
    return found


async def settled(
    client: httpx.AsyncClient, started: float, before: Sample | None, wait: float = 10.0
) -> Sample | None:
    """A sample once no request is left and the cache is no larger than before, or after `wait` seconds."""
    end = time.perf_counter() + wait
    while True:
        now = await sample(client, started)
        if now is None or before is None or time.perf_counter() >= end:
            return now
        if not now.requests and (now.kv_blocks or 0) <= (before.kv_blocks or 0):
            return now
        await asyncio.sleep(0.1)


async def churn(client: httpx.AsyncClient, plan: Churn, stop: asyncio.Event) -> tuple[int, list[str]]:
    """Adds and removes the adapter in turn until `stop` is set, and leaves the pool as it was.

    Returns:
        The number of changes, and a line for each one that failed.
    """
    changes = 0
    failed: list[str] = []
    present = False

    async def change() -> None:
        nonlocal changes, present
        what = "unload" if present else "load"
        body = {"lora_name": plan.name} | ({} if present else {"lora_path": str(plan.folder)})
        try:
            response = await client.post(f"/v1/{what}_lora_adapter", json=body, timeout=_PATIENCE)
        except httpx.HTTPError as error:
            failed.append(f"{what} {plan.name}: {type(error).__name__}: {error}")
            return
        if response.status_code != 200:
            failed.append(f"{what} {plan.name}: {response.status_code}: {said(response.text)}")
            return
        changes += 1
        present = not present

    await change()
    await _each(plan.seconds / 2, stop, change)
    if present:
        await change()
    return changes, failed


async def _each(seconds: float, stop: asyncio.Event, act: Callable[[], Awaitable[None]]) -> None:
    """Calls `act` every `seconds` seconds until `stop` is set; the duration of a call does not shift the next one."""
    beat = time.perf_counter()
    while not stop.is_set():
        beat = max(beat + seconds, time.perf_counter())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), beat - time.perf_counter())
        if not stop.is_set():
            await act()
