"""The server's app: the routes of the API over one service, the same way for both endpoints, streamed or not; the page.

body -> Call, with a mixture per prompt -> Chunk, Chunk, ... -> one of OpenAI's objects, or events
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from logo.core import FinishReason, Prompt
from logo.errors import AdapterError, LoGoError, Unsure, closest
from logo.prompts import MAX_NEW_TOKENS, chat, read
from logo.api import bodies
from logo.serve.batching import Job
from logo.api.errors import ApiError, bad_request, failed, model_not_found, not_found, plain, shown, shown_line
from logo.api.guards import PAGE, response
from logo.api.logs import request_id
from logo.serve.metrics import Metrics
from logo.api.names import AUTO, MixtureRequest, Models
from logo.serve.packed import Chosen
from logo.serve.sampling import Sampling
from logo.serve.service import Service
from logo.text import Text

_T = TypeVar("_T")
_Asking = bodies.CompletionRequest | bodies.ChatRequest | bodies.SelectRequest
_Route = Callable[[Request], Coroutine[Any, Any, Response]]
_B = TypeVar("_B", bound=bodies.Body)
_log = logging.getLogger("logo.serve")

GRACE = 5.0  # seconds that a client has, after the time limit of its request, to read what was generated
_LOGGED = 200  # the most tokens of a prompt that are logged
_LONG = 10_000  # characters that take a few milliseconds to tokenize
_COMPLETION = 16  # tokens of a completion without 'max_tokens', as in OpenAI's API
_FILES = Path(__file__).parent / "page"


@dataclass(frozen=True)
class AppSettings:
    """The settings of a server's app."""

    base_model: str  # the name under which the base model alone answers
    request_timeout: float = 600.0  # the most seconds for a request
    adapter_changes: Path | None = None  # from which adapters may be added; None: the pool cannot be changed
    log_prompts: bool = False


@dataclass(frozen=True)
class Call:
    """A request for text with all that answering it needs."""

    body: bodies.ChatRequest | bodies.CompletionRequest
    prompts: Sequence[Prompt]
    chosen: Sequence[Chosen]
    sampling: Sampling  # of the first choice; the seeds of the others are the numbers that follow its
    began: float  # by `time.perf_counter`
    logged: dict[str, Any]  # its line in the log


class Chunk(NamedTuple):
    """New text (whole characters) and tokens of one answer, and why it ended; None until it does. Answers to the first
    prompt have the first numbers. The text of a token may be in a later chunk."""

    number: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


