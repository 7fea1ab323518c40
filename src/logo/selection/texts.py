"""The texts of a calibration: neutral ones, and unlabelled requests of many kinds, which are in `texts.json`.

A calibrated signal compares each adapter's response to a prompt with its responses to the neutral texts. These were
written for this purpose. They are short and spread over prose, questions, instructions, dialogue, code, lists, numbers
and languages, so that no adapter was trained for many of them. The requests rank the points of a pool by how
differently its adapters respond to different requests. They carry no label, answer or adapter name; users with prompts
of their own give those instead (`--calibration-prompts`).

The key of a stored calibration depends on all texts: if one changes, calibrations are computed again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_KINDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
NEUTRAL: tuple[str, ...] = tuple(text for kind in _KINDS["neutral"].values() for text in kind)
REQUESTS: tuple[str, ...] = tuple(text for kind in _KINDS["requests"].values() for text in kind)


@dataclass(frozen=True)
class Texts:
    """Token ids of the texts on which adapters are calibrated, each cut to the window.

    Attributes:
        neutral: texts that give the reference and the whitening.
        requests: unlabelled prompts by which points are ranked; none if all points are read.
    """

    neutral: Sequence[Sequence[int]]
    requests: Sequence[Sequence[int]]

    @property
    def rows(self) -> list[Sequence[int]]:
        """All of them, neutral ones first."""
        return [*self.neutral, *self.requests]
