"""Detects answers that overflow, in the process that sends them to clients.

vLLM counts the logits of every sampled token that are NaN, and sends the count with the token. Infinite logits do not
count. With speculative decoding a request has several rows of logits, and vLLM gives the counts of the first rows to
the requests in their order, so that a count may be another request's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# The environment variable that makes vLLM count them.
COUNTED = "VLLM_COMPUTE_NANS_IN_LOGITS"

_watched: dict[str, list[asyncio.Event]] = {}


@contextmanager
def watched(recipe: str | None) -> Iterator[asyncio.Event]:
    """Yields an event that is set as soon as any answer with this recipe overflows, since answers with one recipe may
    share cached keys and values. For None (the base model) it is never set."""
    noticed = asyncio.Event()
    if recipe is None:
        yield noticed
        return
    _watched.setdefault(recipe, []).append(noticed)
    try:
        yield noticed
    finally:
        _watched[recipe].remove(noticed)
        if not _watched[recipe]:
            del _watched[recipe]


def notice(states: Any, outputs: Sequence[Any]) -> None:
    """Checks the tokens of a step.

    Args:
        states: vLLM's `RequestState` of each request, by its id.
        outputs: its `EngineCoreOutput`s.
    """
    for output in outputs:
        if output.num_nans_in_logits and (state := states.get(output.request_id)) is not None:
            for noticed in _watched.get(state.lora_name, ()):
                noticed.set()
