"""A picture as a list of marks with roles instead of colours: SVG follows the page's light or dark colours
(`templates/picture.html`). Lengths are CSS pixels, y grows downwards."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import ClassVar, Literal

Anchor = Literal["start", "middle", "end"]

SERIES = 8  # colours; more runs begin again, with the next shape
SHAPES = 4  # circle, diamond, square, triangle
SMALL = 12.0  # font size of ticks and names
_CORNERS: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
)
_WIDTH = 0.55  # average width of a character in proportional print, in font sizes


@dataclass(frozen=True)
class Rect:
    """A filled rectangle."""

    kind: ClassVar = "rect"
    x: float
    y: float
    width: float
    height: float
    role: str
    title: str = ""


@dataclass(frozen=True)
class Stroke:
    """A straight line."""

    kind: ClassVar = "stroke"
    x1: float
    y1: float
    x2: float
    y2: float
    role: str
    width: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Dot:
    """A point of radius `r`; `shape` is the number of one of `SHAPES`."""

    kind: ClassVar = "dot"
    x: float
    y: float
    r: float
    role: str
    shape: int = 0
    title: str = ""

    @property
    def corners(self) -> list[tuple[float, float]]:
        """The corners of the shape; a circle has none."""
        return [(self.x + self.r * dx, self.y + self.r * dy) for dx, dy in _CORNERS[self.shape]]


@dataclass(frozen=True)
class Label:
    """A line of text whose baseline's `anchor` lies at (x, y)."""

    kind: ClassVar = "label"
    x: float
    y: float
    text: str
    role: str = "ink"
    anchor: Anchor = "start"
    bold: bool = False
    title: str = ""


SceneMark = Rect | Stroke | Dot | Label


@dataclass(frozen=True)
class Scene:
    """One picture. `text` says in words what it shows."""

    name: str
    title: str
    text: str
    width: float
    height: float
    marks: tuple[SceneMark, ...]


def series(number: int) -> tuple[str, int]:
    """The role and shape of a run by its place."""
    return f"s{number % SERIES}", (number + number // SERIES) % SHAPES


def text_width(text: str) -> float:
    """The approximate width of a text in pixels."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return SMALL * (_WIDTH * (len(text) - wide) + wide)


def short(text: str, longest: int = 40) -> str:
    """A name shortened in its middle, because names mostly differ at their ends."""
    text = " ".join(text.split())
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    span = high - low
    if not span > 0:
        return [low, low + 1.0]
    power = 10.0
    step = 1.0
    while step * about > span:
        step /= power
    while step * power * about < span:
        step *= power
    step *= next((factor for factor in (1, 2, 5) if factor * step * about >= span), 10)
    first, last = int(low // step), int(-(-high // step))
    return [number * step for number in range(first, last + 1)]
