"""A server under load: what LoGo serves, its base model alone, and one prompt after another.

    python benchmarks/load.py --base-model demo --requests 500 --concurrency 64 --verify 500

Starts `logo serve` for each arm, or measures the server at `--url`. The same requests go to LoGo, to the base model
alone and, one at a time, to LoGo. What follows `--` are options for `logo serve`. The exit code is 1 if a request
fails, a compared answer differs, or the server keeps a part of its KV cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from clients import Answer, Ask, Endpoint, run_load, said
from figures import Summary, metric
from local_server import LocalServer
from logo import Generation, LoGo
from logo.demo import heldout
from logo.errors import LoGoError

ARMS = ("logo", "base", "one-by-one")
MEMORY = "process_resident_memory_bytes"
KV_TOKENS = "logo:kv_tokens_used"

_WARM_UP = 16  # requests before each load, which do not count
_SETTLED = 10.0  # seconds in which a server has to free what the load used
_SHOWN = 5  # differences that are named


@dataclass(frozen=True)
class Load:
    """The load of one arm.

    Attributes:
        answers: in the order in which they ended.
        seconds: wall time.
        before, after: the server's metrics; without those it does not have.
        client_cpu: CPU seconds of the clients.
    """

    answers: Sequence[Answer]
    seconds: float
    before: dict[str, float]
    after: dict[str, float]
    client_cpu: float

    @property
    def summary(self) -> Summary:
        """Rates and times."""
        return Summary.of(self.answers, self.seconds)

    def problems(self, arm: str) -> Iterator[str]:
        """Errors, and memory that the server did not free."""
        for kind, count in self.summary.errors.items():
            first = next(answer.message for answer in self.answers if answer.error == kind)
            yield f"{arm}: {count} × {kind}: {first}"
        kept = self.after.get(KV_TOKENS, 0.0) - self.before.get(KV_TOKENS, 0.0)
        if kept > 0:
            yield f"{arm}: the keys and values of {kept:g} tokens more in use than before the load"


async def measure(endpoint: Endpoint, arm: str, asks: Sequence[Ask], concurrency: int, timeout: float) -> Load:
    """Runs the load of one arm on a server.

    Raises:
        LoGoError: there is no server, or it has no model for the arm.
    """
    async with endpoint.client() as client:
        model = await _model(client, arm)
        concurrency = 1 if arm == "one-by-one" else concurrency
        # Their prompts begin in another way, so that a cache of prompt beginnings holds nothing of the measured ones.
        warm_up = [replace(ask, prompt=f"Please answer. {ask.prompt}") for ask in asks[:_WARM_UP]]
        await run_load(endpoint, model, warm_up, concurrency=concurrency, timeout=timeout)
        before, cpu = await _metrics(client), time.process_time()
        answers, seconds = await run_load(endpoint, model, asks, concurrency=concurrency, timeout=timeout)
        cpu, end = time.process_time() - cpu, time.perf_counter() + _SETTLED
        after = await _metrics(client)
        while after.get(KV_TOKENS, 0.0) > before.get(KV_TOKENS, 0.0) and time.perf_counter() < end:
            await asyncio.sleep(0.1)
            after = await _metrics(client)
        return Load(answers, seconds, before, after, cpu)


async def _model(client: httpx.AsyncClient, arm: str) -> str:
    """The model id under which the server answers as the arm requires."""
    role = "base" if arm == "base" else "auto"
    try:
        response = await client.get("/v1/models", timeout=60.0)
    except httpx.HTTPError as error:
        raise LoGoError(f"server {client.base_url}: no answer ({type(error).__name__}: {error}); is it up?") from error
    if response.status_code != 200:
        raise LoGoError(f"server {client.base_url}: {response.status_code}: {said(response.text)}")
    names = [str(model["id"]) for model in response.json()["data"] if model.get("logo", {}).get("role") == role]
    if not names:
        raise LoGoError(
            f"server {client.base_url}: has no model for the arm {arm!r} (of the role {role!r}); see --arms"
        )
    return names[0]


async def _metrics(client: httpx.AsyncClient) -> dict[str, float]:
    try:
        text = (await client.get("/metrics", timeout=60.0)).text
    except httpx.HTTPError:
        return {}
    return {name: value for name in (MEMORY, KV_TOKENS) if (value := metric(text, name)) is not None}


def make_asks(prompts: Sequence[str], count: int, max_tokens: tuple[int, int], seed: int) -> list[Ask]:
    """This many requests, half of them streamed: the prompts in random order, repeated if there are fewer.

    Args:
        max_tokens: range of the longest answer, drawn uniformly.
    """
    chance = random.Random(seed)
    order: list[str] = []
    while len(order) < count:
        order += chance.sample(prompts, len(prompts))
    streamed = set(chance.sample(range(count), count // 2))
    return [Ask(prompt, chance.randint(*max_tokens), i in streamed) for i, prompt in enumerate(order[:count])]


def differences(engine: LoGo, loads: dict[str, Load], asks: Sequence[Ask], count: int) -> Iterator[str]:
    """A line for each complete answer to the first `count` requests that differs from that of `LoGo.generate`."""

    @functools.cache
    def expected(number: int, base_only: bool) -> Generation:
        mixture: dict[str, float] | None = {} if base_only else None
        return engine.generate(asks[number].prompt, adapters=mixture, max_new_tokens=asks[number].max_tokens)

    for arm, load in loads.items():
        for answer in load.answers:
            if answer.error or answer.ask >= count:
                continue
            made = expected(answer.ask, arm == "base")
            if answer.token_ids != made.token_ids:
                found = f"{answer.token_ids} by {answer.adapters}"
                right = f"{made.token_ids} by {made.selection.adapters}"
                yield f"{arm}, request {answer.ask} ({asks[answer.ask].prompt[:60]!r}): {found} instead of {right}"


def ratios(loads: dict[str, Load]) -> dict[str, float]:
    """LoGo's speeds divided by the other arms': output tokens (and requests) per second."""
    found = {}
    for name, other in (("logo_vs_base", "base"), ("logo_vs_one_by_one", "one-by-one")):
        if other not in loads or "logo" not in loads:
            continue
        for suffix, unit in (("", "output_tokens_per_second"), ("_requests", "requests_per_second")):
            if its := getattr(loads[other].summary, unit):
                found[name + suffix] = getattr(loads["logo"].summary, unit) / its
    return found


@contextlib.contextmanager
def _server(asked: argparse.Namespace, problems: list[str]) -> Iterator[Endpoint]:
    key = os.environ.get("LOGO_API_KEY")  # our own server reads it there, too
    if asked.url is not None:
        yield Endpoint(asked.url.rstrip("/"), key)
        return
    queue = max(256, asked.concurrency)  # so that no request of ours is refused
    with LocalServer([*_engine(asked), f"--max-queue={queue}", *asked.options]) as server:
        yield Endpoint(server.url, key)
    if server.exit_code != 0:
        problems.append(f"the server ended with code {server.exit_code}: {server.said[-500:]}")


def _engine(asked: argparse.Namespace) -> list[str]:
    place = [] if asked.adapters is None else [f"--adapters={asked.adapters}"]
    return [f"--base-model={asked.base_model}", *place, f"--dtype={asked.dtype}"]


def _show(loads: dict[str, Load]) -> None:
    found = {arm: load.summary for arm, load in loads.items()}
    rows: dict[str, list[str]] = {
        "requests": [f"{s.requests:,}" for s in found.values()],
        "answered": [f"{s.ok:,}" for s in found.values()],
        "wall seconds": [f"{s.seconds:,.1f}" for s in found.values()],
        "requests/s": [f"{s.requests_per_second:,.2f}" for s in found.values()],
        "output tokens/s": [f"{s.output_tokens_per_second:,.1f}" for s in found.values()],
        "prompt tokens/s": [f"{s.prompt_tokens_per_second:,.1f}" for s in found.values()],
        "ms to first token, p50 / p90 / p99": [_milliseconds(s.first_token) for s in found.values()],
        "ms between tokens, p50 / p90 / p99": [_milliseconds(s.inter_token) for s in found.values()],
        "ms end to end, p50 / p90 / p99": [_milliseconds(s.end_to_end) for s in found.values()],
        # If much of the wall time, the clients are the bottleneck.
        "CPU seconds of the clients": [f"{load.client_cpu:,.1f}" for load in loads.values()],
        "server: MB before / after": [_both(load, MEMORY, 1e6) for load in loads.values()],
        "server: KV tokens before / after": [_both(load, KV_TOKENS, 1) for load in loads.values()],
    }
    print(f"{'':<36}" + "".join(f"{arm:>22}" for arm in loads))
    for name, cells in rows.items():
        print(f"{name:<36}" + "".join(f"{cell:>22}" for cell in cells))
    print(" · ".join(f"{name} {value:.2f}" for name, value in ratios(loads).items()))


def _milliseconds(values: tuple[float, ...] | None) -> str:
    return "-" if values is None else " / ".join(f"{1000 * value:,.0f}" for value in values)


def _both(load: Load, name: str, unit: float) -> str:
    if name not in load.before or name not in load.after:
        return "-"
    return f"{load.before[name] / unit:,.0f} / {load.after[name] / unit:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", help="options for `logo serve`, after --")
    parser.add_argument("--base-model", default="demo")
    parser.add_argument("--adapters")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--url", help="a running server, whose key is in LOGO_API_KEY")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one per line; default: the demo's held-out rows")
    parser.add_argument("--max-new-tokens", type=int, nargs=2, default=(8, 64), metavar=("LOW", "HIGH"))
    parser.add_argument("--verify", type=int, default=0, metavar="N", help="compare so many answers with LoGo.generate")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one request may take")
    parser.add_argument("--seed", type=int, default=0, help="of the order, the lengths and the streams")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to this file")
    asked = parser.parse_args(argv)
    if asked.verify and asked.options:
        parser.error("--verify compares with LoGo's defaults: leave out the options after --")
    if asked.prompts is not None:
        prompts = [line for line in asked.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        prompts = [str(row["context"]) for rows in heldout().values() for row in rows]
    asks = make_asks(prompts, asked.requests, tuple(asked.max_new_tokens), asked.seed)
    problems: list[str] = []
    loads: dict[str, Load] = {}
    for arm in asked.arms:
        # All arms send the same prompts, so a server that has answered one arm has them in its cache.
        with _server(asked, problems) as endpoint:
            loads[arm] = asyncio.run(measure(endpoint, arm, asks, asked.concurrency, asked.timeout))
        problems += loads[arm].problems(arm)
    different: list[str] = []
    if asked.verify:
        engine = LoGo.from_pretrained(asked.base_model, asked.adapters, dtype=asked.dtype)
        different += differences(engine, loads, asks, asked.verify)
        if different:
            problems.append(f"{len(different)} answers differ from LoGo.generate")
    _show(loads)
    if asked.verify:
        print(f"the first {asked.verify} answers of each compared with LoGo.generate: {len(different)} differ")
    if asked.json is not None:
        content: dict[str, Any] = {
            "about": {name: str(value) for name, value in vars(asked).items()},
            "arms": {
                arm: {
                    **asdict(load.summary),
                    "before": load.before,
                    "after": load.after,
                    "client_cpu_seconds": load.client_cpu,
                }
                for arm, load in loads.items()
            },
            "ratios": ratios(loads),
            "problems": problems,
            "differences": different,
        }
        asked.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in [*problems, *different[:_SHOWN]]:
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
