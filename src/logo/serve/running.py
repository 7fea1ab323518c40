"""Runs a server: binds the port, loads the model, serves; SIGTERM lets accepted requests end."""

from __future__ import annotations

import math
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from logo.api.guards import GuardSettings
from logo.api.layers import guard
from logo.serve.app import GRACE
from logo.serve.entrance import Entrance
from logo.serve.routes import REQUEST_TIMEOUT


class Server(uvicorn.Server):
    """uvicorn's server, which closes the entrance before it ends, and calls `started` when requests are accepted."""

    def __init__(self, config: uvicorn.Config, entrance: Entrance, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._entrance = entrance
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        if self.started:
            self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal ends the server at once."""
        self._entrance.draining = True
        super().handle_exit(sig, frame)


def serve(
    app: ASGIApp,
    entrance: Entrance,
    guards: GuardSettings,
    taken: socket.socket,
    started: Callable[[], None],
) -> None:
    """Serves an app on a socket until a signal comes, and then until accepted requests have ended."""
    config = uvicorn.Config(
        guard(app, guards),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=30,
        # Accepted requests have ended by then, and what remains are clients that do not read.
        timeout_graceful_shutdown=math.ceil(REQUEST_TIMEOUT + GRACE),
    )
    # uvicorn raises the signal again at the end, although ending on a signal is no failure.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    Server(config, entrance, started).run(sockets=[taken])
