"""`Answering`: chooses the mixtures of a request's prompts, and generates with them, whole or as events of a stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from logo.api.errors import ApiError
from logo.api.logs import request_id
from logo.api.names import MixtureRequest
from logo.core import Prompt
from logo.serve.answers import Call, Chunk, choice, event, head, mixtures, usage
from logo.serve.batching import AnswerJob
from logo.serve.choosing import Choosing
from logo.serve.metrics import Metrics
from logo.serve.packed import HeldMixture
from logo.serve.service import Service
from logo.text import Text

_log = logging.getLogger("logo.serve")


class Answering:
    """Answers requests, and says in metrics and in the log how."""

    def __init__(self, service: Service, metrics: Metrics, choosing: Choosing) -> None:
        self._service = service
        self._metrics = metrics
        self._choosing = choosing

    async def choose(
        self, prompts: Sequence[Prompt], request: MixtureRequest, began: float, logged: dict[str, Any]
    ) -> list[HeldMixture]:
        """The mixture of each prompt, with its adapters loaded, and the entries of the log about them. ApiError: the
        time is up; else as `Service.select` and `Loading.load`."""

        async def choosing() -> list[HeldMixture]:
            outcomes = await self._service.select(prompts, request)
            chosen = [outcome.chosen if isinstance(outcome, HeldMixture) else outcome for outcome in outcomes]
            self._choosing.note(prompts, chosen, logged)
            mixtures = [outcome for outcome in outcomes if isinstance(outcome, HeldMixture)]
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    for mixture in mixtures:
                        mixture.release()
                    raise outcome
            return await self._service.loading.load(mixtures)

        return await self._choosing.in_time(choosing(), began)

    async def whole(self, call: Call) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        answers = [Chunk(number) for number in range(call.count)]
        async with aclosing(self._chunks(call)) as chunks:
            async for chunk in chunks:
                before = answers[chunk.number]
                answers[chunk.number] = Chunk(
                    chunk.number, before.text + chunk.text, before.tokens + chunk.tokens, chunk.finish_reason
                )
        choices = [choice(call, answer) for answer in answers]
        return {**head(call), "choices": choices, "usage": usage(call), "logo": mixtures(call)}

    async def events(self, call: Call) -> AsyncGenerator[bytes, None]:
        """The answer of a request that is streamed; an error is an event, since the status was sent already."""
        fields = head(call)
        beginnings = [choice(call, Chunk(number), begins=True) for number in range(call.count)]
        yield event({**fields, "choices": beginnings, "logo": mixtures(call)})
        try:
            async with aclosing(self._chunks(call)) as chunks:
                async for chunk in chunks:
                    if chunk.text or chunk.finish_reason or call.body.return_token_ids:
                        yield event({**fields, "choices": [choice(call, chunk)]})
        except Exception as error:
            _log.warning("a stream failed: %s", error, exc_info=error)
            answer = ApiError.of(error, request_id.get())
            self._metrics.failure.labels(answer.code or "invalid").inc()
            yield event(answer.body())
        else:
            if call.body.stream_options.include_usage:
                yield event({**fields, "choices": [], "usage": usage(call)})
        yield b"data: [DONE]\n\n"

    async def _chunks(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Yields answers in chunks as they come; ApiError: the time is up. Leaving the loop ends them."""
        jobs = _jobs(call)
        texts = {job: Text(self._service.logo.tokenizer, call.body.stop) for job in jobs}
        numbers = {job: number for number, job in enumerate(jobs)}
        times = dict.fromkeys(jobs, call.began)  # when the last tokens of each came
        deadline = asyncio.get_running_loop().time() + self._choosing.seconds_left(call.began)
        self._metrics.prompt_tokens.inc(sum(len(job.prompt) for job in jobs))
        call.logged["completion_tokens"] = 0
        try:
            async with aclosing(self._service.batching.generate(jobs, deadline)) as news:
                async for job, tokens, reason in news:
                    text = texts[job]
                    taken_before = text.taken
                    new_text = text.push(tokens)
                    new_tokens = text.taken - taken_before
                    if reason is not None:
                        new_text += text.finish()
                    if text.stopped:
                        reason = "stop"
                        job.left = True
                    now = time.perf_counter()
                    if new_tokens and not taken_before:
                        call.logged.setdefault("first_token_ms", round(1e3 * (now - call.began), 1))
                    call.logged["completion_tokens"] += new_tokens
                    self._metrics.observe_tokens(new_tokens, taken_before == 0, now - call.began, now - times[job])
                    if reason is not None:
                        self._metrics.observe_end(reason, now - call.began)
                    times[job] = now
                    yield Chunk(numbers[job], new_text, tokens[:new_tokens], reason)
        except TimeoutError:
            raise self._choosing.late() from None


def _jobs(call: Call) -> list[AnswerJob]:
    """The answers of a call: of each prompt as many as it asks for, of which each has the next seed."""
    jobs = []
    for prompt, mixture in zip(call.prompts, call.mixtures, strict=True):
        for number in range(call.body.n):
            seed = None if call.sampling.seed is None else call.sampling.seed + number
            jobs.append(AnswerJob(prompt.ids, mixture, replace(call.sampling, seed=seed)))
    return jobs
