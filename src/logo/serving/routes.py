"""The routes of the API, which parse requests and send answers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, RedirectResponse, Response

from logo import __version__
from logo.api.errors import model_not_found, too_many, unavailable
from logo.api.names import AUTO
from logo.api.replies import AdapterCard, AdapterList, ErrorReply, ModelRole, SelectionReply
from logo.api.requests import SelectRequest
from logo.core import Prompt
from logo.errors import closest
from logo.prompts import MAX_NEW_TOKENS
from logo.protocol import NotReady, Overloaded, Patterns, Sampling
from logo.serving import bodies, openai
from logo.serving.answers import Answers, PreparedRequest
from logo.serving.metrics import CONTENT_TYPE
from logo.serving.rendering import ChatRendering, CompletionRendering, Options, Rendering
from logo.serving.sending import Streamed, unless_left, whole

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)
}
_RETRY_AFTER = 1.0
_COMPLETION = 16  # tokens of a completion without 'max_tokens', as in OpenAI's API

TEXT: dict[str, Any] = {"response_class": Response, "responses": {200: {"content": {"text/plain": {}}}}}
"""For routes that answer in plain text: what fails there is JSON all the same."""

router = APIRouter(responses=ERRORS)


def _answers(request: Request) -> Answers:
    found: Answers = request.app.state.answers
    return found


def _patterns(request: Request) -> Patterns | None:
    """The adapters to which the request's API key is bound; see `logo.serving.guards.ApiKeys`."""
    return getattr(request.state, "adapters", None)


# -- generating ----------------------------------------------------------------------------------------------------


_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "With 'stream', server-sent events."}
}


@router.post("/v1/completions", response_model=openai.Completion, responses=_STREAM, tags=["OpenAI"])
async def completions(body: bodies.CompletionRequest, request: Request) -> Response:
    """Continues prompts, each with the mixture of adapters it selects."""
    answers = _answers(request)
    return await _generate(
        body,
        request,
        CompletionRendering(Options(body.model, body.return_token_ids, body.include_usage)),
        (body.max_tokens, "max_tokens" if body.max_tokens else "prompt", _COMPLETION),
        lambda: answers.encoded(body.prompts),
        len(body.prompts),
    )


@router.post("/v1/chat/completions", response_model=openai.ChatCompletion, responses=_STREAM, tags=["OpenAI"])
async def chat_completions(body: bodies.ChatRequest, request: Request) -> Response:
    """Answers a conversation with the mixture of adapters it selects."""
    answers = _answers(request)
    blamed = next((name for name in ("max_tokens", "max_completion_tokens") if getattr(body, name)), "messages")

    async def encoded() -> list[Prompt]:
        return [await answers.conversation(body.messages, body.chat_template_kwargs)]

    return await _generate(
        body,
        request,
        ChatRendering(Options(body.model, body.return_token_ids, body.include_usage)),
        (body.max_new_tokens, blamed, MAX_NEW_TOKENS),
        encoded,
        1,
    )


async def _generate(
    body: bodies.CompletionRequest | bodies.ChatRequest,
    request: Request,
    rendering: Rendering,
    limit: tuple[int | None, str, int],
    encoded: Callable[[], Awaitable[list[Prompt]]],
    count: int,
) -> Response:
    """Answers a body of either endpoint.

    Args:
        limit: the most new tokens, the field to blame if they do not fit, and their usual number; see `Answers.room`.
        encoded: tokenizes the prompts.
        count: the number of prompts.
    """
    answers, began = _answers(request), time.perf_counter()
    request.state.model = body.model
    wanted = answers.models(_patterns(request)).mixture_request(body.model, body.logo)
    with ExitStack() as stack:
        stack.enter_context(_admitted(answers, count * body.n))
        prompts = await encoded()
        request.state.prompt_tokens = sum(map(len, prompts))
        sampling = Sampling(answers.room(prompts, *limit), body.temperature, body.top_p, body.seed)
        chosen = await unless_left(request, answers.choose(prompts, wanted, began, request.state, body.n))
        for one in chosen:
            stack.callback(one.release)
        prepared = PreparedRequest(tuple(prompts), chosen, body.n, sampling, body.stops, began)
        if body.stream:
            return Streamed(answers, prepared, rendering, request.state, stack.pop_all())
        return await unless_left(request, whole(answers, prepared, rendering, request.state))


