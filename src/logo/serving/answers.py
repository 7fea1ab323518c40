"""`Answers`: from the prompts of a request to chunks of text, the same for every endpoint, streamed or not.

model, options -> MixtureRequest -> HeldMixture per prompt -> AnswerChunk, AnswerChunk, ...
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from logo.api.errors import ApiError, bad_request, timed_out
from logo.api.names import Models
from logo.api.requests import Message
from logo.core import FinishReason, Prompt, Selection
from logo.errors import Unsure
from logo.prompts import MAX_NEW_TOKENS, chat, read
from logo.protocol import (
    GenerationFailed,
    GenerationTimeout,
    MixtureRequest,
    Patterns,
    Sampling,
)
from logo.serving import logged
from logo.serving.metrics import Metrics
from logo.serving.text import Text

if TYPE_CHECKING:
    from logo.serving.mixtures import HeldMixture
    from logo.serving.service import Service

_T = TypeVar("_T")

# Characters that take a few milliseconds to tokenize.
_LONG = 10_000


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose prompts are read and whose mixtures are selected.

    Attributes:
        prompts: its prompts.
        chosen: the mixture of each.
        n: answers per prompt.
        sampling: how the first answer is decoded; the seeds of the others are the numbers that follow its seed.
        stops: texts that end an answer.
        began: when the request came, by `time.perf_counter`.
    """

    prompts: tuple[Prompt, ...]
    chosen: tuple[HeldMixture, ...]
    n: int
    sampling: Sampling
    stops: tuple[str, ...]
    began: float


