"""One pool in several replicas: all of them change or none does, and nobody sees half of a change. No Ray, no model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from logo.api.visits import visit
from logo.errors import AdapterError, LoGoError, PoolError
from logo.protocol import NotReady
from logo.serving import coordinator as coordinating
from logo.serving import membership
from logo.serving.coordinator import Coordinator, Joined, State
from logo.serving.gate import Gate, Gated
from logo.serving.membership import Lost, Member, Own
from logo.serving.metrics import labelled, selected
from logo.serving.pool import Change
from logo.serving.replica import ReplicaService, Together
from tolerances import PATIENCE

NEW = Change("new", Path("/pool/new"))


class Place:
    """Where the coordinator is: it may be away, and another one may come."""

    def __init__(self, coordinator: Coordinator | None = None) -> None:
        self.coordinator = coordinator


class Line:
    """A replica's link to the coordinator of a place."""

    def __init__(self, name: str, place: Place, handle: Any) -> None:
        self.name, self.place, self.handle = name, place, handle

    @property
    def there(self) -> Coordinator:
        if self.place.coordinator is None:
            raise Lost("away")
        return self.place.coordinator

    async def join(self, state: State, *, fresh: bool) -> Joined:
        return await self.there.join(self.name, self.handle, state, fresh=fresh)

    async def next(self) -> Any:
        asked = self.there
        waiting = asyncio.ensure_future(asked.next(self.name))
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.01)
            if self.place.coordinator is not asked and not waiting.done():
                waiting.cancel()
                raise Lost("away")
        return waiting.result()

    async def reply(self, number: int, result: Any) -> None:
        await self.there.reply(self.name, number, result)

    async def change(self, change: Change) -> LoGoError | None:
        return await self.there.change(change)

    async def metrics(self) -> dict[str, str | None]:
        return await self.there.metrics()

    async def drain(self) -> None:
        await self.there.drain()


class Peers:
    """Replicas by themselves: dead ones say so.

    Args:
        busy: some take requests.
    """

    def __init__(self, busy: bool = False) -> None:
        self._busy = busy

    async def answering(self) -> bool:
        return self._busy

    async def gone(self, handle: Pretend) -> bool:
        return handle.dead

    def end(self, handle: Pretend) -> None:
        handle.die()


class Pretend:
    """A replica whose pool is a tuple of names."""

    def __init__(self, name: str, place: Place, pool: tuple[str, ...] = ("a", "b")) -> None:
        self.name, self.pool, self.staged = name, pool, None  # type: tuple[str, tuple[str, ...], tuple[str, ...] | None]
        self.dead = self.drained = False
        self.hooks: dict[str, Callable[[], Awaitable[None]]] = {}
        self.gate = Gate()
        own = Own(self.stage, self.take, self.forget, lambda: f"{name}_total 1.0\n", self.drain)
        self.member = Member(Line(name, place, self), own, self.gate, State(",".join(pool)))

    async def stage(self, change: Change) -> str:
        await self._hook("stage")
        changed = {*self.pool, change.name} if change.folder else {*self.pool} - {change.name}
        self.staged = tuple(sorted(changed))
        return ",".join(self.staged)

    async def take(self) -> None:
        await self._hook("take")
        assert self.staged is not None
        self.pool, self.staged = self.staged, None

    async def forget(self) -> None:
        self.staged = None

    def drain(self) -> None:
        self.drained = True

    def die(self) -> None:
        self.dead = True
        assert self.member._following is not None
        for task in (self.member._following, *self.member._doing):
            if task is not asyncio.current_task():
                task.cancel()

    async def _hook(self, when: str) -> None:
        if when in self.hooks:
            await self.hooks[when]()


@asynccontextmanager
async def replicas(
    *pools: tuple[str, ...], names: str = "xyz", settle: float = 0.0
) -> AsyncIterator[tuple[Place, list[Pretend]]]:
    place = Place(Coordinator(Peers(), settle=settle))
    made = [Pretend(name, place, pool) for name, pool in zip(names, pools, strict=False)]
    try:
        for one in made:
            await one.member.join()
        yield place, made
    finally:
        for one in made:
            await one.member.leave()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), PATIENCE))


def raising(error: Exception) -> Callable[[], Awaitable[None]]:
    async def hook() -> None:
        raise error

    return hook


TWO = (("a", "b"), ("a", "b"))


def test_a_change_is_in_all_replicas_when_it_is_answered() -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            assert place.coordinator is not None
            assert await place.coordinator.change(NEW) is None
            assert x.pool == y.pool == ("a", "b", "new")
            assert x.member.state == y.member.state == State("a,b,new", (NEW,), 1)
            assert x.gate.closed_for == y.gate.closed_for == 0
            assert await place.coordinator.change(Change("a")) is None
            assert x.pool == y.pool == ("b", "new")

    run(test)


