"""What makes vLLM's app one of several replicas, with a router and workers that only pretend: no vLLM, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from logo.adapters.digests import pool_digest
from logo.api.visits import choosing, chosen, indifferent
from logo.backends.vllm.core import WorkerError
from logo.errors import LoGoError, PoolError, UsageError
from logo.serving.coordinator import Coordinator
from logo.serving.lifespan import Begun
from logo.serving.vllm_replica import VllmReplica
from test_coordinator import Line, Peers, Place
from tolerances import PATIENCE


class Engine:
    """A router, its core and its workers: the pool is name -> key, a change takes its folder's name as the key."""

    def __init__(self) -> None:
        self.core, self.workers, self.everywhere = self, self, None
        self.pool = SimpleNamespace(keys={"a": "1", "b": "2"})
        self.staged: Any = None
        self.error: LoGoError | None = None
        self.dead = self.errored = False
        self.client = self

    async def stage(self, core: Engine, change: tuple[str, str, str]) -> Any:
        if self.error is not None:
            raise self.error
        kind, name, folder = change
        keys = {key: value for key, value in self.pool.keys.items() if key != name}
        self.staged = SimpleNamespace(keys=keys if kind == "remove" else {**keys, name: Path(folder).name})
        return self.staged

    async def commit(self, core: Engine) -> None:
        self.pool, self.staged = self.staged, None

    async def abandon(self) -> None:
        self.staged = None

    def metrics(self) -> str:
        return ""


def replica(name: str, place: Place, engine: Engine, app: Any = None) -> VllmReplica:
    """One that has opened an adapter which does not fit the base model, too."""
    opened = {**engine.pool.keys, "unfit": "3"}
    return VllmReplica(name, Line(name, place, engine), engine, app, engine, opened)  # type: ignore[arg-type]


def run(test: Callable[[Place, list[Engine], list[VllmReplica]], Awaitable[None]], app: Any = None) -> None:
    """A test of two replicas."""

    async def whole() -> None:
        place, engines = Place(Coordinator(Peers(), settle=0)), [Engine(), Engine()]
        both = [replica(name, place, engine, app) for name, engine in zip("xy", engines, strict=True)]
        for one in both:
            await one.member.join()
        try:
            await test(place, engines, both)
        finally:
            for one in both:
                await one.member.leave()

    asyncio.run(asyncio.wait_for(whole(), PATIENCE))


def test_what_one_router_is_asked_for_is_done_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def test(place: Place, engines: list[Engine], both: list[VllmReplica]) -> None:
        everywhere: Any = engines[0].everywhere
        await everywhere(("add", "new", "somewhere/else"))
        assert [one.pool.keys for one in engines] == [{"a": "1", "b": "2", "new": "else"}] * 2
        # Wherever another replica runs, a path means the same.
        assert [one.folder for one in both[1].member.state.changes] == [tmp_path / "somewhere" / "else"]
        await everywhere(("replace", "new", "/other"))
        assert [one.pool.keys["new"] for one in engines] == ["other"] * 2
        assert {one.member.state.digest for one in both} == {
            pool_digest({"a": "1", "b": "2", "new": "other", "unfit": "3"})
        }
        await everywhere(("remove", "new", ""))
        assert {one.member.state.digest for one in both} == {pool_digest({"a": "1", "b": "2", "unfit": "3"})}
        # What takes no place is an addition, and nothing is left of it when it goes: no folder has to stay.
        await everywhere(("replace", "brand-new", "/other"))
        await everywhere(("remove", "brand-new", ""))
        assert [one.member.state.changes for one in both] == [(), ()]

    run(test)


def test_what_one_engine_cannot_do_is_done_by_none() -> None:
    async def test(place: Place, engines: list[Engine], both: list[VllmReplica]) -> None:
        everywhere: Any = engines[0].everywhere
        engines[1].error = WorkerError("all 2 of vLLM's slots are in use")
        with pytest.raises(PoolError, match="replica y: all 2 of vLLM's slots are in use; nothing was changed"):
            await everywhere(("add", "new", "/new"))
        assert [one.pool.keys for one in engines] == [{"a": "1", "b": "2"}] * 2
        assert [one.staged for one in engines] == [None, None]
        engines[0].error = engines[1].error
        with pytest.raises(UsageError, match=r"^all 2 of vLLM's slots are in use$"):
            await everywhere(("add", "new", "/new"))

    run(test)


def test_only_what_depends_on_the_pool_waits_for_it() -> None:
    more = asyncio.Event()

    async def completion(request: Request) -> Response:
        what = (await request.body()).decode()
        if what == "base":
            indifferent()
        elif what == "mixtures":
            choosing(2)
            chosen()
            asyncio.get_running_loop().call_later(0.1, chosen)
        await more.wait()  # an answer takes its time
        return PlainTextResponse(what)

    async def tokenize(request: Request) -> Response:
        return PlainTextResponse("tokens")

    async def models(request: Request) -> Response:
        return PlainTextResponse("models")

    app = Starlette(
        routes=[
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", models),
        ]
    )

    async def test(place: Place, engines: list[Engine], both: list[VllmReplica]) -> None:
        gate = both[0].member._gate
        async with httpx.AsyncClient(transport=httpx.ASGITransport(both[0].app), base_url="http://test") as http:
            running = [asyncio.create_task(http.post("/v1/completions", content=what)) for what in ("base", "mixtures")]
            await asyncio.sleep(0.05)
            assert not any(one.done() for one in running)
            await gate.close()  # does not wait for the answers, but for both mixtures of the second one
            waiting = asyncio.create_task(http.get("/v1/models"))
            assert (await http.post("/tokenize", content="x")).text == "tokens"
            assert (await http.get("/health")).headers["X-LoGo-Replica"] == "x"
            assert not waiting.done()
            gate.open()
            assert (await waiting).text == "models"
            more.set()
            assert [(await one).text for one in running] == ["base", "mixtures"]

    run(test, app)


# -- starting before the server starts --------------------------------------------------------------------------------


def lifespan(app: Any, *told: str) -> list[str]:
    """What an app says when it is told to start and to end."""
    said: list[str] = []

    async def whole() -> None:
        messages = iter(told)

        async def receive() -> Any:
            return {"type": next(messages)}

        async def send(message: Any) -> None:
            said.append(message["type"])

        begun = Begun(app)
        await begun.start()
        said.append("begun")
        await begun({"type": "lifespan"}, receive, send)

    asyncio.run(asyncio.wait_for(whole(), PATIENCE))
    return said


def test_an_app_starts_once_and_ends_when_its_server_does() -> None:
    said: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(2):
            what = (await receive())["type"]
            said.append(what)
            await send({"type": f"{what}.complete"})

    found = lifespan(app, "lifespan.startup", "lifespan.shutdown")
    assert said == ["lifespan.startup", "lifespan.shutdown"]
    assert found == ["begun", "lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_an_app_that_does_not_start_says_why() -> None:
    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "Traceback:\n  ...\nLoGo: there is no pool\n"})
        await receive()

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("no")

    async def fails_later(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        raise ValueError("no")

    with pytest.raises(LoGoError, match=r"^LoGo: there is no pool$"):
        lifespan(refuses)
    with pytest.raises(LoGoError, match=r"^ValueError: no$"):
        lifespan(fails)
    assert lifespan(fails_later, "startup", "shutdown")[-1] == "lifespan.shutdown.failed"
