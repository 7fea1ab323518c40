"""Replicas of vLLM's server through Ray Serve: one address, and behind it several processes with the same pool, each
with vLLM's app, engine and LoGo in it.

The pool at the start is the one that the command has opened. What has changed since then is the deployment's
`user_config`: for each changed name the last change, as a mark and a folder, or None for an adapter that was taken out.
A request to load or unload an adapter is answered as usual by the replica that it comes to, in that replica's pool. If
that was done, the replica hands the change to the one process of `Changes`, which deploys the application again with
the next `user_config`. Ray Serve then calls `reconfigure` in one replica after the other, starts none of them again,
and gives the state to replicas that start later. The client has its answer when all have the same pool; until then
each request is answered with the pool of before or the new one, since LoGo's engine takes a pool as one value.

`serve.run` gives what it is told a new version, for which it would start everything again. So the deployments say
their version themselves, by a keyword that Ray keeps for itself (`_internal`).
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
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.cluster.processes import LOCAL, ClusterError, Expected, Layout, connected
from logo.errors import LoGoError

APPLICATION = "logo"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

_ATTEMPTS = 3  # of a replica to open: the next ones would fail, too
_ROOM = 4096  # the most requests of a replica at one time: vLLM has no limit of waiting requests
_DRAIN = 600.0  # seconds in which a replica that is to end may finish accepted requests
_LOOK = 0.5  # seconds between two looks at the application

Changed = Mapping[str, Sequence[Any]]  # name -> [mark, folder or None]


@dataclass(frozen=True)
class ReplicaPlan:
    """The settings of each replica.

    Attributes:
        open: makes an app with an engine in the process that calls it, as `vllm_app` does.
        variables: environment variables that are set before, an API key among them.
        expected: what each replica has to find.
        count: number of replicas; `options`: Ray's of each (`connected`).
    """

    open: Callable[[], Awaitable[Starlette]]
    variables: Mapping[str, str] = field(repr=False)
    expected: Expected
    count: int
    options: Mapping[str, Any]


async def vllm_app(flags: Sequence[str]) -> Starlette:
    """vLLM's app, with its engine in this process and its children; `flags` are those of vLLM's server, whose host and
    port are not used. The app's state has vLLM's `engine_client`, and LoGo's `logo`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.openai.api_server import build_app, build_async_engine_client, init_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(flags))
    validate_parsed_serve_args(args)
    engine = build_async_engine_client(args)
    client = await engine.__aenter__()
    tasks = await client.get_supported_tasks()
    app: Starlette = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    app.state.engine = engine  # which ends the client when nobody holds it any more
    app.state.server = SimpleNamespace()  # told to exit when the engine dies, which `check_health` notices
    return app


# -- the processes ----------------------------------------------------------------------------------------------------


class Replica:
    """A replica; `changes` is the handle of `Changes`. ClusterError where it finds something else than the command."""

    async def __init__(self, plan: ReplicaPlan, changes: Any) -> None:  # type: ignore[misc]
        os.environ.update(plan.variables)  # before vLLM is imported
        await asyncio.to_thread(plan.expected.check)
        self._app, self._changes = await plan.open(), changes
        self._changed: dict[str, Sequence[Any]] = {}
        self._changing = asyncio.Lock()

    async def reconfigure(self, config: Mapping[str, Changed]) -> None:
        """Makes the pool what Ray Serve says; its errors end this replica, which would answer with another pool."""
        logo = self._app.state.logo
        async with self._changing:
            # Adapters are added before others are removed, since a pool never loses its last one.
            for name, last in sorted(config["changed"].items(), key=lambda change: change[1][1] is None):
                if self._changed.get(name) == last:
                    continue
                there, folder = name in logo.pool.names, last[1]
                if there or folder is not None:
                    await logo.change("remove" if folder is None else "replace" if there else "add", name, folder)
                self._changed[name] = last

    async def check_health(self) -> None:
        """Raises an error if this replica has to be replaced."""
        if self._app.state.engine_client.errored:
            raise LoGoError("vLLM's engine has ended")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:  # uvicorn does not take a method
            await self._answer(scope, receive, send)

        return app

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") not in (LOAD, UNLOAD):
            return await self._app(scope, receive, send)
        body = await Request(scope, receive).body()
        for message in await asyncio.shield(self._change(scope, body)):  # which goes on if the client leaves
            await send(message)

    async def _change(self, scope: Scope, body: bytes) -> list[Message]:
        """The answer of vLLM's app to a request that changes its pool, when all replicas have changed theirs."""
        answer: list[Message] = []
        requests = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            return next(requests, None) or await asyncio.Future[Message]()  # it never hears that the client has left

        async def send(message: Message) -> None:
            answer.append(message)

        async with self._changing:
            await self._app(scope, receive, send)
            if not answer or answer[0]["status"] != 200:
                return answer
            asked = json.loads(body)
            name, folder = asked["lora_name"], asked["lora_path"] if scope["path"].startswith(LOAD) else None
            folder = os.path.abspath(folder) if folder is not None and os.path.isdir(folder) else folder
            last = self._changed[name] = [uuid4().hex, folder]
        failure = await self._changes.put.remote(name, last)
        if failure is not None:
            answer.clear()
            said = f"adapter {name!r}: changed here, but not in every replica: {failure}; unload it, or try again"
            error = {"message": said, "type": "server_error", "param": None, "code": "not_everywhere"}
            await JSONResponse({"error": error}, 500)(scope, receive, send)
        return answer