@contextmanager
def _admitted(answers: Answers, count: int = 1) -> Iterator[None]:
    """Reserves places for so many answers, or raises an `ApiError`."""
    try:
        with answers.service.admitted(count):
            yield
    except Overloaded:
        answers.metrics.failed("queue_full", count)
        raise too_many(_RETRY_AFTER) from None
    except NotReady as error:
        raise unavailable(str(error), _RETRY_AFTER, closing=True) from None


# -- selecting and the pool ----------------------------------------------------------------------------------------


@router.post("/v1/logo/select", response_model=SelectionReply, tags=["LoGo"])
async def select(body: SelectRequest, request: Request) -> SelectionReply:
    """Selects the adapters that would answer a prompt, with their weights and the scores of all."""
    answers, began = _answers(request), time.perf_counter()
    wanted = answers.models(_patterns(request)).mixture_request(body.model, body.logo)
    with _admitted(answers):
        if body.prompt is not None:
            [prompt] = await answers.encoded([body.prompt])
        else:
            prompt = await answers.conversation(body.messages or [], body.chat_template_kwargs)
        answers.room([prompt], None, "prompt" if body.messages is None else "messages")
        [chosen] = await unless_left(request, answers.choose([prompt], wanted, began, request.state))
        chosen.release()
    return SelectionReply.of(chosen, len(prompt))


@router.get("/v1/logo/adapters", response_model=AdapterList, tags=["LoGo"])
async def adapters(request: Request) -> AdapterList:
    """Lists the adapters of the pool that the API key may use."""
    answers = _answers(request)
    service, pool = answers.service, answers.service.pool
    names = pool.usable(_patterns(request))
    cards = [AdapterCard.of(card, service.selected.get(name, 0)) for name, card in pool.cards.items() if name in names]
    return AdapterList(
        base_model=answers.base_model,
        default_k=service.k,
        signal=service.signal,
        signals=list(service.signals),
        data=cards,
    )


@router.get("/v1/models", response_model=openai.ModelList, tags=["OpenAI"])
async def models(request: Request) -> openai.ModelList:
    """Lists the names that requests may give as `model`."""
    return openai.ModelList(data=_cards(request))


@router.get("/v1/models/{name:path}", response_model=openai.ModelCard, tags=["OpenAI"])
async def model(name: str, request: Request) -> openai.ModelCard | RedirectResponse:
    """One of the models that `/v1/models` lists."""
    if not name:
        return RedirectResponse(str(request.url.replace(path="/v1/models")))  # as for every other path
    cards = {card.id: card for card in _cards(request)}
    if name not in cards:
        raise model_not_found(name, closest(name, cards))
    return cards[name]


def _cards(request: Request) -> list[openai.ModelCard]:
    """The models that the API key may use."""
    answers = _answers(request)
    created, length = request.app.state.created, answers.service.context

    def card(name: str, role: str, parent: str | None) -> openai.ModelCard:
        return openai.ModelCard(
            id=name,
            created=created,
            root=answers.base_model if parent is None else name,
            parent=parent,
            max_model_len=length,
            logo=ModelRole.model_validate({"role": role}),
        )

    names = answers.service.pool.usable(_patterns(request))
    return [
        card(AUTO, "auto", None),
        card(answers.base_model, "base", None),
        *(card(name, "adapter", answers.base_model) for name in names),
    ]


# -- the server itself ---------------------------------------------------------------------------------------------


@router.get("/health", tags=["Server"], **TEXT)
async def health(request: Request) -> Response:
    """Answers 200 as long as answers can be generated, else 503."""
    alive = _answers(request).service.batching.alive
    return PlainTextResponse("ok" if alive else "generation has stopped", 200 if alive else 503)


@router.get("/ready", tags=["Server"], **TEXT)
async def ready(request: Request) -> Response:
    """Answers 200 as long as requests are accepted, else 503."""
    is_ready = _answers(request).service.ready
    return PlainTextResponse("ok" if is_ready else "not taking requests", 200 if is_ready else 503)


@router.get("/version", tags=["Server"])
async def server_version() -> dict[str, str]:
    """The versions of LoGo, transformers and PyTorch."""
    return {"version": __version__, "transformers": version("transformers"), "torch": version("torch")}


@router.get("/metrics", tags=["Server"], **TEXT)
async def metrics(request: Request) -> Response:
    """The metrics in Prometheus' text format."""
    return Response(_answers(request).metrics.text(), media_type=CONTENT_TYPE)
