"""The texts of a calibration, which are in `texts.json`: neutral ones, and two kinds of unlabelled requests.

The neutral ones were written for this purpose: short, and spread over prose, questions, instructions, dialogue, code,
lists, numbers and languages, so that no adapter was trained for many of them. The requests carry no label, answer or
adapter name; users with prompts of their own give those instead (`--calibration-prompts`). The everyday requests, four
for each of 36 tasks and all worded differently, were written by someone who knew no pool: what prompts of one task have
in common shows best beside many requests of other tasks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# (tokens of the beginning, tokens of the end), or all of the text.
Window = tuple[int, int] | Literal["whole"]
WHOLE: Literal["whole"] = "whole"
USUAL_WINDOW = (32, 32)

_KINDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
NEUTRAL: tuple[str, ...] = tuple(text for kind in _KINDS["neutral"].values() for text in kind)
REQUESTS: tuple[str, ...] = tuple(text for kind in _KINDS["requests"].values() for text in kind)
EVERYDAY: tuple[str, ...] = tuple(text for task in _KINDS["everyday"].values() for text in task)


@dataclass(frozen=True)
class Texts:
    """Token ids of the texts on which adapters are calibrated, each cut to the window: the neutral ones give the
    reference and the whitening, the requests rank points."""

    neutral: Sequence[Sequence[int]]
    requests: Sequence[Sequence[int]]

    @property
    def rows(self) -> list[Sequence[int]]:
        """All of them, neutral ones first."""
        return [*self.neutral, *self.requests]
