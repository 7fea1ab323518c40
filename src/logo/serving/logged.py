"""Adapters in the log of a server: a line with the pool, and an entry for the selection of each prompt.

`logo pool examples --from-log` reads them. Prompts are only logged if the operator wants that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from heapq import nlargest
from typing import Any

from logo.selection import Selection
from logo.selection.selector import UNSURE

# The scores of a selection that are logged, the highest ones.
LEADING = 5
# The most tokens of a prompt that are logged.
TOKENS = 200

_log = logging.getLogger("logo.serving")


def entry(
    selection: Selection, prompt: str | None = None, cut: bool = False, unsure_below: float = UNSURE
) -> dict[str, Any]:
    """One selection as JSON.

    Args:
        prompt: the probed text, if it may be logged.
        cut: whether that is only the beginning of it.
        unsure_below: the confidence below which the selection counts as unsure.
    """
    found: dict[str, Any] = {
        "adapters": list(selection.adapters),  # all of them, since mean weights are computed from the log
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


def tell_pool(names: Iterable[str]) -> None:
    """Logs the adapters of the pool."""
    pool = list(names)
    text = f"{len(pool)} adapters in the pool"
    _log.info(text, extra={"fields": {"message": text, "pool": pool}})
