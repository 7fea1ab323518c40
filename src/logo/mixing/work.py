"""`Work`: how much a mixture is going to be used, which says in what form it is cheapest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a mixture is going to be used for.

    Attributes:
        prompt: tokens that are read in one pass, over all rows.
        rows: sequences that are decoded together.
        steps: decoding steps to be expected, from what the call allows and from nothing that ran before.
    """

    prompt: int
    rows: int
    steps: float
