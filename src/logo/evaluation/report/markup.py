"""HTML and SVG built from Python: whatever is not markup already is escaped, so text from data cannot become any."""

from __future__ import annotations

import html
import re

_VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta", "wbr"})
# Not allowed in HTML, and half of a surrogate pair is no character at all.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

Attribute = str | int | float | bool | None


class Html(str):
    """Text that is markup. Made by `element` and `join` only."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Text as markup, safe in elements and in quoted attributes; markup stays as it is."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", str(text))))


def join(*parts: object) -> Html:
    """Parts one after the other; None is nothing."""
    return Html("".join(escape(part) for part in parts if part is not None))


def element(name: str, *children: object, **attributes: Attribute) -> Html:
    """An element. `class_` is `class`, other underscores are dashes; None and False leave an attribute out, True gives
    it no value. Numbers are written short."""
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def number(value: float) -> str:
    """A number with at most two digits after the point, and no more than it needs."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")  # + 0.0: no negative zero


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{escape(number(value) if isinstance(value, float) else value)}"'
