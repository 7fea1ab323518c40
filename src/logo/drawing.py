"""Figures of matplotlib as PNGs, without its global state and without a window system."""

from __future__ import annotations

import io
import logging
import warnings
from typing import Any

SERIES = ("#2563a8", "#c9591f", "#1f8a63", "#8a4fb5", "#9a7400", "#c2386b", "#1f8799", "#5f666e")  # as the page's


def new_figure(width: float, height: float, **options: Any) -> Any:
    """A `matplotlib.figure.Figure` of this size in inches.

    Args:
        options: further options of that class.
    """
    from matplotlib.figure import Figure  # the class behind pyplot

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # otherwise it reports where it keeps its fonts
    return Figure(figsize=(width, height), **options)


def as_png(figure: Any, **options: Any) -> bytes:
    """The figure as a PNG file.

    Args:
        options: of `Figure.savefig`.
    """
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name with characters that the font lacks is drawn with boxes
        figure.savefig(picture, format="png", **options)
    return picture.getvalue()
