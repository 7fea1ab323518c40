"""LoGo's routes in vLLM's server (entry point `vllm.endpoint_plugins`), in place of vLLM's own of the same paths.

    vLLM's request class -> the prompts' texts -> Selection -> vLLM's serving object -> the reply, with the field `logo`

vLLM authenticates, parses, renders, generates and streams. A route chooses the mixture of each prompt, and lets vLLM's
own serving object answer through an engine client that adds the `LoRARequest` of the prompt (`Mixing`).
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import re
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import SamplingParams, envs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation

from logo.adapters.pool import AdapterPool
from logo.api import bodies
from logo.api.errors import ApiError, bad_request, failed, not_found, shown
from logo.api.guards import Admission, GuardSettings, response
from logo.api.names import AUTO, Models, check_pool
from logo.api.replies import Chosen, adapter_card, adapter_list, model_card
from logo.core import Options, Prompt
from logo.errors import LoGoError, UsageError
from logo.prompts import PLAIN_CHAT, asked_text, begun, read
from logo.selection.selector import forced
from logo.vllm.engine import Engine, Served
from logo.vllm.metrics import Counts
from logo.vllm.options import VllmOptions, log
from logo.vllm.pool import head_adapter
from logo.vllm.requests import Mix
from logo.vllm.selftest import check

# What needs no key, and what may be posted to besides our routes: it generates nothing and changes no adapter.
_OPEN = ("/health", "/ready", "/readyz", "/ping", "/metrics", "/metrics/")
_HARMLESS = re.compile(
    "/(tokenize|detokenize|ping|sleep|wake_up|release_kv_cache_memory|pause|resume|abort_requests|(start|stop)_profile"
    "|reset_(prefix|mm|encoder)_cache|v1/messages/count_tokens|v1/responses/[^/]+/cancel|cohere/v2/chat/render"
    "|v1/(completions|chat/completions|messages|responses)/(de)?render)"
)
MAX_BODY = 32_000_000  # bytes of a request, which may hold pictures
NOT_FINITE = (
    "the model's logits are NaN, so nothing can be generated from them: an adapter, or the base model, is too large "
    "for the model's dtype; leave that adapter out, or use float32"
)


class Routes:
    """The plugin, see `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`."""

    name = "logo"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Replaces vLLM's routes, if the server has a pool."""
        options = VllmOptions.of(app.state.args.additional_config, os.environ)
        app.state.logo = None
        app.exception_handler(ApiError)(_refusal)
        app.exception_handler(LoGoError)(_refusal)
        posted: dict[str, Any] = {"/v1/completions": _completion, "/v1/chat/completions": _chat}
        posted |= {"/v1/responses": _response, "/v1/logo/select": _select}
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING or (options is not None and options.adapter_changes):
            posted |= {"/v1/load_lora_adapter": _load, "/v1/unload_lora_adapter": _unload}
        if options is not None:  # vLLM asks for keys on some paths, but neither for the host nor for the origin
            keys = tuple(key for key in app.state.args.api_key or [envs.VLLM_API_KEY] if key)
            guards = GuardSettings(options.host, keys, MAX_BODY, options.hosts, options.origins)
            app.add_middleware(Ours, paths=tuple(posted))
            app.add_middleware(Admission, settings=guards, opened=_OPEN)
        for path, route in posted.items():
            app.post(path, dependencies=[Depends(validate_json_request)])(with_cancellation(load_aware_call(route)))
        app.get("/v1/models")(_models)
        app.get("/v1/logo/adapters")(_adapters)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Opens the pool, and ends the start with one line if that fails."""
        try:
            state.logo = await Logo.opened(engine_client, state)
        except LoGoError as error:
            log.error("LoGo: %s", error)
            raise SystemExit(1) from None


class Ours:
    """The layer that refuses what vLLM would answer without LoGo, or would put into LoGo's slots: websockets, and all
    that is sent to other than these `paths` and harmless ones."""

    def __init__(self, app: ASGIApp, paths: Sequence[str]) -> None:
        self.app, self._paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path.rstrip("/") not in self._paths and not _HARMLESS.fullmatch(path.rstrip("/")):
                said = f"expected one of {', '.join(self._paths)}, which answer with adapters; use one of these"
                error = not_found(f"{scope['method']} {shown(path)}: {said}")
                return await response(error)(scope, receive, send)
        await self.app(scope, receive, send)


def _engine(client: Any) -> Engine:
    """The engine of a server, which is not open yet."""

    async def run(rows: Sequence[tuple[Sequence[int], Any, Any]]) -> list[Any]:
        return list(await asyncio.gather(*(one(*row) for row in rows)))

    async def one(ids: Sequence[int], parameters: Any, lora: Any) -> Any:
        prompt, number = {"prompt_token_ids": list(ids)}, f"logo-{uuid.uuid4().hex}"
        return [one async for one in client.generate(prompt, parameters, number, lora_request=lora)][-1]

    return Engine(lambda *args: client.collective_rpc("logo", args=args), run, client.vllm_config)


class Mixing:
    """vLLM's engine client for one request, whose prompts have these mixtures."""

    def __init__(self, client: Any, engine: Engine, mixes: Sequence[Mix]) -> None:
        self._client, self._engine, self._mixes, self._lengths = client, engine, mixes, dict[int, int]()

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """As the client's, after the adapters of the prompt's mixture have slots. vLLM numbers the prompts of a request
        at the end of their ids."""
        number = int(request_id.rpartition("-")[2]) if len(self._mixes) > 1 else 0
        mix, length = self._mixes[number], len(prompt["prompt_token_ids"])
        if (first := self._lengths.setdefault(number, length)) < length:  # a beam, which goes on behind its prompt
            mix = replace(mix, prompt=first)
        async with self._engine.held([mix]) as [lora]:
            kwargs["lora_request"] = lora
            unsure = lora is not None
            # vLLM has to hear that a client has left before others get its slots, where it would go on to compute.
            async with aclosing(self._client.generate(prompt, params, request_id, *args, **kwargs)) as outputs:
                async for output in outputs:
                    drawn = [one.token_ids[0] for one in output.outputs if one.token_ids] if unsure else []
                    if 0 in drawn:  # vLLM draws token 0 where logits are NaN, which may be a good token, too
                        await self._check(prompt, request_id, lora)
                    unsure = unsure and not drawn
                    yield output

    async def _check(self, prompt: Any, request_id: str, lora: Any) -> None:
        """Raises ApiError if the logits behind a prompt are NaN."""
        once = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, detokenize=False)
        async for output in self._client.generate(prompt, once, f"{request_id}-again", lora_request=lora):
            if any(math.isnan(one.logprob) for one in output.outputs[0].logprobs[0].values()):
                raise failed(NOT_FINITE, "not_finite")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Logo:
    """LoGo in a server, as `app.state.logo`: an open engine, and the names of the base model alone."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        self.engine, self.bases, self.base, self.counts = engine, names, names[0], Counts()
        self.cards = {one.name: adapter_card(one) for one in self.pool}  # kept: files may be removed later

    @classmethod
    async def opened(cls, client: Any, state: Any) -> Logo:
        """Opens the pool in the engine of a server; raises LoGoError."""
        started, models = time.perf_counter(), state.openai_serving_models
        if models.lora_requests or models.lora_resolvers:
            what = "put the adapters of --lora-modules and resolvers into the pool"
            raise UsageError(f"LoGo fills all of vLLM's slots: {what}")
        engine, names = _engine(client), tuple(one.name for one in models.base_model_paths)
        await engine.open()
        for name in names:
            check_pool(name, engine.served.pool.names)
        await check(engine)
        seconds, signal = time.perf_counter() - started, engine.options.settings.signal
        log.info("LoGo: %d adapters, signal %s, ready in %.1f s", len(engine.served.pool), signal, seconds)
        return cls(engine, names)

    @property
    def pool(self) -> AdapterPool:
        """What prompts are selected from now."""
        return self.engine.served.pool

    async def change(self, kind: str, name: str, folder: str = "") -> None:
        """See `Engine.change`."""
        await self.engine.change(kind, name, folder)
        kept = {other: card for other, card in self.cards.items() if other != name}
        self.cards = {one.name: kept.get(one.name) or adapter_card(one) for one in self.pool}

    def names(self, served: Served | None = None) -> Models:
        """The names that requests may give as `model`, for a pool (None: as it is now)."""
        served = served or self.engine.served
        return Models(self.base, served.pool.names, tuple(served.opened))

    async def choose(
        self, model: str, options: bodies.LogoOptions | None, rows: Sequence[Prompt], alone: bool = False
    ) -> tuple[list[Chosen], list[Mix]]:
        """The mixture of each prompt of a request; `alone`: as `Probe`. ApiError, LoGoError: there is no such model, or
        the options cannot be used."""
        engine = self.engine
        async with engine.using() as served:
            wanted = self.names(served).mixture_request(self.base if model in self.bases else model, options)
            if wanted.adapters is not None:
                chosen = [Chosen(forced(wanted.adapters, served.pool))] * len(rows)
            else:
                call = engine.options.settings.options(served.pool, wanted.options)
                chosen = list(await asyncio.gather(*(self._chosen(served, row, call, alone) for row in rows)))
            mixes = [engine.mix(served, one.selection) for one in chosen]
        for mix in mixes:
            engine.slots.check(mix.keys)
        return chosen, mixes

    async def _chosen(self, served: Served, row: Prompt, call: Options, alone: bool) -> Chosen:
        started = time.perf_counter()
        selection = await self.engine.select(served, row, call, alone)
        seconds = time.perf_counter() - started
        self.counts.selected(selection, seconds)
        return Chosen(selection, 1000 * seconds)

    async def answer(
        self, request: Any, raw: Request, by: tuple[str, str], rows: Sequence[Prompt], several: bool = False
    ) -> Response:
        """Has vLLM answer a request, parsed by its class, with the mixtures of its prompts. `by`: the names of vLLM's
        serving object in the app's state, and of its method; `several`: whether the reply's field `logo` is a list."""
        handler = getattr(raw.app.state, by[0])
        if handler is None:
            raise ApiError(501, "this model does not answer requests of this kind", "invalid_request_error")
        asked, extra = request.model, request.model_extra or {}
        misplaced = {name: extra[name] for name in bodies.LogoOptions.model_fields if name in extra}
        found = bodies.checked(bodies.ModelRequest, {"model": asked or None, "logo": extra.get("logo"), **misplaced})
        chosen, mixes = await self.choose(asked, found.logo, rows, request.cache_salt is not None)
        own = copy.copy(handler)
        own.engine_client, own.models = Mixing(handler.engine_client, self.engine, mixes), copy.copy(handler.models)
        own.models.model_name = lambda lora_request=None: asked
        request.model = self.base
        for one in chosen:
            self.counts.answered(one.selection)
        made = await getattr(own, by[1])(request, raw)
        if isinstance(made, ErrorResponse):
            return JSONResponse(made.model_dump(), made.error.code)
        told = [one.reply() for one in chosen]
        field = told if several else told[0]
        if hasattr(made, "model_dump"):
            return JSONResponse({**made.model_dump(mode="json", by_alias=True), "logo": field})
        return StreamingResponse(_told(made, json.dumps(field)), media_type="text/event-stream")


async def _told(events: AsyncIterator[Any], field: str) -> AsyncIterator[str]:
    """The events of a stream, the first of which gets the field `logo`."""
    first = True
    async for event in events:
        if not isinstance(event, str):  # of `/v1/responses`
            data = event.model_dump_json(by_alias=True)
            event = f"event: {getattr(event, 'type', 'unknown')}\ndata: {data}\n\n"
        if first and "data: {" in event:
            event, first = event.replace("data: {", f'data: {{"logo": {field}, ', 1), False
        yield event


def _logo(raw: Request) -> Logo:
    if raw.app.state.logo is None:
        raise ApiError(503, "LoGo is not open in this server", "server_error")
    return raw.app.state.logo  # type: ignore[no-any-return]


# -- answering ---------------------------------------------------------------------------------------------------------


async def _completion(request: CompletionRequest, raw_request: Request) -> Response:
    """`POST /v1/completions`"""
    given, logo = request.prompt, _logo(raw_request)
    if not given:
        raise bad_request("prompt: expected a text or token ids, found none", "prompt")
    several = isinstance(given, list) and not isinstance(given[0], int)
    if several and len(given) > 1 and request.use_beam_search:
        raise bad_request("use_beam_search: expected one prompt, found several", "use_beam_search")
    _check_scored(logo, request.prompt_logprobs, request.logprobs if request.echo else None)
    tokenizer, texts = _tokenizer(raw_request), given if several else [given]
    if request.add_special_tokens and any(begun(tokenizer, text) for text in texts):
        ids = [list(read(tokenizer, text).ids) for text in texts]  # never a second one, as in the library
        request.prompt = ids if several else ids[0]
    rows, by = await _rendered(request, raw_request), ("openai_serving_completion", "create_completion")
    return await logo.answer(request, raw_request, by, rows, several)


async def _chat(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """`POST /v1/chat/completions`"""
    logo = _logo(raw_request)
    _check_scored(logo, request.prompt_logprobs, request.top_logprobs if request.echo else None)
    row = await _conversation(logo, request, raw_request)
    return await logo.answer(request, raw_request, ("openai_serving_chat", "create_chat_completion"), [row])


class _ResponsesRequest(ResponsesRequest):  # type: ignore[misc]
    add_special_tokens: bool = False  # as for chats: the template has written them

    def build_tok_params(self, *args: Any) -> Any:
        return replace(super().build_tok_params(*args), add_special_tokens=self.add_special_tokens)


async def _response(request: _ResponsesRequest, raw_request: Request) -> Response:
    """`POST /v1/responses`"""
    if request.background:
        raise bad_request("background: no mixture answers in the background; leave it out", "background")
    said, logo = request.input, _logo(raw_request)
    turns: list[Any] = [{"role": "user", "content": said}] if isinstance(said, str) else list(said)
    turns = [turn if isinstance(turn, dict) else turn.model_dump() for turn in turns]
    messages = [{"role": turn["role"], "content": _texts(turn.get("content"))} for turn in turns if "role" in turn]
    if request.instructions:
        messages.insert(0, {"role": "system", "content": request.instructions})
    asked = ChatCompletionRequest(model=logo.base, messages=messages)
    row = await _conversation(logo, asked, raw_request)
    request.add_special_tokens = asked.add_special_tokens
    return await logo.answer(request, raw_request, ("openai_serving_responses", "create_responses"), [row])


async def _conversation(logo: Logo, request: ChatCompletionRequest, raw: Request) -> Prompt:
    """A conversation, of which less than all is probed. Our own template writes no special tokens, since some
    tokenizers read a text that stands behind one otherwise; so the request asks for them."""
    plain, first = raw.app.state.args.chat_template == PLAIN_CHAT, dict(next(iter(request.messages), {})).get("content")
    request.add_special_tokens |= plain and not begun(_tokenizer(raw), first)
    try:
        text = asked_text([dict(message) for message in request.messages], logo.engine.probe_text)
    except UsageError:  # such as pictures, or parts that we do not know: vLLM reads or refuses these
        text = None
    if text is not None and not logo.pool.invoked:
        return read(_tokenizer(raw), text)
    whole = (await _rendered(request, raw))[0]  # which decides what acts
    return whole if text is None else Prompt(whole.ids, read(_tokenizer(raw), text).ids)


async def _rendered(request: ChatCompletionRequest | CompletionRequest, raw: Request) -> list[Prompt]:
    """Each prompt, or a whole conversation, as vLLM will read it: cut, and with a suffix."""
    chat, renderer = isinstance(request, ChatCompletionRequest), raw.app.state.online_renderer
    found = await (renderer.render_chat if chat else renderer.render_completion)(copy.copy(request))
    if isinstance(found, ErrorResponse):
        raise ApiError(found.error.code, found.error.message, "invalid_request_error", found.error.param)
    return [Prompt.of_ids(given["prompt_token_ids"]) for given in (found[1] if chat else found)]


def _texts(content: Any) -> Any:
    """The texts of a list of parts, joined as in chats; anything else is returned unchanged."""
    if not isinstance(content, list):
        return content or ""
    return "\n".join(p["text"] for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str))


def _check_scored(logo: Logo, *asked: Any) -> None:
    """Raises ApiError where log probabilities of a prompt are asked for, and vLLM cannot compute them."""
    if (head := head_adapter(logo.pool)) is not None and any(one is not None for one in asked):
        found = f"adapter {head!r} acts on the output head, which vLLM applies to the last token of a prompt alone"
        advice = "leave out prompt_logprobs, or echo with logprobs"
        raise bad_request(f"prompt_logprobs: {found}; {advice}", "prompt_logprobs")


def _tokenizer(raw: Request) -> Any:
    return raw.app.state.engine_client.renderer.tokenizer


# -- the pool ----------------------------------------------------------------------------------------------------------


async def _select(request: bodies.SelectRequest, raw_request: Request) -> Response:
    """`POST /v1/logo/select`"""
    logo = _logo(raw_request)
    if request.prompt is not None:
        row = whole = read(_tokenizer(raw_request), request.prompt)
    else:
        messages: Any = [message.turn for message in request.messages or ()]
        given = {"messages": messages, "chat_template_kwargs": request.chat_template_kwargs}
        asked = ChatCompletionRequest(model=logo.base, **given)
        row, [whole] = await _conversation(logo, asked, raw_request), await _rendered(asked, raw_request)
    [chosen], _ = await logo.choose(request.model, request.logo, [row])
    return JSONResponse(chosen.reply_with_scores(len(whole.ids)))


async def _load(request: bodies.LoadAdapter, raw_request: Request) -> Response:
    """`POST /v1/load_lora_adapter`: adds an adapter to the pool, or replaces it there."""
    logo = _logo(raw_request)
    logo.names().check_new(request.lora_name, replace=request.load_inplace, others=logo.bases)
    kind = "replace" if request.lora_name in logo.pool else "add"
    await _changed(logo.change(kind, request.lora_name, request.lora_path))
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")


async def _unload(request: bodies.UnloadAdapter, raw_request: Request) -> Response:
    """`POST /v1/unload_lora_adapter`"""
    logo = _logo(raw_request)
    logo.names().check_there(request.lora_name)
    await _changed(logo.change("remove", request.lora_name))
    return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")


async def _changed(change: Any) -> None:
    """Waits for a change, which goes on if its client leaves; an adapter that cannot be used is the client's error."""
    try:
        await asyncio.shield(change)
    except LoGoError as error:
        raise bad_request(" ".join(str(error).split())) from error


async def _models(raw_request: Request) -> Response:
    """`GET /v1/models`"""
    logo = _logo(raw_request)
    listed = (await raw_request.app.state.openai_serving_models.show_available_models()).model_dump()
    own = [{**card, "logo": {"role": "base"}} for card in listed["data"]]
    about = {**listed["data"][0], "owned_by": "logo"}
    cards = [model_card(AUTO, "auto", logo.base, about)]
    cards += [model_card(name, "adapter", logo.base, about) for name in logo.pool.names]
    return JSONResponse({**listed, "data": [*own, *cards]})


async def _adapters(raw_request: Request) -> Response:
    """`GET /v1/logo/adapters`"""
    logo = _logo(raw_request)
    opened, how = tuple(logo.engine.served.opened), logo.engine.options.settings
    cards = logo.cards.values(), logo.counts.chosen
    return JSONResponse(adapter_list(logo.base, how.k_of(logo.pool), opened, how, *cards))


async def _refusal(request: Request, error: Exception) -> Response:
    found = ApiError.of(error)
    if found.status >= 500:
        log.error("LoGo: %s", error, exc_info=error)
    return JSONResponse(found.body(), found.status, dict(found.headers))
