"""Replicas of vLLM's server through Ray Serve: one address, and behind it several processes with the same pool, each
with vLLM's app, engine and LoGo in it.

The pool at the start is the one that the command has opened; which adapters have changed since then is the deployment's
`user_config`, for each name the last change as `[mark, folder]`, or `[mark, None]` for one that was taken out. A
request to load or unload an adapter is answered as usual by the replica that it comes to, in that replica's pool. If it
was done there, the replica hands it to the one process of `Changes`, which deploys the application again with the next
`user_config`. Ray Serve then calls `reconfigure` in every replica, without starting any of them again, one after the
other, and keeps the state for replicas that start later. The client has its answer when all have the same pool.
Until then, a request is answered with the pool of before or with the new one, according to its replica, and never with
a mixture of both, since LoGo's engine takes a pool as one value.

`serve.run` calls what it is given a new version and starts everything again, so the deployments name their version
themselves, by a keyword that Ray keeps for itself (`_internal`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.cluster.processes import LOCAL, ClusterError, Expected, Layout, connected
from logo.errors import LoGoError

APPLICATION = "logo"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

# A replica that cannot be opened: the next attempts would fail, too.
_ATTEMPTS = 3

# The most requests of a replica at one time: vLLM has no limit of waiting requests.
_ROOM = 4096

# Seconds in which a replica that is to end may finish accepted requests; and between two looks at the application.
_DRAIN, _LOOK = 600.0, 0.5

Changed = Mapping[str, Sequence[Any]]  # name -> [mark, folder or None]


@dataclass(frozen=True)
class Engine:
    """What a replica has opened: vLLM's app, its client of the engine (with `errored`), and LoGo's part in it (with
    `pool.names` and `change(kind, name, folder)`)."""

    app: ASGIApp
    client: Any
    logo: Any


@dataclass(frozen=True)
class Plan:
    """The settings of each replica.

    Attributes:
        open: opens an engine in the process that calls it, as `vllm_engine` does.
        variables: environment variables that are set before, an API key among them.
        expected: what each replica has to find.
        count: number of replicas; `options`: Ray's options of each, see `connected`.
    """

    open: Callable[[], Awaitable[Engine]]
    variables: Mapping[str, str] = field(repr=False)
    expected: Expected
    count: int
    options: Mapping[str, Any]


async def vllm_engine(flags: Sequence[str]) -> Engine:
    """vLLM's engine and app in this process and its children.

    Args:
        flags: of vLLM's server, whose host and port are not used.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.openai.api_server import build_app, build_async_engine_client, init_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(flags))
    validate_parsed_serve_args(args)
    client = await build_async_engine_client(args).__aenter__()  # ends with the process
    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    app.state.server = SimpleNamespace()  # told to exit when the engine dies, which `check_health` notices
    return Engine(app, client, app.state.logo)


# -- the processes ----------------------------------------------------------------------------------------------------


class Replica:
    """A replica; `changes`: the handle of `Changes`.

    Raises:
        LoGoError: it finds something else than the command.
    """

    async def __init__(self, plan: Plan, changes: Any) -> None:  # type: ignore[misc]
        os.environ.update(plan.variables)  # before vLLM is imported
        await asyncio.to_thread(plan.expected.check)
        self._engine, self._changes = await plan.open(), changes
        self._changed: dict[str, Sequence[Any]] = {}
        self._changing = asyncio.Lock()

    async def reconfigure(self, config: Mapping[str, Changed]) -> None:
        """Makes the pool what Ray Serve says; its errors end this replica, which would answer with another pool."""
        logo = self._engine.logo
        async with self._changing:
            for name, last in config["changed"].items():
                if self._changed.get(name) == last:
                    continue
                there, folder = name in logo.pool.names, last[1]
                if there or folder is not None:
                    await logo.change("remove" if folder is None else "replace" if there else "add", name, folder)
                self._changed[name] = last

    async def check_health(self) -> None:
        """Raises an error if this replica has to be replaced."""
        if self._engine.client.errored:
            raise LoGoError("vLLM's engine has ended")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request: by vLLM's app, and a change that was done by it when it is done in every replica."""
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        if path not in (LOAD, UNLOAD):
            await self._engine.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        answer: list[Message] = []

        async def again() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def keep(message: Message) -> None:
            answer.append(message)

        async with self._changing:
            await self._engine.app(scope, again, keep)
            done = bool(answer) and answer[0]["status"] == 200
            if done:
                asked = json.loads(body)
                name, folder = asked["lora_name"], asked["lora_path"] if path == LOAD else None
                folder = os.path.abspath(folder) if folder is not None and os.path.isdir(folder) else folder
                last = self._changed[name] = [uuid4().hex, folder]
        failure = await self._changes.put.remote(name, last) if done else None
        if failure is not None:
            message = f"adapter {name!r}: changed here, but not in every replica: {failure}; unload it, or try again"
            error = {"message": message, "type": "server_error", "param": None, "code": "not_everywhere"}
            await JSONResponse({"error": error}, 500)(scope, receive, send)
            return
        for message in answer:
            await send(message)


