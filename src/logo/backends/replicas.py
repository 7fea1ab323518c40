"""Replicas of vLLM's server through Ray Serve: one address, and behind it several processes that have opened the same
pool, each with vLLM's app and LoGo's router in it.

Ray Serve starts replicas, replaces those that fail `check_health`, and balances requests. The pool is opened at the
start, and requests that would change it in one replica are refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from types import FrameType, SimpleNamespace
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from logo import plugins
from logo.adapters.pool import AdapterPool
from logo.backends.cluster import LOCAL, Layout, WorkersError, connect, imported, process_resources
from logo.backends.vllm.asgi import answer_error
from logo.backends.vllm.launch import API_KEY, Launch
from logo.errors import LoGoError
from logo.serve.errors import ApiError

_log = logging.getLogger("logo.serve")

APPLICATION = "logo"

# A replica that cannot be opened: the next attempts would fail, too.
_ATTEMPTS = 3

# The most requests of a replica at one time: vLLM has no limit of waiting requests.
_ROOM = 4096

# Seconds in which a replica that is to end may finish accepted requests.
_DRAIN = 600.0

# Seconds between two checks of the application; and seconds that further replicas have after the first one.
_LOOK, _GRACE = 0.5, 120.0

_FIXED = "the pool of a server with replicas is the one that it was started with; change its adapters and restart it"
_ONE = "the numbers of one replica are not those of the server; Ray's own metrics are of all"

REFUSED = {
    "/v1/load_lora_adapter": ApiError(409, _FIXED, "invalid_request_error", code="conflict"),
    "/v1/unload_lora_adapter": ApiError(409, _FIXED, "invalid_request_error", code="conflict"),
    "/metrics": ApiError(404, _ONE, "invalid_request_error", code="not_found"),
}
"""Paths of vLLM's app that concern one replica alone -> what is answered instead."""


@dataclass(frozen=True)
class Plan:
    """The settings of each replica.

    Attributes:
        launch: vLLM's flags and LoGo's options. Host and port are not used.
        front: further environment variables.
        pool: opens the pool.
        digest: of the pool that every replica has to find.
        concurrent: the number of requests that keep a replica busy, for scaling.
    """

    launch: Launch = field(repr=False)
    front: Mapping[str, str]
    pool: Callable[[], AdapterPool]
    digest: str
    concurrent: int


def digest(pool: AdapterPool) -> str:
    """The digest of names and contents of all adapters. Reads each file once."""
    return pool.digest


# -- in a process -----------------------------------------------------------------------------------------------------


class Replica:
    """The class that Ray Serve starts: runs vLLM's engine in this process and its children.

    Args:
        plan: its settings.

    Raises:
        LoGoError: it finds another pool.
    """

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]
        found = await asyncio.to_thread(lambda: digest(plan.pool()))
        if found != plan.digest:
            raise LoGoError("this replica finds other adapters or example prompts than the command that started it")
        launch = plan.launch
        own = {**launch.variables, **plan.front, **({} if launch.api_key is None else {API_KEY: launch.api_key})}
        os.environ.update(own)  # before vLLM is imported
        from vllm.entrypoints.openai.api_server import build_app, build_async_engine_client, init_app_state

        args = _parsed(launch.command[3:])
        self._engine: AbstractAsyncContextManager[Any] = build_async_engine_client(args)
        self._client = await self._engine.__aenter__()  # ends with the process
        tasks = await self._client.get_supported_tasks()
        app = build_app(args, tasks, self._client.model_config)
        await init_app_state(self._client, app.state, args, tasks)
        app.state.server = SimpleNamespace()  # told to exit when the engine dies, which `check_health` notices
        self._app = app

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Fixed(self._app)

    async def check_health(self) -> None:
        """Raises an error if this replica has to be replaced."""
        if self._client.errored:
            raise LoGoError("vLLM's engine has ended")


