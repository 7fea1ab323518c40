"""The window: the part of a prompt that is probed.

Of a long text the probe reads the first and the last tokens as one short text, so that a long input neither costs more
nor drowns the words that name the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

# (tokens of the beginning, tokens of the end), or all of the text.
Window = tuple[int, int] | Literal["whole"]
WHOLE: Literal["whole"] = "whole"
USUAL_WINDOW = (32, 32)


def windowed(ids: Sequence[int], window: Window) -> Sequence[int]:
    """The first and the last tokens of a text, as many as the window has of each; all of a text that is not longer."""
    if window == WHOLE or len(ids) <= sum(window):
        return ids
    head, tail = window
    return [*ids[:head], *ids[len(ids) - tail :]]
