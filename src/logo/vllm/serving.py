"""`Logo`: LoGo in vLLM's server. It selects the mixtures of a request, and has vLLM's serving objects answer with them.

prompts -> Selection of each -> Mix -> vLLM's serving object, whose engine client is `Mixing` -> the reply
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm import envs
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.sampling_params import RequestOutputKind

from logo.adapters.pool import AdapterPool
from logo.api import bodies
from logo.api.errors import ApiError, failed, plain
from logo.api.logs import LOGGED_TOKENS, selection_entry
from logo.api.names import AUTO, Models, check_pool
from logo.api.replies import Chosen, adapter_card
from logo.api.shadow import Shadow
from logo.core import Options, Prompt, Selection
from logo.errors import LoGoError, Unsure, UsageError
from logo.selection.selector import forced
from logo.vllm.engine import Engine, Served
from logo.vllm.launch import COUNT_NANS
from logo.vllm.metrics import Counts
from logo.vllm.options import log
from logo.vllm.requests import Mix, prompt_number
from logo.vllm.selftest import check

NOT_FINITE = (
    "the model's logits are NaN, so nothing can be generated from them: an adapter, or the base model, is too large "
    "for the model's dtype; leave that adapter out, or use float32"
)


@dataclass(frozen=True)
class Handler:
    """One of vLLM's serving objects: its name in the state of the app, and its method that answers."""

    name: str
    method: str


COMPLETIONS = Handler("openai_serving_completion", "create_completion")
CHATS = Handler("openai_serving_chat", "create_chat_completion")
RESPONSES = Handler("openai_serving_responses", "create_responses")


@dataclass(frozen=True)
class RequestPrompts:
    """The prompts of a request, which are read only where they select."""

    read: Callable[[], Awaitable[Sequence[Prompt]]]
    count: int = 1
    listed: bool = False  # whether they were given as a list, so that the reply's field `logo` is one


class Mixing:
    """vLLM's engine client for one request, whose prompts have these mixtures.

    Attributes:
        ended: the numbers of the prompts whose answers have ended as they should.
    """

    def __init__(self, client: Any, engine: Engine, mixes: Sequence[Mix]) -> None:
        self._client = client
        self._engine = engine
        self._mixes = mixes
        self._lengths: dict[int, int] = {}  # number of a prompt -> its tokens
        self._new_tokens: dict[int, int] = {}  # number of a prompt -> those of its answers
        self.ended: set[int] = set()

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """As the client's, after the adapters of the prompt's mixture have slots; ApiError: logits are NaN."""
        number = prompt_number(request_id) if len(self._mixes) > 1 else 0
        mix = self._mix(number, len(prompt["prompt_token_ids"]))
        if params.num_logprobs is None and not self._marks_all(params):
            params = copy.copy(params)
            params.logprobs = 0  # those of the drawn tokens alone, which `_check_finite` looks at
        outputs: asyncio.Queue[Any] = asyncio.Queue()

        async def answered() -> None:
            """Puts the outputs into the queue as they come, so that a client that does not read keeps no slots."""
            try:
                async with self._engine.held([mix]) as [lora]:
                    kwargs["lora_request"] = lora
                    # vLLM has to hear that a client has left before others get its slots, where it would go on.
                    async with aclosing(self._client.generate(prompt, params, request_id, *args, **kwargs)) as given:
                        async for output in given:
                            _check_finite(output)
                            outputs.put_nowait(output)
            finally:
                outputs.put_nowait(None)

        task = asyncio.create_task(answered())
        try:
            while (output := await outputs.get()) is not None:
                self._count(number, output, params.output_kind)
                yield output
            await task  # raises its error
        finally:
            task.cancel()
            await asyncio.wait([task])
        self.ended.add(number)

    def _count(self, number: int, output: Any, kind: RequestOutputKind) -> None:
        """Counts the tokens of an output, which holds new ones alone or all so far."""
        tokens = sum(len(answer.token_ids) for answer in output.outputs)
        before = self._new_tokens.get(number, 0) if kind is RequestOutputKind.DELTA else 0
        self._new_tokens[number] = before + tokens

    @property
    def logged(self) -> dict[str, int]:
        """What the request's line in the log says of its tokens."""
        return {"prompt_tokens": sum(self._lengths.values()), "completion_tokens": sum(self._new_tokens.values())}

    def _mix(self, number: int, length: int) -> Mix:
        """The mixture of a prompt, of so many tokens; if they are more than at first, it is a beam, which goes on
        behind its prompt."""
        first = self._lengths.setdefault(number, length)
        mix = self._mixes[number]
        return replace(mix, prompt=first) if first < length else mix

    def _marks_all(self, params: Any) -> bool:
        """Whether vLLM marks every answer from NaN: of several that come together it marks the last one alone, and
        where tokens are guessed it does not know whose logits are whose."""
        together = params.n > 1 and params.output_kind is RequestOutputKind.FINAL_ONLY
        return not together and self._client.vllm_config.speculative_config is None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def _check_finite(output: Any) -> None:
    """Raises ApiError if vLLM has marked one of its outputs, or a log probability there is NaN, as all of a token are
    if a logit is."""
    places = [place for answer in output.outputs for place in answer.logprobs or ()]
    is_marked = output.metrics is not None and output.metrics.is_corrupted
    if is_marked or any(math.isnan(token.logprob) for place in places for token in place.values()):
        raise failed(NOT_FINITE, "not_finite")


