"""Asks vLLM's app whether a client may use this server, before its request is read, because only the app with its
middlewares can decide this.
"""

from __future__ import annotations

import hashlib

from logo.backends.vllm.asgi import App, Scope, Send, answer, ask

# Headers that identify a client.
_CREDENTIALS = (b"authorization", b"proxy-authorization", b"x-api-key", b"api-key", b"cookie")
# The most clients that are remembered.
_MOST_KNOWN = 4096


class Admission:
    """Asks an app about a client, by the client's headers alone.

    Args:
        app: vLLM's.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._known: set[bytes] = set()

    async def refuses(self, scope: Scope, send: Send) -> bool:
        """Whether the app refuses this client. If so, its refusal has been sent to the client."""
        found = await ask(self._app, scope, "/v1/models", "GET")
        if found.status != 200:
            await answer(send, found.status, found.body, found.headers)
        return found.status != 200

    async def leaves_unread(self, scope: Scope, send: Send) -> bool:
        """Whether the app refuses this client, so that its body must not be read. A client that was let in before is
        not asked about again: the app judges each request itself, and only the reading of its body depends on this."""
        client = hashlib.sha256()
        for name, value in scope["headers"]:
            if name in _CREDENTIALS:
                client.update(b"%d %s %d " % (len(name), name, len(value)) + value)
        if client.digest() in self._known:
            return False
        if await self.refuses(scope, send):
            return True
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known.add(client.digest())
        return False
