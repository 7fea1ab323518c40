"""`review`: how the selections of a server's shadow (`logo serve --shadow`) agree with what its requests have named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logo.errors import DataError, StorageError
from logo.evaluation.statistics import interval

# A row disagrees clearly if some other adapter than the named one has at least this probability.
CLEAR = 0.9
# Fewer rows of an adapter say little about it.
FEWEST = 3
# An adapter that is found for a smaller share of its rows needs example prompts.
OFTEN = 0.8
_SHOWN = 10


@dataclass(frozen=True)
class ShadowRow:
    """One line of a shadow's log.

    Attributes:
        named: the adapter that the request has named alone; empty: the base model; None: a mixture.
        probabilities: of the best adapters, the best first.
        confidence: None for signals that have none.
        prompt: empty if the log has no prompts.
    """

    time: str
    named: str | None
    probabilities: Mapping[str, float]
    confidence: float | None
    prompt: str = ""

    @property
    def first(self) -> str:
        """The adapter that the prompt would select first."""
        return next(iter(self.probabilities))

    @property
    def agrees(self) -> bool:
        """Whether that is the named one."""
        return self.first == self.named

    @property
    def is_clear(self) -> bool:
        """Whether another adapter than the named one is clearly first."""
        return not self.agrees and self.probabilities[self.first] >= CLEAR


def read_log(files: Sequence[Path]) -> tuple[list[ShadowRow], int]:
    """The rows of such files, and the number of other lines, such as one that a full disk has cut. StorageError: a file
    cannot be read; DataError: there are no rows."""
    rows = []
    others = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")  # prompts hold other separators
        except OSError as error:
            raise StorageError(f"{file}: cannot be read ({error.strerror}); name a file of `--shadow`") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = _row(line)
            if row is None:
                others.append(f"{file}:{number}: expected a line of `logo serve --shadow`, found {line:.60}")
            else:
                rows.append(row)
    if others and not rows:
        raise DataError(others[0])
    if not rows:
        raise DataError("expected a line per request, found none: has a request named an adapter or the base model?")
    return rows, len(others)


def _row(line: str) -> ShadowRow | None:
    """The row that a line is, if it is one."""
    try:
        match json.loads(line):
            case {"time": str(time), "named": dict(named), "first": [_, *_] as first, **more}:
                probabilities = {entry["adapter"]: float(entry["probability"]) for entry in first}
                adapter: Any = more["adapter"] if named else ""
                confidence: Any = more["confidence"]
                return ShadowRow(time, adapter, probabilities, confidence, str(more.get("prompt", "")))
    except (ValueError, KeyError, TypeError):
        pass
    return None


def review(rows: Sequence[ShadowRow], unreadable: int = 0) -> dict[str, Any]:
    """What a log says, as JSON: how many rows there are, and of which kind; the `unreadable` lines beside them;
    `agreement` with the named adapter, with the 95 % interval; the most frequent `confusions`; the rows of `clear`
    disagreement; per `adapter` the rows, the agreement and the mean confidence, and whether it needs example prompts;
    the `threshold` of the confidence below which the base model would best answer (None: no row has named it, or no
    confidence is known)."""
    named = [row for row in rows if row.named]
    base = [row for row in rows if row.named == ""]
    agreed = [float(row.agrees) for row in named]
    confusions = Counter((row.named, row.first) for row in named if not row.agrees)
    return {
        "rows": len(rows),
        "unreadable": unreadable,
        "named_one_adapter": len(named),
        "named_the_base_model": len(base),
        "agreement": _mean(agreed),
        "interval": interval(agreed, "binary"),
        "in_first_three": _mean(float(row.named in row.probabilities) for row in named),
        "confusions": [
            {"named": pair[0], "first": pair[1], "rows": count} for pair, count in confusions.most_common(_SHOWN)
        ],
        "clear": [_shown(row) for row in (*named, *base) if row.is_clear],
        "adapters": _by_adapter(named),
        "threshold": _threshold([*named, *base]),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def _shown(row: ShadowRow) -> dict[str, Any]:
    """A row as JSON."""
    shown = {"time": row.time, "named": row.named, "first": row.first, "probability": row.probabilities[row.first]}
    return {**shown, "prompt": row.prompt} if row.prompt else shown


def _by_adapter(named: Sequence[ShadowRow]) -> dict[str, dict[str, Any]]:
    """Of each adapter that rows have named: what they say of it."""
    adapters: dict[str, list[ShadowRow]] = {}
    for row in named:
        adapters.setdefault(str(row.named), []).append(row)
    by_adapter = {}
    for name, rows in sorted(adapters.items()):
        agreed = sum(row.agrees for row in rows)
        by_adapter[name] = {
            "rows": len(rows),
            "agreement": agreed / len(rows),
            "confidence": _mean(row.confidence for row in rows),
            "needs_examples": len(rows) >= FEWEST and agreed < OFTEN * len(rows),
        }
    return by_adapter


def _threshold(rows: Sequence[ShadowRow]) -> dict[str, Any] | None:
    """The confidence below which the base model answers most rows as they were named, counted with the adapter that
    would be first above it."""
    known = [row for row in rows if row.confidence is not None]
    if not any(row.named == "" for row in known):
        return None
    confidence = np.array([row.confidence for row in known])
    to_base = np.array([row.named == "" for row in known])
    agrees = np.array([row.agrees for row in known])
    just_above = np.minimum(np.floor(100 * confidence + 1e-9) + 1, 100) / 100  # in steps of a hundredth
    candidates = np.unique([0.0, *just_above])
    right = [int(np.where(confidence < at, to_base, agrees).sum()) for at in candidates]
    best = float(candidates[int(np.argmax(right))])
    below = confidence < best
    return {
        "unsure_below": best,
        "right": max(right),
        "right_without": right[0],
        "rows": len(known),
        "base": int(below.sum()),
        "base_named": int((below & to_base).sum()),
    }
