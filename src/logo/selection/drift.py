"""How far the scores of each adapter have moved over the prompts so far; a running reference corrects them for it.

    level_i  += RATE · clip(score_i - level_i, -1, 1)        after each prompt; at first the median of the other levels
    shift_i   = level_i - median over adapters of level      how much more than others i responds to any prompt
    score_i' = score_i - clip(shift_i, -MOST, MOST)          `baseline="running"`

A running reference sees scores in standard deviations of neutral text, before they are scaled
(`logo.selection.chance`); the metrics of a server see them as they are returned. No prompt moves a level by more than
`RATE`, however large its score is, so the prompts that an adapter was made for lower its score only if most prompts are
such, and by `MOST` at most. The median is subtracted because a shift that all adapters share does not change their
order. Where only some adapters may be selected, these are all that count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from statistics import median

# The most by which one prompt moves a level, in units of the score.
RATE = 1 / 128
# The most that a running reference subtracts from a score or adds to it.
MOST = 1.0


class Drift:
    """The levels of adapters by name; they depend on the order of the prompts.

    Args:
        levels: those to begin with.

    Attributes:
        levels: of the adapters that have been scored.
    """

    def __init__(self, levels: Mapping[str, float] | None = None) -> None:
        self.levels = dict(levels or {})

    def see(self, scores: Mapping[str, float]) -> None:
        """Moves the levels by the scores of one prompt; adapters without a score keep theirs."""
        levels, middle = self.levels, _middle(self._of(scores))  # one that is new is usual until it has been seen
        for name, score in scores.items():
            level = levels.get(name, middle)
            levels[name] = level + RATE * max(-1.0, min(1.0, score - level))

    def keep(self, names: Collection[str]) -> None:
        """Forgets all other adapters."""
        self.levels = {name: level for name, level in self.levels.items() if name in names}

    @property
    def middle(self) -> float:
        """The median of the levels; 0 where there are none."""
        return _middle(self.levels)

    @property
    def shifts(self) -> dict[str, float]:
        """The level of each adapter minus the median."""
        middle = self.middle
        return {name: level - middle for name, level in self.levels.items()}

    def corrections(self, among: Collection[str]) -> dict[str, float]:
        """What a running reference subtracts from the scores of these adapters, whose own median is the middle; those
        that have not been scored are left out."""
        seen = self._of(among)
        middle = _middle(seen)
        return {name: max(-MOST, min(MOST, level - middle)) for name, level in seen.items()}

    def _of(self, names: Iterable[str]) -> dict[str, float]:
        return {name: self.levels[name] for name in names if name in self.levels}


def _middle(levels: Mapping[str, float]) -> float:
    return median(levels.values()) if levels else 0.0