class Logo:
    """LoGo in a server, as `app.state.logo`: an open engine, and the names of the base model alone."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        self.engine = engine
        self.bases = names
        self.base = names[0]
        self.counts = Counts()
        self._shadow: Shadow | None = None
        if engine.options.shadow:
            text_of = self._text if engine.options.log == "prompts" else None
            self._shadow = Shadow(Path(engine.options.shadow), lambda: engine.answers > 0, text_of, self.counts.shadow)
        self._reading: set[asyncio.Task[None]] = set()  # prompts for the shadow
        # Kept, since files may be removed later.
        self.cards = {adapter.name: adapter_card(adapter) for adapter in self.pool}

    @classmethod
    async def opened(cls, client: Any, state: Any) -> Logo:
        """Opens the pool in the engine of a server; raises LoGoError."""
        started = time.perf_counter()
        models = state.openai_serving_models
        if models.lora_requests or models.lora_resolvers:
            advice = "put the adapters of resolvers and of --lora-modules in a file of --config into the pool"
            raise UsageError(f"LoGo fills all of vLLM's slots: {advice}")
        if not envs.VLLM_COMPUTE_NANS_IN_LOGITS:
            raise UsageError(f"{COUNT_NANS} is 0, so that vLLM would answer from NaN without a sign of it: unset it")
        if not client.log_stats:
            raise UsageError("--disable-log-stats: vLLM marks answers from NaN in its statistics only; leave it out")
        engine = _engine(client)
        await engine.open()
        names = tuple(path.name for path in models.base_model_paths)
        for name in names:
            check_pool(name, engine.served.pool.names)
        await check(engine)
        seconds = time.perf_counter() - started
        signal = engine.options.settings.signal
        log.info("LoGo: %d adapters, signal %s, ready in %.1f s", len(engine.served.pool), signal, seconds)
        logo = cls(engine, names)
        # vLLM's routes that only read a text know the base model alone; all other names are the same to them.
        models.registry.is_base_model = logo.is_served
        return logo

    def is_served(self, name: str) -> bool:
        """Whether requests may give this name of one model."""
        return name in (*self.bases, AUTO) or name in self.pool.names

    @property
    def pool(self) -> AdapterPool:
        """What prompts are selected from now."""
        return self.engine.served.pool

    async def change(self, kind: str, name: str, folder: str = "") -> None:
        """See `Engine.change`."""
        await self.engine.change(kind, name, folder)
        before = {other: card for other, card in self.cards.items() if other != name}
        self.cards = {adapter.name: before.get(adapter.name) or adapter_card(adapter) for adapter in self.pool}

    def names(self, served: Served | None = None) -> Models:
        """The names that requests may give as `model`, for a pool (None: as it is now)."""
        served = served or self.engine.served
        return Models(self.base, served.pool.names, tuple(served.opened))

    async def choose(
        self,
        model: str,
        options: bodies.LogoOptions | None,
        prompts: RequestPrompts,
        raw: Request,
        alone: bool = False,
    ) -> tuple[list[Chosen], list[Mix]]:
        """The mixture of each prompt of a request, which its line in the log has, too; `alone`: as `ProbeRequest`.
        ApiError, LoGoError: there is no such model, or the options cannot be used, or no adapter fits."""
        engine = self.engine
        logged = getattr(raw.state, "logged", None)  # None: requests have no line
        async with engine.using() as served:
            mixture = self.names(served).mixture_request(self.base if model in self.bases else model, options)
            selects = mixture.adapters is None
            rows = await prompts.read() if selects or logged is not None else ()
            if mixture.adapters is None:
                call = engine.options.settings.options(served.pool, mixture.options)
                outcomes = await asyncio.gather(*(self._outcome(served, row, call, alone) for row in rows))
            else:
                outcomes = [Chosen(forced(mixture.adapters, served.pool))] * prompts.count
            if logged is not None:
                logged["model"] = plain(model)
                logged["selections"] = self._entries(rows, outcomes)
            chosen = [_answered(outcome) for outcome in outcomes]
            mixes = [engine.mix(served, choice.selection) for choice in chosen]
        for mix in mixes:
            engine.slots.check(mix.keys)
        return chosen, mixes

    async def _outcome(self, served: Served, row: Prompt, call: Options, alone: bool) -> Chosen | Unsure:
        """The mixture that a prompt selects, or that it is too unsure to be answered."""
        started = time.perf_counter()
        try:
            selection = await self.engine.select(served, row, call, alone)
        except Unsure as unsure:
            self.counts.unsure(unsure.confidence)
            return unsure
        seconds = time.perf_counter() - started
        self.counts.selected(selection, seconds)
        return Chosen(selection, 1000 * seconds)

    def _entries(self, rows: Sequence[Prompt], outcomes: Sequence[Chosen | Unsure]) -> list[dict[str, Any]]:
        """What a line of the log says of the prompts of a request."""
        shown = self.engine.options.log == "prompts"
        texts = [self._text(row) if shown else None for row in rows]
        return [selection_entry(*entry) for entry in zip(rows, outcomes, texts, strict=True)]

    def _text(self, row: Prompt) -> str:
        """What the log shows of a prompt."""
        return self.engine.text_of(row.probed[:LOGGED_TOKENS])

    def _watch(self, prompts: RequestPrompts, mixture: Mapping[str, float], alone: bool) -> None:
        """If there is a shadow, has it select for the prompts of a request that has named a mixture; returns at once.
        `alone`: as `ProbeRequest`."""
        shadow = self._shadow
        if shadow is None:
            return

        async def offer() -> None:
            with suppress(ApiError, LoGoError, ValueError):  # prompts that cannot be read, which the answer says
                shadow.offer(await prompts.read(), mixture, partial(self._selected, alone))

        task = asyncio.create_task(offer())
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _selected(self, alone: bool, row: Prompt) -> Selection:
        """What a prompt selects, beside an answer that something else has been named for."""
        async with self.engine.using() as served:
            call = self.engine.options.settings.options(served.pool, {"when_unsure": "mix"})
            return await self.engine.select(served, row, call, alone)

    async def answer(self, request: Any, raw: Request, handler: Handler, prompts: RequestPrompts) -> Response:
        """Has one of vLLM's serving objects answer a request, parsed by its class, with the mixtures of its prompts."""
        serving = getattr(raw.app.state, handler.name)
        if serving is None:
            raise ApiError(501, "this model does not answer requests of this kind", "invalid_request_error")
        model = request.model
        options = _options(request)
        alone = request.cache_salt is not None
        chosen, mixes = await self.choose(model, options, prompts, raw, alone)
        mixing = Mixing(serving.engine_client, self.engine, mixes)
        answers = getattr(_mixed(serving, mixing, model), handler.method)
        reply = await answers(request.model_copy(update={"model": self.base}), raw)
        if isinstance(reply, ErrorResponse):
            return JSONResponse(reply.model_dump(), reply.error.code)
        has_named = not chosen[0].selection.scores
        is_watched = options is None or options.shadow
        if has_named and is_watched:
            self._watch(prompts, chosen[0].selection.mixture, alone)

        def count() -> None:
            logged = getattr(raw.state, "logged", {})
            logged.update(mixing.logged)
            is_beam = getattr(request, "use_beam_search", False)
            if is_beam and hasattr(reply, "usage"):  # each step of a beam is a call of its own, of one token
                logged["completion_tokens"] = reply.usage.completion_tokens
            for number in mixing.ended:
                self.counts.answered(chosen[number].selection)

        mixtures = [choice.reply() for choice in chosen]
        field = mixtures if prompts.listed else mixtures[0]
        if hasattr(reply, "model_dump"):
            count()
            return JSONResponse({**reply.model_dump(mode="json", by_alias=True), "logo": field})
        return StreamingResponse(_stream(reply, json.dumps(field), count), media_type="text/event-stream")


