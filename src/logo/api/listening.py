"""The socket of a server, which is taken before anything slow happens."""

from __future__ import annotations

import socket

from logo.errors import UsageError


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on this address before anything slow happens; port 0 is any free port. UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # so that another server cannot bind it while this one loads its model
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """`http://host:port` of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