A, B, LATER, OTHER = Path("/start/a"), Path("/b"), Path("/later"), Path("/other")


@pytest.mark.parametrize(
    ("changes", "net"),
    [
        ([NEW, Change("new")], []),
        ([NEW, Change("new", LATER, True)], [Change("new", LATER)]),
        ([NEW, Change("new", LATER, True), Change("new")], []),
        ([Change("a")], [Change("a")]),
        ([Change("a"), Change("a", LATER)], [Change("a", LATER, True)]),
        ([Change("a"), Change("a", LATER), Change("a")], [Change("a")]),
        ([Change("a", LATER, True), Change("a", OTHER, True)], [Change("a", OTHER, True)]),
        ([Change("a", LATER, True), Change("a")], [Change("a")]),
        ([NEW, Change("a"), Change("new", LATER, True)], [Change("a"), Change("new", LATER)]),
    ],
)
def test_a_state_says_what_is_left_of_its_changes(changes: list[Change], net: list[Change]) -> None:
    def pool(start: dict[str, Path], made: Sequence[Change]) -> dict[str, Path]:
        found = dict(start)
        for change in made:
            if change.folder is None:
                del found[change.name]
            else:
                assert change.replace or change.name not in found
                found[change.name] = change.folder
        return found

    start = {"a": A, "b": B}
    states = [State("0")]
    for number, change in enumerate(changes, 1):
        states.append(states[-1].after(change, str(number)))
    assert states[-1] == State(str(len(changes)), tuple(net), len(changes))
    # Whoever has missed some makes them up.
    for missed in range(len(changes)):
        one = pool(start, changes[:missed])
        assert pool(one, states[missed].towards(states[-1])) == pool(start, changes)


def test_a_replica_that_comes_later_needs_no_folder_of_what_has_gone() -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, (x, _)):
            assert place.coordinator is not None
            assert await place.coordinator.change(NEW) is None
            assert await place.coordinator.change(Change("new")) is None
            late = Pretend("z", place)
            late.hooks["stage"] = raising(AdapterError("new", "there is no such folder"))
            await late.member.join()
            assert late.pool == x.pool == ("a", "b") and late.member.state == x.member.state
            await late.member.leave()

    run(test)


def test_what_takes_no_place_is_asked_for_as_an_addition() -> None:
    asked: list[Change] = []

    class Recording:
        async def change(self, change: Change) -> None:
            asked.append(change)

    service: Any = object.__new__(ReplicaService)
    service.logo, service._link = SimpleNamespace(pool={"a"}), Recording()
    for name in ("new", "a"):
        asyncio.run(service.add(LATER, name, replace=True))
    assert asked == [Change("new", LATER), Change("a", LATER, replace=True)]


def test_changes_that_are_made_up_take_an_order_that_can_be() -> None:
    async def test() -> None:
        async with replicas(("a",)) as (place, [x]):
            assert place.coordinator is not None
            for change in (NEW, Change("a"), Change("b", LATER), Change("new")):
                assert await place.coordinator.change(change) is None
            late = Pretend("z", place, ("a",))

            async def no_pool_is_empty() -> None:
                if late.staged is None and late.pool == ("a",) and not tried:
                    tried.append("a")
                    raise PoolError("adapter 'a' is the last one of the pool and cannot be removed")

            tried: list[str] = []
            late.hooks["stage"] = no_pool_is_empty
            await late.member.join()
            assert tried and late.pool == x.pool == ("b",)
            await late.member.leave()

    run(test)


@pytest.mark.parametrize("everywhere", [True, False])
def test_an_adapter_that_one_replica_refuses_is_in_none(everywhere: bool) -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            assert place.coordinator is not None
            y.hooks["stage"] = raising(AdapterError("new", "it holds NaN"))
            if everywhere:
                x.hooks["stage"] = y.hooks["stage"]
            error = await place.coordinator.change(NEW)
            # What all say is the adapter's fault; what one says is that replica's.
            assert isinstance(error, AdapterError if everywhere else PoolError)
            assert "adapter 'new': it holds NaN" in str(error) and ("replica y" in str(error)) != everywhere
            assert x.pool == y.pool == ("a", "b") and x.staged is None
            assert x.gate.closed_for == y.gate.closed_for == 0
            x.hooks.clear(), y.hooks.clear()
            assert await place.coordinator.change(NEW) is None

    run(test)


