"""Marks on requests, such as that a request is a probe, in the `extra_args` of its sampling parameters.

Clients can fill in `extra_args` on many of vLLM's routes, so marks that arrive with a request are not trusted. `seal`
removes them when vLLM accepts the request, and sets those of the task that made it (`probing`, `answering`, `reading`).
`cut` then leaves the window of a probe's prompt: what the engine runs is a short prompt of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from logo.selection.texts import WHOLE, Window, windowed

# Of a probe: the key by which its scores are fetched, the signal that gives them (empty: hidden vectors are kept to
# calibrate), the names of the adapters that may be selected, without which all are scored, and the part of the prompt
# that is read, without which it is the whole.
KEY, SIGNAL, AMONG, WINDOW = "logo_probe", "logo_signal", "logo_among", "logo_window"

# Of an answer: the key under which a worker notes that its mixture failed.
ANSWER = "logo_answer"

# The number of prompt tokens of a request whose prompt is followed by a completion to score.
PROMPT = "logo_prompt"

_OURS = (KEY, SIGNAL, AMONG, WINDOW, ANSWER, PROMPT)

_marks: ContextVar[dict[str, Any] | None] = ContextVar("logo_marks", default=None)


@dataclass(frozen=True)
class Span:
    """The rows of one step that are tokens of a probed prompt.

    Attributes:
        key: of the prompt.
        signal: the signal that scores it; empty where its hidden vectors are kept for a calibration.
        row: the first row.
        start: the position of that token in the prompt.
        count: the number of rows.
        prompt: its token ids, all of them.
        request: vLLM's id of the request.
        among: names of the adapters that may be selected; None: all.
    """

    key: str
    signal: str
    row: int
    start: int
    count: int
    prompt: Sequence[int]
    request: str = ""
    among: tuple[str, ...] | None = None

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + self.count

    @property
    def total(self) -> int:
        """The number of tokens of the prompt."""
        return len(self.prompt)


def probing(
    key: str, signal: str, among: Collection[str] | None = None, window: Window = WHOLE
) -> AbstractContextManager[None]:
    """Makes probes of the requests that vLLM accepts inside the block, and in tasks started there.

    Args:
        among: names of the adapters that may be selected; others may have no score (-inf). None: all.
        window: what is read of their prompts.
    """
    marks: dict[str, Any] = {KEY: key, SIGNAL: signal}
    marks |= {} if among is None else {AMONG: list(among)}
    return _marking(marks if window == WHOLE else {**marks, WINDOW: list(window)})


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


def cut(request: Any) -> None:
    """Leaves the window of the prompt of a probe that vLLM has accepted and its engine has not seen.

    A prompt with pictures or embeddings stays whole, since these belong to positions of its tokens.

    Args:
        request: vLLM's `EngineCoreRequest`.
    """
    window, ids = _given(request.sampling_params).get(WINDOW), request.prompt_token_ids
    if window is not None and ids is not None and not request.mm_features and request.prompt_embeds is None:
        request.prompt_token_ids = list(windowed(ids, tuple(window)))


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
    return Span(str(given[KEY]), str(given.get(SIGNAL, "")), row, computed, count, prompt, request, names)


def _given(parameters: Any) -> dict[str, Any]:
    return getattr(parameters, "extra_args", None) or {}
