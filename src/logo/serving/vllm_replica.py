"""`VllmReplica`: vLLM's app with LoGo's router as a replica, without vLLM's own listener.

The pool changes in the four steps of replicas (`logo.serving.coordinator`); in each replica the workers of its engine
stage and commit the change (`logo.backends.vllm.workers`).
"""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from logo.adapters.digests import pool_digest
from logo.adapters.pool import AdapterPool
from logo.api.errors import unavailable
from logo.backends.vllm.bodies import POOLED
from logo.backends.vllm.core import WorkerError
from logo.backends.vllm.launch import API_KEY, Launch
from logo.backends.vllm.pool import Change as KeyedChange
from logo.backends.vllm.pool import KeyedPool
from logo.backends.vllm.router import Router
from logo.errors import LoGoError, UsageError
from logo.serving.coordinator import State
from logo.serving.error_handlers import response
from logo.serving.gate import Gate, Gated
from logo.serving.lifespan import Begun
from logo.serving.membership import Link, Member, Own
from logo.serving.pool import Change
from logo.serving.replica import POOL, REPLICA, Nameless, Together, keys_of

# vLLM has no limit of waiting requests.
_ROOM = 4096

UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


@dataclass(frozen=True)
class VllmPlan:
    """The settings of each replica.

    Attributes:
        launch: vLLM's flags and LoGo's options. Host and port are not used.
        front: further environment variables.
        pool: opens the pool, for its digest.
    """

    launch: Launch = field(repr=False)
    front: Mapping[str, str]
    pool: Callable[[], AdapterPool]
    concurrent: int = 64
    log_json: bool = False

    @property
    def room(self) -> int:
        """The most requests of a replica at one time."""
        return _ROOM

    async def replica(self, name: str, link: Link) -> VllmReplica:
        """Starts vLLM's engine in this process and its children."""
        launch = self.launch
        own = {**launch.variables, **self.front, **({} if launch.api_key is None else {API_KEY: launch.api_key})}
        os.environ.update(own)  # before vLLM is imported
        os.environ.pop(UPDATING, None)  # vLLM's own routes would only change this replica
        opened = await asyncio.to_thread(lambda: keys_of(self.pool()))
        server = _Server(_parsed(launch.command[3:]))
        app = Begun(await server.start())
        await app.start()
        return VllmReplica(name, link, server, app, server.router, opened)


class VllmReplica:
    """vLLM's app as one of several replicas.

    Args:
        name: of the replica.
        link: to the coordinator.
        server: runs the engine.
        app: vLLM's app, started.
        router: LoGo's router in it.
        opened: name -> key of the adapters of the pool, including those that do not fit the base model.
    """

    def __init__(
        self, name: str, link: Link, server: _Server, app: ASGIApp, router: Router, opened: Mapping[str, str]
    ) -> None:
        self._link, self._server, self._router = link, server, router
        self._left_out = {adapter: key for adapter, key in opened.items() if adapter not in router.core.pool.keys}
        router.everywhere = self._everywhere
        gate = Gate()
        drainable = Drainable(Together(Gated(app, gate, self._headers, POOLED), name, link))
        self.app: ASGIApp = Nameless(drainable)
        own = Own(self._stage, self._take, router.workers.abandon, server.metrics, drainable.drain)
        self.member = Member(link, own, gate, State(self._digest(router.core.pool)))
        self._name = name

    def check(self) -> None:
        """Raises an error if the replica has to be replaced."""
        self.member.check()
        if self._server.client.errored:
            raise LoGoError("vLLM's engine has ended")

    def _headers(self) -> Mapping[str, str]:
        return {POOL: self.member.state.digest, REPLICA: self._name}

    def _digest(self, pool: KeyedPool) -> str:
        return pool_digest(dict(sorted({**self._left_out, **pool.keys}.items())))  # in pool order

    # -- changes -------------------------------------------------------------------------------------------------------

    async def _everywhere(self, change: KeyedChange) -> None:
        """Makes a change that a client of this replica wants, in all replicas or in none."""
        kind, name, folder = change
        there = name in self._router.core.pool.keys
        path = Path(folder).absolute()
        asked = Change(name) if kind == "remove" else Change(name, path, kind == "replace" and there)
        error = await self._link.change(asked)
        if error is not None:
            raise error

    async def _stage(self, change: Change) -> str:
        kind = "remove" if change.folder is None else "replace" if change.replace else "add"
        asked = kind, change.name, str(change.folder or "")
        try:
            return self._digest(await self._router.workers.stage(self._router.core, asked))
        except WorkerError as error:  # other replicas do not know this class
            raise UsageError(str(error)) from None

    async def _take(self) -> None:
        await self._router.workers.commit(self._router.core)


class Drainable:
    """An app that answers new requests with 503 while the server ends, and reports this at `/ready`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self._draining = app, False

    def drain(self) -> None:
        """Refuses new requests from now on."""
        self._draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/ready":
            health = PlainTextResponse("not taking requests", 503) if self._draining else PlainTextResponse("ok")
            return await health(scope, receive, send)
        if self._draining and scope["type"] == "http" and scope["method"] == "POST":
            answer = unavailable("the server is shutting down", 1.0, closing=True)
            return await response(answer)(scope, receive, send)
        await self.app(scope, receive, send)


class _Server:
    """vLLM's engine and app in this process.

    Args:
        args: the parsed arguments of vLLM's server.
    """

    client: Any
    _app: Any

    def __init__(self, args: Namespace) -> None:
        self._args = args

    async def start(self) -> ASGIApp:
        """Starts the engine, and returns the app in front of it."""
        from vllm.entrypoints.openai.api_server import build_app, build_async_engine_client, init_app_state

        self._engine: AbstractAsyncContextManager[Any] = build_async_engine_client(self._args)
        self.client = await self._engine.__aenter__()  # ends with the process
        tasks = await self.client.get_supported_tasks()
        app = build_app(self._args, tasks, self.client.model_config)
        await init_app_state(self.client, app.state, self._args, tasks)
        app.state.server = SimpleNamespace()  # vLLM makes it exit when the engine dies; here `check` notices that
        self._app = app
        ready: ASGIApp = app
        return ready

    @property
    def router(self) -> Router:
        """LoGo's router in the app, once that has started."""
        found: Router = self._app.state.logo_router
        return found

    def metrics(self) -> str:
        """The metrics of vLLM and of the router."""
        from prometheus_client import generate_latest
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        return generate_latest(get_prometheus_registry()).decode()


def _parsed(flags: list[str]) -> Namespace:
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ModuleNotFoundError:  # older versions
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    validate_parsed_serve_args(args)
    return args