def _mixed(serving: Any, mixing: Mixing, model: str) -> Any:
    """One of vLLM's serving objects whose answers have these mixtures, and the name of this model."""
    serving = copy.copy(serving)
    serving.engine_client = mixing
    serving.models = copy.copy(serving.models)
    serving.models.model_name = lambda lora_request=None: model
    return serving


def _answered(outcome: Chosen | Unsure) -> Chosen:
    """The mixture that a prompt is answered with; Unsure: none."""
    if isinstance(outcome, Unsure):
        raise outcome
    return outcome


def _options(request: Any) -> bodies.LogoOptions | None:
    """The field `logo` of a request; ApiError: it is not valid, or stands elsewhere, or there is no model."""
    extra = request.model_extra or {}
    body = {name: extra[name] for name in bodies.LogoOptions.model_fields if name in extra}
    body |= {"model": request.model or None, "logo": extra.get("logo")}
    return bodies.checked(bodies.ModelRequest, body).logo


async def _stream(events: AsyncIterator[Any], field: str, count: Callable[[], None]) -> AsyncIterator[str]:
    """The events of a stream, the first of which gets the field `logo`; `count` is called when it has ended. An error
    is an event, since the status was sent already."""
    number = 0
    first = True
    try:
        async for event in events:
            if not isinstance(event, str):  # of `/v1/responses`
                event = _sent(getattr(event, "type", "unknown"), event.model_dump_json(by_alias=True))
            number += 1
            if first and "data: {" in event:
                event = event.replace("data: {", f'data: {{"logo": {field}, ', 1)
                first = False
            yield event
    except (ApiError, LoGoError) as error:  # of `/v1/responses`, too: vLLM makes events of those of other routes
        log.error("LoGo: a stream failed: %s", error, exc_info=error)
        answer = ApiError.of(error)
        fields = {"message": answer.message, "param": answer.param, "code": answer.code, "sequence_number": number}
        yield _sent("error", json.dumps({"type": "error", **fields}))
    finally:
        count()


