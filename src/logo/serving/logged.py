"""The entry of each prompt in the log of a server: its selection and, if the operator wants that, the prompt itself."""

from __future__ import annotations

from heapq import nlargest
from typing import Any

from logo.core import Selection

# The scores of a selection that are logged, the highest ones.
LEADING = 5
# The most tokens of a prompt that are logged.
TOKENS = 200


def entry(selection: Selection, unsure_below: float, prompt: str | None = None, cut: bool = False) -> dict[str, Any]:
    """One selection as JSON.

    Args:
        unsure_below: the confidence below which the selection counts as unsure.
        prompt: the probed text, if it may be logged.
        cut: whether that is only the beginning of it.
    """
    found: dict[str, Any] = {
        "adapters": list(selection.adapters),
        "weights": [round(weight, 4) for weight in selection.weights],
        "scores": {name: round(score, 3) for name, score in nlargest(LEADING, selection.scores.items(), _score)},
    }
    if selection.confidence is not None:
        found |= {"confidence": round(selection.confidence, 4), "unsure": selection.confidence < unsure_below}
    if prompt is not None:
        found |= {"prompt": prompt, **({"cut": True} if cut else {})}
    return found


def _score(item: tuple[str, float]) -> float:
    return item[1]
