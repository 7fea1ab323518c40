"""`Choosing`: the selections of requests, within a time limit, in the metrics and in the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from logo.api.errors import ApiError, failed
from logo.api.logs import LOGGED_TOKENS, selection_entry
from logo.api.names import MixtureRequest
from logo.api.replies import Chosen
from logo.core import Prompt
from logo.errors import Unsure
from logo.serve.metrics import Metrics
from logo.serve.selecting import Selecting

_T = TypeVar("_T")


class Choosing:
    """Has the mixtures of requests chosen, which have so many seconds for everything.

    Args:
        log_prompts: whether lines of the log hold the beginnings of prompts.
    """

    def __init__(self, selecting: Selecting, metrics: Metrics, timeout: float, log_prompts: bool) -> None:
        self._selecting = selecting
        self._metrics = metrics
        self._timeout = timeout
        self._log_prompts = log_prompts

    async def choose(
        self, prompts: Sequence[Prompt], request: MixtureRequest, began: float, logged: dict[str, Any]
    ) -> list[Chosen]:
        """The mixture of each prompt, which nothing is generated with, and the entries of the log about them. ApiError:
        the time is up; else as `Selecting.choose`."""
        choosing = self._selecting.choose(prompts, request, lambda chosen, prompt: chosen)
        outcomes = await self.in_time(choosing, began)
        self.note(prompts, outcomes, logged)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Chosen)]

    def text_of(self, prompt: Prompt) -> str:
        """What the log shows of a prompt."""
        return str(self._selecting.logo.tokenizer.decode(prompt.probed[:LOGGED_TOKENS], skip_special_tokens=True))

    def note(
        self, prompts: Sequence[Prompt], outcomes: Sequence[Chosen | BaseException], logged: dict[str, Any]
    ) -> None:
        """Counts the selections of a request, also those that are too unsure to answer, and writes the entries of its
        line about them."""
        entries = []
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            if isinstance(outcome, Unsure):
                self._metrics.observe_selection(outcome.confidence, 0.0)
            elif isinstance(outcome, Chosen):
                self._metrics.observe_selection(outcome.selection.confidence, outcome.probe_ms / 1e3)
                if outcome.selection.scores:  # else the request has named the adapters
                    self._selecting.selected.update(outcome.selection.adapters)
            else:
                continue
            text = self.text_of(prompt) if self._log_prompts else None
            entries.append(selection_entry(prompt, outcome, text))
        logged["selections"] = entries

    async def in_time(self, work: Awaitable[_T], began: float) -> _T:
        """What the work gives; ApiError: the time of the request is up before."""
        try:
            return await asyncio.wait_for(work, self.seconds_left(began))
        except asyncio.TimeoutError:
            raise self.late() from None

    def seconds_left(self, began: float) -> float:
        """The seconds that are left to a request that began at this moment of `time.perf_counter`."""
        return max(0.0, began + self._timeout - time.perf_counter())

    def late(self) -> ApiError:
        """The error of a request whose time is up."""
        limit = f"not answered within {self._timeout:g} s, the limit of this server"
        return failed(limit, "timeout", 504)