def _sent(kind: str, body: str) -> str:
    """An event of a stream of `/v1/responses`, by its kind and its JSON."""
    return f"event: {kind}\ndata: {body}\n\n"


def _engine(client: Any) -> Engine:
    """The engine of a server, which is not open yet; with data parallelism, its engines have the same adapters in the
    same slots, so that each of them can answer any request."""
    core = client.engine_core
    engines = len(getattr(core, "core_engines", ())) or 1

    async def call(*args: Any) -> list[Any]:
        if engines == 1:
            return list(await client.collective_rpc("logo", args=args))
        # `collective_rpc` asks all engines, and returns what the first one says.
        replies = await core.call_utility_all_async("collective_rpc", "logo", None, args, {})
        return [reply for of_engine in replies for reply in of_engine]

    async def answer(ids: Sequence[int], parameters: Any, lora: Any, engine: int | None) -> Any:
        prompt = {"prompt_token_ids": list(ids)}
        name = f"logo-{uuid.uuid4().hex}"
        outputs = client.generate(prompt, parameters, name, lora_request=lora, data_parallel_rank=engine)
        return [output async for output in outputs][-1]

    async def run(rows: Sequence[tuple[Sequence[int], Any, Any]], engine: int | None = None) -> list[Any]:
        return list(await asyncio.gather(*(answer(*row, engine) for row in rows)))

    return Engine(call, run, client.vllm_config, engines)
