"""The differences between two runs in words: the entries of their identities that differ, with both values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

_SHOWN = 5  # differences that are named
_LONGEST = 20  # characters of a value

Difference = tuple[str, object, object]  # name, value on the one side and on the other


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[Difference]:
    """The entries that differ, by dotted name; None stands for a missing one. If the number of rows differs, their
    digest is left out.
    """
    found = [pair for pair in _pairs("", one, other) if pair[1] != pair[2]]
    names = {name for name, _, _ in found}
    return [pair for pair in found if not (pair[0].endswith("_sha256") and pair[0].removesuffix("_sha256") in names)]


def described(found: Sequence[Difference]) -> str:
    """The differences in a few words, from the other side: `settings.k is 5, not 2`."""
    named = [
        f"{name} is {_short(theirs)}{' instead of' if ours is None else ', not'} {_short(ours)}"
        for name, ours, theirs in found[:_SHOWN]
    ]
    return "; ".join([*named, *([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])])


def _pairs(prefix: str, one: Mapping[str, object], other: Mapping[str, object]) -> Iterator[Difference]:
    for key in dict.fromkeys((*one, *other)):
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _pairs(f"{prefix}{key}.", ours, theirs)
        else:
            yield f"{prefix}{key}", ours, theirs


def _short(value: object) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