class Changes:
    """The one process that changes the pool of all replicas, one change after the other."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._changed = plan, dict[str, Sequence[Any]]()
        self._changing = asyncio.Lock()

    def reconfigure(self, config: Mapping[str, Changed]) -> None:
        """What Ray Serve has kept, when this process is started again."""
        self._changed = dict(config["changed"])

    async def put(self, name: str, last: Sequence[Any]) -> str | None:
        """Makes a change in all replicas; why one of them could not, or None.

        Args:
            last: a mark that tells this change from others, and the folder, or None to take the adapter out.
        """
        from ray import serve

        async with self._changing:
            self._changed[name] = last
            target = application(self._plan, self._changed)
            try:
                await asyncio.to_thread(serve.run, target, name=APPLICATION, route_prefix="/")
            except RuntimeError as error:
                return _reason(str(error))
        return None


# -- the application --------------------------------------------------------------------------------------------------


def application(plan: Plan, changed: Changed) -> Any:
    """The application for Ray Serve, after these changes of the pool."""
    from ray import serve

    quiet = {"logging_config": {"enable_access_log": False}, "user_config": {"changed": dict(changed)}}
    made: Any = serve.deployment(Changes)
    changes = made.options(
        name="Changes",
        version="1",
        _internal=True,
        max_ongoing_requests=_ROOM,
        ray_actor_options={**plan.options, "num_cpus": 0, "num_gpus": 0},
        **quiet,
    )
    made = serve.deployment(serve.ingress()(Replica))
    replicas = made.options(
        name="LoGo",
        version="1",
        _internal=True,
        num_replicas=plan.count,
        max_ongoing_requests=_ROOM,
        graceful_shutdown_timeout_s=_DRAIN,
        health_check_period_s=5,
        max_constructor_retry_count=_ATTEMPTS,
        ray_actor_options=dict(plan.options),
        **quiet,
    )
    return replicas.bind(plan, changes.bind(plan))


def serve_replicas(
    layout: Layout,
    plan_of: Callable[[Mapping[str, Any]], Plan],
    address: tuple[str, int],
    say: Callable[[str], None],
) -> None:
    """Serves until SIGTERM or Ctrl-C, and then until accepted requests have ended; a second signal does not wait.

    Args:
        plan_of: the settings of replicas with these options of Ray.
        address: host and port.
        say: called with a line when the server accepts requests, and when the number of replicas changes.

    Raises:
        MissingLibrary, ClusterError: as `connected`; or Ray Serve runs on the cluster already.
        LoGoError: no replica can be opened.
        KeyboardInterrupt, SystemExit: the signal.
    """
    with connected(layout) as options:
        from ray import serve
        from ray.serve.schema import LoggingConfig

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # of this process; its state is said below
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)  # Ray's own handlers do not wait
        there = serve.status()
        if there.applications or there.proxies:
            raise ClusterError(f"Ray Serve runs {layout} already; end it with `serve shutdown`")
        host, port = address
        plan = plan_of(options)
        try:
            serve.start(
                proxy_location="HeadOnly" if layout.address == LOCAL else "EveryNode",
                http_options={"host": host, "port": port, "request_timeout_s": None, "keep_alive_timeout_s": 30},
                logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            )
            serve.run_many(
                [serve.RunTarget(application(plan, {}), APPLICATION, "/")],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            _watch(serve, plan.count, f"http://{f'[{host}]' if ':' in host else host}:{port}", say)
        finally:
            serve.delete(APPLICATION, _blocking=False)  # blocking waits for a minute at most
            end = time.monotonic() + _DRAIN
            while APPLICATION in serve.status().applications and time.monotonic() < end:
                time.sleep(_LOOK)
            serve.shutdown()


def _watch(serve: Any, expected: int, url: str, say: Callable[[str], None]) -> None:
    """Says the address, and how many replicas accept requests, for ever."""
    before, started = 0, False
    while True:
        found = serve.status().applications.get(APPLICATION)
        if found is None:
            raise ClusterError("the application was removed from the cluster")
        count = found.deployments["LoGo"].replica_states.get("RUNNING", 0) if "LoGo" in found.deployments else 0
        if not count and found.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            said = " ".join([found.message, *(one.message for one in found.deployments.values())])
            raise LoGoError(f"no replica could be opened: {_reason(said)}")
        if count and not started:
            say(f"Serving on {url}")
            started = True
        if count != before:
            say(f"{count} of {expected} replicas take{'s' if count == 1 else ''} requests")
            before = count
        time.sleep(_LOOK)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)


def _reason(said: str) -> str:
    """The error in a message of Ray Serve, without its traceback."""
    found = re.findall(r"logo\.[\w.]*Error: ([^\n]+)", said) or re.findall(r"\w+Error: ([^\n]+)", said)
    return str(found[-1]).strip() if found else " ".join(said.split())[-300:]
