"""Marks on requests, such as that a request is a probe, in the `extra_args` of its sampling parameters.

Clients can fill in `extra_args` on many of vLLM's routes, so marks that arrive with a request are not trusted. `seal`
removes them when vLLM accepts the request, and sets those of the task that made it (`marking`, `reading`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from logo.backends.vllm.sums import Span

# The key by which scores are fetched, and the signal that gives them (empty: hidden vectors are kept to calibrate).
KEY, SIGNAL = "logo_probe", "logo_signal"

# Set on a probe that has to compute its whole prompt, including tokens that are in vLLM's KV cache.
WHOLE = "logo_whole"

# The number of prompt tokens of a request whose prompt is followed by a completion to score.
PROMPT = "logo_prompt"

_OURS = (KEY, SIGNAL, WHOLE, PROMPT)

_probing: ContextVar[dict[str, Any] | None] = ContextVar("logo_probing", default=None)


def marked(key: str, signal: str, *, whole: bool = False) -> dict[str, str]:
    """The extra arguments of a probe."""
    return {KEY: key, SIGNAL: signal, **({WHOLE: "1"} if whole else {})}


@contextmanager
def marking(key: str, signal: str, *, whole: bool = False) -> Iterator[None]:
    """Makes probes of the requests that vLLM accepts inside the block, and in tasks started there."""
    token = _probing.set(marked(key, signal, whole=whole))
    try:
        yield
    finally:
        _probing.reset(token)


@contextmanager
def reading(prompt: int) -> Iterator[None]:
    """Marks the first `prompt` tokens of requests that vLLM accepts inside the block as their prompt."""
    token = _probing.set({PROMPT: prompt})
    try:
        yield
    finally:
        _probing.reset(token)


def prompt_of(parameters: Any, tokens: Sequence[int]) -> Sequence[int]:
    """The tokens of a request's actual prompt: `tokens` without a completion to score (see `reading`)."""
    count = (getattr(parameters, "extra_args", None) or {}).get(PROMPT)
    return tokens if count is None else tokens[:count]


def seal(parameters: Any) -> None:
    """Replaces the marks of a request by those of the current task, so that clients cannot send probes.

    Args:
        parameters: vLLM's `SamplingParams` of this request alone; None where nothing is sampled.
    """
    own, given = _probing.get() or {}, getattr(parameters, "extra_args", None) or {}
    if parameters is None or not (own or given.keys() & set(_OURS)):
        return
    others = {name: value for name, value in given.items() if name not in _OURS}
    parameters.extra_args = {**others, **own} or None  # not in place: several requests may share it


def mark(parameters: Any) -> tuple[str, str] | None:
    """Key and signal of a probe; None for any other request."""
    extra = getattr(parameters, "extra_args", None) or {}
    key = extra.get(KEY)
    return None if key is None else (str(key), str(extra.get(SIGNAL, "")))


def reads_whole(parameters: Any) -> bool:
    """Whether a request is a probe that has to compute its whole prompt: a calibration text, or one marked `WHOLE`."""
    found = mark(parameters)
    return found is not None and (not found[1] or WHOLE in parameters.extra_args)


def span(
    parameters: Any,
    prompt: Sequence[int] | None,
    row: int,
    computed: int,
    count: int,
    *,
    pictures: bool = False,
) -> Span | None:
    """The rows of a request that are tokens of a probed prompt; None if it is no probe, or has no prompt token here.

    Args:
        parameters, prompt: of the request.
        row: its first row in the step.
        computed: how many of its tokens were run before.
        count: how many rows it has in the step.
        pictures: whether the prompt has pictures, which its token ids do not identify.
    """
    found = mark(parameters)
    if found is None or prompt is None:
        return None
    count = min(count, len(prompt) - computed)
    if count <= 0:
        return None
    return Span(*found, row, computed, count, len(prompt), prompt, pictures)
