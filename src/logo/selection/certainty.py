"""How certain the score of a prompt is, from the number of tokens that were read.

A response is a mean over tokens, and a mean over few tokens varies more: "Hi!" or "import os" would give some adapter a
lead by chance. The variance over adapters, on texts that none of them was made for, is roughly proportional to

    1 + FEW / n        n: tokens that were read

so the scores of a prompt's responses are scaled by the root of this for the usual n, divided by the root of this for
the prompt; longer prompts are not scaled. The ranking by responses does not change, but the confidence and the weights
do, and similarities to example prompts count more, because these are not scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from torch import Tensor

# Fitted to the calibration texts of three pools of different base models, it was 4 to 11. Scores depend on it, so
# `logo.selection.reference.SCORES` has to be raised when it changes.
FEW = 5.0


def usual_length(texts: Sequence[Sequence[int]]) -> float:
    """The median number of tokens that are read of texts: all but the first one (`logo.selection.probe`)."""
    return median(max(1, len(text) - 1) for text in texts)


def certainty(tokens: Tensor, usual: float) -> Tensor:
    """Factors for the scores of prompts with so many tokens (rows,): float32 (rows,), at most 1."""
    return ((1 + FEW / usual) / (1 + FEW / tokens)).sqrt().clamp(max=1.0)
