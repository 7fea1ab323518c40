"""The picture of a pool: overlaps of column spaces, norms and effective ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from logo.evaluation.report.adapters import leaf_order
from logo.evaluation.report.pictures import NAMED, PAD, heat_map
from logo.evaluation.report.scene import Label, Raster, Rect, Scene, SceneMark, short

if TYPE_CHECKING:
    from logo.adapters.upkeep.anatomy import Anatomy

GAP = 24.0  # between the map and the bars
BARS = 120.0  # width of the longest bar


def likeness(found: Anatomy) -> Scene:
    """Overlaps as a heat map, alike adapters side by side; a bar per adapter for its norm and its effective rank."""
    values = np.nan_to_num(found.overlap.numpy(), nan=0.0)
    values = (values + values.T) / 2
    np.fill_diagonal(values, 0.0)
    most = float(values.max(initial=0.0)) or 1.0  # the largest overlap of two adapters scales the colours
    np.fill_diagonal(values, 1.0)
    order = leaf_order(1.0 - values)
    names = [found.names[place] for place in order]
    text = f"{len(names)} adapters, ordered so that alike ones are neighbours; beside each its norm and effective rank."
    scale = ("0", f"{most:.2f}", "overlap of column spaces")
    pixels = np.clip(values[np.ix_(order, order)] / most, 0.0, 1.0)
    scene = heat_map("likeness", "Overlap of updates", text, names, names, pixels, scale, square=True)
    [field] = (mark for mark in scene.marks if isinstance(mark, Raster) and mark.key)
    first = field.x + field.width + GAP
    norms = [found.norm(name) for name in names]
    ranks = [found.effective_rank(name) for name in names]
    marks = [
        *scene.marks,
        *_bars(names, norms, "norm", first, field, "s0"),
        *_bars(names, ranks, "effective rank", first + BARS + GAP, field, "s2"),
    ]
    width = max(scene.width, first + 2 * (BARS + GAP) + PAD)
    return Scene(scene.name, scene.title, scene.text, width, scene.height, tuple(marks))


def _bars(
    names: Sequence[str], values: Sequence[float], what: str, left: float, field: Raster, role: str
) -> Iterator[SceneMark]:
    longest = max(values, default=0.0)
    step = field.height / max(1, len(names))
    yield Label(left, field.y - 17, f"{what}, up to {longest:.3g}", "muted")
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        if value > 0:
            y = field.y + step * row + (1.0 if step >= NAMED else 0.0)
            height = step - (2.0 if step >= NAMED else 0.0)
            yield Rect(left, y, BARS * value / longest, height, role, f"{short(name)}: {value:.3g}")