class Changes:
    """The one process that changes the pool of all replicas, one change after the other."""

    def __init__(self, plan: ReplicaPlan) -> None:
        self._plan, self._changed = plan, dict[str, Sequence[Any]]()
        self._changing = asyncio.Lock()

    def reconfigure(self, config: Mapping[str, Changed]) -> None:
        """What Ray Serve has kept, when this process is started again."""
        self._changed = dict(config["changed"])

    async def put(self, name: str, last: Sequence[Any]) -> str | None:
        """Makes a change in all replicas; why one of them could not, or None."""
        from ray import serve

        async with self._changing:
            self._changed[name] = last
            target = application(self._plan, self._changed)
            try:
                await asyncio.to_thread(serve.run, target, name=APPLICATION, route_prefix="/")
            except RuntimeError:  # the deployment has failed; says less than the status
                return _reason(serve.status().applications[APPLICATION])
        return None


# -- the application --------------------------------------------------------------------------------------------------


def application(plan: ReplicaPlan, changed: Changed) -> Any:
    """The application for Ray Serve, after these changes of the pool."""
    from ray import serve

    deployment: Any = serve.deployment
    common: dict[str, Any] = {"user_config": {"changed": dict(changed)}, "logging_config": {"enable_access_log": False}}
    common |= {"version": "1", "_internal": True, "max_ongoing_requests": _ROOM}
    small = {**plan.options, "num_cpus": 0, "num_gpus": 0}
    changes = deployment(Changes).options(name="Changes", ray_actor_options=small, **common)
    replicas = deployment(serve.ingress()(Replica)).options(
        name="LoGo",
        num_replicas=plan.count,
        graceful_shutdown_timeout_s=_DRAIN,
        health_check_period_s=5,
        max_constructor_retry_count=_ATTEMPTS,
        ray_actor_options=dict(plan.options),
        **common,
    )
    return replicas.bind(plan, changes.bind(plan))


def serve_replicas(
    layout: Layout,
    plan_of: Callable[[Mapping[str, Any]], ReplicaPlan],
    host: str,
    port: int,
    say: Callable[[str], None],
) -> None:
    """Serves until SIGTERM or Ctrl-C, and then until accepted requests have ended; a second signal does not wait.

    Args:
        plan_of: the settings of replicas with these options of Ray.
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
        plan = plan_of(options)
        with suppress(TimeoutError):  # Ray gives its proxy a minute, too little on busy machines; `_watch` waits for it
            serve.start(
                proxy_location="HeadOnly" if layout.address == LOCAL else "EveryNode",
                http_options={"host": host, "port": port, "request_timeout_s": None, "keep_alive_timeout_s": 30},
                logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            )
        try:
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
            if layout.address != LOCAL:
                serve.shutdown()


def _watch(serve: Any, expected: int, url: str, say: Callable[[str], None]) -> None:
    """Says the address, and how many replicas accept requests, for ever: Ray replaces replicas that have ended."""
    before = None
    while True:
        status = serve.status()
        found, listens = status.applications.get(APPLICATION), "HEALTHY" in status.proxies.values()
        if found is None:
            raise ClusterError("the application was removed from the cluster")
        count = found.deployments["LoGo"].replica_states.get("RUNNING", 0) if "LoGo" in found.deployments else 0
        if not count and found.status == "DEPLOY_FAILED":
            raise LoGoError(f"no replica could be opened: {_reason(found)}")
        line = f"{count} of {expected} replicas take{'s' if count == 1 else ''} requests"
        if not count and found.status == "UNHEALTHY":
            line += f": {_reason(found)}"
        if listens and line != before and (count or before is not None):
            if before is None:
                say(f"Serving on {url}")
            say(line)
            before = line
        time.sleep(_LOOK)


def _stop(number: int, frame: FrameType | None) -> None:
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_DFL)  # the second one ends this process, and what it has started with it
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)


def _reason(found: Any) -> str:
    """The error of an application in Ray Serve's words, without its traceback."""
    said = "\n".join([*(one.message for one in found.deployments.values()), found.message])
    errors = re.findall(r"logo\.[\w.]*Error: ([^\n]+)", said) or re.findall(r"\w+Error: ([^\n]+)", said)
    return str(errors[-1]).strip() if errors else " ".join(said.split())[-300:]
