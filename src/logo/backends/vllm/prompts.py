"""Observes the prompts of answers, in the process that sends requests to vLLM.

    vLLM takes a request     -> the adapters of its mixture that the prompt does not invoke
    its first token comes    -> how much of what the probe has read was still in the cache

An answer of several texts (`n`) is several requests to vLLM with one prompt, of which the first counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from logo.backends.vllm.onsets import Onset


class Counting(Protocol):
    """What is called."""

    def not_invoked(self, keys: Sequence[str]) -> None:
        """The prompt does not invoke the adapters of these keys, so they do nothing."""

    def read(self, found: int, missed: int) -> None:
        """Of the tokens that the probe has read for all mixtures, so many were there, and so many were gone."""


@dataclass
class _Prompt:
    """The prompt of one answer.

    Attributes:
        counting: what is called.
        block: tokens of which vLLM's cache hands on all or none; None: no probe has read the prompt.
        request: vLLM's id of the request; None: it has not come yet.
        read: tokens that the answer may find in the cache.
    """

    counting: Counting
    block: int | None
    request: str | None = None
    read: int = 0


_at_hand: ContextVar[_Prompt | None] = ContextVar("logo_prompt_at_hand", default=None)

# The prompts of requests that have no token yet, by vLLM's ids.
_waiting: dict[str, _Prompt] = {}


@contextmanager
def following(counting: Counting, block: int | None) -> Iterator[None]:
    """Tells what becomes of the prompt of the request that vLLM takes inside the block, or in tasks begun there.

    Args:
        block: tokens of which vLLM's cache hands on all or none; None: no probe has read the prompt.
    """
    prompt = _Prompt(counting, block)
    token = _at_hand.set(prompt)
    try:
        yield
    finally:
        _at_hand.reset(token)
        if prompt.request is not None:
            _waiting.pop(prompt.request, None)


def take(request: Any) -> None:
    """Looks at the prompt of a request that vLLM takes.

    Args:
        request: vLLM's `EngineCoreRequest`.
    """
    prompt, tokens = _at_hand.get(), request.prompt_token_ids
    if prompt is None or prompt.request is not None or tokens is None:
        return
    onset = Onset.of(request.lora_request, request.sampling_params, tokens, len(tokens))
    if onset is None:
        return
    prompt.request = request.request_id
    if onset.silent:
        prompt.counting.not_invoked(onset.silent)
    # What is asked of every token of the prompt is read whole in any case.
    if prompt.block and not getattr(request.sampling_params, "skip_reading_prefix_cache", False):
        # Where no adapter acts, all is the base model's, but the last token is computed again in any case.
        end = min(onset.begins[0] if onset.begins else len(tokens), len(tokens) - 1)
        prompt.read = end // prompt.block * prompt.block
        _waiting[request.request_id] = prompt


def begun(states: Mapping[str, Any], outputs: Iterable[Any]) -> list[tuple[_Prompt, Any]]:
    """The prompts whose requests have their first token in a step, to be given to `found`.

    Args:
        states: vLLM's `RequestState` of each request, by its id.
        outputs: its `EngineCoreOutput`s.
    """
    if not _waiting:
        return []
    known = ((_waiting.pop(output.request_id, None), states.get(output.request_id)) for output in outputs)
    return [(prompt, state) for prompt, state in known if prompt is not None and state is not None]


def found(begun: Iterable[tuple[_Prompt, Any]]) -> None:
    """Tells how much of prompts was in the cache, once vLLM has looked at the step's outputs itself."""
    for prompt, state in begun:
        there = min(state.num_cached_tokens, prompt.read)
        prompt.counting.read(there, prompt.read - there)
