"""A replica that is vLLM's own server, with LoGo's router in it: vLLM's app, without the part of it that listens.

The pool stays as it is: vLLM's processes take changes by themselves, and nothing makes all replicas change together.
"""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from logo.adapters.pool import AdapterPool
from logo.api.errors import unavailable
from logo.backends.vllm.launch import API_KEY, Launch
from logo.errors import LoGoError, UsageError
from logo.serving.coordinator import State
from logo.serving.errors import response
from logo.serving.gate import Gate, Gated
from logo.serving.membership import Link, Member, Own
from logo.serving.pool import Change
from logo.serving.replica import POOL, REPLICA, Nameless, Together, digest

# vLLM lets any number of requests wait.
_ROOM = 4096

_UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


@dataclass(frozen=True)
class VllmPlan:
    """What each replica starts.

    Attributes:
        launch: vLLM's flags, and what LoGo is told. Host and port are not used.
        front: further variables of the environment.
        pool: opens the pool, for its digest.
    """

    launch: Launch = field(repr=False)
    front: Mapping[str, str]
    pool: Callable[[], AdapterPool]
    concurrent: int = 64
    log_json: bool = False

    @property
    def room(self) -> int:
        """Requests that a replica may have at one time."""
        return _ROOM

    async def replica(self, name: str, link: Link) -> VllmReplica:
        """Starts vLLM's engine in this process and its children."""
        launch = self.launch
        own = {**launch.variables, **self.front, **({} if launch.api_key is None else {API_KEY: launch.api_key})}
        os.environ.update(own)  # before vLLM is imported
        os.environ.pop(_UPDATING, None)
        found = digest(await asyncio.to_thread(self.pool))
        server = _Server(_parsed(launch.command[3:]))
        return VllmReplica(name, link, server, await server.start(), found)


class VllmReplica:
    """vLLM's app as one of several replicas.

    Args:
        name: of the replica.
        link: to the coordinator.
        server: that runs the engine.
        app: vLLM's.
        pool: the pool's digest.
    """

    def __init__(self, name: str, link: Link, server: _Server, app: ASGIApp, pool: str) -> None:
        self._server = server
        gate = Gate()
        told = {POOL: pool, REPLICA: name}
        drainable = Drainable(Together(Gated(app, gate, lambda: told), name, link))
        self.app: ASGIApp = Nameless(drainable)
        own = Own(_unchanged, _nothing, lambda: None, server.metrics, drainable.drain)
        self.member = Member(link, own, gate, State(pool))

    def check(self) -> None:
        """Raises where the replica has to be replaced."""
        self.member.check()
        if self._server.client.errored:
            raise LoGoError("vLLM's engine has ended")


class Drainable:
    """An app that answers with 503 what comes when the server is to end, and says at `/ready` whether it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self._draining = app, False

    def drain(self) -> None:
        """From here on."""
        self._draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/ready":
            told = PlainTextResponse("not taking requests", 503) if self._draining else PlainTextResponse("ok")
            return await told(scope, receive, send)
        if self._draining and scope["type"] == "http" and scope["method"] == "POST":
            answer = unavailable("the server is shutting down", 1.0, closing=True)
            return await response(answer)(scope, receive, send)
        await self.app(scope, receive, send)


class _Server:
    """vLLM's engine and app in this process.

    Args:
        args: as vLLM's server parses them.
    """

    client: Any

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
        app.state.server = SimpleNamespace()  # vLLM tells it to exit when the engine dies; here `check` sees that
        ready: ASGIApp = app
        return ready

    def metrics(self) -> str:
        """vLLM's, and the router's."""
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


async def _unchanged(change: Change) -> str:
    raise UsageError(
        "the pool of vLLM replicas cannot change while they run: start them again with the pool that you want"
    )


async def _nothing() -> None: ...
