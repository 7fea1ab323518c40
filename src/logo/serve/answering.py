"""From the prompts of a request to OpenAI's objects, the same way for both endpoints, streamed or not.

body -> Call -> Chosen per prompt -> Chunk, Chunk, ... -> an object, or events
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from heapq import nlargest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from logo.core import FinishReason, Prompt, Selection
from logo.errors import Unsure
from logo.prompts import MAX_NEW_TOKENS, chat, read
from logo.serve.batching import Job
from logo.serve.bodies import ChatRequest, CompletionRequest, Message, Mixture
from logo.serve.errors import ApiError, bad_request, client_left, timed_out
from logo.serve.logs import request_id
from logo.serve.metrics import Metrics
from logo.serve.names import MixtureRequest, Models, Patterns
from logo.serve.packed import Chosen
from logo.serve.sampling import Sampling
from logo.serve.service import Service
from logo.serve.text import Text

_T = TypeVar("_T")
_log = logging.getLogger("logo.serve")

# The scores of a selection that are logged, the highest ones; the most tokens of a prompt.
_LEADING, _LOGGED = 5, 200
_LONG = 10_000  # characters that take a few milliseconds to tokenize
_COMPLETION = 16  # tokens of a completion without 'max_tokens', as in OpenAI's API


@dataclass(frozen=True)
class AppSettings:
    """The settings of a server's app.

    Attributes:
        base_model: the name under which the base model alone answers.
        request_timeout: the most seconds for a request, including its waiting; None: no limit.
        adapter_changes: a folder from which adapters may be added while it runs; None: the pool cannot be changed.
        log_prompts: whether prompts are logged.
    """

    base_model: str
    request_timeout: float | None = 600.0
    adapter_changes: Path | None = None
    log_prompts: bool = False


@dataclass(frozen=True)
class Call:
    """A request for text, read and checked: all that answering it needs."""

    body: ChatRequest | CompletionRequest
    prompts: tuple[Prompt, ...]
    wanted: MixtureRequest
    sampling: Sampling  # of the first answer to a prompt; the seeds of the others are the numbers that follow its
    began: float  # when the request came, by `time.perf_counter`
    logged: dict[str, Any]  # the fields of its line in the log


class Chunk(NamedTuple):
    """New text (whole characters) and tokens of one answer, and why it ended; None until it does. Answers to the first
    prompt have the first numbers. The text of a token may be in a later chunk."""

    number: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


class Answers:
    """Answers requests with a service."""

    def __init__(self, service: Service, settings: AppSettings) -> None:
        self.service, self.metrics, self.base_model = service, Metrics(service), settings.base_model
        self._tokenizer, self._vocabulary = service.logo.tokenizer, service.logo.model.get_input_embeddings().weight
        self._timeout, self._log_prompts = settings.request_timeout, settings.log_prompts

    # -- reading requests ------------------------------------------------------------------------------------------

    def models(self, patterns: Patterns | None) -> Models:
        """The models of a request whose API key is bound to these adapters; None: the whole pool."""
        return Models(self.base_model, self.service.usable(patterns), self.service.signals, patterns)

    async def call(
        self, body: ChatRequest | CompletionRequest, wanted: MixtureRequest, began: float, logged: dict[str, Any]
    ) -> Call:
        """Reads a request for text; ApiError or UsageError: it cannot be answered."""
        if isinstance(body, ChatRequest):
            prompts = [await self.conversation(body.messages, body.chat_template_kwargs)]
            most, usual, blamed = body.max_completion_tokens or body.max_tokens, MAX_NEW_TOKENS, "messages"
        else:
            prompts = await self.encoded(body.prompts)
            most, usual, blamed = body.max_tokens, _COMPLETION, "prompt"
        named = ("max_completion_tokens", "max_tokens")
        blamed = next((name for name in named if getattr(body, name, None) is not None), blamed)
        logged["prompt_tokens"] = sum(map(len, prompts))
        sampling = Sampling(self.room(prompts, most, blamed, usual), body.temperature, body.top_p, body.seed)
        return Call(body, tuple(prompts), wanted, sampling, began, logged)

    async def encoded(self, prompts: Sequence[str | Sequence[int]]) -> list[Prompt]:
        """Reads prompts; ApiError: one has no tokens, or an id that the model does not know."""
        known = len(self._vocabulary)
        for ids in (one for one in prompts if not isinstance(one, str)):
            if not 0 <= min(ids) <= max(ids) < known:
                found = min(ids) if min(ids) < 0 else max(ids)
                raise bad_request(f"prompt: expected token ids from 0 to {known - 1}, found {found}", "prompt")
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        rows = await _beside(size, lambda: [read(self._tokenizer, prompt) for prompt in prompts])
        if not all(rows):
            raise bad_request("prompt: expected a text, found an empty one", "prompt")
        return rows

    async def conversation(self, messages: Sequence[Message], variables: Mapping[str, Any] | None) -> Prompt:
        """Reads a conversation; `variables` are for the model's template.

        Raises:
            ApiError: it has no tokens, or a variable has the name of an argument of `apply_chat_template`.
            UsageError: the model's template refuses it.
        """
        turns, variables = [message.turn for message in messages], variables or {}
        for name in inspect.signature(self._tokenizer.apply_chat_template).parameters:
            if name in variables:
                raise bad_request(
                    f"chat_template_kwargs: expected variables of the chat template, found {name!r}; leave it out",
                    "chat_template_kwargs",
                )
        size, probed = sum(len(turn["content"] or "") for turn in turns), self.service.logo.settings.probe_text
        prompt = await _beside(size, lambda: chat(self._tokenizer, turns, probed, variables))
        if not prompt.ids:
            raise bad_request("messages: expected a text, found an empty one", "messages")
        return prompt

    def room(self, prompts: Sequence[Prompt], most: int | None, param: str, usual: int = _COMPLETION) -> int:
        """The most new tokens of the answers: what the request asks for; None: the usual number, or as many as there is
        room for. ApiError about the field `param`: they do not fit behind the longest prompt."""
        context, longest = self.service.batching.context, max(map(len, prompts))
        asked = min(usual, context - longest) if most is None else most
        if longest >= context or asked > context - longest:
            raise bad_request(
                f"this model's context holds {context} tokens: found {longest} in the prompt and {max(asked, 1)} for "
                "the answer; send a shorter prompt or ask for fewer tokens",
                param,
                "context_length_exceeded",
            )
        return asked

    # -- answering -------------------------------------------------------------------------------------------------

    async def choose(
        self, prompts: Sequence[Prompt], wanted: MixtureRequest, began: float, logged: dict[str, Any]
    ) -> list[Chosen]:
        """Selects the mixture of each prompt; they are probed together. Errors as `Service.choose`; ApiError: the time
        is up."""

        async def choosing() -> list[Chosen | BaseException]:
            # A coroutine, since nobody retrieves the exception of a future of `gather` that is cancelled in `wait_for`.
            asked = (self.service.choose(prompt, wanted) for prompt in prompts)
            return await asyncio.gather(*asked, return_exceptions=True)

        try:
            found = await asyncio.wait_for(choosing(), self.left(began))
        except asyncio.TimeoutError:
            raise timed_out(self._timeout or 0) from None
        chosen = [one for one in found if isinstance(one, Chosen)]
        noted = [self._noted(prompt, one) for prompt, one in zip(prompts, found, strict=True)]
        logged["selections"] = [one for one in noted if one is not None]
        for error in found:
            if isinstance(error, BaseException):
                for one in chosen:
                    one.release()
                raise error
        return chosen

    def _noted(self, prompt: Prompt, found: Chosen | BaseException) -> dict[str, Any] | None:
        """Counts a selection, also one that is too unsure to answer; the entry of the log about it, with a hash of the
        prompt, by which equal ones are found."""
        if isinstance(found, Unsure):
            selection, times = Selection((), (), dict(found.scores), found.confidence), {}
        elif isinstance(found, Chosen):
            selection = found.selection
            times = {"probe_ms": round(found.probe_ms, 1), "queue_ms": round(found.queue_ms, 1)}
            if found.probe_ms:
                self.metrics.probe.observe(found.probe_ms / 1e3)
        else:
            return None
        scores, confidence = selection.scores, selection.confidence
        noted: dict[str, Any] = {
            "prompt_sha256": hashlib.sha256(" ".join(map(str, prompt.ids)).encode()).hexdigest()[:16],
            "adapters": list(selection.adapters),
            "weights": [round(weight, 4) for weight in selection.weights],
            "scores": {name: round(scores[name], 3) for name in nlargest(_LEADING, scores, scores.__getitem__)},
        }
        if confidence is not None:
            self.metrics.confidence.observe(confidence)
            unsure = confidence < self.service.logo.settings.unsure_below
            noted |= {"confidence": round(confidence, 4), "unsure": unsure}
        if self._log_prompts:
            text = self._tokenizer.decode(prompt.probed[:_LOGGED], skip_special_tokens=True)
            noted |= {"prompt": text, "cut": len(prompt.probed) > _LOGGED}
        return noted | times

    async def chunks(self, call: Call, chosen: Sequence[Chosen]) -> AsyncGenerator[Chunk, None]:
        """Yields the answers of a request in chunks as they come. Leaving the loop ends them.

        Raises:
            ApiError: the time is up.
            Exception: what failed.
        """
        seed, left, n = call.sampling.seed, self.left(call.began), call.body.n
        ways = [call.sampling if seed is None else replace(call.sampling, seed=seed + choice) for choice in range(n)]
        jobs = [Job(p.ids, one, way) for p, one in zip(call.prompts, chosen, strict=True) for way in ways]
        deadline = None if left is None else asyncio.get_running_loop().time() + left
        texts = {job: (number, Text(self._tokenizer, call.body.stops)) for number, job in enumerate(jobs)}
        before = dict.fromkeys(jobs, call.began)  # when the last tokens of each came
        self.metrics.prompt_tokens.inc(sum(len(job.prompt) for job in jobs))
        with self.counting(len(jobs), call.began) as unended:
            try:
                async with aclosing(self.service.generate(jobs, deadline)) as deltas:
                    async for job, delta in deltas:
                        (number, text), now = texts[job], time.perf_counter()
                        count, shown, reason = text.taken, text.push(delta.tokens), delta.finish_reason
                        new = text.taken - count
                        self._time(new, count, now, before[job], call)
                        before[job] = now
                        shown += text.finish() if reason is not None else ""
                        if text.stopped:
                            reason, job.left = "stop", True
                        if reason is not None:
                            unended.discard(number)
                            self.metrics.success.labels(reason).inc()
                            self.metrics.end_to_end.observe(now - call.began)
                        yield Chunk(number, shown, delta.tokens[:new], reason)
            except TimeoutError:
                raise timed_out(self._timeout or 0) from None

    def _time(self, new: int, count: int, now: float, before: float, call: Call) -> None:
        """Counts new tokens of an answer that had `count`."""
        self.metrics.generation_tokens.inc(new)
        call.logged["completion_tokens"] = call.logged.get("completion_tokens", 0) + new
        if new and not count:
            self.metrics.first_token.observe(now - call.began)
            call.logged.setdefault("first_token_ms", round(1e3 * (now - call.began), 1))
        for _ in range(new if count else 0):
            self.metrics.inter_token.observe((now - before) / new)

    @contextmanager
    def counting(self, count: int, began: float) -> Iterator[set[int]]:
        """Counts the answers that the block does not end, which gets their numbers, by the code of the error: what the
        client did wrong is no failure."""
        unended = set(range(count))
        try:
            yield unended
        except BaseException as error:
            left = client_left() if self.left(began) != 0 else timed_out(0)  # the client is there, but does not read
            answer = left if isinstance(error, (asyncio.CancelledError, GeneratorExit)) else ApiError.of(error)
            if answer.status > 404 or isinstance(error, Unsure):
                self.metrics.failure.labels(answer.code).inc(len(unended))
            raise

    def left(self, began: float) -> float | None:
        """The seconds that are left to a request; None: no limit."""
        return None if self._timeout is None else max(0.0, began + self._timeout - time.perf_counter())

    # -- OpenAI's objects ------------------------------------------------------------------------------------------

    async def whole(self, call: Call, chosen: Sequence[Chosen]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        answers = [Chunk(i) for i in range(len(chosen) * call.body.n)]
        async with aclosing(self.chunks(call, chosen)) as chunks:
            async for i, text, tokens, reason in chunks:
                answers[i] = Chunk(i, answers[i].text + text, answers[i].tokens + tokens, reason)
        choices = [_choice(call, one) for one in answers]
        return {**_head(call), "choices": choices, "usage": _usage(call), "logo": _mixtures(chosen)}

    async def events(self, call: Call, chosen: Sequence[Chosen]) -> AsyncGenerator[bytes, None]:
        """The answer of a request that is streamed; an error is an event, since the status was sent already."""
        head, begun = _head(call), [_choice(call, Chunk(i), begins=True) for i in range(len(chosen) * call.body.n)]
        yield _event({**head, "choices": begun, "logo": _mixtures(chosen)})
        try:
            async with aclosing(self.chunks(call, chosen)) as chunks:
                async for chunk in chunks:
                    if chunk.text or chunk.finish_reason or call.body.return_token_ids:
                        yield _event({**head, "choices": [_choice(call, chunk)]})
        except Exception as error:
            _log.warning("a stream failed: %s", error, exc_info=error)
            yield ApiError.of(error, request_id.get()).event()
        else:
            if call.body.stream_options.include_usage:
                yield _event({**head, "choices": [], "usage": _usage(call)})
        yield b"data: [DONE]\n\n"


def _head(call: Call) -> dict[str, Any]:
    is_chat = isinstance(call.body, ChatRequest)
    kind = "text_completion" if not is_chat else "chat.completion.chunk" if call.body.stream else "chat.completion"
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": call.body.model}


def _choice(call: Call, chunk: Chunk, begins: bool = False) -> dict[str, Any]:
    """One answer, or a piece of it; `begins`: the first one."""
    said: dict[str, Any] = {"text": chunk.text}
    if isinstance(call.body, ChatRequest) and call.body.stream:
        said = {"delta": {**({"role": "assistant"} if begins else {}), "content": chunk.text}}
    elif isinstance(call.body, ChatRequest):
        said = {"message": {"role": "assistant", "content": chunk.text, "refusal": None}}
    ids = {"token_ids": list(chunk.tokens)} if call.body.return_token_ids else {}
    return {"index": chunk.number, **said, "logprobs": None, "finish_reason": chunk.finish_reason, **ids}


def _usage(call: Call) -> dict[str, int]:
    """The counts of tokens; each prompt is counted once, however many answers it has."""
    prompt, completion = call.logged["prompt_tokens"], call.logged.get("completion_tokens", 0)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _mixtures(chosen: Sequence[Chosen]) -> Any:
    """The mixture of a single prompt, or a list for several."""
    found = [Mixture.of(one).model_dump() for one in chosen]
    return found[0] if len(found) == 1 else found


def _event(reply: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(reply, ensure_ascii=False).encode() + b"\n\n"


async def _beside(size: int, work: Callable[[], _T]) -> _T:
    """Runs `work`, in a thread for long texts, so that other requests are answered meanwhile."""
    return await asyncio.to_thread(work) if size > _LONG else work()
