"""Marks on requests, such as that a request is a probe, in the `extra_args` of its sampling parameters.

Clients can fill in `extra_args` on many of vLLM's routes, so marks that arrive with a request are not trusted. `seal`
removes them when vLLM accepts the request, and sets those of the task that made it (`probing`, `answering`, `reading`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from logo.backends.vllm.sums import Span

# Of a probe: the key by which its scores are fetched, the signal that gives them (empty: hidden vectors are kept to
# calibrate), and the names of the adapters that may be selected, without which all are scored.
KEY, SIGNAL, AMONG = "logo_probe", "logo_signal", "logo_among"

# Of an answer: the key under which a worker notes that its mixture failed.
ANSWER = "logo_answer"

# The number of prompt tokens of a request whose prompt is followed by a completion to score.
PROMPT = "logo_prompt"

_OURS = (KEY, SIGNAL, AMONG, ANSWER, PROMPT)

_marks: ContextVar[dict[str, Any] | None] = ContextVar("logo_marks", default=None)


def probing(key: str, signal: str, among: Collection[str] | None = None) -> AbstractContextManager[None]:
    """Makes probes of the requests that vLLM accepts inside the block, and in tasks started there.

    Args:
        among: names of the adapters that may be selected; others may have no score (-inf). None: all.
    """
    return _marking({KEY: key, SIGNAL: signal, **({} if among is None else {AMONG: list(among)})})


def answering(key: str) -> AbstractContextManager[None]:
    """Gives the requests that vLLM accepts inside the block, and in tasks started there, a key for failures."""
    return _marking({ANSWER: key})


def reading(prompt: int) -> AbstractContextManager[None]:
    """Marks the first `prompt` tokens of requests that vLLM accepts inside the block as their prompt."""
    return _marking({PROMPT: prompt})


@contextmanager
def _marking(marks: dict[str, Any]) -> Iterator[None]:
    token = _marks.set({**(_marks.get() or {}), **marks})
    try:
        yield
    finally:
        _marks.reset(token)


def prompt_of(parameters: Any, tokens: Sequence[int]) -> Sequence[int]:
    """The tokens of a request's actual prompt: `tokens` without a completion to score (see `reading`)."""
    count = _given(parameters).get(PROMPT)
    return tokens if count is None else tokens[:count]


def answer_of(parameters: Any) -> str | None:
    """The key of an answer; None for any other request."""
    key: str | None = _given(parameters).get(ANSWER)
    return key


def seal(parameters: Any) -> None:
    """Replaces the marks of a request by those of the current task, so that clients cannot send probes.

    Args:
        parameters: vLLM's `SamplingParams` of this request alone; None where nothing is sampled.
    """
    own, given = _marks.get() or {}, _given(parameters)
    if parameters is None or not (own or given.keys() & set(_OURS)):
        return
    others = {name: value for name, value in given.items() if name not in _OURS}
    parameters.extra_args = {**others, **own} or None  # not in place: several requests may share it


def is_probe(parameters: Any) -> bool:
    """Whether a request is a probe, which has to compute its whole prompt."""
    return KEY in _given(parameters)


def span(
    parameters: Any, prompt: Sequence[int] | None, request: str, row: int, computed: int, count: int
) -> Span | None:
    """The rows of a request that are tokens of a probed prompt; None if it is no probe, or has no prompt token here.

    Args:
        parameters, prompt: of the request.
        request: vLLM's id of it.
        row: its first row in the step.
        computed: how many of its tokens were run before.
        count: how many rows it has in the step.
    """
    given = _given(parameters)
    if KEY not in given or prompt is None:
        return None
    count = min(count, len(prompt) - computed)
    if count <= 0:
        return None
    among = given.get(AMONG)
    names = None if among is None else tuple(among)
    return Span(str(given[KEY]), str(given.get(SIGNAL, "")), row, computed, count, len(prompt), prompt, request, names)


def _given(parameters: Any) -> dict[str, Any]:
    return getattr(parameters, "extra_args", None) or {}
