"""The middleware in front of vLLM's app. A request for `model: "logo"` is probed first, and then answered with the
mixture that its scores select.

    body -> probe (a request for one token to the app) -> scores from the workers -> recipe -> the original request

Templates, limits, streams, tools and errors are vLLM's own. Middlewares run before authentication, so everything that
reaches the engine on behalf of a client is sent through the app.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from logo.backends.vllm import bodies
from logo.backends.vllm.admission import Admission
from logo.backends.vllm.answering import Answering, RoutedMixture
from logo.backends.vllm.asgi import App, Receive, Scope, Send, answer, answer_error, ask, body_of, sending, together
from logo.backends.vllm.bodies import CHAT, COMPLETIONS, Body
from logo.backends.vllm.core import Core, WorkerError, new_key, scores_of
from logo.backends.vllm.listing import adapter_list, model_cards
from logo.backends.vllm.marks import probing
from logo.backends.vllm.metrics import Counts
from logo.backends.vllm.names import Names
from logo.backends.vllm.pool import Change, head_adapter
from logo.backends.vllm.rewriting import Rewriting
from logo.backends.vllm.several import Refused
from logo.backends.vllm.workers import Workers
from logo.errors import AdapterError, LoGoError, UsageError
from logo.serve.bodies import (
    LoadAdapter,
    LogoOptions,
    ModelRequest,
    SelectionReply,
    SelectRequest,
    UnloadAdapter,
    checked,
)
from logo.serve.errors import ApiError, bad_request, failed, shown_line, unavailable
from logo.serve.guards import BodyLimit
from logo.serve.names import AUTO, MixtureRequest, Models

_B = TypeVar("_B", LoadAdapter, UnloadAdapter)
_Handler = Callable[[str, Scope, Receive, Send], Awaitable[None]]

# How often a prompt is probed, if the pool changes meanwhile, before its request is refused.
_TRIES = 5

log = logging.getLogger("vllm.logo")


class Router:
    """The middleware of `vllm serve ... --middleware logo.backends.vllm.Router`.

    Args:
        app: vLLM's app with its own middlewares.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._admission = Admission(app)
        self._core: Core | None = None
        self._workers: Workers | None = None
        self._models: Any = None  # vLLM's OpenAIServingModels
        self._answering: Answering | None = None
        self._counts = Counts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._opening(scope, send))
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        handler = {
            ("POST", COMPLETIONS): self._generate,
            ("POST", CHAT): self._generate,
            ("POST", bodies.RESPONSES): self._generate,
            ("GET", "/v1/models"): self._list_models,
            ("POST", "/v1/logo/select"): self._select,
            ("GET", "/v1/logo/adapters"): self._list_adapters,
            ("POST", "/v1/load_lora_adapter"): self._load,
            ("POST", "/v1/unload_lora_adapter"): self._unload,
        }.get((scope.get("method", ""), path))
        if handler is None and path == "/health" and self._core is not None and self._core.broken is not None:
            await answer_error(send, failed(self._core.broken, "pools_differ"))  # so that somebody starts it again
            return
        if handler is None or self._core is None:
            await self.app(scope, receive, send)
            return
        limit = int(self._core.options.max_body_mb * 1e6)
        await BodyLimit(partial(self._handled, handler, path), limit)(scope, receive, send)

    async def _handled(self, handler: _Handler, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] == "POST":
                check_json(scope)
            if self.core.broken is not None:
                raise failed(self.core.broken, "pools_differ")
            await handler(path, scope, receive, send)
        except Refused as refusal:
            await answer(send, refusal.answer.status, refusal.answer.body, refusal.answer.headers)
        except (ApiError, LoGoError) as error:
            # Errors can name adapters of the pool, so only clients that may use the server get them.
            if not await self._admission.refuses(scope, send):
                await answer_error(send, ApiError.of(error))

    # -- starting ------------------------------------------------------------------------------------------------

    def _opening(self, scope: Scope, send: Send) -> Send:
        """A `send` that opens the pool before it forwards the app's message that startup is complete."""

        async def opening(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self._open(scope["app"].state)
                except LoGoError as error:
                    log.error("LoGo: %s", error)
                    message = {"type": "lifespan.startup.failed", "message": f"LoGo: {error}"}
            await send(message)

        return opening

    async def _open(self, state: Any) -> None:
        client = state.engine_client
        core = await asyncio.to_thread(Core, client.vllm_config)
        self._workers = Workers(client)
        started = time.perf_counter()
        await self._workers.change(core)
        self._models = state.openai_serving_models
        self._models.lora_requests = Names(self._models.lora_requests)
        native = [*self._models.lora_requests, *getattr(self._models, "lora_resolvers", ())]
        if native:
            raise UsageError(
                "the pool takes all of vLLM's slots, which leaves none for --lora-modules and resolvers: put those "
                "adapters into the pool"
            )
        self._core = core
        self._answering = Answering(self.app, self._workers, self._base, self._counts)
        log.info(
            "LoGo: %d adapters, signal %s, ready in %.1f s",
            len(core.pool.keys),
            core.options.settings.signal,
            time.perf_counter() - started,
        )

    @property
    def core(self) -> Core:
        """The pool of the engine; may be used once the app has started."""
        assert self._core is not None
        return self._core

    @property
    def workers(self) -> Workers:
        """The workers of the engine; may be used once the app has started."""
        assert self._workers is not None
        return self._workers

    @property
    def _base(self) -> str:
        name: str = self._models.base_model_paths[0].name
        return name

    @property
    def _names(self) -> Models:
        return self.core.models(self._base)

    # -- answering -----------------------------------------------------------------------------------------------

    async def _generate(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if await self._admission.leaves_unread(scope, send) or (raw := await body_of(receive)) is None:
            return
        body = _object(raw)
        model = None if body is None else body.get("model")
        if body is None or not isinstance(model, str) or not self._ours(model, body):
            await self.app(scope, sending(raw, receive), send)
            return
        misplaced = {name: body[name] for name in LogoOptions.model_fields if name in body}
        asked = checked(ModelRequest, {"model": model, "logo": body.pop("logo", None), **misplaced})
        if body.get("background"):
            raise bad_request(
                "background: only the base model answers in the background; leave it out, or name the base model",
                "background",
            )
        if bodies.scores_prompt(path, body) and (head := head_adapter(self.core.pool.adapters)) is not None:
            raise bad_request(
                f"prompt_logprobs: adapter {head!r} acts on the output head, which vLLM applies to the last token of a "
                "prompt alone; leave out prompt_logprobs, or echo with logprobs",
                "prompt_logprobs",
            )
        wanted = self._names.mixture_request(model, asked.logo)
        parts = bodies.split(path, body)
        assert self._answering is not None
        with ExitStack() as held:
            chosen = await together(self._chosen(path, part, wanted, scope, receive, held) for part in parts)
            if len(parts) == 1:
                await self._answering.one(path, body, model, chosen[0], scope, receive, send)
            else:
                await self._answering.several(path, parts, model, chosen, scope, receive, send)

    def _ours(self, model: str, body: Body) -> bool:
        """Whether a request is for a mixture.

        Unknown names are also answered here, because vLLM's own refusal names the base model alone as an alternative.
        """
        if "logo" in body or model == AUTO or model in self.core.pool.keys:
            return True
        return bool(model) and model not in [path.name for path in self._models.base_model_paths]

    async def _chosen(
        self, path: str, body: Body, wanted: MixtureRequest, scope: Scope, receive: Receive, held: ExitStack
    ) -> RoutedMixture:
        """The selection for one prompt.

        Args:
            held: has the adapters of the selection stay loaded until it is closed.

        Raises:
            Refused: vLLM has refused to run the probe.
        """
        if wanted.adapters is not None:
            selection = self.core.forced(wanted.adapters)
            return RoutedMixture(selection, held.enter_context(self.core.request(selection)))
        started = time.perf_counter()
        for _ in range(_TRIES):
            key, call = new_key(), self.core.asked(wanted)
            where, asked = bodies.probe(path, body, self._base, self.core.probe_text)
            with probing(key, call.signal, call.candidates, self.core.window(call.signal)):
                probed = await ask(self.app, scope, where, body=json.dumps(asked).encode(), receive=receive)
            if probed.status != 200:
                raise Refused(probed)
            scores = scores_of(await self.workers.scores(key), self.core.pool.digest)
            if scores is None:  # the pool has changed
                continue
            selection = self.core.select(call, scores)
            request = held.enter_context(self.core.request(selection))
            spent = time.perf_counter() - started
            self._counts.selected(selection, spent)
            usage = (probed.json() or {}).get("usage") or {}
            # If a text of a conversation was probed, or a chat in place of a request to `/v1/responses`, the probe does
            # not give the number of the prompt's tokens.
            tokens = usage.get("prompt_tokens") if where == path else None
            return RoutedMixture(selection, request, 1000 * spent, tokens)
        raise unavailable("the pool changes faster than prompts are probed; try again", retry_after=1)

    # -- the pool ------------------------------------------------------------------------------------------------

    async def _select(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if await self._admission.refuses(scope, send) or (raw := await body_of(receive)) is None:
            return
        body = _object(raw)
        asked = checked(SelectRequest, raw.decode("utf-8", "replace") if body is None else body)
        assert body is not None  # `checked` has refused anything else
        where = COMPLETIONS if asked.prompt is not None else CHAT
        with ExitStack() as held:
            wanted = self._names.mixture_request(asked.model, asked.logo)
            found = await self._chosen(where, body, wanted, scope, receive, held)
        tokens = await self._counted(body, found, scope)
        await answer(send, 200, SelectionReply.of(found, tokens).model_dump_json().encode())

    async def _counted(self, body: Body, chosen: RoutedMixture, scope: Scope) -> int:
        """The number of tokens of a prompt; vLLM counts them if no probe did, or refuses it (`Refused`)."""
        if chosen.tokens is not None:
            return chosen.tokens
        what = {
            name: body[name] for name in ("prompt", "messages", "chat_template_kwargs") if body.get(name) is not None
        }
        if isinstance(what.get("prompt"), list):
            return len(what["prompt"])
        asked = json.dumps({"model": self._base, **what}).encode()
        counted = await ask(self.app, scope, "/tokenize", body=asked)
        if counted.status != 200:
            raise Refused(counted)
        return int(counted.json()["count"])

    async def _load(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles vLLM's route that loads an adapter: adds the adapter to the pool, or replaces it there."""
        asked = await self._changing(path, scope, receive, send, LoadAdapter)
        if asked is None:
            return
        self._names.check_new(asked.lora_name, replace=asked.load_inplace)
        kind = "replace" if asked.lora_name in self.core.pool.keys else "add"
        await self._change((kind, asked.lora_name, asked.lora_path))
        await _said(send, f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def _unload(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        asked = await self._changing(path, scope, receive, send, UnloadAdapter)
        if asked is None:
            return
        self._names.check_there(asked.lora_name)
        await self._change(("remove", asked.lora_name, ""))
        await _said(send, f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    async def _changing(self, path: str, scope: Scope, receive: Receive, send: Send, kind: type[_B]) -> _B | None:
        """The body of a request that changes the pool; None if vLLM has answered it, or if its client has left."""
        import vllm.envs

        if not (vllm.envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING or self.core.options.adapter_changes):
            await self.app(scope, receive, send)
            return None
        if await self._admission.refuses(scope, send) or (raw := await body_of(receive)) is None:
            return None
        body = _object(raw)
        return checked(kind, raw.decode("utf-8", "replace") if body is None else body)

    async def _change(self, change: Change) -> None:
        try:
            await self.workers.change(self.core, change)
        except (AdapterError, UsageError, WorkerError) as error:
            raise bad_request(shown_line(str(error)), "lora_path") from error

    async def _list_adapters(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if await self._admission.refuses(scope, send):
            return
        listed = adapter_list(self.core, self._base, self._counts.chosen)
        await answer(send, 200, listed.model_dump_json().encode())

    async def _list_models(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        def change(found: dict[str, Any], first: bool) -> None:
            if isinstance(found.get("data"), list):
                found["data"] = model_cards(self.core, self._base, found["data"])

        await self.app(scope, receive, Rewriting(send, change))


async def _said(send: Send, text: str) -> None:
    """Sends a plain text in the form in which vLLM confirms changes of adapters."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text.encode())).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _object(raw: bytes) -> Body | None:
    """The JSON object in a body; None for any other body, which vLLM or `checked` refuses."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def check_json(scope: Scope) -> None:
    """Raises ApiError unless a request says that its body is JSON. A page of another origin can send other types
    without asking, in the name of whoever looks at it."""
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    if not kinds or any(kind.split(b";")[0].strip().lower() != b"application/json" for kind in kinds):
        raise bad_request("expected a JSON object and 'Content-Type: application/json', found another type of content")