@dataclass(frozen=True)
class AnswerChunk:
    """New text and tokens of one answer.

    Attributes:
        index: of the answer; those of the first prompt come first.
        text: new whole characters.
        tokens: new token ids, whose text may follow later.
        finish_reason: None until the answer ends.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None


class Answers:
    """Answers requests.

    Args:
        service: selects and generates.
        metrics: the counters.
        base_model: the name under which the base model alone answers.
        timeout: the most seconds for a request, including its waiting; None: no limit.
        log_prompts: whether prompts may be logged.
    """

    def __init__(
        self, service: Service, metrics: Metrics, base_model: str, timeout: float | None, log_prompts: bool = False
    ) -> None:
        self.service, self.tokenizer = service, service.tokenizer
        self.metrics = metrics
        self.base_model = base_model
        self.timeout = timeout
        self._log_prompts = log_prompts

    # -- reading requests -----------------------------------------------------------------------------------------

    def models(self, patterns: Patterns | None = None) -> Models:
        """The models of a request whose API key is bound to these adapters; None: the whole pool."""
        return Models(self.base_model, self.service.pool.usable(patterns), self.service.signals, patterns)

    async def encoded(self, prompts: Sequence[str | Sequence[int]]) -> list[Prompt]:
        """Reads prompts.

        Raises:
            ApiError: a prompt without tokens, or an id that the model does not know.
        """
        known = self.service.vocabulary
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        rows = await _beside(size, lambda: [read(self.tokenizer, prompt) for prompt in prompts])
        for row in rows:
            if not row.ids:
                raise bad_request("prompt: expected a text, found an empty one", "prompt")
            if max(row.ids) >= known:
                raise bad_request(f"prompt: expected token ids below {known}, found {max(row.ids)}", "prompt")
        return rows

    async def conversation(self, messages: Sequence[Message], variables: Mapping[str, Any] | None) -> Prompt:
        """Reads a conversation; `variables` are for the model's template.

        Raises:
            ApiError: it has no tokens, or a variable has the name of an argument of `apply_chat_template`.
            UsageError: the model's template refuses it.
        """
        turns = [{**m.further, "role": m.role, "content": None if m.content is None else m.text} for m in messages]
        variables = variables or {}
        for name in inspect.signature(self.tokenizer.apply_chat_template).parameters:
            if name in variables:
                raise bad_request(
                    f"chat_template_kwargs: expected variables of the chat template, found {name!r}; leave it out",
                    "chat_template_kwargs",
                )
        size, probe_text = sum(len(m.text) for m in messages), self.service.probe_text
        prompt = await _beside(size, lambda: chat(self.tokenizer, turns, probe_text, variables))
        if not prompt.ids:
            raise bad_request("messages: expected a text, found an empty one", "messages")
        return prompt

    def room(self, prompts: Sequence[Prompt], max_tokens: int | None, param: str, usual: int = MAX_NEW_TOKENS) -> int:
        """The most new tokens of the answers.

        Args:
            max_tokens: what the request asks for; None: the usual number, or as many as there is room for.
            param: the field that an error names.

        Raises:
            ApiError: they do not fit behind the longest prompt.
        """
        context, longest = self.service.context, max(map(len, prompts))
        left = context - longest
        asked = min(usual, left) if max_tokens is None else max_tokens
        if longest >= context or asked > left:
            raise bad_request(
                f"this model's context holds {context} tokens: found {longest} in the prompt and {max(asked, 1)} for "
                "the answer; send a shorter prompt or ask for fewer tokens",
                param,
                "context_length_exceeded",
            )
        return asked

    # -- answering -------------------------------------------------------------------------------------------------

    async def choose(
        self, prompts: Sequence[Prompt], wanted: MixtureRequest, began: float, state: Any, n: int = 1
    ) -> tuple[HeldMixture, ...]:
        """Selects the mixture of each prompt; they are probed together.

        Args:
            state: of the request; gets the entries of the log, also those of prompts that are refused.
            n: answers per prompt, which are counted if there is no mixture.

        Raises:
            ApiError: the request has timed out.
            LoGoError: as `Service.choose`.
        """

        async def choosing() -> list[HeldMixture | BaseException]:
            # A coroutine, since nobody retrieves the exception of a future of `gather` that is cancelled in `wait_for`.
            asked = (self.service.choose(prompt, wanted) for prompt in prompts)
            return await asyncio.gather(*asked, return_exceptions=True)

        try:
            found = await asyncio.wait_for(choosing(), self.left(began))
        except asyncio.TimeoutError:
            self.metrics.failed("timeout", n * len(prompts))
            raise timed_out(self.timeout or 0) from None
        except asyncio.CancelledError:
            self.metrics.failed("left", n * len(prompts))
            raise
        entries, chosen = [], []
        for prompt, one in zip(prompts, found, strict=True):
            if isinstance(one, Unsure):
                self.metrics.confidence.observe(one.confidence)
                entries.append(self._entry(Selection((), (), dict(one.scores), one.confidence), prompt))
            elif not isinstance(one, BaseException):
                self.metrics.chosen(one)
                entries.append(self._entry(one.selection, prompt))
                chosen.append(one)
        state.selections = entries or None
        for error in found:
            if isinstance(error, BaseException):
                for one in chosen:
                    one.release()
                if isinstance(error, Unsure) or ApiError.of(error).status >= 500:
                    self.metrics.failed("unsure" if isinstance(error, Unsure) else "error", n * len(prompts))
                raise error
        return tuple(chosen)

    def _entry(self, selection: Selection, prompt: Prompt) -> dict[str, Any]:
        """The entry of the log, with the beginning of the probed tokens if prompts may be logged."""
        below = self.service.unsure_below
        if not self._log_prompts:
            return logged.entry(selection, below)
        text: str = self.tokenizer.decode(prompt.probed[: logged.TOKENS], skip_special_tokens=True)
        return logged.entry(selection, below, text, cut=len(prompt.probed) > logged.TOKENS)

    async def chunks(self, request: PreparedRequest) -> AsyncGenerator[AnswerChunk, None]:
        """Yields the answers of a request in chunks as they come. Leaving the loop ends them.

        Raises:
            ApiError, or the error of an answer that failed.
        """
        unended = set(range(len(request.prompts) * request.n))
        answers = [self._answer(index, request, unended) for index in sorted(unended)]
        try:
            async with aclosing(answers[0] if len(answers) == 1 else _merged(answers)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except GenerationTimeout:
            self.metrics.failed("timeout", len(unended))
            raise timed_out(self.timeout or 0) from None
        except GenerationFailed as error:
            self.metrics.failed("error", len(unended))
            raise error.__cause__ or error from None
        except (asyncio.CancelledError, GeneratorExit):
            late = self.left(request.began) == 0  # the client is there, but does not read
            self.metrics.failed("timeout" if late else "left", len(unended))
            raise

    async def _answer(
        self, index: int, request: PreparedRequest, unended: set[int]
    ) -> AsyncGenerator[AnswerChunk, None]:
        prompt, choice = divmod(index, request.n)
        sampling, ids = request.sampling, request.prompts[prompt].ids
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + choice)
        text = Text(self.tokenizer, request.stops)
        count, before = 0, request.began
        left = self.left(request.began)
        deadline = None if left is None else asyncio.get_running_loop().time() + left
        self.metrics.prompt_tokens.inc(len(ids))
        self.metrics.prompt_length.observe(len(ids))
        async with aclosing(self.service.generate(ids, request.chosen[prompt], sampling, deadline)) as deltas:
            async for delta in deltas:
                shown, reason = text.push(delta.tokens), delta.finish_reason
                new = text.taken - count
                before = self._count(new, count, before)
                count = text.taken
                if reason is not None:
                    shown += text.finish()
                if text.stopped:
                    reason = "stop"
                if reason is not None:
                    unended.discard(index)
                    self._ended(reason, count, request.began)
                yield AnswerChunk(index, shown, delta.tokens[:new], reason)
                if reason is not None:
                    return

    def left(self, began: float) -> float | None:
        """The seconds that are left to a request; None: no limit."""
        return None if self.timeout is None else max(0.0, began + self.timeout - time.perf_counter())

    def _count(self, new: int, count: int, before: float) -> float:
        now = time.perf_counter()
        self.metrics.generation_tokens.inc(new)
        if not count and new:
            self.metrics.first_token.observe(now - before)
        else:
            for _ in range(new):
                self.metrics.inter_token.observe((now - before) / new)
        return now

    def _ended(self, reason: FinishReason, count: int, began: float) -> None:
        self.metrics.success.labels(reason).inc()
        self.metrics.answer_length.observe(count)
        self.metrics.end_to_end.observe(time.perf_counter() - began)


async def _beside(size: int, work: Callable[[], _T]) -> _T:
    """Runs `work`, in a thread for long texts, so that other requests are answered meanwhile."""
    return await asyncio.to_thread(work) if size > _LONG else work()


async def _merged(streams: Sequence[AsyncGenerator[AnswerChunk, None]]) -> AsyncGenerator[AnswerChunk, None]:
    """The chunks of several answers as they come."""
    queue: asyncio.Queue[AnswerChunk | BaseException | None] = asyncio.Queue()

    async def forward(stream: AsyncGenerator[AnswerChunk, None]) -> None:
        try:
            async for chunk in stream:
                queue.put_nowait(chunk)
        except Exception as error:  # raised where the chunks are read
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
