"""Text with `{fields}` in it, filled from the values of one row. It can do nothing else: no attributes, no formats.

A field is a plain name (or a number, for an item of a list); `{{` and `}}` stand for braces. Whatever else Python's
format strings allow is refused when the template is read, so a declaration from elsewhere cannot reach into objects.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")


class RowError(ValueError):
    """A row that does not fit its declaration; the message says how. Whoever knows the file and the row adds both."""


@dataclass(frozen=True)
class Template:
    """A parsed template: pairs of literal text and the name of the field that follows it (None: no more)."""

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template.

        Raises:
            ValueError: an unmatched brace, or a field that is more than a name; the message says which.
        """
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{error}; write {{{{ and }}}} for braces that stay") from None
        for _, name, spec, conversion in pieces:
            if name is not None and (spec or conversion or not _NAME.fullmatch(name)):
                shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise ValueError(
                    f"{{{shown}}} is not a plain field name (letters, digits and _, no dots, brackets or formats); "
                    "write {{ and }} for braces that stay"
                )
        return cls(tuple((literal, name) for literal, name, _, _ in pieces))

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in it, in order, each once."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    @property
    def sole(self) -> str | None:
        """The name, if the template is one field and nothing else; such a template may stand for a list."""
        match self.parts:
            case (("", name),):
                return name
        return None

    def render(self, values: Mapping[str, object]) -> str:
        """The text with every field replaced by `as_text` of its value.

        Raises:
            RowError: a value that is a list or an object.
            KeyError: a field that has no value.
        """
        return "".join(literal + ("" if name is None else as_text(values[name], name)) for literal, name in self.parts)


def as_text(value: object, name: str) -> str:
    """A value as it stands in a prompt: text without the blanks around it, numbers as Python writes them, null as ''.

    Raises:
        RowError: a list or an object, which no rule turns into text.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (bool, int, float)):
        return str(value)
    kind = "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, (list, tuple)) else "no text"
    raise RowError(f"{name!r} is {kind}; say how it becomes text with 'from', 'each' and 'join' under fields")
