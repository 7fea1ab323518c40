"""From a row in its source's own shape to the values that templates name: where a value is, and what it is called.

A field is a path into the row and a few fixed steps, in this order: `split` text at a separator, `pick` one item,
`position_in` another list (as a letter, A for the first), `map` values to words, `each` item through a template,
`join` the items. Steps that a field does not have are passed over; nothing here can be programmed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logo.evaluation.sources.templates import RowError, Template, as_text

Path = tuple[str, ...]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN = 8  # columns or labels worth listing in a message


@dataclass(frozen=True)
class Field:
    """One value of a row. Several `paths` are one list of all that is found there."""

    paths: tuple[Path, ...]
    split: str | None = None
    pick: int | None = None
    position_in: Path | None = None
    map: Mapping[str, str] | None = None
    each: Template | None = None
    join: str | None = None

    def value(self, row: Mapping[str, Any]) -> Any:
        """Text, a number, a list or None, as it comes out of the last step.

        Raises:
            RowError: the row does not have what a path names, or a step does not fit what it meets.
        """
        found = [look_up(row, path) for path in self.paths]
        value = found[0] if len(found) == 1 else _flat(found)
        if self.split is not None and value is not None:
            value = [part.strip() for part in as_text(value, self._name).split(self.split)]
        if self.pick is not None:
            value = self._picked(value)
        if self.position_in is not None:
            value = self._letter(value, look_up(row, self.position_in))
        if self.map is not None:
            value = [self._mapped(item) for item in value] if isinstance(value, list) else self._mapped(value)
        if self.each is not None:
            value = [self._item(item, index) for index, item in enumerate(self._list(value, "each"))]
        if self.join is not None:
            value = self.join.join(as_text(item, self._name) for item in self._list(value, "join"))
        return value

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the row that it reads."""
        paths = self.paths if self.position_in is None else (*self.paths, self.position_in)
        return tuple(dict.fromkeys(path[0] for path in paths))

    @property
    def _name(self) -> str:
        return ".".join(self.paths[0])

    def _list(self, value: Any, step: str) -> list[Any]:
        if value is None:
            return []
        if isinstance(value, list):
            return value
        raise RowError(f"{self._name!r} is {_kind(value)}, and {step!r} needs a list")

    def _picked(self, value: Any) -> Any:
        items, index = self._list(value, "pick"), self.pick or 0
        if index >= len(items):
            raise RowError(f"{self._name!r} has {len(items)} items, and 'pick' asks for number {index}")
        return items[index]

    def _letter(self, value: Any, items: Any) -> str:
        if not isinstance(items, list) or value not in items or len(items) > len(_LETTERS):
            raise RowError(f"{self._name!r} is {value!r}, which 'position_in' does not find in {items!r}")
        return _LETTERS[items.index(value)]

    def _mapped(self, value: Any) -> str:
        assert self.map is not None
        key = as_text(value, self._name)
        if key not in self.map:
            raise RowError(f"{self._name!r} is {key!r}, which 'map' does not have; it has {listed(self.map)}")
        return self.map[key]

    def _item(self, item: Any, index: int) -> str:
        assert self.each is not None
        values: dict[str, Any] = {"letter": _LETTERS[index % len(_LETTERS)], "number": index + 1, "item": item}
        if isinstance(item, Mapping):
            values |= item
        elif isinstance(item, list):
            values |= {str(place): part for place, part in enumerate(item)}
        try:
            return self.each.render(values)
        except KeyError as error:
            raise RowError(f"{self._name!r}: 'each' names {{{error.args[0]}}}, an item has {listed(values)}") from None


def look_up(row: Any, path: Path) -> Any:
    """What a path leads to: names of an object's members, numbers of a list's items, `*` for all items. None stays.

    Raises:
        RowError: no such member or item.
    """
    value = row
    for place, part in enumerate(path):
        if value is None:
            return None
        if part == "*":
            if not isinstance(value, list):
                raise RowError(f"{_dotted(path[:place])} is {_kind(value)}, and {'.'.join(path)!r} needs a list there")
            return _flat(look_up(item, path[place + 1 :]) for item in value)
        if isinstance(value, Mapping):
            if part not in value:
                raise RowError(f"{_dotted(path[:place])} has no {part!r}, only {listed(value)}")
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise RowError(f"{_dotted(path[:place])} is {_kind(value)}, and has no {part!r}")
    return value


def listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    """Up to eight names, quoted."""
    shown = ", ".join(repr(str(name)) for name in list(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown or "nothing"


def _flat(values: Any) -> list[Any]:
    """One list of values and of the items of lists, without None."""
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, list) else [] if value is None else [value]
    return flat


def _dotted(path: Path) -> str:
    return repr(".".join(path)) if path else "the row"


def _kind(value: object) -> str:
    return "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else f"{value!r:.60}"
