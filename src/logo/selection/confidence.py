"""How sure a selection is: the probability that the pool holds an adapter that was made for the prompt.

    lead        = best score - mean of the next five
    confidence  = 1 / (1 + exp(-steepness · (lead - even)))

The best score alone is no evidence, since some prompts make every adapter respond. Nor is its distance to the second,
since a near relative of the right adapter may come second; several adapters close behind are a reason for doubt.
`steepness` and `even` belong to a kind of score. They were fitted once, on half of the tasks of one pool, to tell
prompts whose own adapter is in the pool from prompts without one; a pool at hand needs no labels.
docs/how-selection-works.md shows how well that holds for other pools.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# How many adapters behind the best one the mean is taken over.
FIELD = 5
# Temperatures, times the steepness: at the first one adapter has nearly all the weight, at the second many share it.
_SHARPEST, _BROADEST = 1.7, 7.6
# A mixture is as broad as it gets up to the first confidence, and as sharp as it gets from the second on.
_DOUBT, _TRUST = 0.25, 0.4


@dataclass(frozen=True)
class Evidence:
    """What a lead of one kind of score is worth.

    Attributes:
        steepness: how fast confidence grows with the lead.
        even: the lead at which it is one half.
    """

    steepness: float
    even: float

    def confidence(self, ranked: Tensor) -> float:
        """The confidence that scores (adapters,), sorted with the best first, give; 1/2 for a single adapter."""
        if len(ranked) == 1:
            return 0.5
        if ranked[0] <= 0:  # nothing responds more than it does to neutral text
            return 0.0
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, self.steepness * (lead(ranked) - self.even)))))

    def temperature(self, confidence: float) -> float:
        """The softmax temperature for a confidence, in units of the score: the surer the selection, the sharper.

        Between the two ends, log T is linear in the confidence.
        """
        sureness = min(max((confidence - _DOUBT) / (_TRUST - _DOUBT), 0.0), 1.0)
        return float(_BROADEST * (_SHARPEST / _BROADEST) ** sureness) / self.steepness


# For scores in standard deviations of neutral text, and for scores to which example prompts contribute.
RESPONSES = Evidence(3.8, 0.8)
EXAMPLES = Evidence(1.2, 3.5)


def lead(ranked: Tensor) -> float:
    """How far the best of sorted scores (adapters,) is above the mean of the next `FIELD`."""
    return float(ranked[0] - ranked[1 : 1 + FIELD].mean())