class Fixed:
    """Answers requests for the paths in `REFUSED` in place of an app, and `/ready`, as our own server does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        if path in REFUSED:
            await answer_error(send, REFUSED[path])
        elif path == "/ready":
            await PlainTextResponse("ok")(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _parsed(flags: list[str]) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    validate_parsed_serve_args(args)
    return args


# -- the application ---------------------------------------------------------------------------------------------------


def application(plan: Plan, layout: Layout, most: int | None, cpus: int, gpus: float) -> Any:
    """The application for Ray Serve.

    Args:
        layout: the number of replicas at first is its `count`.
        most: the number grows with requests up to this; None: it is constant.
        cpus, gpus: of each replica.
    """
    imported()
    from ray import serve

    first = layout.count or 1
    count: dict[str, Any] = {"num_replicas": first}
    if most is not None:
        bounds = {"min_replicas": first, "initial_replicas": first, "max_replicas": most}
        count = {"autoscaling_config": {**bounds, "target_ongoing_requests": plan.concurrent}}
    made: Any = serve.deployment(serve.ingress()(Replica))
    deployment = made.options(
        name="LoGo",
        **count,
        max_ongoing_requests=_ROOM,
        graceful_shutdown_timeout_s=_DRAIN,
        health_check_period_s=5,
        max_constructor_retry_count=_ATTEMPTS,
        logging_config={"enable_access_log": False},
        ray_actor_options={
            "num_cpus": cpus,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cpus), **plugins.environment()}},
        },
    )
    return deployment.bind(plan)


def serve_replicas(
    plan: Plan,
    layout: Layout,
    most: int | None,
    address: tuple[str, int],
    started: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Serves until a signal comes, and then until accepted requests have ended.

    Args:
        layout, most: see `application`.
        address: host and port.
        started: called with the address when requests are accepted.
        say: called with a line when the number of replicas changes.

    Raises:
        MissingLibrary: Ray is not installed.
        UsageError: the cluster's address is not valid.
        WorkersError: no cluster answers, it has no room, or an application of this name runs there already.
        LoGoError: no replica can be opened.
        KeyboardInterrupt: the signal was SIGINT.
    """
    ray = imported()
    from ray import serve
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # of this process; its state is reported below
    widest = layout if most is None else replace(layout, count=most)
    connect(ray, widest)
    stop = _stopped()  # Ray's own handlers do not wait
    local = layout.address == LOCAL
    mine = False
    try:
        room = process_resources(ray, widest)  # with room for replicas that start later
        first = layout.count if most is not None and layout.count else room.count
        if APPLICATION in serve.status().applications:
            raise WorkersError(f"the cluster serves an application {APPLICATION!r} already; end that one first")
        host, port = address if local else _there(serve, address)
        serve.start(
            proxy_location="HeadOnly" if local else "EveryNode",
            http_options={"host": host, "port": port, "request_timeout_s": None, "keep_alive_timeout_s": 30},
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        mine = True
        target = application(plan, replace(layout, count=first), most, room.cpus, room.gpus)
        serve.run_many(
            [serve.RunTarget(target, APPLICATION, "/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        if _until_running(serve, min(first, room.room), stop):
            started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            _watch(serve, say, stop)
    finally:
        try:
            if mine:
                _remove(serve, stop)
        finally:
            ray.shutdown()  # also ends a cluster that was started for this
    if stop.by == signal.SIGINT:
        raise KeyboardInterrupt  # like a server of one process


def _there(serve: Any, address: tuple[str, int]) -> tuple[str, int]:
    """The address that all applications of a cluster share: that of its proxy if it has one, else `address`."""
    if not serve.status().proxies:
        return address
    from ray.serve.context import _get_global_client

    found: Any = _get_global_client()
    return str(found.http_config.host), int(found.http_config.port)


def _running(serve: Any) -> tuple[int, str, str]:
    """The number of replicas that accept requests, the application's status, and a message."""
    found = serve.status().applications.get(APPLICATION)
    if found is None:
        return 0, "NOT_STARTED", ""
    count = sum(one.replica_states.get("RUNNING", 0) for one in found.deployments.values())
    said = " ".join([found.message, *(one.message for one in found.deployments.values())])
    return count, str(getattr(found.status, "value", found.status)), said


def _until_running(serve: Any, expected: int, stop: threading.Event) -> bool:
    """Waits for as many replicas as there is room for; False if a signal came."""
    limit = float("inf")
    while not stop.wait(_LOOK):
        count, status, said = _running(serve)
        if status in ("DEPLOY_FAILED", "UNHEALTHY") and not count:
            raise LoGoError(f"no replica could be opened: {_reason(said)}")
        if count:
            limit = min(limit, time.monotonic() + _GRACE)
        if count >= expected or time.monotonic() > limit:
            return True
    return False


def _reason(said: str) -> str:
    """The error in a message of Ray Serve, without its traceback."""
    found = re.findall(r"logo\.[\w.]*Error: ([^\n]+)", said) or re.findall(r"\w+Error: ([^\n]+)", said)
    return str(found[-1]).strip() if found else " ".join(said.split())[-300:]


def _watch(serve: Any, say: Callable[[str], None], stop: threading.Event) -> None:
    """Reports changes of the number of replicas until a signal comes."""
    before, _, _ = _running(serve)
    while not stop.wait(2.0):
        count, status, _ = _running(serve)
        if status == "NOT_STARTED":
            raise WorkersError("the application was removed from the cluster")
        if count != before:
            say(f"{count} replica{' takes' if count == 1 else 's take'} requests, {before} did")
            before = count


def _remove(serve: Any, stop: _Stop) -> None:
    """Removes the application from the cluster, when accepted requests have ended or after `_DRAIN` seconds."""
    serve.delete(APPLICATION, _blocking=False)  # blocking waits for a minute at most
    end = time.monotonic() + _DRAIN
    while APPLICATION in serve.status().applications and not stop.hurry:  # the controller has received it
        if time.monotonic() > end:
            _log.warning("replicas have not ended within %.0f s", _DRAIN)
            break
        time.sleep(_LOOK)


class _Stop(threading.Event):
    """A signal: `by` is the first one, `hurry` whether there was a second one."""

    by: int | None = None
    hurry = False


def _stopped() -> _Stop:
    """Installs handlers: the first SIGTERM or Ctrl-C stops, the second one does not wait."""
    stop = _Stop()

    def leave(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            stop.hurry = True
            raise SystemExit(128 + number)
        stop.by = number
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    return stop
