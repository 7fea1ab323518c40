"""How a request says that it is a probe: in the sampling parameters' `extra_args`, which HTTP calls `vllm_xargs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logo.backends.vllm.heard import Span

# The key that scores are taken by, and the signal that gives them (empty: hidden vectors are kept for a calibration).
KEY, SIGNAL = "logo_probe", "logo_signal"

# That a probe reads all of its prompt, also what vLLM has in its cache of keys and values.
WHOLE = "logo_whole"


def marked(key: str, signal: str, *, whole: bool = False) -> dict[str, str]:
    """The extra arguments of a probe."""
    return {KEY: key, SIGNAL: signal, **({WHOLE: "1"} if whole else {})}


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
        pictures: whether its tokens stand for something besides text.
    """
    found = mark(parameters)
    if found is None or prompt is None:
        return None
    count = min(count, len(prompt) - computed)
    if count <= 0:
        return None
    begun = bos is not None and prompt[0] == bos
    return Span(*found, row, computed, count, len(prompt), begun, None if pictures else prompt)
