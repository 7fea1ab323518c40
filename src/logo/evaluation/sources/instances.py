"""From raw rows to instances, and the seeded draw among them.

The draw depends only on an instance's text and the seed: instances are ordered by a hash of both, and the first ones
are taken. So the same seed draws the same rows on every machine, in whatever order a source ships them; fewer rows are
a part of more rows; and further rows do not change the order. No random generator is used, since generators may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from logo.errors import DataError
from logo.evaluation.sources.readers import RawRow
from logo.evaluation.sources.templates import RowError, Wording


@dataclass(frozen=True)
class Instance:
    """A prompt, its gold text (or the texts that all count as right), all references, and what the draw looks at."""

    context: str
    completion: str | tuple[str, ...]
    references: tuple[str, ...]
    key: str

    def row(self) -> dict[str, Any]:
        """The JSON row of a data file."""
        gold = self.completion if isinstance(self.completion, str) else list(self.completion)
        row: dict[str, Any] = {"context": self.context, "completion": gold}
        return row | {"references": list(self.references)} if self.references else row


@dataclass(frozen=True)
class Instances:
    """The instances of a split.

    Attributes:
        unusable: number of raw rows that lack a prompt or a gold text.
        other_golds: number of raw rows that have the prompt of an earlier row, and another gold text, which is dropped.
    """

    items: tuple[Instance, ...]
    unusable: int
    other_golds: int = 0


def make_instances(name: str, wording: Wording, rows: Iterable[tuple[str, RawRow]]) -> Instances:
    """Fill the templates from every row. Rows with the same prompt are one instance: with the references of all if the
    declaration has references, else with the gold text of the first row.

    Raises:
        DataError: a row that does not fit the declaration (names the file and the row), or no usable row at all.
    """
    found: dict[str, Instance] = {}
    unusable = other_golds = 0
    where = ""
    for where, row in rows:
        try:
            instance = _instance(wording, row)
        except RowError as error:
            raise DataError(f"dataset {name!r}: {where}: {error}; fix the declaration") from None
        if instance is None:
            unusable += 1
        elif (known := found.get(instance.context)) is None:
            found[instance.context] = instance
        elif instance.references:
            found[instance.context] = replace(known, references=_merged(known.references, instance.references))
        else:
            other_golds += not set(_merged(instance.completion)) <= set(_merged(known.completion))
    if not found and not unusable:
        raise DataError(f"dataset {name!r}: expected rows, found none in its files; is this the right split?")
    if not found:
        raise DataError(
            f"dataset {name!r}: {where}: none of {unusable} rows has a prompt and a gold text; is this the right split?"
        )
    return Instances(tuple(found.values()), unusable, other_golds)


def draw(instances: Sequence[Instance], count: int, seed: int, without: Iterable[Instance] = ()) -> list[Instance]:
    """The first `count` instances in the order of the seed, or all if there are fewer; none whose prompt or whose
    key is one of `without`."""
    taken = [(instance.context, instance.key) for instance in without]
    contexts, keys = {context for context, _ in taken}, {key for _, key in taken}
    rest = [instance for instance in instances if instance.context not in contexts and instance.key not in keys]

    def place(instance: Instance) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}\n{instance.key}".encode()).digest(), instance.context

    return sorted(rest, key=place)[:count]


def _instance(wording: Wording, row: RawRow) -> Instance | None:
    """The instance of a row; None if it lacks a prompt or a gold text, or has text that no tokenizer accepts."""
    texts = wording.of(row)
    if texts is None:
        return None
    context, key, completion = str(texts["context"]), str(texts["draw_by"]), texts["completion"]
    golds, more = _merged(completion), _merged(texts.get("references", ()))
    try:
        "".join((context, key, *golds, *more)).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
    if not golds or not context.strip():
        return None
    references = _merged(golds, more) if "references" in texts else ()
    return Instance(context, golds[0] if isinstance(completion, str) else golds, references, key)


def _merged(*texts: str | Iterable[str]) -> tuple[str, ...]:
    """All texts that are not blank, each once."""
    flat = (text for part in texts for text in ([part] if isinstance(part, str) else part))
    return tuple(dict.fromkeys(text for text in flat if text.strip()))
