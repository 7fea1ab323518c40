"""Answers with mixtures: sends a request to vLLM's app with its recipe, and adds the mixture to the response.

If the mixture could not be made, or its output overflows, the response becomes an error, also in the middle of a
stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from logo.api.asgi import App, Receive, Scope, Send
from logo.api.errors import ApiError, failed, unavailable
from logo.api.replies import Mixture
from logo.backends.vllm.asgi import asking, sending
from logo.backends.vllm.bodies import Body
from logo.backends.vllm.core import Core
from logo.backends.vllm.metrics import Counts
from logo.backends.vllm.names import meaning
from logo.backends.vllm.overflows import watched
from logo.backends.vllm.pool import KeyedPool
from logo.backends.vllm.prompts import following
from logo.backends.vllm.rewriting import Rewriting, run
from logo.backends.vllm.several import merged, merged_stream
from logo.backends.vllm.workers import Workers
from logo.decoder import overflow
from logo.decoding import OVERFLOW
from logo.errors import NotFinite
from logo.selection.selector import Selection


@dataclass(frozen=True)
class RoutedMixture:
    """The selection for one prompt, see `logo.protocol.SelectedMixture`.

    Attributes:
        tokens: number of tokens of the prompt; None if no probe has read it, because the mixture was forced or a
            separate text was probed.
    """

    selection: Selection
    probe_ms: float = 0.0
    tokens: int | None = None
    queue_ms: float = 0.0  # vLLM's queue is part of the probe


@dataclass(frozen=True)
class _Told:
    """Counts the outcome of a prompt.

    Attributes:
        pool: the pool of the mixture.
        counts: the counters.
    """

    pool: KeyedPool
    counts: Counts

    def not_invoked(self, keys: Sequence[str]) -> None:
        """See `logo.backends.vllm.prompts.Counting`."""
        names = {key: name for name, key in self.pool.keys.items()}
        self.counts.not_invoked([names.get(key, key) for key in keys])

    def read(self, found: int, missed: int) -> None:
        """See `logo.backends.vllm.prompts.Counting`."""
        self.counts.read(found, missed)


class Answering:
    """Answers requests with selected mixtures.

    Args:
        app: vLLM's.
        core: the pool.
        workers: of the engine.
        base: the base model's name.
        counts: the counters.
    """

    def __init__(self, app: App, core: Core, workers: Workers, base: str, counts: Counts) -> None:
        self._app, self._core, self._workers, self._base, self._counts = app, core, workers, base, counts

    async def one(
        self,
        path: str,
        body: Body,
        model: str,
        chosen: RoutedMixture,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Sends the answer to one prompt.

        Args:
            model: the name under which the client requested it.
        """
        with self._request(chosen.selection) as request, watched(request and request.lora_name) as overflows:
            own = self._base if request is None else request.lora_name

            def change(found: dict[str, Any], first: bool) -> None:
                body = found.get("response") if isinstance(found.get("response"), dict) else found
                if isinstance(body, dict) and body.get("model") in (own, model):
                    body["model"] = model
                if first and "error" not in found:
                    found["logo"] = Mixture.of(chosen).model_dump()

            async def check() -> ApiError | None:
                if request is None:
                    return None
                if overflows.is_set():
                    return await self._overflown(request.lora_name, str(overflow(chosen.selection.mixture)))
                return self._failed(request.lora_name, await self._workers.take(request.lora_name))

            raw = json.dumps({**body, "model": self._base if request is None else model}).encode()
            again = asking(scope, path, "POST", raw)
            self._counts.answered("base" if request is None else self._core.mode)
            # If only a separate text was probed, no probe has read the prompt itself.
            block = None if chosen.tokens is None else self._core.block
            with meaning(model, request), following(_Told(self._core.pool, self._counts), block):
                await run(self._app, again, sending(raw, receive), Rewriting(send, change, check, overflows), overflows)

    async def several(
        self,
        path: str,
        parts: Sequence[Body],
        model: str,
        chosen: Sequence[RoutedMixture],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Sends the answers to several prompts of one request as one response."""
        fields = [Mixture.of(one).model_dump() for one in chosen]

        async def answered(part: Body, one: RoutedMixture, sink: Send) -> None:
            await self.one(path, part, model, one, scope, receive, sink)

        requests = [partial(answered, part, one) for part, one in zip(parts, chosen, strict=True)]
        n = int(parts[0].get("n") or 1) if isinstance(parts[0].get("n"), int) else 1
        if parts[0].get("stream"):
            await merged_stream(send, requests, fields, n)
        else:
            await merged(send, requests, fields, n)

    @contextmanager
    def _request(self, selection: Selection) -> Iterator[Any]:
        with ExitStack() as stack:
            try:
                request = stack.enter_context(self._core.request(selection))
            except KeyError:
                raise unavailable("the pool changed while the request waited; try again", retry_after=1) from None
            yield request

    def _failed(self, recipe: str, reason: str | None) -> ApiError | None:
        """The error for a recipe that was not mixed or overflowed, which is noted as failed; None without a reason."""
        if reason is None:
            return None
        self._core.failed(recipe)
        if reason.startswith(OVERFLOW):
            return ApiError.of(NotFinite(reason))
        return failed(f"the mixture could not be made: {reason}", "mixture_failed")

    async def _overflown(self, recipe: str, reason: str) -> ApiError | None:
        await self._workers.call("logo_clean", recipe, reason)
        return self._failed(recipe, reason)
