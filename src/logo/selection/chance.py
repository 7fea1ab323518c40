"""How far apart the scores of a pool's adapters lie by chance, for prompts that none of them was made for.

That depends on the pool: the more points its adapters touch, and the stronger they are, the more of the chance
averages out. And it depends on the prompt: a response is a mean over tokens, and a mean over few tokens varies more, so
that "Hi!" or "import os" would give some adapter a lead. Both can be measured without labels. The standard deviation
over the adapters, of a text of which n tokens are read, is roughly

    apart · √((1 + FEW / n) / (1 + FEW / m))      apart: of the calibration texts; m: their usual n

and a prompt's scores are divided by it (for n > m, by `apart`), times `UNIT`. So a lead means the same in every pool
(`logo.selection.confidence`). The ranking of adapters by their responses does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

# Fitted to the calibration texts of three pools of different base models, FEW was 4 to 11. Scores depend on these two,
# so `logo.selection.reference.SCORES` has to be raised when one changes.
FEW = 5.0
# The standard deviation by chance of the scores that are given.
UNIT = 0.35
# Adapters that are nearly copies of each other do not make a small lead a large one.
_LEAST = 0.1


def usual_length(texts: Sequence[Sequence[int]]) -> float:
    """The median number of tokens that are read of texts: all but the first one (`logo.selection.probe`)."""
    return median(max(1, len(text) - 1) for text in texts)


def deviation(scores: Tensor) -> float:
    """`apart`: the standard deviation over adapters, of scores (texts, adapters); `UNIT` for fewer than two."""
    if scores.shape[1] < 2:
        return UNIT
    return max(float(scores.var(dim=1).mean().sqrt()), _LEAST)


def factors(tokens: Tensor, usual: float, apart: float) -> Tensor:
    """What the scores of prompts with so many tokens (rows,) are multiplied by: float32 (rows,)."""
    few = ((1 + FEW / usual) / (1 + FEW / tokens)).sqrt().clamp(max=1.0)
    return few * torch.tensor(UNIT / apart)
