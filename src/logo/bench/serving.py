"""A server under load: what LoGo serves, its base model alone, and one prompt after another.

`run_bench` sends the same requests to each arm in turn, observes the server meanwhile, and compares answers with
`LoGo.generate`, token for token, after the server has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import httpx

from logo.bench.figures import Summary
from logo.bench.in_process import Begin, Difference, compare, one_by_one
from logo.bench.load import Endpoint, run_load
from logo.bench.local_server import LocalServer
from logo.bench.watch import Churn, Watched, churn, sample, samples, settled
from logo.bench.wire import Ask, said
from logo.errors import LoGoError

if TYPE_CHECKING:
    from logo.engine import LoGo

Arm = Literal["logo", "base", "one-by-one"]
ARMS: tuple[Arm, ...] = ("logo", "base", "one-by-one")

_WARM_UP = 16  # requests before each load, which do not count


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        asks: the requests.
        arms: in this order.
        concurrency: requests in flight.
        seconds: repeat the requests for this long; None: send each once.
        rounds: rounds over all arms; a server of our own is started anew for each arm and round.
        verify: number of requests, from the first, whose answers are compared.
        churn: an adapter that is added and removed meanwhile.
        timeout: seconds that one request may take.
    """

    asks: tuple[Ask, ...]
    arms: tuple[Arm, ...] = ARMS
    concurrency: int = 64
    seconds: float | None = None
    rounds: int = 1
    verify: int = 0
    churn: Churn | None = None
    timeout: float = 300.0


@dataclass
class Results:
    """The results of a run.

    Attributes:
        loads: for each arm, one load per round.
        verified: number of compared answers.
        verified_with_passing: those of them in which the temporary adapter took part.
        differences: answers that differ from `LoGo.generate`.
        problems: one line for each; a run is good if there are none.
    """

    loads: dict[Arm, list[Watched]] = field(default_factory=dict)
    verified: int = 0
    verified_with_passing: int = 0
    differences: list[Difference] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def summary(self, arm: Arm) -> Summary:
        """The answers of an arm in all rounds."""
        loads = self.loads[arm]
        return Summary.of([answer for load in loads for answer in load.answers], sum(load.seconds for load in loads))

    @property
    def ratios(self) -> dict[str, float]:
        """LoGo's speeds divided by the other's: output tokens (and requests) per second, medians over the rounds."""
        rounds = {arm: [Summary.of(load.answers, load.seconds) for load in loads] for arm, loads in self.loads.items()}
        found = {}
        for name, other in (("logo_vs_base", "base"), ("logo_vs_one_by_one", "one-by-one")):
            pairs = list(zip(rounds.get("logo", ()), rounds.get(other, ()), strict=False))  # type: ignore[call-overload]
            for suffix, unit in (("", "output_tokens_per_second"), ("_requests", "requests_per_second")):
                speeds = [getattr(ours, unit) / getattr(its, unit) for ours, its in pairs if getattr(its, unit)]
                if speeds:
                    found[name + suffix] = statistics.median(speeds)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the differences are the first hundred."""
        return {
            "arms": {
                arm: {
                    **self.summary(arm).as_dict(),
                    "client_cpu_seconds": [load.client_cpu for load in loads],
                    "server": [load.server() for load in loads],
                }
                for arm, loads in self.loads.items()
            },
            "ratios": self.ratios,
            "verified": self.verified,
            "verified_with_passing": self.verified_with_passing,
            "different": len(self.differences),
            "differences": [vars(one) for one in self.differences[:100]],
            "problems": self.problems,
        }


def run_bench(
    plan: Plan,
    place: Endpoint | Callable[[], LocalServer],
    engine: Callable[[], LoGo],
    *,
    api_key: str | None = None,
    begin: Begin = lambda what, steps: lambda: None,
) -> Results:
    """Runs the arms on a running server, or each on one of our own, which is started anew in every round.

    Args:
        place: the address, or a function that starts a server.
        engine: opens the same model and pool in this process; called at most once, when it is needed. One by one means
            `LoGo.generate` after our own server has ended, or one request at a time through another server.
        api_key: key of our own server.
        begin: called with a description of each step.

    Raises:
        LoGoError: there is no server, or it cannot do what is requested.
    """
    results = Results({arm: [] for arm in plan.arms})
    local = not isinstance(place, Endpoint)
    total = None if plan.seconds else len(plan.asks)
    opened: list[LoGo] = []

    def in_process() -> LoGo:
        if not opened:
            begin("opening the model", None)
            opened.append(engine())
        return opened[0]

    for round_ in range(plan.rounds):
        suffix = f", round {round_ + 1} of {plan.rounds}" if plan.rounds > 1 else ""
        for arm in plan.arms:
            if local and arm == "one-by-one":
                results.loads[arm].append(_alone(plan, in_process(), begin(f"{arm}{suffix}", total)))
                continue
            # All arms send the same prompts, so a server that has answered one arm has them in its cache.
            with _open(place, api_key, begin, results) as endpoint:
                step = begin(f"{arm}{suffix}", total)
                results.loads[arm].append(asyncio.run(_served(plan, endpoint, arm, step)))
    results.problems += problems(results, local)
    if plan.verify:
        _compare(plan, results, in_process(), begin)
    return results


def _compare(plan: Plan, results: Results, engine: LoGo, begin: Begin) -> None:
    """Compares the servers' answers to the first requests with `LoGo.generate`."""
    own = {arm for arm, loads in results.loads.items() if not any(load.before for load in loads)}  # by LoGo itself
    known = {a.ask: a for arm in own for load in results.loads[arm] for a in load.answers}
    for arm, loads in results.loads.items():
        if arm in own:
            continue
        answers = [a for load in loads for a in load.answers if a.outcome == "ok" and a.ask < plan.verify]
        found = compare(engine, arm, plan.asks, answers, known, base_only=arm == "base", churn=plan.churn, begin=begin)
        results.verified += len(answers)
        results.verified_with_passing += found.with_passing
        results.differences += found.differences
    if results.differences:
        results.problems.append(f"{len(results.differences)} of {results.verified} answers differ from LoGo.generate")


