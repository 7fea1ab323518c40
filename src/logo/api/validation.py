"""Messages about invalid requests, one line each: `max_tokens: Input should be greater than or equal to 1`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from logo.api.fields import TAGS

_SHOWN = 80  # characters of a text that a message shows


def validation_message(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first of pydantic's errors as one line, and its field (None: the whole body)."""
    first = errors[0]
    context, place = first.get("ctx", {}), list(first["loc"])
    if place[:1] in (["body"], ["query"], ["path"], ["header"]):
        place = place[1:]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {context.get('error', 'unreadable')} at character {place[-1]}", None
    field = path([*place, context["field"]] if "field" in context else place)
    if not field and isinstance(first.get("input"), bytes):
        return "expected a JSON object and 'Content-Type: application/json', found another type of content", None
    return f"{field or 'body'}: {first['msg']}", field or None


def path(place: Sequence[str | int]) -> str:
    """The path of a field in the body, such as `messages[0].content[1].text`."""
    written = ""
    for step in place:
        if isinstance(step, int):
            written += f"[{step}]"
        elif step not in TAGS:
            written += f".{plain(step)}" if written else plain(step)
    return written


def shown(text: str) -> str:
    """A text for a message: one line of at most 80 printable characters."""
    return f"'{plain(text)}'"


def plain(text: str) -> str:
    """A text cut to 80 characters, with line breaks, control characters and surrogates escaped."""
    cut = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
