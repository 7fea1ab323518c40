"""LoGo's routes in vLLM's server (entry point `vllm.endpoint_plugins`), in place of vLLM's own of the same paths.

    vLLM's request class -> the prompts' texts -> Selection -> vLLM's serving object -> the reply, with the field `logo`

vLLM authenticates, parses, renders, generates and streams. A route says which prompts a request has
(`logo.vllm.reading`), and has `logo.vllm.serving` select for them and answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation

from logo.api import bodies
from logo.api.errors import ApiError, bad_request, not_found, shown, too_long
from logo.api.guards import Admission, GuardSettings, response
from logo.api.layers import Observed
from logo.api.logs import configure
from logo.api.names import AUTO
from logo.api.replies import adapter_list, labels, model_card
from logo.core import Prompt
from logo.errors import LoGoError
from logo.prompts import read
from logo.vllm.options import MODULES, VllmOptions, log
from logo.vllm.pool import head_adapter
from logo.vllm.reading import Conversation, Probing, begin_once, completion_prompts, history_of, text_prompt
from logo.vllm.serving import CHATS, COMPLETIONS, RESPONSES, Logo, RequestPrompts

# What needs no key, and what may be posted to besides our routes: it generates nothing and changes no adapter.
_OPEN = ("/health", "/ready", "/readyz", "/ping", "/metrics", "/metrics/")
_HARMLESS = re.compile(
    "/(tokenize|detokenize|ping|sleep|wake_up|release_kv_cache_memory|pause|resume|abort_requests|(start|stop)_profile"
    "|reset_(prefix|mm|encoder)_cache|v1/messages/count_tokens|v1/responses/[^/]+/cancel|cohere/v2/chat/render"
    "|v1/(completions|chat/completions|messages|responses)/(de)?render)"
)
_OBSERVED = f"{Observed.__module__}.{Observed.__name__}"  # of vLLM's option for layers around its own
MAX_BODY = 32_000_000  # bytes of a request, which may hold pictures


class Routes:
    """The plugin, see `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`."""

    name = "logo"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Replaces vLLM's routes, if the server has a pool."""
        options = VllmOptions.of(app.state.args.additional_config, os.environ)
        app.state.logo = None
        if os.environ.get(MODULES):  # they are in the pool
            app.state.args.lora_modules = None
        app.exception_handler(ApiError)(_refusal)
        app.exception_handler(LoGoError)(_refusal)
        posted: dict[str, Any] = {"/v1/completions": _completion, "/v1/chat/completions": _chat}
        posted |= {"/v1/responses": _response, "/v1/logo/select": _select, "/classify": _classify}
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING or (options is not None and options.adapter_changes):
            posted |= {"/v1/load_lora_adapter": _load, "/v1/unload_lora_adapter": _unload}
        if options is not None:  # vLLM asks for keys on some paths, but neither for the host nor for the origin
            keys = tuple(key for key in app.state.args.api_key or [envs.VLLM_API_KEY] if key)
            host = options.host or app.state.args.host or ""
            guards = GuardSettings(host, keys, MAX_BODY, options.hosts, options.origins)
            app.add_middleware(Ours, paths=tuple(posted))
            app.add_middleware(Admission, settings=guards, opened=_OPEN)
            if options.log != "text":
                configure(True, {"logo": logging.INFO})
                app.state.args.middleware = [*app.state.args.middleware, _OBSERVED]
        for path, route in posted.items():
            app.post(path, dependencies=[Depends(validate_json_request)])(with_cancellation(load_aware_call(route)))
        app.get("/ready")(_ready)
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
        self.app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path.rstrip("/") not in self._paths and not _HARMLESS.fullmatch(path.rstrip("/")):
                expected = f"expected one of {', '.join(self._paths)}, which answer with adapters; use one of these"
                error = not_found(f"{scope['method']} {shown(path)}: {expected}")
                return await response(error)(scope, receive, send)
        await self.app(scope, receive, send)


def _logo(raw: Request) -> Logo:
    if raw.app.state.logo is None:
        raise ApiError(503, "LoGo is not open in this server", "server_error")
    return raw.app.state.logo  # type: ignore[no-any-return]


# -- answering ---------------------------------------------------------------------------------------------------------


async def _completion(request: CompletionRequest, raw_request: Request) -> Response:
    """`POST /v1/completions`"""
    logo = _logo(raw_request)
    state = raw_request.app.state
    if request.prompt_embeds:
        expected = "expected a text or token ids as 'prompt', by which adapters are selected; leave it out"
        raise bad_request(f"prompt_embeds: {expected}", "prompt_embeds")
    if not request.prompt:
        raise bad_request("prompt: expected a text or token ids, found none", "prompt")
    listed = isinstance(request.prompt, list) and not isinstance(request.prompt[0], int)
    count = len(request.prompt) if listed else 1
    if count > 1 and request.use_beam_search:
        raise bad_request("use_beam_search: expected one prompt, found several", "use_beam_search")
    _check_scored(logo, request.prompt_logprobs, request.logprobs if request.echo else None)
    await begin_once(state, request)
    prompts = RequestPrompts(lambda: completion_prompts(state, request), count, listed)
    return await logo.answer(request, raw_request, COMPLETIONS, prompts)