@contextlib.contextmanager
def _open(
    place: Endpoint | Callable[[], LocalServer], api_key: str | None, begin: Begin, results: Results
) -> Iterator[Endpoint]:
    if isinstance(place, Endpoint):
        yield place
        return
    begin("starting the server", None)
    with place() as server:
        try:
            yield Endpoint(server.url, api_key)
        except LoGoError as error:
            if not server.gone:
                raise
            raise LoGoError(f"{error} `logo serve` has exited; its last output: {server.said[-500:]}") from error
    if server.exit_code != 0:
        results.problems.append(f"the server ended with code {server.exit_code}: {server.said[-500:]}")


async def _served(plan: Plan, endpoint: Endpoint, arm: Arm, step: Callable[[], None]) -> Watched:
    """Runs the load of one arm on a server, and observes the server meanwhile."""
    async with endpoint.client() as client:
        model = await _model(client, arm)
        alone = arm == "one-by-one"
        asks = [replace(ask, hang_up=None) for ask in plan.asks] if alone else plan.asks
        concurrency = 1 if alone else plan.concurrency
        await run_load(endpoint, model, _warm_up(plan), concurrency=concurrency, timeout=plan.timeout)
        started = time.perf_counter()
        before = await sample(client, started)
        stop = asyncio.Event()
        watching = asyncio.create_task(samples(client, started, stop))
        changing = asyncio.create_task(churn(client, plan.churn, stop)) if plan.churn else None
        cpu = time.process_time()
        answers, seconds = await run_load(
            endpoint,
            model,
            asks,
            concurrency=concurrency,
            seconds=plan.seconds,
            timeout=plan.timeout,
            on_answer=lambda answer: step(),
        )
        cpu = time.process_time() - cpu
        stop.set()
        changes, failed = await changing if changing else (0, [])
        return Watched(
            answers,
            seconds,
            before,
            samples=await watching,
            after=await settled(client, started, before),
            changes=changes,
            failed_changes=failed,
            client_cpu=cpu,
        )


def _warm_up(plan: Plan) -> list[Ask]:
    """Requests that are not measured. Their prompts begin in another way, so that the cache of prompt beginnings holds
    nothing of the measured ones.
    """
    return [replace(ask, prompt=f"Please answer. {ask.prompt}", hang_up=None) for ask in plan.asks[:_WARM_UP]]


async def _model(client: httpx.AsyncClient, arm: Arm) -> str:
    """The model id under which the server answers as the arm requires.

    Raises:
        LoGoError: there is no server, or it has no such model.
    """
    role = "base" if arm == "base" else "auto"
    try:
        response = await client.get("/v1/models", timeout=60.0)
        if response.status_code != 200:
            raise LoGoError(f"server {client.base_url}: {response.status_code}: {said(response.text)}")
        listed = response.json()["data"]
        names = [str(model["id"]) for model in listed if model.get("logo", {}).get("role") == role]
    except httpx.HTTPError as error:
        raise LoGoError(f"server {client.base_url}: no answer ({type(error).__name__}: {error}); is it up?") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoGoError(f"server {client.base_url}: not the list of models of `logo serve`: {error}") from error
    if not names:
        raise LoGoError(
            f"server {client.base_url}: has no model for the arm {arm!r} (of the role {role!r}); see --arms"
        )
    return names[0]


def _alone(plan: Plan, engine: LoGo, step: Callable[[], None]) -> Watched:
    warm_up = _warm_up(plan)
    one_by_one(engine, warm_up, range(len(warm_up)))
    numbers = range(len(plan.asks))
    repeated = itertools.cycle(numbers) if plan.seconds else numbers
    answers = one_by_one(engine, plan.asks, repeated, seconds=plan.seconds, on_answer=step)
    return Watched(answers, sum(answer.seconds for answer in answers))


def problems(results: Results, own: bool) -> list[str]:
    """Errors, failed changes of the pool, and memory that the server did not free.

    Args:
        own: whether the server has no other clients.
    """
    found = []
    for arm, loads in results.loads.items():
        for kind, count in results.summary(arm).errors.items():
            first = next(a.message for load in loads for a in load.answers if a.outcome == "error" and a.kind == kind)
            found.append(f"{arm}: {count} × {kind}: {first}")
        for load in loads:
            if load.failed_changes:
                found.append(f"{arm}: {len(load.failed_changes)} × pool change: {load.failed_changes[0]}")
            kept = ((load.after and load.after.kv_blocks) or 0) - ((load.before and load.before.kv_blocks) or 0)
            if own and kept > 0:
                found.append(f"{arm}: {kept:g} blocks of the KV cache more in use than before the load")
    return found
