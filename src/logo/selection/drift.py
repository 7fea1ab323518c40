"""Where the scores of adapters have moved in the prompts that came: a running reference takes it out, a gauge shows it.

    level_i  += RATE · clip(score_i - level_i, -1, 1)        after each prompt; 0 before the first
    shift_i   = level_i - median over adapters of level      what adapter i responds to everything, beside the others
    score_i' = score_i - clip(shift_i, -MOST, MOST)          `baseline="running"`

Scores are in standard deviations of neutral text. No prompt moves a level by more than `RATE`, however far out a
response is, so an adapter is not pulled down by the prompts that are its own unless most of all prompts are; and then
by `MOST` at most. What all adapters have in common is left out: it tells none of them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import median

# What one prompt may move a level by, in the score's unit: it takes 128 of them to move it by one.
RATE = 1 / 128
# What a running reference takes from a score, or adds to it, at most.
MOST = 1.0


class Drift:
    """The levels of adapters, by name, in the order of what came.

    Args:
        levels: from which to go on.

    Attributes:
        levels: of those adapters that have been scored.
    """

    def __init__(self, levels: Mapping[str, float] | None = None) -> None:
        self.levels = dict(levels or {})

    def see(self, scores: Mapping[str, float]) -> None:
        """Takes in the scores of one prompt; adapters that are not in it stay where they are."""
        levels = self.levels
        for name, score in scores.items():
            level = levels.get(name, 0.0)
            levels[name] = level + RATE * max(-1.0, min(1.0, score - level))

    def keep(self, names: Collection[str]) -> None:
        """Forgets all other adapters."""
        self.levels = {name: level for name, level in self.levels.items() if name in names}

    @property
    def middle(self) -> float:
        """The median of the levels; 0 where there are none."""
        return median(self.levels.values()) if self.levels else 0.0

    @property
    def shifts(self) -> dict[str, float]:
        """How far each is from the middle."""
        middle = self.middle
        return {name: level - middle for name, level in self.levels.items()}

    @property
    def corrections(self) -> dict[str, float]:
        """What a running reference takes from each adapter's score."""
        return {name: max(-MOST, min(MOST, shift)) for name, shift in self.shifts.items()}
