"""Prompts and gold texts of rows, through Jinja2 in its sandbox: a template from elsewhere cannot reach into objects.

Values are written without surrounding blanks, and numbers as Python writes them. A row in which a value of a
template is null, empty or an empty list is left out; a name that the row does not have is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from logo.errors import DataError, listed
from logo.evaluation.sources.declarations import Declaration
from logo.rows import is_broken

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN = 8  # columns worth listing in a message
_SOLE = re.compile(r"\s*\{\{(.*?)\}\}\s*", re.DOTALL)
_WRONG = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

_Compiled = Callable[[Mapping[str, Any]], Any]  # values by name -> a value or a text
Texts = dict[str, str | list[str]]


class _Blank(Exception):
    """A template has a value that is null or empty."""


def wording(declaration: Declaration) -> Callable[[Mapping[str, Any]], Texts | None]:
    """What makes the texts of a row, or raises DataError: `context`, `draw_by`, `completion` and perhaps `references`,
    the last two as lists where one expression is all of the template. None: a value in a template is null or empty.

    Raises:
        DataError: a field or a template is not Jinja2; the message shows it.
    """
    environment = _Environment(undefined=StrictUndefined, finalize=_shown, keep_trailing_newline=True)
    environment.filters |= {"join": _join, "lettered": _lettered}
    environment.globals["letters"] = _LETTERS
    # No random filters: the same row always gives the same texts.
    del environment.filters["random"], environment.globals["lipsum"]
    try:
        fields = {key: _expression(environment, text) for key, text in declaration.fields.items()}
        templates = {key: environment.from_string(getattr(declaration, key)).render for key in ("context", "draw_by")}
        for key in ("completion", "references") if declaration.references else ("completion",):
            templates[key] = _text_or_texts(environment, getattr(declaration, key))
    except TemplateSyntaxError as error:
        raise DataError(f"expected Jinja2, found {error.source!r:.60} ({error.message})") from None

    def texts(row: Mapping[str, Any]) -> Texts | None:
        columns = {"row": row, **row}
        values = columns | {name: _called(name, expression, columns) for name, expression in fields.items()}
        rendered: Texts = {}
        for key, template in templates.items():
            try:
                rendered[key] = _called(key, template, values)
            except _Blank:
                if key != "references":
                    return None
                rendered[key] = []
        return rendered

    return texts


class _Environment(ImmutableSandboxedEnvironment):
    """An environment in which every attribute and item of null is null: a missing object is missing text, no error."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return None if obj is None else super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return None if obj is None else super().getitem(obj, argument)


def _as_text(value: object) -> str:
    if isinstance(value, (str, bool, int, float, StrictUndefined)):
        text = str(value).strip()  # an undefined name raises Jinja2's error
        if is_broken(text):
            raise DataError(f"expected text, found half of a surrogate pair in {value!r:.60}")
        return text
    if value is None:
        return ""
    raise DataError(f"expected text, found {value!r:.60}; `join` makes text of a list")


def _shown(value: object) -> str:
    text = "" if value == [] else _as_text(value)
    if not text:
        raise _Blank
    return text


def _join(values: Iterable[object] | None, separator: str = "") -> str:
    """Joins texts. Unlike Jinja2's own filter, it accepts null and strips the blanks around items."""
    return separator.join(map(_as_text, values or ()))


def _lettered(values: Iterable[object] | None) -> list[str]:
    """The options with letters, as FLAN writes them: `(A) yes`."""
    return [f"({_LETTERS[i % len(_LETTERS)]}) {_as_text(value)}" for i, value in enumerate(values or ())]


def _expression(environment: _Environment, text: str) -> _Compiled:
    compiled = environment.compile_expression(text, undefined_to_none=False)

    def value(values: Mapping[str, Any]) -> Any:
        computed = compiled(values)
        if isinstance(computed, StrictUndefined):
            return str(computed)  # raises, with the name that is missing
        return list(computed) if isinstance(computed, Iterator) else computed  # filters are lazy

    return value


def _text_or_texts(environment: _Environment, text: str) -> _Compiled:
    sole_expression = _SOLE.fullmatch(text)
    body = environment.parse(text).body
    if sole_expression is None or len(body) != 1 or len(getattr(body[0], "nodes", ())) != 1:
        return environment.from_string(text).render
    value = _expression(environment, sole_expression[1])

    def texts(values: Mapping[str, Any]) -> str | list[str]:
        computed = value(values)
        if isinstance(computed, (list, tuple)):
            return [_as_text(text) for text in computed]
        return _shown(computed)

    return texts


def _called(key: str, compiled: _Compiled, values: Mapping[str, Any]) -> Any:
    try:
        return compiled(values)
    except _WRONG as error:
        names = [repr(name) for name in values if name != "row"]
        raise DataError(f"{key!r}: {error}; the row has {listed(names, _SHOWN) or 'nothing'}") from None
