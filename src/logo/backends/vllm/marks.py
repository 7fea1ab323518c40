"""How a request says that it is a probe: in the sampling parameters' `extra_args`, which HTTP calls `vllm_xargs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logo.backends.vllm.taps import Span

# The key that scores are taken by, and the signal that gives them (empty: hidden vectors are kept for a calibration).
KEY, SIGNAL = "logo_probe", "logo_signal"


def marked(key: str, signal: str) -> dict[str, str]:
    """The extra arguments of a probe."""
    return {KEY: key, SIGNAL: signal}


def mark(parameters: Any) -> tuple[str, str] | None:
    """Key and signal of a probe; None for any other request."""
    extra = getattr(parameters, "extra_args", None) or {}
    key = extra.get(KEY)
    return None if key is None else (str(key), str(extra.get(SIGNAL, "")))


def span(
    parameters: Any, prompt: Sequence[int] | None, row: int, computed: int, count: int, bos: int | None
) -> Span | None:
    """The rows of a request that are tokens of a probed prompt; None where it is none, or they are all answer.

    Args:
        parameters, prompt: of the request.
        row: its first row in the step.
        computed: how many of its tokens were run before.
        count: how many rows it has in the step.
        bos: the token that begins every text.
    """
    found = mark(parameters)
    if found is None or prompt is None:
        return None
    count = min(count, len(prompt) - computed)
    if count <= 0:
        return None
    return Span(*found, row, computed, count, len(prompt), bos is not None and prompt[0] == bos)
