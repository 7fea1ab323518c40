"""How a request says that it is a probe: in the sampling parameters' `extra_args`.

Clients fill in `extra_args` on many of vLLM's routes, so a mark that a request comes with means nothing. It is taken
off when vLLM takes the request (`seal`), and put on where the task that made the request is one of ours (`marking`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from logo.backends.vllm.sums import Span

# The key that scores are taken by, and the signal that gives them (empty: hidden vectors are kept for a calibration).
KEY, SIGNAL = "logo_probe", "logo_signal"

# That a probe reads all of its prompt, also what vLLM has in its cache of keys and values.
WHOLE = "logo_whole"

# How many of its tokens are the prompt, where a completion that is scored follows it.
PROMPT = "logo_prompt"

_OURS = (KEY, SIGNAL, WHOLE, PROMPT)

_probing: ContextVar[dict[str, Any] | None] = ContextVar("logo_probing", default=None)


def marked(key: str, signal: str, *, whole: bool = False) -> dict[str, str]:
    """The extra arguments of a probe."""
    return {KEY: key, SIGNAL: signal, **({WHOLE: "1"} if whole else {})}


@contextmanager
def marking(key: str, signal: str, *, whole: bool = False) -> Iterator[None]:
    """Requests that vLLM takes inside the block, and in tasks begun there, are probes."""
    token = _probing.set(marked(key, signal, whole=whole))
    try:
        yield
    finally:
        _probing.reset(token)


@contextmanager
def reading(prompt: int) -> Iterator[None]:
    """Of requests that vLLM takes inside the block, so many tokens are the prompt."""
    token = _probing.set({PROMPT: prompt})
    try:
        yield
    finally:
        _probing.reset(token)


def prompt_of(parameters: Any, tokens: Sequence[int]) -> Sequence[int]:
    """The prompt among the tokens that a request gives as its prompt."""
    count = (getattr(parameters, "extra_args", None) or {}).get(PROMPT)
    return tokens if count is None else tokens[:count]


def seal(parameters: Any) -> None:
    """Makes a request that vLLM takes a probe where it is ours, and an ordinary one where it only says that it is one.

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
    """Whether a request is a probe that has to read all of its prompt: of a calibration, all vectors are kept."""
    found = mark(parameters)
    return found is not None and (not found[1] or WHOLE in parameters.extra_args)


def span(
    parameters: Any,
    prompt: Sequence[int] | None,
    row: int,
    computed: int,
    count: int,
    bos: int | None,
    *,
    pictures: bool = False,
) -> Span | None:
    """The rows of a request that are tokens of a probed prompt; None where it is none, or they are all answer.

    Args:
        parameters, prompt: of the request.
        row: its first row in the step.
        computed: how many of its tokens were run before.
        count: how many rows it has in the step.
        bos: the token that begins every text.
        pictures: whether its tokens represent something besides text.
    """
    found = mark(parameters)
    if found is None or prompt is None:
        return None
    count = min(count, len(prompt) - computed)
    if count <= 0:
        return None
    begun = bos is not None and prompt[0] == bos
    return Span(*found, row, computed, count, len(prompt), begun, prompt, pictures)