def test_a_folder_that_is_not_the_same_everywhere_is_refused() -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            assert place.coordinator is not None

            async def other() -> None:
                y.pool = ("a", "b", "c")

            y.hooks["stage"] = other
            assert "different files" in str(await place.coordinator.change(NEW))
            assert x.pool == ("a", "b")

    run(test)


@pytest.mark.parametrize("when", ["stage", "take"])
def test_a_replica_that_dies_meanwhile_keeps_no_change_from_the_others(when: str) -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            assert place.coordinator is not None

            async def dies() -> None:
                y.die()
                await asyncio.sleep(PATIENCE)

            y.hooks[when] = dies
            assert await place.coordinator.change(NEW) is None
            assert x.pool == ("a", "b", "new") and y.pool == ("a", "b")
            late = Pretend("z", place)
            await late.member.join()
            assert late.pool == x.pool and late.member.state == x.member.state
            await late.member.leave()

    run(test)


def test_a_replica_that_does_not_take_what_all_take_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinating, "PATIENCE", 0.3)

    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            assert place.coordinator is not None

            async def hangs() -> None:
                await asyncio.sleep(PATIENCE)

            y.hooks["take"] = hangs
            assert await place.coordinator.change(NEW) is None
            assert y.dead and not x.dead
            assert x.gate.closed_for == 0
            assert y.gate.closed_for > 0  # it has not answered from the old pool since

    run(test)


def test_a_replica_that_cannot_pause_changes_nothing_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinating, "PATIENCE", 0.3)

    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            assert place.coordinator is not None
            inside = await y.gate.enter()
            error = await place.coordinator.change(NEW)
            assert isinstance(error, NotReady) and "replica y did not pause" in str(error)
            assert x.pool == y.pool == ("a", "b") and x.staged is y.staged is None
            assert x.gate.closed_for == y.gate.closed_for == 0
            inside.leave()
            assert await place.coordinator.change(NEW) is None

    run(test)


def test_a_replica_with_another_pool_may_not_answer() -> None:
    async def test() -> None:
        async with replicas(("a", "b")) as (place, _):
            other = Pretend("y", place, ("a", "c"))
            with pytest.raises(
                PoolError,
                match=r"the others have the pool a,b, this one has a,c: .*example prompts .* restart all replicas",
            ):
                await other.member.join()
            assert other.gate.closed_for > 0
        first = Pretend("x", Place(Coordinator(Peers(), "a,b", settle=0)), ("c",))
        with pytest.raises(
            PoolError, match=r"expected the pool a,b, opened c: .*example prompts .* restart all replicas"
        ):
            await first.member.join()

    run(test)


def test_another_coordinator_learns_from_the_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_AGAIN", 0.01)
    monkeypatch.setattr(coordinating, "REFUSED", 0.0)

    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            assert place.coordinator is not None
            assert await place.coordinator.change(NEW) is None
            place.coordinator = None
            with pytest.raises(Lost):
                await x.member._link.change(Change("a"))
            assert x.gate.closed_for == 0  # it goes on with what it has
            again = place.coordinator = Coordinator(Peers(), "a,b", settle=0.5)
            late = Pretend("z", place)  # starts at the same time, and does not know of the change
            await late.member.join()
            assert late.pool == ("a", "b", "new")
            while len(again._members) < 3:
                await asyncio.sleep(0.01)
            assert await again.change(Change("b")) is None
            assert x.pool == y.pool == late.pool == ("a", "new")
            await late.member.leave()

    run(test)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_coordinator_that_is_started_again_changes_nothing_while_a_replica_may_answer_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    monkeypatch.setattr(membership, "_AGAIN", 0.01)
    monkeypatch.setattr(membership, "LEASE", 0.4)
    monkeypatch.setattr(coordinating, "REFUSED", 0.6)
    monkeypatch.setattr(coordinating, "_POLL", 0.05)

    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            again = Coordinator(Peers(busy=True), "a,b", settle=0)
            elsewhere = Place()
            first = x
            if fresh:  # another one is faster than those that were there before
                first = Pretend("z", Place(again))
                x.member._link, y.member._link = Line("x", elsewhere, x), Line("y", elsewhere, y)
                place.coordinator = None
                await first.member.join()
            else:
                y.member._link = Line("y", elsewhere, y)  # does not reach it
                place.coordinator = again
                while "x" not in again._members:
                    await asyncio.sleep(0.01)
            error = await again.change(NEW)
            assert isinstance(error, NotReady) and "has restarted" in str(error)
            assert first.pool == y.pool and not y.gate.closed_for
            while isinstance(await again.change(NEW), NotReady):
                await asyncio.sleep(0.01)
            assert first.pool == ("a", "b", "new") and first.gate.closed_for == 0
            assert y.pool == ("a", "b") and y.gate.closed_for > 0  # it has stopped answering by itself before
            elsewhere.coordinator = again
            while y.gate.closed_for:
                await asyncio.sleep(0.01)
            assert y.pool == ("a", "b", "new")
            if fresh:
                await first.member.leave()

    run(test)


