"""The grid of a sweep: axes, the cells between them, and names for cells that every file system can hold.

An axis is the name of an option with the values that it is to take; a cell takes one value of every axis. Nothing here
depends on what the options mean.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from logo.errors import UsageError

Value = int | float | str

_LONGEST = 120  # characters of a name: half of what file systems allow, since journals add to it
_KEPT = 80  # characters of a name that is too long
# Values that are written unchanged: without upper case, and without characters that a file system treats specially.
_PLAIN = re.compile(r"[a-z0-9+._-]*[a-z0-9+_-]")
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Axis:
    """One option and the values that it takes, each of them once.

    Attributes:
        name: the option's, in lower case with dashes.
        values: as the table shows them.
    """

    name: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"axis {self.name!r}: expected a name in lower case with dashes")
        twice = [value for i, value in enumerate(self.values) if value in self.values[:i]]
        if twice:
            raise UsageError(f"grid {self.name}: the value {twice[0]!r} is given twice; give it once")
        if not self.values:
            raise UsageError(f"grid {self.name}: expected one or more values, found none")


def split(text: str) -> tuple[str, tuple[str, ...]]:
    """`k=1,3,20` as an axis's name and values; an underscore in a name is a dash.

    Raises:
        UsageError: the text has another form.
    """
    name, equals, rest = text.partition("=")
    values = tuple(value.strip() for value in rest.split(","))
    if not equals or not name.strip() or not all(values):
        raise UsageError(f"grid {text!r}: expected AXIS=VALUE,VALUE,..., such as k=1,3,20")
    return name.strip().lower().replace("_", "-"), values


def product(axes: Sequence[Axis]) -> Iterator[dict[str, Value]]:
    """Every combination of the axes' values; the last axis changes fastest."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.name for axis in axes), values, strict=True))


def cell_name(values: Mapping[str, Value]) -> str:
    """A file name for a cell: `k=3_signal=norm`, by axis in alphabetical order, `defaults` for a cell without axes.

    Different values give different names, on file systems that ignore case too: what would not be safe to write as it
    is, or is too long, ends with a digest.
    """
    if not values:
        return "defaults"
    texts = {name: str(values[name]) for name in sorted(values)}
    plain = "_".join(f"{name}={text}" for name, text in texts.items())
    if len(plain) <= _LONGEST and all(_PLAIN.fullmatch(text) for text in texts.values()):
        return plain
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^a-zA-Z0-9+._=-]', '-', plain)[:_KEPT]}~{digest}"


def label(values: Mapping[str, Value]) -> str:
    """A cell in words: `k 3, signal norm`."""
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "defaults"


def numbers(values: Sequence[Value]) -> list[int] | list[float] | None:
    """The values as numbers of one type; None if one of them is not a number."""
    integers = [value for value in values if isinstance(value, int) or _INTEGER.fullmatch(str(value))]
    if len(integers) == len(values):
        return [int(value) for value in integers]
    found = [float(value) for value in values if isinstance(value, (int, float))]
    return found if len(found) == len(values) else None
