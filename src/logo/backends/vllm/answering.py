"""Answers with mixtures: sends a request to vLLM's app with its recipe, and adds the mixture to the response.

If the mixture could not be made, the response becomes an error, also in the middle of a stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from logo.backends.vllm.asgi import App, Receive, Scope, Send, asking, run, sending
from logo.backends.vllm.bodies import Body
from logo.backends.vllm.core import new_key
from logo.backends.vllm.marks import answering
from logo.backends.vllm.metrics import Counts
from logo.backends.vllm.names import meaning
from logo.backends.vllm.rewriting import Rewriting
from logo.backends.vllm.several import merged, merged_stream
from logo.backends.vllm.workers import Workers
from logo.core import Selection
from logo.serve.bodies import Mixture
from logo.serve.errors import ApiError, failed


@dataclass(frozen=True)
class RoutedMixture:
    """The selection for one prompt, see `logo.serve.bodies.SelectedMixture`.

    Attributes:
        request: vLLM's `LoRARequest`, see `Core.request`; None: the base model's.
        tokens: number of tokens of the prompt; None if no probe has read it, because the mixture was forced or a
            separate text was probed.
    """

    selection: Selection
    request: Any
    probe_ms: float = 0.0
    tokens: int | None = None
    queue_ms: float = 0.0  # vLLM's queue is part of the probe


class Answering:
    """Answers requests with selected mixtures.

    Args:
        app: vLLM's.
        workers: of the engine.
        base: the base model's name.
        counts: the counters.
    """

    def __init__(self, app: App, workers: Workers, base: str, counts: Counts) -> None:
        self._app, self._workers, self._base, self._counts = app, workers, base, counts

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
        request, key = chosen.request, new_key()
        own = self._base if request is None else request.lora_name

        def change(found: dict[str, Any], first: bool) -> None:
            body = found.get("response") if isinstance(found.get("response"), dict) else found
            if isinstance(body, dict) and body.get("model") in (own, model):
                body["model"] = model
            if first and "error" not in found:
                found["logo"] = Mixture.of(chosen).model_dump()

        async def check() -> ApiError | None:
            reason = None if request is None else await self._workers.failures(key)
            return None if reason is None else failed(f"the mixture could not be made: {reason}", "mixture_failed")

        raw = json.dumps({**body, "model": self._base if request is None else model}).encode()
        again = asking(scope, path, "POST", raw)
        self._counts.answered("base" if request is None else "gate")
        with meaning(model, request), answering(key):
            await run(self._app, again, sending(raw, receive), Rewriting(send, change, check))

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
        """Sends the answers to several prompts of one request as one response; raises `several.Refused`."""
        fields = [Mixture.of(one).model_dump() for one in chosen]

        async def answered(part: Body, one: RoutedMixture, sink: Send) -> None:
            await self.one(path, part, model, one, scope, receive, sink)

        requests = [partial(answered, part, one) for part, one in zip(parts, chosen, strict=True)]
        n = int(parts[0].get("n") or 1) if isinstance(parts[0].get("n"), int) else 1
        if parts[0].get("stream"):
            await merged_stream(send, requests, fields, n)
        else:
            await merged(send, requests, fields, n)