def create_app(service: Service, settings: AppSettings) -> Starlette:
    """The app, which starts and ends the service; `logo.api.guards.guard` is to be put around it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.batching.start()
        try:
            yield
        finally:
            await service.close()

    api, post, kinds = _Api(service, settings), ["POST"], (ApiError, HTTPException, LoGoError, MemoryError, Exception)
    routes: list[Mount | Route] = [
        Route("/", api.page),
        Mount(PAGE.rstrip("/"), StaticFiles(directory=_FILES)),
        Route("/v1/completions", api.posted(bodies.CompletionRequest, api.text), methods=post),
        Route("/v1/chat/completions", api.posted(bodies.ChatRequest, api.text), methods=post),
        Route("/v1/logo/select", api.posted(bodies.SelectRequest, api.select), methods=post),
        Route("/v1/logo/adapters", api.adapters),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.models),
        Route("/health", api.state),
        Route("/ready", api.state),
        Route("/metrics", api.scraped),
    ]
    if settings.adapter_changes is not None:
        load, unload = api.posted(bodies.LoadAdapter, api.load), api.posted(bodies.UnloadAdapter, api.unload)
        routes.append(Route("/v1/load_lora_adapter", load, methods=post))
        routes.append(Route("/v1/unload_lora_adapter", unload, methods=post))
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=dict.fromkeys(kinds, api.failed))


class _Api:
    """The routes. What they find in `request.state` is from `logo.api.guards`."""

    def __init__(self, service: Service, settings: AppSettings) -> None:
        self.service, self.settings, self.metrics = service, settings, Metrics(service)
        self._tokenizer, self._timeout = service.logo.tokenizer, settings.request_timeout
        self._known, self._created = len(service.logo.model.get_input_embeddings().weight), int(time.time())

    def posted(self, kind: type[_B], answer: Callable[[Request, _B], Coroutine[Any, Any, Response]]) -> _Route:
        """A route that answers bodies of this kind, until the client leaves, which cancels the answer."""

        async def route(request: Request) -> Response:
            # A web page elsewhere cannot send JSON that is called so without asking first.
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise bad_request("expected a JSON object and 'Content-Type: application/json', found another type")
            body = bodies.checked(kind, bodies.read_json(await request.body()))

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                working.cancel()

            working = asyncio.ensure_future(answer(request, body))
            watching = asyncio.ensure_future(watch())
            try:
                return await working
            except asyncio.CancelledError:
                if not watching.done():  # somebody else has cancelled both
                    raise
                raise bad_request("the client has left", None, "client_left", 499) from None  # as in nginx's logs
            finally:
                watching.cancel()

        return route

    def _models(self, request: Request) -> Models:
        """The models that the request's API key may use."""
        patterns = getattr(request.state, "adapters", None)
        return Models(self.settings.base_model, self.service.usable(patterns), self.service.signals, patterns)

    async def _encoded(self, prompts: Sequence[str | Sequence[int]]) -> list[Prompt]:
        """Reads prompts; ApiError: one has no tokens, or an id that the model does not know."""
        for found in (token for ids in prompts if not isinstance(ids, str) for token in (min(ids), max(ids))):
            if not 0 <= found < self._known:
                raise bad_request(f"prompt: expected token ids from 0 to {self._known - 1}, found {found}", "prompt")
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        rows = await _beside(size, lambda: [read(self._tokenizer, prompt) for prompt in prompts])
        if not all(rows):
            raise bad_request("prompt: expected a text, found an empty one", "prompt")
        self._check_known("prompt", rows)
        return rows

    def _check_known(self, what: str, rows: Sequence[Prompt]) -> None:
        for row in rows:
            self.service.logo.prompts.check_known(what, (*row.ids, *row.probed))

    async def _conversation(self, body: bodies.ChatRequest | bodies.SelectRequest) -> list[Prompt]:
        """Reads a conversation; ApiError or UsageError: it has no tokens, the model's template refuses it, or a
        variable for the template has the name of an argument of `apply_chat_template`."""
        turns, variables = [message.turn for message in body.messages or ()], body.chat_template_kwargs or {}
        for name in variables.keys() & inspect.signature(self._tokenizer.apply_chat_template).parameters:
            said = f"chat_template_kwargs: expected variables of the chat template, found {name!r}; leave it out"
            raise bad_request(said, "chat_template_kwargs")
        size, probed = sum(len(turn["content"] or "") for turn in turns), self.service.logo.settings.probe_text
        prompt = await _beside(size, lambda: chat(self._tokenizer, turns, probed, variables))
        if not prompt.ids:
            raise bad_request("messages: expected a text, found an empty one", "messages")
        self._check_known("messages", [prompt])
        return [prompt]

    def _room(self, body: _Asking, prompts: Sequence[Prompt]) -> int:
        """The most new tokens of the answers: what the request asks for; else the usual number, or as many as there is
        room for. ApiError: they do not fit behind the longest prompt."""
        batching, longest = self.service.batching, max(map(len, prompts))
        context = batching.context
        is_chat = not isinstance(body, bodies.CompletionRequest) and body.messages is not None
        blamed, usual = ("messages", MAX_NEW_TOKENS) if is_chat else ("prompt", _COMPLETION)
        asked = max(1, min(usual, context - longest))
        for name in ("max_tokens", "max_completion_tokens"):
            if (given := getattr(body, name)) is not None:
                blamed, asked = name, given
        if longest + asked > context:
            found = f"found {longest} in the prompt and {asked} for the answer; send a shorter prompt or ask for less"
            of_memory = context == batching.kv_tokens[1]
            where = "the memory for keys and values (--kv-cache-gb)" if of_memory else "this model's context"
            said = f"{where} holds {context} tokens: {found}"
            raise bad_request(said, blamed, "context_length_exceeded")
        return asked

    async def _choose(
        self, prompts: Sequence[Prompt], wanted: MixtureRequest, began: float, logged: dict[str, Any]
    ) -> list[Chosen]:
        """Selects the mixture of each prompt; they are probed together. ApiError: the time is up; else as
        `Service.choose`."""

        async def choosing() -> list[Chosen | BaseException]:
            # A coroutine, since nobody retrieves the exception of a future of `gather` that is cancelled in `wait_for`.
            asked = (self.service.choose(prompt, wanted, waits=len(prompts) == 1) for prompt in prompts)
            return await asyncio.gather(*asked, return_exceptions=True)

        try:
            found = await asyncio.wait_for(choosing(), self._left(began))
        except asyncio.TimeoutError:
            raise self._late() from None
        noted = [self._noted(*one) for one in zip(prompts, found, strict=True)]
        logged["selections"] = [one for one in noted if one]
        chosen = [one for one in found if isinstance(one, Chosen)]
        for error in (one for one in found if isinstance(one, BaseException)):
            for one in chosen:
                one.release()
            raise error
        return chosen

    def _noted(self, prompt: Prompt, found: Chosen | BaseException) -> dict[str, Any]:
        """Counts a selection, also one that is too unsure to answer; the entry of the log about it."""
        if not isinstance(found, (Chosen, Unsure)):
            return {}
        told, mixture = (found.selection, found.selection.mixture) if isinstance(found, Chosen) else (found, {})
        noted: dict[str, Any] = {
            "prompt_sha256": hashlib.sha256(" ".join(map(str, prompt.ids)).encode()).hexdigest()[:16],
            "adapters": list(mixture),
            "weights": [round(weight, 4) for weight in mixture.values()],
        }
        if told.confidence is not None:
            self.metrics.confidence.observe(told.confidence)
            noted["confidence"] = round(told.confidence, 4)
        if self.settings.log_prompts:
            text = self._tokenizer.decode(prompt.probed[:_LOGGED], skip_special_tokens=True)
            noted |= {"prompt": text, "cut": len(prompt.probed) > _LOGGED}
        if isinstance(found, Chosen):
            noted["named"] = bool(mixture) and not found.selection.scores
            noted |= {"probe_ms": round(found.probe_ms, 1), "queue_ms": round(found.queue_ms, 1)}
            if found.probe_ms:
                self.metrics.probe.observe(found.probe_ms / 1e3)
        return noted

    async def text(self, request: Request, body: bodies.CompletionRequest | bodies.ChatRequest) -> Response:
        """Continues prompts or answers a conversation, each with the mixture of adapters that it selects."""
        began, logged = time.perf_counter(), getattr(request.state, "logged", {})
        logged["model"] = plain(body.model)
        wanted = self._models(request).mixture_request(body.model, body.logo)
        with ExitStack() as held:
            if isinstance(body, bodies.ChatRequest):
                held.enter_context(self.service.admitted(body.n))
                prompts = await self._conversation(body)
            else:
                held.enter_context(self.service.admitted(len(body.prompts) * body.n))
                prompts = await self._encoded(body.prompts)
            logged["prompt_tokens"] = sum(map(len, prompts))
            sampling = Sampling(self._room(body, prompts), body.temperature, body.top_p, body.seed)
            chosen = await self._choose(prompts, wanted, began, logged)
            for one in chosen:
                held.callback(one.release)
            call = Call(body, prompts, chosen, sampling, began, logged)
            if body.stream:
                return Streamed(self._events(call), held.pop_all(), self._left(began))
            return JSONResponse(await self._whole(call))

    async def _chunks(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Yields answers in chunks as they come; ApiError: the time is up. Leaving the loop ends them."""
        seed, left, metrics, logged = call.sampling.seed, self._left(call.began), self.metrics, call.logged
        ways = [replace(call.sampling, seed=None if seed is None else seed + choice) for choice in range(call.body.n)]
        jobs = [Job(p.ids, one, way) for p, one in zip(call.prompts, call.chosen, strict=True) for way in ways]
        texts = {job: (number, Text(self._tokenizer, call.body.stop)) for number, job in enumerate(jobs)}
        before = dict.fromkeys(jobs, call.began)  # when the last tokens of each came
        deadline = None if left is None else asyncio.get_running_loop().time() + left
        metrics.prompt_tokens.inc(sum(len(job.prompt) for job in jobs))
        logged["completion_tokens"] = 0
        try:
            async with aclosing(self.service.generate(jobs, deadline)) as news:
                async for job, tokens, reason in news:
                    (number, text), now = texts[job], time.perf_counter()
                    count, shown = text.taken, text.push(tokens)
                    new = text.taken - count
                    logged["completion_tokens"] += new
                    metrics.generation_tokens.inc(new)
                    if new and not count:
                        metrics.first_token.observe(now - call.began)
                        logged.setdefault("first_token_ms", round(1e3 * (now - call.began), 1))
                    for _ in range(new if count else 0):
                        metrics.inter_token.observe((now - before[job]) / new)
                    before[job] = now
                    shown += text.finish() if reason is not None else ""
                    if text.stopped:
                        reason, job.left = "stop", True
                    if reason is not None:
                        metrics.success.labels(reason).inc()
                        metrics.end_to_end.observe(now - call.began)
                    yield Chunk(number, shown, tokens[:new], reason)
        except TimeoutError:
            raise self._late() from None

    async def _whole(self, call: Call) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        answers = [Chunk(i) for i in range(len(call.chosen) * call.body.n)]
        async with aclosing(self._chunks(call)) as chunks:
            async for i, text, tokens, reason in chunks:
                answers[i] = Chunk(i, answers[i].text + text, answers[i].tokens + tokens, reason)
        choices = [_choice(call, one) for one in answers]
        return {**_head(call), "choices": choices, "usage": _usage(call), "logo": _mixtures(call)}

    async def _events(self, call: Call) -> AsyncGenerator[bytes, None]:
        """The answer of a request that is streamed; an error is an event, since the status was sent already."""
        head, begun = _head(call), [_choice(call, Chunk(i), begins=True) for i in range(len(call.chosen) * call.body.n)]
        yield _event({**head, "choices": begun, "logo": _mixtures(call)})
        try:
            async with aclosing(self._chunks(call)) as chunks:
                async for chunk in chunks:
                    if chunk.text or chunk.finish_reason or call.body.return_token_ids:
                        yield _event({**head, "choices": [_choice(call, chunk)]})
        except Exception as error:
            _log.warning("a stream failed: %s", error, exc_info=error)
            answer = ApiError.of(error, request_id.get())
            self.metrics.failure.labels(answer.code or "invalid").inc()
            yield _event(answer.body())
        else:
            if call.body.stream_options.include_usage:
                yield _event({**head, "choices": [], "usage": _usage(call)})
        yield b"data: [DONE]\n\n"

    def _left(self, began: float) -> float:
        """The seconds that are left to a request."""
        return max(0.0, began + self._timeout - time.perf_counter())

    def _late(self) -> ApiError:
        return failed(f"not answered within {self._timeout:g} s, the limit of this server", "timeout", 504)

    async def select(self, request: Request, body: bodies.SelectRequest) -> Response:
        """Selects the adapters that would answer a prompt, with their weights, the scores of all (none for a forced
        mixture) and the number of the prompt's tokens."""
        wanted, began = self._models(request).mixture_request(body.model, body.logo), time.perf_counter()
        with self.service.admitted():
            prompts = await (self._conversation(body) if body.prompt is None else self._encoded([body.prompt]))
            self._room(body, prompts)
            [one] = await self._choose(prompts, wanted, began, getattr(request.state, "logged", {}))
            one.release()
        found = bodies.mixture_reply(one.selection, one.probe_ms, one.queue_ms)
        return JSONResponse({**found, "scores": one.selection.scores, "tokens": len(prompts[0])})

    async def adapters(self, request: Request) -> Response:
        """Lists the adapters of the pool that the API key may use."""
        service, known, all_cards = self.service, self._models(request), self.service.adapters
        cards = [all_cards[name] for name in known.adapters if name in all_cards]
        how = service.logo.k, service.signals, service.logo.settings
        return JSONResponse(bodies.adapter_list(known.base, *how, cards, service.selected))

    async def models(self, request: Request) -> Response:
        """Lists the names that requests may give as `model`, or tells of one."""
        known, length, asked = self._models(request), self.service.batching.context, request.path_params.get("name")
        roles = {AUTO: "auto", known.base: "base", **dict.fromkeys(known.adapters, "adapter")}
        about = {"object": "model", "created": self._created, "owned_by": "logo", "max_model_len": length}
        cards = []
        for name in roles if asked is None else {asked} & roles.keys():
            root, parent = (name, known.base) if roles[name] == "adapter" else (known.base, None)
            own: dict[str, Any] = {"root": root, "parent": parent, "permission": [], "logo": {"role": roles[name]}}
            cards.append({"id": name, **about, **own})
        if not cards:
            raise model_not_found(str(asked), closest(asked, roles))
        return JSONResponse({"object": "list", "data": cards} if asked is None else cards[0])

    async def load(self, request: Request, body: bodies.LoadAdapter) -> Response:
        """Adds an adapter to the pool, from below the server's folder; if a check fails, nothing changes."""
        folder = _inside(self.settings.adapter_changes or Path(), body.lora_path)
        self._models(request).check_new(body.lora_name, replace=body.load_inplace)
        try:
            await self.service.add(folder, body.lora_name, replace=body.load_inplace)
        except AdapterError as error:
            raise bad_request(shown_line(str(error)), "lora_path") from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request, body: bodies.UnloadAdapter) -> Response:
        """Removes an adapter from the pool; requests that have selected it are still answered with it."""
        self._models(request).check_there(body.lora_name)
        await self.service.remove(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def failed(self, request: Request, error: Exception) -> Response:
        """The answer to any exception. One that is unexpected is raised again, so that it is logged."""
        if isinstance(error, HTTPException):
            error.detail += f": {request.method} {shown(request.scope['path'])}"
        else:
            self.metrics.failure.labels(ApiError.of(error).code or "invalid").inc()
        return response(error)

    async def page(self, request: Request) -> Response:
        """The page, which asks for a key itself."""
        return FileResponse(_FILES / "index.html")

    async def state(self, request: Request) -> Response:
        """200 as long as answers can be generated (`/health`) or requests are accepted (`/ready`), else 503."""
        fine = self.service.ready if request.url.path == "/ready" else self.service.batching.alive
        return PlainTextResponse("ok" if fine else "not generating or not taking requests", 200 if fine else 503)

    async def scraped(self, request: Request) -> Response:
        """The metrics in Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class Streamed(StreamingResponse):
    """Sends events; what the request holds is released when they end in any way, as also if the client does not read
    them, `GRACE` seconds after the time that is `left`."""

    def __init__(self, events: AsyncGenerator[bytes, None], held: ExitStack, left: float | None) -> None:
        self._events, self._held, self._limit = events, held, None if left is None else left + GRACE
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        with self._held:
            async with aclosing(self._events):
                try:
                    await asyncio.wait_for(super().__call__(scope, receive, send), self._limit)
                except asyncio.TimeoutError:
                    _log.warning("a stream was ended, since its client does not read it")


async def _beside(size: int, work: Callable[[], _T]) -> _T:
    """Runs `work`, in a thread for long texts, so that other requests are answered meanwhile."""
    return await asyncio.to_thread(work) if size > _LONG else work()


def _inside(root: Path, path: str) -> Path:
    """The folder that a client names, absolute or relative to `root`; ApiError unless it is one inside of `root`."""
    try:
        found = (root / path).resolve()
        is_folder = found.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long a path, or links in a circle
        raise bad_request(f"lora_path: expected a path, found {shown(path)}", "lora_path") from None
    if not found.is_relative_to(root.resolve()):
        said = f"lora_path: expected a folder inside the one this server was given, found {shown(path)}"
        raise bad_request(said, "lora_path", "forbidden", 403)
    if not is_folder:
        raise not_found(f"lora_path: expected a folder, found none at {shown(path)}", "lora_path")
    return found


def _head(call: Call) -> dict[str, Any]:
    is_chat = isinstance(call.body, bodies.ChatRequest)
    kind = "text_completion" if not is_chat else "chat.completion.chunk" if call.body.stream else "chat.completion"
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": call.body.model}


def _choice(call: Call, chunk: Chunk, begins: bool = False) -> dict[str, Any]:
    """One answer, or a piece of it; `begins`: the first one."""
    said: dict[str, Any] = {"text": chunk.text}
    if isinstance(call.body, bodies.ChatRequest) and call.body.stream:
        said = {"delta": {**({"role": "assistant"} if begins else {}), "content": chunk.text}}
    elif isinstance(call.body, bodies.ChatRequest):
        said = {"message": {"role": "assistant", "content": chunk.text, "refusal": None}}
    ids = {"token_ids": list(chunk.tokens)} if call.body.return_token_ids else {}
    return {"index": chunk.number, **said, "logprobs": None, "finish_reason": chunk.finish_reason, **ids}


def _usage(call: Call) -> dict[str, int]:
    """The counts of tokens; each prompt is counted once, however many answers it has."""
    prompt, completion = call.logged["prompt_tokens"], call.logged["completion_tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _mixtures(call: Call) -> Any:
    """The mixture of a single prompt, or a list for a list of prompts."""
    found = [bodies.mixture_reply(one.selection, one.probe_ms, one.queue_ms) for one in call.chosen]
    return found if isinstance(call.body, bodies.CompletionRequest) and call.body.several else found[0]


def _event(reply: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(reply).encode() + b"\n\n"
