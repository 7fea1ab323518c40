"""From raw rows to instances, and the seeded draw among them.

The draw looks at an instance's text and the seed only: instances are ordered by a hash of both, and the first come
first. So the same seed draws the same rows on every machine, in whatever order a source ships them; fewer rows are a
part of more rows; and what other rows there are changes nothing. It is no random generator's, which may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from logo.errors import DataError
from logo.evaluation.sources.declarations import Declaration, Layout
from logo.evaluation.sources.fields import Field
from logo.evaluation.sources.readers import RawRow
from logo.evaluation.sources.templates import RowError, Template, as_text


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
    """The instances of a split, and how many raw rows are in none because they lack a prompt or a gold text."""

    items: tuple[Instance, ...]
    unusable: int


def columns_of(declaration: Declaration, layout: Layout) -> tuple[str, ...]:
    """The columns of a raw row that the templates need."""
    names = dict.fromkeys(name for template in _templates(declaration) for name in template.fields)
    columns = (layout.fields[name].columns if name in layout.fields else (name,) for name in names)
    return tuple(dict.fromkeys(column for group in columns for column in group))


def make_instances(declaration: Declaration, layout: Layout, rows: Iterable[tuple[str, RawRow]]) -> Instances:
    """Fill the templates from every row. Rows with the same prompt are one instance, with the references of all.

    Raises:
        DataError: a row that does not fit the declaration (names the file and the row), or no usable row at all.
    """
    names = tuple(dict.fromkeys(name for template in _templates(declaration) for name in template.fields))
    fields = {name: layout.fields.get(name, Field(((name,),))) for name in names}
    found: dict[str, Instance] = {}
    unusable = 0
    where = "no file"
    for where, row in rows:
        try:
            instance = _instance(declaration, {name: field.value(row) for name, field in fields.items()})
        except RowError as error:
            raise DataError(f"dataset {declaration.name!r}: {where}: {error}; mend the declaration") from None
        if instance is None:
            unusable += 1
        elif (known := found.get(instance.context)) is None:
            found[instance.context] = instance
        elif instance.references:
            merged = tuple(dict.fromkeys((*known.references, *instance.references)))
            found[instance.context] = replace(known, references=merged)
    if not found:
        raise DataError(
            f"dataset {declaration.name!r}: {where}: none of {unusable} rows has a prompt and a gold text; is this the "
            "right split?"
        )
    return Instances(tuple(found.values()), unusable)


def draw(instances: Sequence[Instance], count: int, seed: int, without: Iterable[Instance] = ()) -> list[Instance]:
    """The first `count` instances in the order of the seed, or all if there are fewer; none whose prompt or whose
    key is one of `without`."""
    contexts = {instance.context for instance in without}
    keys = {instance.key for instance in without}
    rest = [instance for instance in instances if instance.context not in contexts and instance.key not in keys]
    return sorted(rest, key=lambda instance: _place(instance, seed))[:count]


def _place(instance: Instance, seed: int) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}\n{instance.key}".encode()).digest(), instance.context


def _templates(declaration: Declaration) -> list[Template]:
    references = [] if declaration.references is None else [declaration.references]
    return [declaration.context, declaration.completion, *references, declaration.draw_by]


def _instance(declaration: Declaration, values: dict[str, Any]) -> Instance | None:
    """None: no prompt, no gold text, or text that no tokenizer accepts."""
    blank = [name for name in declaration.context.fields if values[name] in (None, "", [])]
    context = declaration.context.render(values)
    golds = _texts(declaration.completion, values)
    if blank or not golds or not context.strip():
        return None
    listing = declaration.completion.sole is not None and isinstance(values[declaration.completion.sole], list)
    references = [] if declaration.references is None else [*golds, *_texts(declaration.references, values)]
    key = declaration.draw_by.render(values)
    if not all(map(_encodable, (context, *golds, *references, key))):
        return None
    return Instance(context, tuple(golds) if listing else golds[0], tuple(dict.fromkeys(references)), key)


def _texts(template: Template, values: dict[str, Any]) -> list[str]:
    """The text of a template; the texts of the list, where it is one field that is a list. Empty ones are left out."""
    value = values[template.sole] if template.sole is not None else None
    if isinstance(value, list):
        texts = [as_text(item, str(template.sole)) for item in value]
    elif any(values[name] in (None, "") for name in template.fields):
        return []
    else:
        texts = [template.render(values)]
    return list(dict.fromkeys(text for text in texts if text.strip()))


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
