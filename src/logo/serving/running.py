"""A server as a process: opens the port first, then the model, then accepts requests; SIGTERM lets accepted requests
finish.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from logo.errors import UsageError
from logo.protocol import Engine
from logo.serving.app import AppSettings, create_app
from logo.serving.guards import GuardSettings, guard

# Seconds between the signal and the end of listening.
_FAREWELL = 1.0


def listening(host: str, port: int) -> socket.socket:
    """A socket of this address, opened before anything slow happens; port 0 is any free port.

    Raises:
        UsageError: it cannot be opened.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    return taken


def address_of(taken: socket.socket) -> str:
    """`http://host:port` of a socket."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def released(taken: socket.socket) -> tuple[str, int]:
    """Host and port of a socket, which is closed so that another process can listen there."""
    host, port = taken.getsockname()[:2]
    taken.close()
    return host, port


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service first that it is shutting down."""

    def __init__(self, config: uvicorn.Config, service: Engine, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        if self.started:
            self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no new requests: a moment in which they get 503 and a closed connection, and then none at all.

        Closed without that, a connection that is kept for the next request would be reset under it.
        """
        if not self.force_exit:
            await asyncio.sleep(_FAREWELL)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal does not wait."""
        self._service.draining = True
        super().handle_exit(sig, frame)


def serve(
    service: Engine,
    settings: AppSettings,
    guards: GuardSettings,
    taken: socket.socket,
    started: Callable[[], None] = lambda: None,
    **uvicorn_options: Any,
) -> None:
    """Serves until a signal comes, and then finishes accepted requests.

    Args:
        taken: the socket.
        started: called when requests are accepted.

    Raises:
        ModelError: the model cannot be served.
    """
    config = uvicorn.Config(
        guard(create_app(service, settings), guards),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=30,
        **uvicorn_options,
    )
    # uvicorn raises the signal again when it is done; ending as one was asked to is no failure.
    signal.signal(signal.SIGTERM, _leave)
    service.prepare()  # a model that cannot be served is one line, not a traceback of uvicorn's
    try:
        Server(config, service, started).run(sockets=[taken])
    finally:
        service.stop()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
