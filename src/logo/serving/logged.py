"""Log entries about adapters: a line with the pool, and an entry for each selection.

`logo.serving.traffic` reads them again (`logo pool health`). They contain prompts only if the operator asks for that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from heapq import nlargest
from typing import Any

from logo.selection import Selection
from logo.selection.selector import UNSURE

# Of a selection, so many adapters are listed: the heaviest ones, and those with the best scores.
LEADING = 5
# Tokens of a prompt that are logged.
TOKENS = 200

_log = logging.getLogger("logo.serving")


def entry(selection: Selection, prompt: str | None = None) -> dict[str, Any]:
    """One selection as JSON.

    Args:
        prompt: the probed text, if it may be logged.
    """
    found: dict[str, Any] = {
        "adapters": list(selection.adapters[:LEADING]),
        "weights": [round(weight, 4) for weight in selection.weights[:LEADING]],
        "scores": {name: round(score, 3) for name, score in nlargest(LEADING, selection.scores.items(), _score)},
    }
    if selection.confidence is not None:
        found |= {"confidence": round(selection.confidence, 4), "unsure": selection.confidence < UNSURE}
    return found if prompt is None else {**found, "prompt": prompt}


def _score(item: tuple[str, float]) -> float:
    return item[1]


def tell_pool(names: Iterable[str]) -> None:
    """Logs the adapters of the present pool."""
    pool = list(names)
    text = f"{len(pool)} adapters in the pool"
    _log.info(text, extra={"fields": {"message": text, "pool": pool}})
