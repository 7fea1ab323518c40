"""A scene as inline SVG. Colours are the page's: every mark has its role as its class."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

from logo.evaluation.intervals import Values
from logo.evaluation.report.markup import Html, element, join, number
from logo.evaluation.report.scene import Dot, Label, Raster, Rect, Scene, SceneMark, Stroke

POSITIVE = (46, 120, 210)
NEGATIVE = (214, 90, 60)


def svg(scene: Scene) -> Html:
    """An `<svg>` that a screen reader announces by its title and text."""
    name = f"picture-{scene.name}"
    return element(
        "svg",
        element("title", scene.title, id=f"{name}-title"),
        element("desc", scene.text, id=f"{name}-text"),
        *(svg_mark(mark) for mark in scene.marks),
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        aria_labelledby=f"{name}-title {name}-text",
        viewBox=f"0 0 {number(scene.width)} {number(scene.height)}",
        width=scene.width,
        height=scene.height,
    )


def coloured(values: Values) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """RGBA (rows, columns, 4) of numbers in [-1, 1]: two hues, opacity for strength, so that they suit any ground."""
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(values[..., None] >= 0, np.array(POSITIVE), np.array(NEGATIVE))
    pixels[..., 3] = np.round(255 * np.clip(np.abs(values), 0.0, 1.0))
    return pixels


def png_uri(values: Values) -> str:
    """A `data:` URI of a PNG with one pixel per number of a matrix in [-1, 1]."""
    pixels = coloured(values)
    rows, columns = values.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: no filter
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)  # eight bits, RGBA
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def svg_mark(mark: SceneMark) -> Html:
    """One mark as an element."""
    if isinstance(mark, Rect):
        role = f"{mark.role} frame" if mark.outline else mark.role
        return element(
            "rect", _title(mark.title), x=mark.x, y=mark.y, width=mark.width, height=mark.height, class_=role
        )
    if isinstance(mark, Stroke):
        return element(
            "line",
            _title(mark.title),
            x1=mark.x1,
            y1=mark.y1,
            x2=mark.x2,
            y2=mark.y2,
            stroke_width=mark.width,
            class_=f"{mark.role} stroke",
        )
    if isinstance(mark, Dot):
        return _dot(mark)
    if isinstance(mark, Label):
        return element(
            "text",
            mark.text,
            _title(mark.title),
            x=mark.x,
            y=mark.y,
            font_size=mark.size,
            text_anchor=mark.anchor if mark.anchor != "start" else None,
            font_weight="600" if mark.bold else None,
            transform=f"rotate(-90 {number(mark.x)} {number(mark.y)})" if mark.up else None,
            class_=f"{mark.role} text",
        )
    return _raster(mark)


def _dot(dot: Dot) -> Html:
    x, y, r = dot.x, dot.y, dot.r
    if dot.shape == 0:
        return element("circle", _title(dot.title), cx=x, cy=y, r=r, class_=dot.role)
    corners = {
        1: [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        2: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        3: [(0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
    }[dot.shape]
    points = " ".join(f"{number(x + r * dx)},{number(y + r * dy)}" for dx, dy in corners)
    return element("polygon", _title(dot.title), points=points, class_=dot.role)


def _raster(raster: Raster) -> Html:
    picture = element(
        "image",
        x=raster.x,
        y=raster.y,
        width=raster.width,
        height=raster.height,
        preserveAspectRatio="none",
        href=png_uri(raster.values),
        class_="raster",
        data_matrix=raster.key or None,
    )
    edge = element(
        "rect", x=raster.x, y=raster.y, width=raster.width, height=raster.height, class_="grid frame", fill="none"
    )
    return join(picture, edge)


def _title(text: str) -> Html | None:
    return element("title", text) if text else None
