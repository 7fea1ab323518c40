"""The routes of the API: parse, ask, answer. What they mean is elsewhere."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from logo.serving import protocol, replies
from logo.serving.answers import AUTO, Answers, Asked
from logo.serving.errors import too_many, unavailable
from logo.serving.metrics import CONTENT_TYPE
from logo.serving.rendering import ChatRendering, CompletionRendering, Options, Rendering
from logo.serving.responding import CLIENT_LEFT, ClientLeft, Streamed, unless_left, whole
from logo.serving.sampling import Sampling
from logo.serving.service import Draining, Overloaded

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.ErrorReply} for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)
}
_RETRY_AFTER = 1.0

TEXT: dict[str, Any] = {"response_class": Response, "responses": {200: {"content": {"text/plain": {}}}}}
"""For routes that answer in plain text: what fails there is JSON all the same."""

router = APIRouter(responses=ERRORS)


def _answers(request: Request) -> Answers:
    found: Answers = request.app.state.answers
    return found


# -- generating ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """What both endpoints make of a body."""

    prompts: list[list[int]]
    max_tokens: int
    logprobs: int | None
    rendering: Rendering
    options: Options


_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "With 'stream', server-sent events."}
}


@router.post("/v1/completions", response_model=replies.Completion, responses=_STREAM, tags=["OpenAI"])
async def completions(body: protocol.CompletionRequest, request: Request) -> Response:
    """Continues prompts, each with the mixture of adapters it selects."""
    answers = _answers(request)
    prompts = await answers.encoded(body.prompts)
    options = Options(body.model, body.return_token_ids, body.logprobs is not None, body.include_usage)
    text = _Text(
        prompts,
        answers.room(prompts, body.max_tokens, "max_tokens"),
        body.logprobs,
        CompletionRendering(options, answers.tokenizer.decode),
        options,
    )
    return await _generate(body, text, request)


@router.post("/v1/chat/completions", response_model=replies.ChatCompletion, responses=_STREAM, tags=["OpenAI"])
async def chat_completions(body: protocol.ChatRequest, request: Request) -> Response:
    """Answers a conversation with the mixture of adapters it selects."""
    answers = _answers(request)
    prompts = [await answers.conversation(body.messages)]
    options = Options(body.model, body.return_token_ids, body.logprobs, body.include_usage)
    text = _Text(
        prompts,
        answers.room(prompts, body.max_new_tokens, "max_tokens" if body.max_tokens else "max_completion_tokens"),
        (body.top_logprobs or 0) if body.logprobs else None,
        ChatRendering(options, answers.tokenizer.decode),
        options,
    )
    return await _generate(body, text, request)


async def _generate(body: protocol.CompletionRequest | protocol.ChatRequest, text: _Text, request: Request) -> Response:
    answers, began = _answers(request), time.perf_counter()
    request.state.model, request.state.prompt_tokens = body.model, sum(map(len, text.prompts))
    wish = answers.wish(body.model, body.logo)
    sampling = Sampling(text.max_tokens, body.temperature, body.top_p, body.seed, text.logprobs)
    with ExitStack() as stack:
        try:
            stack.enter_context(answers.service.admitted(len(text.prompts) * body.n))
        except Overloaded:
            raise too_many(_RETRY_AFTER) from None
        except Draining as error:
            raise unavailable(str(error), _RETRY_AFTER, closing=True) from None
        try:
            chosen = await unless_left(request, answers.choose(text.prompts, wish, began))
            prompts = tuple(map(tuple, text.prompts))
            asked = Asked(prompts, chosen, body.n, sampling, body.stops, began)
            if body.stream:
                return Streamed(answers, asked, text.rendering, text.options, request.state, stack.pop_all())
            return await unless_left(request, whole(answers, asked, text.rendering, request.state))
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT)


# -- selecting and the pool ----------------------------------------------------------------------------------------


@router.post("/v1/logo/select", response_model=replies.SelectionReply, tags=["LoGo"])
async def select(body: protocol.SelectRequest, request: Request) -> replies.SelectionReply | Response:
    """Which adapters would answer, with the scores of all."""
    answers, began = _answers(request), time.perf_counter()
    if body.prompt is not None:
        [ids] = await answers.encoded([body.prompt])
    else:
        ids = await answers.conversation(body.messages or [])
    answers.room([ids], None, "prompt" if body.messages is None else "messages")
    try:
        with answers.service.admitted():
            [chosen] = await unless_left(request, answers.choose([ids], answers.wish(AUTO, body.logo), began))
    except Overloaded:
        raise too_many(_RETRY_AFTER) from None
    except Draining as error:
        raise unavailable(str(error), _RETRY_AFTER, closing=True) from None
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    selection = chosen.selection
    return replies.SelectionReply(
        adapters=list(selection.adapters),
        weights=list(selection.weights),
        scores=dict(selection.scores),
        probe_ms=round(chosen.probe_ms, 3),
        tokens=len(ids),
    )


@router.get("/v1/logo/adapters", response_model=replies.AdapterList, tags=["LoGo"])
async def adapters(request: Request) -> replies.AdapterList:
    """The pool."""
    answers = _answers(request)
    service = answers.service
    cards = [
        replies.AdapterCard(
            id=adapter.name,
            rank=max(adapter.ranks),
            parameters=adapter.parameters,
            modules=len(adapter.modules),
            targets=sorted({path.rpartition(".")[2] for path in adapter.modules}),
            size_bytes=adapter.size,
            selected=service.selected.get(adapter.name, 0),
        )
        for adapter in service.adapters.values()
    ]
    return replies.AdapterList(
        base_model=answers.base_model,
        default_k=service.logo.settings.k,
        signal=service.logo.settings.signal,
        data=cards,
    )


@router.get("/v1/models", response_model=replies.ModelList, tags=["OpenAI"])
async def models(request: Request) -> replies.ModelList:
    """What requests may give as their model."""
    answers = _answers(request)
    created, length = request.app.state.created, answers.service.batching.context

    def card(name: str, role: str, parent: str | None) -> replies.ModelCard:
        return replies.ModelCard(
            id=name,
            created=created,
            root=answers.base_model if parent is None else name,
            parent=parent,
            max_model_len=length,
            logo=replies.ModelRole.model_validate({"role": role}),
        )

    names = answers.service.adapters
    return replies.ModelList(
        data=[
            card(AUTO, "auto", None),
            card(answers.base_model, "base", None),
            *(card(name, "adapter", answers.base_model) for name in names),
        ]
    )


# -- the server itself ---------------------------------------------------------------------------------------------


@router.get("/health", tags=["Server"], **TEXT)
async def health(request: Request) -> Response:
    """200 as long as answers can be generated."""
    alive = _answers(request).service.batching.alive
    return PlainTextResponse("ok" if alive else "generation has stopped", 200 if alive else 503)


@router.get("/ready", tags=["Server"], **TEXT)
async def ready(request: Request) -> Response:
    """200 as long as requests are taken."""
    is_ready = _answers(request).service.ready
    return PlainTextResponse("ok" if is_ready else "not taking requests", 200 if is_ready else 503)


@router.get("/version", tags=["Server"])
async def server_version() -> dict[str, str]:
    """Of what runs here."""
    return {"version": version("lora-on-the-go"), "transformers": version("transformers"), "torch": version("torch")}


@router.get("/metrics", tags=["Server"], **TEXT)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(_answers(request).metrics.text(), media_type=CONTENT_TYPE)
