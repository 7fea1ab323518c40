"""Draws `logo.serving.traffic`: wins of adapters in either half, and a histogram of confidence."""

from __future__ import annotations

from logo.drawing import as_png, new_figure
from logo.serving.traffic import Traffic

# The most adapters that are drawn, by wins.
DRAWN = 30


def picture(found: Traffic) -> bytes:
    """A PNG: the shares of the first and the second half that adapters won, and a histogram of confidence."""
    drawn = found.adapters[:DRAWN]
    figure = new_figure(9.0, 1.6 + 0.24 * max(8, len(drawn)), layout="constrained")
    wins, sure = figure.subplots(1, 2, width_ratios=(3, 2))
    for half, label in enumerate(("first half", "second half")):
        places = [row + 0.2 * (2 * half - 1) for row in range(len(drawn))]
        wins.barh(places, [adapter.halves[half] for adapter in drawn], height=0.36, label=label)
    wins.set_yticks(range(len(drawn)), [adapter.name for adapter in drawn])
    for label in wins.get_yticklabels():
        label.set_parse_math(False)  # names may hold $
    wins.invert_yaxis()
    more = len(found.adapters) - len(drawn)
    wins.set(xlabel="share of prompts won" + (f" ({more} more adapters)" if more else ""))
    wins.legend(frameon=False)
    sure.bar(range(len(found.confidence)), found.confidence, width=0.9, align="edge")
    sure.set_xticks(range(0, 11, 2), [f"{tenth / 10:.1f}" for tenth in range(0, 11, 2)])
    sure.set(xlabel="confidence", ylabel="prompts")
    return as_png(figure, dpi=120, metadata={"Software": None})