async def _chat(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """`POST /v1/chat/completions`"""
    logo = _logo(raw_request)
    _check_scored(logo, request.prompt_logprobs, request.top_logprobs if request.echo else None)
    conversation = Conversation.of_chat(raw_request.app.state, request)
    conversation.write_special_tokens()
    return await logo.answer(request, raw_request, CHATS, _probed(logo, conversation))


class _ResponsesRequest(ResponsesRequest):  # type: ignore[misc]
    add_special_tokens: bool = False  # as for chats: the template has written them

    def build_tok_params(self, *args: Any) -> Any:
        return replace(super().build_tok_params(*args), add_special_tokens=self.add_special_tokens)


async def _response(request: _ResponsesRequest, raw_request: Request) -> Response:
    """`POST /v1/responses`"""
    if request.background:
        raise bad_request("background: no mixture answers in the background; leave it out", "background")
    logo = _logo(raw_request)
    state = raw_request.app.state
    history = await history_of(state.openai_serving_responses, request)
    conversation = Conversation.of_response(state, request, history)
    conversation.write_special_tokens()
    return await logo.answer(request, raw_request, RESPONSES, _probed(logo, conversation))


def _probed(logo: Logo, conversation: Conversation) -> RequestPrompts:
    """The conversation as the one prompt of a request."""

    async def read_conversation() -> list[Prompt]:
        return [await conversation.prompt(Probing(logo.engine.probe_text, logo.pool.invoked))]

    return RequestPrompts(read_conversation)


def _check_scored(logo: Logo, *options: Any) -> None:
    """Raises ApiError where log probabilities of a prompt are asked for, and vLLM cannot compute them."""
    head = head_adapter(logo.pool)
    if head is not None and any(option is not None for option in options):
        why = f"adapter {head!r} acts on the output head, which vLLM applies to the last token of a prompt alone"
        advice = "leave out prompt_logprobs, or echo with logprobs"
        raise bad_request(f"prompt_logprobs: {why}; {advice}", "prompt_logprobs")


# -- the pool ----------------------------------------------------------------------------------------------------------


async def _select(request: bodies.SelectRequest, raw_request: Request) -> Response:
    """`POST /v1/logo/select`"""
    logo = _logo(raw_request)
    state = raw_request.app.state
    if request.prompt is None:
        messages: Any = [message.turn for message in request.messages or ()]
        chat = ChatCompletionRequest(
            model=logo.base, messages=messages, chat_template_kwargs=request.chat_template_kwargs
        )
        conversation = Conversation.of_chat(state, chat)
        conversation.write_special_tokens()
        [row] = await _probed(logo, conversation).read()
        whole = await conversation.whole()
    elif isinstance(request.prompt, str):
        row = whole = await text_prompt(state, request.prompt)
    else:
        row = whole = read(state.engine_client.renderer.tokenizer, request.prompt)
    context = state.engine_client.model_config.max_model_len
    tokens, blamed = bodies.asked_tokens(request) or (1, "messages" if request.prompt is None else "prompt")
    if len(whole.ids) + tokens > context:
        raise too_long(context, len(whole.ids), tokens, blamed)

    async def rows() -> list[Prompt]:
        return [row]

    [choice], _ = await logo.choose(request.model, request.logo, RequestPrompts(rows), raw_request)
    return JSONResponse(choice.reply_with_scores(len(whole.ids)))


async def _classify(request: bodies.ClassifyRequest, raw_request: Request) -> Response:
    """`POST /classify`: as our own server."""
    logo = _logo(raw_request)
    state = raw_request.app.state
    row = await text_prompt(state, request.inputs)
    context = state.engine_client.model_config.max_model_len
    if len(row.ids) + 1 > context:
        raise too_long(context, len(row.ids), 1, "inputs")

    async def rows() -> list[Prompt]:
        return [row]

    [choice], _ = await logo.choose(AUTO, bodies.LogoOptions(when_unsure="mix"), RequestPrompts(rows), raw_request)
    return JSONResponse(labels(choice.selection, logo.base))


async def _load(request: bodies.LoadAdapter, raw_request: Request) -> Response:
    """`POST /v1/load_lora_adapter`: adds an adapter to the pool, or replaces it there."""
    logo = _logo(raw_request)
    logo.names().check_new(request.lora_name, replace=request.load_inplace, others=logo.bases)
    kind = "replace" if request.load_inplace else "add"  # of which the former takes a new name, too
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


async def _ready(raw_request: Request) -> Response:
    """`GET /ready`: 200 as long as requests are answered with adapters, else 503."""
    fine = raw_request.app.state.logo is not None and not raw_request.app.state.engine_client.errored
    return PlainTextResponse("ok" if fine else "not answering with adapters", 200 if fine else 503)


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
    settings = logo.engine.options.settings
    signals = tuple(logo.engine.served.opened)
    k = settings.k_of(logo.pool)
    cards = logo.cards.values()
    return JSONResponse(adapter_list(logo.base, k, signals, settings, cards, logo.counts.chosen))


async def _refusal(request: Request, error: Exception) -> Response:
    if ApiError.of(error).status >= 500:
        log.error("LoGo: %s", error, exc_info=error)
    return response(error)
