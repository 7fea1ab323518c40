"""Starts replicas through Ray Serve (`logo.serving.replicas`), reports their number, and ends them."""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

from logo.backends.cluster import LOCAL, WorkersError, connect, imported, process_resources
from logo.errors import LoGoError
from logo.serving.replicas import APPLICATION, Plan, Scale, application, running

_log = logging.getLogger("logo.serving")

# Seconds between two checks of the application; and seconds that further replicas have after the first one.
_LOOK, _GRACE = 0.5, 120.0

# Seconds between the signal and the end of the address, in which kept connections get 503.
_FAREWELL = 1.0


def serve_replicas(
    plan: Plan,
    scale: Scale,
    address: tuple[str, int],
    digest: str | None,
    started: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Serves until a signal comes, and then until accepted requests have ended.

    Args:
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
    widest = scale.layout if scale.most is None else replace(scale.layout, count=scale.most)
    connect(ray, widest)
    stop = _stopped()  # Ray's own handlers do not wait
    local = scale.layout.address == LOCAL
    mine = False
    try:
        room = process_resources(ray, widest)  # with room for replicas that start later
        first = scale.layout.count if scale.most is not None and scale.layout.count else room.count
        if APPLICATION in serve.status().applications:
            raise WorkersError(f"the cluster serves an application {APPLICATION!r} already; end that one first")
        host, port = address if local else _there(serve, address)
        serve.start(
            proxy_location="HeadOnly" if local else "EveryNode",
            http_options={"host": host, "port": port, "request_timeout_s": None, "keep_alive_timeout_s": 30},
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        mine = True
        asked = replace(scale, layout=replace(scale.layout, count=first))
        target = application(plan, asked, room.cpus, room.gpus, digest)
        serve.run_many(
            [serve.RunTarget(target, APPLICATION, "/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        if _until_running(serve, min(first, room.room), stop):
            started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            _watch(serve, say, stop)
            _drain(ray, serve)
    finally:
        try:
            if mine:
                _remove(serve, scale.drain, stop)
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


def _until_running(serve: Any, expected: int, stop: threading.Event) -> bool:
    """Waits for as many replicas as there is room for; False if a signal came."""
    limit = float("inf")
    while not stop.wait(_LOOK):
        count, status, said = running(serve)
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
    before, _, _ = running(serve)
    while not stop.wait(2.0):
        count, status, _ = running(serve)
        if status == "NOT_STARTED":
            raise WorkersError("the application was removed from the cluster")
        if count != before:
            say(f"{count} replica{' takes' if count == 1 else 's take'} requests, {before} did")
            before = count


def _drain(ray: Any, serve: Any) -> None:
    """Makes every replica refuse new requests."""
    try:
        serve.get_app_handle(APPLICATION).drain.remote().result(timeout_s=30)
    except (ray.exceptions.RayError, serve.exceptions.RayServeException, TimeoutError) as error:
        _log.warning("replicas end without having refused new requests first (%s)", type(error).__name__)
    time.sleep(_FAREWELL)


def _remove(serve: Any, limit: float, stop: _Stop) -> None:
    """Removes the application from the cluster, when accepted requests have ended or after `limit` seconds."""
    serve.delete(APPLICATION, _blocking=False)  # blocking waits for a minute at most
    end = time.monotonic() + limit
    while APPLICATION in serve.status().applications and not stop.hurry:  # the controller has received it
        if time.monotonic() > end:
            _log.warning("replicas have not ended within %.0f s", limit)
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