def test_a_replica_answers_for_as_long_as_it_hears_of_its_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "LEASE", 0.4)
    monkeypatch.setattr(membership, "_AGAIN", 0.01)
    monkeypatch.setattr(coordinating, "_POLL", 0.05)

    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            there = place.coordinator
            assert there is not None
            for _ in range(30):
                await asyncio.sleep(0.02)
                assert x.gate.closed_for == y.gate.closed_for == 0
            place.coordinator = None
            while not x.gate.closed_for:
                await asyncio.sleep(0.01)
            place.coordinator = there
            while x.gate.closed_for:
                await asyncio.sleep(0.01)
            # What the coordinator has closed is not opened by what else is heard of it.
            await x.member._close()
            await asyncio.sleep(0.2)
            assert x.gate.closed_for > 0

    run(test)


def test_a_replica_that_another_coordinator_finds_unlike_the_others_asks_to_be_replaced() -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            y.member.state = State("a,b,other", (Change("other", Path("/other")),))
            y.member.check()
            again = Coordinator(Peers(), settle=0)
            await again.join("x", x, x.member.state, fresh=False)
            place.coordinator = again
            while y.member.trouble is None:
                await asyncio.sleep(0.01)
            with pytest.raises(PoolError, match="gets no requests"):
                y.member.check()
            assert y.gate.closed_for > 0

    run(test)


def test_metrics_and_draining_reach_all() -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            assert place.coordinator is not None
            assert await place.coordinator.metrics() == {"x": "x_total 1.0\n", "y": "y_total 1.0\n"}
            await place.coordinator.drain()
            assert x.drained and y.drained

    run(test)


def test_a_replica_that_does_not_answer_is_named_and_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinating, "_SCRAPE", 0.1)

    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            there = place.coordinator
            assert there is not None and y.member._following is not None
            y.member._following.cancel()  # it is there, but fetches nothing
            assert await there.metrics() == {"x": "x_total 1.0\n", "y": None}
            assert not there._members["y"].asked and not there._members["y"].waiting
            app = Starlette(routes=[Route("/metrics", lambda request: PlainTextResponse("x_total 1.0\n"))])
            together = Together(app, "x", x.member._link)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(together), base_url="http://test") as http:
                text = (await http.get("/metrics")).text
            assert 'x_total{replica="x"} 1.0' in text and "# replica y does not answer" in text

    run(test)


def test_a_question_meanwhile_may_find_out_first_that_a_replica_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinating, "_LOOK", 0.05)

    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            there = place.coordinator
            assert there is not None
            x.hooks["stage"] = lambda: asyncio.sleep(0.2)

            async def dies() -> None:
                y.die()
                await asyncio.sleep(PATIENCE)

            y.hooks["stage"] = dies
            error, *_ = await asyncio.gather(there.change(NEW), *(there.metrics() for _ in range(3)))
            assert error is None and x.pool == ("a", "b", "new")
            assert list(there._members) == ["x"] and x.gate.closed_for == 0

    run(test)


def test_what_goes_wrong_in_the_coordinator_leaves_nobody_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            there = place.coordinator
            assert there is not None
            close = there._close

            async def fails() -> None:
                await close()
                raise RuntimeError("no")

            monkeypatch.setattr(there, "_close", fails)
            with pytest.raises(RuntimeError):
                await there.change(NEW)
            assert x.gate.closed_for == y.gate.closed_for == 0 and x.staged is y.staged is None
            monkeypatch.undo()
            assert await there.change(NEW) is None

    run(test)


def test_a_client_that_leaves_does_not_leave_half_of_a_change() -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, (x, y)):
            assert place.coordinator is not None
            begun, go_on = asyncio.Event(), asyncio.Event()

            async def waits() -> None:
                begun.set()
                await go_on.wait()

            y.hooks["take"] = waits
            asked = asyncio.create_task(place.coordinator.change(NEW))
            await begun.wait()
            asked.cancel()
            await asyncio.wait([asked])
            go_on.set()
            while x.gate.closed_for or y.gate.closed_for:
                await asyncio.sleep(0.01)
            assert x.pool == y.pool == ("a", "b", "new")

    run(test)


