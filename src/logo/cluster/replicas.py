"""Replicas of vLLM's server through Ray Serve: one address, and behind it several processes with the same pool, each
with vLLM's app, engine and LoGo in it.

The pool at the start is the one that the command has opened. What has changed since then is the deployment's
`user_config`: for each changed name the last change, as a mark and a folder, or None for an adapter that was taken out.
A request to load or unload an adapter is answered as usual by the replica that it comes to, in that replica's pool. If
that was done, the replica hands the change to the one process of `Changes`, which deploys the application again with
the next `user_config`. Ray Serve then calls `reconfigure` in one replica after the other, starts none of them again,
and gives the state to replicas that start later. The client has its answer when all have the same pool; until then
each request is answered with the pool of before or the new one, since LoGo's engine takes a pool as one value. Where no
replica is left and one that starts cannot make a change, since its folder is gone, the change is withdrawn.

A request waits until a replica is there. `/health` does not: it is answered by a small application of its own.

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
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logo.api.guards import Admission, GuardSettings
from logo.cluster.processes import LOCAL, ClusterError, Expected, Layout, connected
from logo.errors import LoGoError

APPLICATION = "logo"
HEALTH = "logo-health"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

_ATTEMPTS = 3  # of a replica to open: the next ones would fail, too
_ROOM = 4096  # the most requests of a replica at one time: vLLM has no limit of waiting requests
_DRAIN = 600.0  # seconds in which a replica that is to end may finish accepted requests
_LOOK = 0.5  # seconds between two looks at the application
_ASK = 5.0  # seconds in which the process of `Changes` has to answer the command
_SMALL = {"num_cpus": 0, "num_gpus": 0}  # of processes that compute nothing

Change = Sequence[Any]  # a mark of its own, and the adapter's folder, or None for one that was taken out
Changed = Mapping[str, Change]  # by the adapter's name


@dataclass(frozen=True)
class ReplicaPlan:
    """The settings of each replica.

    Attributes:
        open: makes an app with an engine in the process that calls it, as `vllm_app` does.
        variables: environment variables that are set before, an API key among them.
        expected: what each replica has to find.
        guards: who may change the pool; vLLM's app guards everything else in each replica.
        count: number of replicas.
        options: Ray's of each (`connected`).
    """

    open: Callable[[], Awaitable[Starlette]]
    variables: Mapping[str, str] = field(repr=False)
    expected: Expected
    guards: GuardSettings
    count: int
    options: Mapping[str, Any]


async def vllm_app(flags: Sequence[str]) -> Starlette:
    """vLLM's app, with its engine in this process and its children; `flags` are those of vLLM's server, whose host and
    port are not used. The app's state has vLLM's `engine_client`, and LoGo's `logo`."""
    from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args
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
        self._app = await plan.open()
        self._changes = changes
        self._changed: dict[str, Change] = {}
        self._changing = asyncio.Lock()
        self._change_route = Admission(self._change, plan.guards)

    async def reconfigure(self, config: Mapping[str, Changed]) -> None:
        """Makes the pool what Ray Serve says. An error ends this replica, which would answer with another pool, unless
        none is left that has the pool of the change: then the change is withdrawn."""
        async with self._changing:
            # Adapters are added before others are removed, since a pool never loses its last one.
            for name, change in sorted(config["changed"].items(), key=lambda entry: entry[1][1] is None):
                if self._changed.get(name) == change:
                    continue
                try:
                    await self._make(name, change[1])
                except LoGoError as error:
                    if not await self._changes.withdraw.remote(name, change, str(error)):
                        raise
                self._changed[name] = change

    async def _make(self, name: str, folder: str | None) -> None:
        """Makes a change in this replica's pool."""
        logo = self._app.state.logo
        is_there = name in logo.pool.names
        if folder is None:
            if is_there:
                await logo.change("remove", name, None)
        else:
            await logo.change("replace" if is_there else "add", name, folder)

    async def check_health(self) -> None:
        """Raises an error if this replica has to be replaced."""
        if self._app.state.engine_client.errored:
            raise LoGoError("vLLM's engine has ended")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:  # uvicorn does not take a method
            is_change = scope["type"] == "http" and scope["path"].rstrip("/") in (LOAD, UNLOAD)
            route = self._change_route if is_change else self._app
            await route(scope, receive, send)

        return app

    async def _change(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request that changes the pool, when all replicas have changed theirs."""
        body = await Request(scope, receive).body()
        for message in await asyncio.shield(self._changed_everywhere(scope, body)):  # goes on if the client leaves
            await send(message)

    async def _changed_everywhere(self, scope: Scope, body: bytes) -> list[Message]:
        """The answer of vLLM's app to a request that changes its pool, unless another replica cannot change."""
        async with self._changing:
            answer = await _answered(self._app, scope, body)
            if not answer or answer[0]["status"] != 200:
                return answer
            fields = json.loads(body)
            name = fields["lora_name"]
            folder = fields["lora_path"] if scope["path"].startswith(LOAD) else None
            if folder is not None and os.path.isdir(folder):
                folder = os.path.abspath(folder)
            change = [uuid4().hex, folder]
            self._changed[name] = change
        failure = await self._changes.put.remote(name, change)
        if failure is None:
            return answer
        said = f"adapter {name!r}: changed here, but not in every replica: {failure}; unload it, or try again"
        error = {"message": said, "type": "server_error", "param": None, "code": "not_everywhere"}
        return await _answered(JSONResponse({"error": error}, 500), scope, b"")


async def _answered(app: ASGIApp, scope: Scope, body: bytes) -> list[Message]:
    """The messages with which an app answers a request, which it never hears of being given up."""
    answer: list[Message] = []
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return requests.pop() if requests else await asyncio.Future[Message]()

    async def send(message: Message) -> None:
        answer.append(message)

    await app(scope, receive, send)
    return answer


class Changes:
    """The one process that changes the pool of all replicas, one change after the other."""

    def __init__(self, plan: ReplicaPlan) -> None:
        self._plan = plan
        self._changed: dict[str, Change] = {}
        self._changing = asyncio.Lock()
        self._withdrawn: list[str] = []  # a line for each
        self._withdrawing: set[asyncio.Task[str | None]] = set()

    def reconfigure(self, config: Mapping[str, Changed]) -> None:
        """What Ray Serve has kept, when this process is started again."""
        self._changed = dict(config["changed"])

    async def put(self, name: str, change: Change) -> str | None:
        """Makes a change in all replicas; why one of them could not, or None."""
        self._changed[name] = change
        return await self._deploy()

    async def withdraw(self, name: str, change: Change, reason: str) -> bool:
        """Forgets a change that a replica cannot make for this reason, if no replica is left that has made it; whether
        it is forgotten."""
        if self._changed.get(name) != change:
            return True  # another replica has asked, or there is a later change, which comes next
        if await asyncio.to_thread(serving_replicas):
            return False
        del self._changed[name]
        self._withdrawn.append(
            f"adapter {name!r}: its change was withdrawn, since no replica is left that has made it, and one that "
            f"starts cannot: {reason}; load it again"
        )
        task = asyncio.create_task(self._deploy())  # the replica that asks has to start before
        self._withdrawing.add(task)
        task.add_done_callback(self._withdrawing.discard)
        return True

    def withdrawn(self) -> list[str]:
        """A line for each change that was withdrawn."""
        return self._withdrawn

    async def _deploy(self) -> str | None:
        """Tells all replicas of the changes; why one of them could not make them, or None."""
        from ray import serve

        async with self._changing:
            target = application(self._plan, self._changed)
            try:
                await asyncio.to_thread(serve.run, target, name=APPLICATION, route_prefix="/")
            except RuntimeError:  # the deployment has failed; says less than the status
                return _reason(serve.status().applications[APPLICATION])
        return None


class Health:
    """Answers `/health`, also while no replica answers anything."""

    async def __call__(self, request: Request) -> Response:
        """200 while there is a replica, else 503."""
        if await asyncio.to_thread(serving_replicas):
            return PlainTextResponse("")
        return PlainTextResponse("no replica takes requests", 503)


def serving_replicas() -> int:
    """How many replicas take requests now."""
    from ray import serve

    return _serving(serve.status().applications.get(APPLICATION))


def _serving(status: Any) -> int:
    """How many replicas take requests, by the status of the application; those whose pool changes do so in a moment."""
    deployments = {} if status is None else status.deployments
    states = deployments["LoGo"].replica_states if "LoGo" in deployments else {}
    return int(states.get("RUNNING", 0) + states.get("UPDATING", 0))


# -- the application --------------------------------------------------------------------------------------------------


def application(plan: ReplicaPlan, changed: Changed) -> Any:
    """The application for Ray Serve, after these changes of the pool."""
    from ray import serve

    deployment: Any = serve.deployment
    common: dict[str, Any] = {
        "user_config": {"changed": dict(changed)},
        "logging_config": {"enable_access_log": False},
        "version": "1",
        "_internal": True,
        "max_ongoing_requests": _ROOM,
    }
    small = {**plan.options, **_SMALL}
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


def health_application(plan: ReplicaPlan) -> Any:
    """The application that answers `/health`."""
    from ray import serve

    deployment: Any = serve.deployment
    small = {**plan.options, **_SMALL}
    health = deployment(Health).options(
        name="Health", ray_actor_options=small, logging_config={"enable_access_log": False}, max_ongoing_requests=_ROOM
    )
    return health.bind()


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
        before = serve.status()
        if before.applications or before.proxies:
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
                [
                    serve.RunTarget(application(plan, {}), APPLICATION, "/"),
                    serve.RunTarget(health_application(plan), HEALTH, "/health"),
                ],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            _watch(serve, plan.count, f"http://{f'[{host}]' if ':' in host else host}:{port}", say)
        finally:
            _end(serve)
            if layout.address != LOCAL:
                serve.shutdown()


def _watch(serve: Any, expected: int, url: str, say: Callable[[str], None]) -> None:
    """Says the address, and how many replicas accept requests, for ever: Ray replaces replicas that have ended."""
    last_line = None
    asks_for_withdrawn = False
    said_withdrawn = 0
    while True:
        status = serve.status()
        application_status = status.applications.get(APPLICATION)
        if application_status is None:
            raise ClusterError("the application was removed from the cluster")
        count = _serving(application_status)
        if not count and application_status.status == "DEPLOY_FAILED":
            raise LoGoError(f"no replica could be opened: {_reason(application_status)}")
        line = f"replicas ready: {count} of {expected}"
        if not count and application_status.status == "UNHEALTHY":
            line += f": {_reason(application_status)}"
        listens = "HEALTHY" in status.proxies.values()
        if listens and line != last_line and (count or last_line is not None):
            if last_line is None:
                say(f"Serving on {url}")
            else:
                asks_for_withdrawn = count > 0  # one that has started may have asked for it
            say(line)
            last_line = line
        withdrawn = _withdrawn(serve) if asks_for_withdrawn else None
        if withdrawn is not None:
            for withdrawn_line in withdrawn[said_withdrawn:]:
                say(withdrawn_line)
            said_withdrawn = len(withdrawn)
            asks_for_withdrawn = False
        time.sleep(_LOOK)


def _withdrawn(serve: Any) -> list[str] | None:
    """A line for each change of the pool that was withdrawn; None: the process that knows does not answer now."""
    with suppress(Exception):
        changes = serve.get_deployment_handle("Changes", APPLICATION)
        lines: list[str] = changes.withdrawn.remote().result(timeout_s=_ASK)
        return lines
    return None


def _end(serve: Any) -> None:
    """Ends the application, once accepted requests have ended."""
    for name in (APPLICATION, HEALTH):
        serve.delete(name, _blocking=False)  # blocking waits for a minute at most
    end = time.monotonic() + _DRAIN
    while APPLICATION in serve.status().applications and time.monotonic() < end:
        time.sleep(_LOOK)


def _stop(number: int, frame: FrameType | None) -> None:
    for stopping in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping, signal.SIG_DFL)  # the second one ends this process, and what it has started with it
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)


def _reason(status: Any) -> str:
    """The error of an application in Ray Serve's words, without its traceback."""
    messages = [deployment.message for deployment in status.deployments.values()]
    text = "\n".join([*messages, status.message])
    errors = re.findall(r"logo\.[\w.]*Error: ([^\n]+)", text) or re.findall(r"\w+Error: ([^\n]+)", text)
    return str(errors[-1]).strip() if errors else " ".join(text.split())[-300:]
