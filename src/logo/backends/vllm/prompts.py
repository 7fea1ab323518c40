"""Observes the prompts of answers, in the process that sends requests to vLLM.

    vLLM accepts a request   -> the adapters of its mixture that the prompt does not invoke
    its first token comes    -> the tokens read by the probe that were still in the KV cache, and those that were not

A request for several answers (`n`) becomes several vLLM requests with one prompt, of which only the first is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from logo.backends.vllm.onsets import Onset


class Counting(Protocol):
    """The callbacks for what is observed."""

    def not_invoked(self, keys: Sequence[str]) -> None:
        """Called if the prompt does not invoke the adapters with these keys, so that they do nothing."""

    def read(self, found: int, missed: int) -> None:
        """Called with the numbers of tokens read by the probe that were still in the KV cache, and that were not."""


@dataclass
class _Prompt:
    """The prompt of one answer.

    Attributes:
        counting: the callbacks.
        block: tokens per block of vLLM's KV cache; None: no probe has read the prompt.
        request: vLLM's id of the request; None: vLLM has not accepted it yet.
        read: the number of tokens that the answer may find in the cache.
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
    """Observes the prompt of the request that vLLM accepts inside the block, or in tasks started there.

    Args:
        block: tokens per block of vLLM's KV cache; None: no probe has read the prompt.
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
    """Examines the prompt of a request that vLLM accepts.

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
    # Requests that need every token of the prompt, as for its log probabilities, do not use the cache.
    if prompt.block and not getattr(request.sampling_params, "skip_reading_prefix_cache", False):
        # Without an acting adapter, the base model reads the whole prompt; vLLM always computes the last token again.
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
    """Reports how many tokens of prompts were cached; called after vLLM itself has processed the step's outputs."""
    for prompt, state in begun:
        there = min(state.num_cached_tokens, prompt.read)
        prompt.counting.read(there, prompt.read - there)
