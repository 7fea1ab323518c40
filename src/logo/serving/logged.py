"""Adapters in the log of a server: a line with the pool, and an entry for the selection of each prompt.

`logo.serving.traffic` reads them (`logo pool health`). Prompts are only logged if the operator wants that.
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


def prompts_of(line: object) -> list[tuple[str, str | None]]:
    """The prompts of a line: an object with a `prompt` (or `context`), or a line of the log.

    Empty prompts are left out, and so are logged ones that were cut or are no Unicode text.

    Returns:
        Each with the one adapter that its request named, None if it named none or several.

    Raises:
        ValueError: it is neither, or the prompt is no Unicode text.
    """
    if not isinstance(line, dict):
        raise ValueError("no object")
    prompt = line.get("prompt", line.get("context"))
    if isinstance(prompt, str):
        prompt.encode()
        adapter = line.get("adapter")
        return [(prompt, adapter if isinstance(adapter, str) and adapter else None)] if prompt.strip() else []
    if str(line.get("logger")).split(".")[0] != "logo":
        raise ValueError("neither a prompt nor a line of the log")
    selections = line.get("selections")
    entries = [one for one in selections if isinstance(one, dict)] if isinstance(selections, list) else []
    texts = [(one.get("prompt"), _named(one)) for one in entries if not one.get("cut")]
    return [(text, name) for text, name in texts if isinstance(text, str) and text.strip() and _encodable(text)]


def _named(entry: dict[str, Any]) -> str | None:
    """The adapter of an entry that has one, as it is, and was not scored."""
    match entry:
        case {"adapters": [str(name)], "weights": [1], "scores": {**scores}} if not scores:
            return name
    return None


def _encodable(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _score(item: tuple[str, float]) -> float:
    return item[1]


def tell_pool(names: Iterable[str]) -> None:
    """Logs the adapters of the pool."""
    pool = list(names)
    text = f"{len(pool)} adapters in the pool"
    _log.info(text, extra={"fields": {"message": text, "pool": pool}})
