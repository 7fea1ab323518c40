"""Messages about invalid requests, one line each: `max_tokens: expected 1 or more, found -3`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from logo.api.fields import TAGS

_SHOWN = 80  # characters of a value that a message shows

_Context = Mapping[str, Any]

# Pydantic's error type -> the expected value.
_EXPECTED: dict[str, Callable[[_Context], str]] = {
    "string_type": lambda c: "a string",
    "int_type": lambda c: "a whole number",
    "float_type": lambda c: "a number",
    "bool_type": lambda c: "true or false",
    "finite_number": lambda c: "a finite number",
    "list_type": lambda c: "a list",
    "dict_type": lambda c: "an object",
    "model_type": lambda c: "an object",
    "model_attributes_type": lambda c: "an object",
    "greater_than": lambda c: f"more than {_number(c['gt'])}",
    "greater_than_equal": lambda c: f"{_number(c['ge'])} or more",
    "less_than": lambda c: f"less than {_number(c['lt'])}",
    "less_than_equal": lambda c: f"{_number(c['le'])} or less",
    "too_short": lambda c: f"{_count(c['min_length'], 'item')} or more",
    "too_long": lambda c: f"{_count(c['max_length'], 'item')} or fewer",
    "string_too_short": lambda c: f"{_count(c['min_length'], 'character')} or more",
    "string_too_long": lambda c: f"{_count(c['max_length'], 'character')} or fewer",
    "literal_error": lambda c: str(c["expected"]),
}


def validation_message(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first of pydantic's errors as one line, and its field (None: the whole body)."""
    first = errors[0]
    kind, context, value = str(first["type"]), first.get("ctx", {}), first.get("input")
    place = list(first["loc"])
    if place[:1] in (["body"], ["query"], ["path"], ["header"]):
        place = place[1:]
    if kind == "json_invalid":
        return f"the body is not JSON: {context.get('error', 'unreadable')} at character {place[-1]}", None
    field = path([*place, context["field"]] if "field" in context else place)
    message = _message(kind, context, value, str(first["msg"]))
    if field:
        return f"{field}: {message}", field
    return (_no_object(value, kind) if kind in ("missing", "model_type", "model_attributes_type") else message), None


def path(place: Sequence[str | int]) -> str:
    """The path of a field in the body, such as `messages[0].content[1].text`."""
    written = ""
    for step in place:
        if isinstance(step, int):
            written += f"[{step}]"
        elif step not in TAGS:
            written += f".{plain(step)}" if written else plain(step)
    return written


def shown(value: Any) -> str:
    """A value for a message: one line of at most 80 printable characters; of lists and objects only the kind."""
    if isinstance(value, str):
        return "'" + plain(value) + "'"
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "a number of many digits"
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return f"a {type(value).__name__}"


def plain(text: str) -> str:
    """A text cut to 80 characters, with line breaks, control characters and surrogates escaped."""
    cut = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def unreadable(cause: BaseException) -> str:
    """A message of one line that says why a body could not be read."""
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not UTF-8: byte {cause.start} belongs to no character"
    if isinstance(cause, RecursionError):
        return "the body is not usable JSON: lists or objects are nested too deeply"
    if isinstance(cause, ValueError) and "digits" in str(cause):
        return "the body is not usable JSON: a number has too many digits"
    return "the body could not be read"


def _message(kind: str, context: _Context, value: Any, fallback: str) -> str:
    if kind == "missing":
        return "expected a value, found none"
    if kind == "extra_forbidden":
        return "there is no such field here"
    if kind == "logo":
        return fallback
    if kind == "logo_kind":
        return f"expected {fallback}, found {shown(value)}"
    if kind not in _EXPECTED:
        return fallback[:1].lower() + fallback[1:]
    if kind in ("too_short", "too_long"):
        found = str(context["actual_length"])
    elif kind.startswith("string_too"):
        found = str(len(value))
    else:
        found = shown(value)
    return f"expected {_EXPECTED[kind](context)}, found {found}"


def _no_object(value: Any, kind: str) -> str:
    if isinstance(value, bytes):
        return "expected a JSON object and 'Content-Type: application/json', found another type of content"
    return f"expected a JSON object as body, found {'nothing' if kind == 'missing' else shown(value)}"


def _number(bound: float) -> str:
    return str(int(bound)) if int(bound) == bound else f"{bound:g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
