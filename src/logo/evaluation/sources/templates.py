"""Prompts and gold texts of rows, through Jinja2 in its sandbox: a template from elsewhere cannot reach into objects.

Values stand in a text without the blanks around them, numbers as Python writes them. A row in which a value of a
template is null, empty or an empty list is left out; a name that the row does not have is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from logo.errors import DataError, UsageError
from logo.evaluation.sources.declarations import Declaration, Layout

try:
    from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise UsageError(
        "datasets are prepared through `jinja2`, which is not installed; pip install 'lora-on-the-go[eval]'"
    ) from error

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN = 8  # columns worth listing in a message
_SOLE = re.compile(r"\s*\{\{(.*?)\}\}\s*", re.DOTALL)

_Made = Callable[[Mapping[str, Any]], Any]


class Blank(Exception):
    """A value that says nothing; its row is left out."""


class RowError(ValueError):
    """A row that does not fit its declaration; the message says how. Whoever knows the file and the row adds both."""


def as_text(value: object) -> str:
    """A value as it stands in a text: without the blanks around it, null as ''.

    Raises:
        RowError: a list or an object, which no rule turns into text.
    """
    if isinstance(value, (str, bool, int, float, StrictUndefined)):
        return str(value).strip()  # of a name without a value, Jinja2's error
    if value is None:
        return ""
    raise RowError(f"expected text, found {value!r:.60}; `join` makes text of a list")


def _shown(value: object) -> str:
    if value is None or value == "" or value == []:
        raise Blank
    return as_text(value)


def _join(values: Iterable[object] | None, separator: str = "") -> str:
    """Jinja2's own filter takes no null, and leaves the blanks around items."""
    return separator.join(map(as_text, values or ()))


def _lettered(values: Iterable[object] | None) -> list[str]:
    """Options as FLAN writes them."""
    return [f"({_LETTERS[i % len(_LETTERS)]}) {as_text(value)}" for i, value in enumerate(values or ())]


class _Environment(ImmutableSandboxedEnvironment):
    """Whatever is looked up in null is null: a row without the object is one without text, not an error."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return None if obj is None else super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return None if obj is None else super().getitem(obj, argument)


class Wording:
    """The fields and templates of a declaration for one layout, compiled.

    Raises:
        DataError: one of them is not Jinja2; the message names it.
    """

    def __init__(self, declaration: Declaration, layout: Layout) -> None:
        self._environment = _Environment(undefined=StrictUndefined, finalize=_shown, keep_trailing_newline=True)
        self._environment.filters |= {"join": _join, "lettered": _lettered}
        self._environment.globals["letters"] = _LETTERS
        try:
            self._fields = {key: self._expression(text) for key, text in layout.fields.items()}
            self._templates = {
                key: self._texts(text) if key in ("completion", "references") else self._template(text)
                for key, text in declaration.templates.items()
            }
        except TemplateSyntaxError as error:
            raise DataError(
                f"dataset {declaration.name!r}: expected Jinja2, found {error.source!r:.60} ({error.message}); "
                "mend the declaration"
            ) from None

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What templates may name: the columns of a row, `row` itself, and the fields.

        Raises:
            RowError: a field that cannot be made of the row.
        """
        columns = {"row": row, **row}
        return columns | {name: _called(name, field, columns) for name, field in self._fields.items()}

    def text(self, key: str, values: Mapping[str, Any]) -> str:
        """The text of the template that is called so in the declaration.

        Raises:
            Blank: a value in it is null or empty.
            RowError: it cannot be made of these values.
        """
        return str(_called(key, self._templates[key], values))

    def texts(self, key: str, values: Mapping[str, Any]) -> str | list[str] | None:
        """As `text`, or the texts of a list, each once, where the template is one expression that is a list. Blank
        texts are left out; None: there is no such template.

        Raises:
            RowError: as `text`.
        """
        try:
            found = _called(key, self._templates[key], values) if key in self._templates else None
        except Blank:
            return ""
        if isinstance(found, list):
            return list(dict.fromkeys(filter(None, found)))
        return found if found is None or found.strip() else ""

    def _template(self, text: str) -> _Made:
        return self._environment.from_string(text).render

    def _expression(self, text: str) -> _Made:
        compiled = self._environment.compile_expression(text, undefined_to_none=False)

        def value(values: Mapping[str, Any]) -> Any:
            found = compiled(values)
            if isinstance(found, StrictUndefined):
                return str(found)  # raises, with the name that is missing
            return list(found) if isinstance(found, Iterator) else found  # filters are lazy

        return value

    def _texts(self, text: str) -> _Made:
        sole, body = _SOLE.fullmatch(text), self._environment.parse(text).body
        if sole is None or len(body) != 1 or len(getattr(body[0], "nodes", ())) != 1:
            return self._template(text)
        value = self._expression(sole[1])

        def texts(values: Mapping[str, Any]) -> str | list[str]:
            found = value(values)
            return [as_text(item) for item in found] if isinstance(found, (list, tuple)) else _shown(found)

        return texts


def _called(key: str, made: _Made, values: Mapping[str, Any]) -> Any:
    try:
        return made(values)
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        names = [repr(name) for name in values if name != "row"]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise RowError(f"{key!r}: {error}; the row has {', '.join(names[:_SHOWN]) or 'nothing'}{more}") from None
