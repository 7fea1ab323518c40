"""How sure a selection is: the probability that the pool holds an adapter that was made for the prompt.

    lead        = best score - mean of the next five
    confidence  = 1 / (1 + exp(-steepness · (lead - even)))

Not the best score alone: a prompt that excites every adapter says nothing. Not the distance to the second alone: a near
relative of the right adapter is no reason to doubt it, a whole field close behind is. `steepness` and `even` belong to
a kind of score. They were fitted once, on half of the tasks of one pool, to tell prompts with their own adapter in the
pool from prompts without (tasks that no adapter was made for, and own tasks with their adapter left out); no label of
the pool at hand is needed. docs/how-selection-works.md shows how well that holds elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Adapters behind the best one whose mean score it must stand out from.
FIELD = 5
# Temperatures, times the steepness of the evidence: one adapter nearly alone, and a broad mixture.
_SHARPEST, _BROADEST = 1.7, 7.6
# Confidence up to which a mixture is broad, and from which it is sharp.
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
        """The probability, of scores (adapters,) that are sorted, best first; 1/2 where there is nothing to compare."""
        if len(ranked) == 1:
            return 0.5
        if ranked[0] <= 0:  # nothing responds more than it does to neutral text
            return 0.0
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, self.steepness * (lead(ranked) - self.even)))))

    def temperature(self, confidence: float) -> float:
        """The softmax temperature of a mixture that is as sharp as the selection is sure, in units of the score.

        Between broad and sharp, log T is in proportion.
        """
        sureness = min(max((confidence - _DOUBT) / (_TRUST - _DOUBT), 0.0), 1.0)
        return float(_BROADEST * (_SHARPEST / _BROADEST) ** sureness) / self.steepness


# Scores in standard deviations of neutral text, and scores with what example prompts say added.
RESPONSES = Evidence(3.8, 0.8)
EXAMPLES = Evidence(1.2, 3.5)


def lead(ranked: Tensor) -> float:
    """How far the best of sorted scores (adapters,) is above the mean of the next `FIELD`."""
    return float(ranked[0] - ranked[1 : 1 + FIELD].mean())