def test_one_exposition_says_of_every_sample_whose_it_is() -> None:
    text = '# HELP a_total All.\n# TYPE a_total counter\na_total{{kind="k"}} {}\n# HELP g Now.\n# TYPE g gauge\ng {}\n'
    found = labelled({"x": text.format(1.0, 2.0), "y": text.format(3.0, 4.0)}).decode().splitlines()
    assert found == [
        *("# HELP a_total All.", "# TYPE a_total counter"),
        *('a_total{kind="k",replica="x"} 1.0', 'a_total{kind="k",replica="y"} 3.0'),
        *("# HELP g Now.", "# TYPE g gauge", 'g{replica="x"} 2.0', 'g{replica="y"} 4.0'),
    ]


def test_selections_are_added_up_over_replicas() -> None:
    text = (
        "# TYPE logo:adapter_selected_total counter\n"
        'logo:adapter_selected_total{{adapter="a"}} {}\nlogo:adapter_selected_total{{adapter="{}"}} 1.0\n'
        "# TYPE logo:adapter_selected_created gauge\n"
        'logo:adapter_selected_created{{adapter="a"}} 1.7e9\n'
    )
    assert selected([text.format(2.0, "b"), text.format(3.0, "c")]) == {"a": 5, "b": 1, "c": 1}


# -- requests ---------------------------------------------------------------------------------------------------------


def served(one: Pretend) -> httpx.AsyncClient:
    """An app that answers with the pool, which it looks at a moment after it was asked."""

    async def answer(request: Request) -> Response:
        await request.body()
        inside = visit.get()
        assert inside is not None
        inside.choosing()
        await asyncio.sleep(0.003)
        pool = one.pool
        inside.chosen()
        await asyncio.sleep(0.003)
        return PlainTextResponse(",".join(pool))

    async def listed(request: Request) -> Response:
        return PlainTextResponse(",".join(one.pool))

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    app = Starlette(
        routes=[
            Route("/v1/completions", answer, methods=["POST"]),
            Route("/v1/models", listed),
            Route("/health", health),
        ]
    )
    gated = Gated(app, one.gate, lambda: {"X-LoGo-Pool": one.member.state.digest})
    return httpx.AsyncClient(transport=httpx.ASGITransport(gated), base_url="http://test")


def test_who_has_seen_the_new_pool_never_sees_the_old_one() -> None:
    async def test() -> None:
        async with replicas(*TWO) as (place, both):
            assert place.coordinator is not None
            seen: list[tuple[float, float, bool]] = []  # asked, answered, new
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()

            async def client(number: int) -> None:
                async with served(both[number % 2]) as http:
                    while not stop.is_set():
                        asked = loop.time()
                        one = await (http.get("/v1/models") if number % 3 == 0 else http.post("/v1/completions"))
                        seen.append((asked, loop.time(), "new" in one.text))
                        await asyncio.sleep(0.001)

            async def slowly() -> None:  # so that replicas change one after the other
                await asyncio.sleep(0.05)

            both[1].hooks["take"] = slowly
            clients = [asyncio.create_task(client(number)) for number in range(8)]
            await asyncio.sleep(0.1)
            assert await place.coordinator.change(NEW) is None
            changed = loop.time()
            await asyncio.sleep(0.1)
            stop.set()
            await asyncio.gather(*clients)
            first = min(answered for _, answered, new in seen if new)
            assert any(not new for _, _, new in seen)
            assert all(new for asked, _, new in seen if asked >= min(first, changed))

    run(test)


def test_a_client_that_sends_slowly_does_not_hold_up_a_change() -> None:
    async def test() -> None:
        async with replicas(("a", "b")) as (place, [x]), served(x) as http:
            assert place.coordinator is not None
            more = asyncio.Event()

            async def body() -> AsyncIterator[bytes]:
                yield b"{"
                await more.wait()
                yield b"}"

            slow = asyncio.create_task(http.post("/v1/completions", content=body()))
            await asyncio.sleep(0.01)
            assert await place.coordinator.change(NEW) is None
            more.set()
            assert (await slow).text == "a,b,new"

    run(test)


def test_health_says_the_pool_while_others_wait() -> None:
    async def test() -> None:
        async with replicas(("a", "b")) as (_, [x]), served(x) as http:
            await x.gate.close()
            waiting = asyncio.create_task(http.get("/v1/models"))
            found = await http.get("/health")
            assert (found.text, found.headers["X-LoGo-Pool"]) == ("ok", "a,b")
            assert not waiting.done()
            x.gate.open()
            assert (await waiting).text == "a,b"

    run(test)
