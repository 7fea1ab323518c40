"""The README's picture: how often the right adapter comes first and how many answers are exact, by several methods.

    python tools/signals_picture.py STUDY docs/images/signals.svg

STUDY is the folder of a study of rows in several wordings, `training`, `terse`, `chatty` and `first`, with rows of
tasks that have no adapter, example prompts, an encoder, the signals `calibrated,responses+examples,responses` and
LoraRetriever (docs/study.md has the command).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import altair as alt
import pandas as pd

ARMS = {
    "base model": "base",
    "all adapters alike": "uniform",
    "text encoder": "loraretriever",
    "LoGo, no examples": "responses",
    "LoGo": "responses+examples",
    "LoGo, text encoder": "calibrated",
    "right adapter": "target",
}
METHODS = tuple(ARMS)
SHOWN = ("training wording", "other words", "nothing fits")
MEASURES = ("right adapter first", "exact answers")
OTHER_WORDS = ("terse", "chatty", "first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    run = json.loads((args.study / "run.json").read_text(encoding="utf-8"))
    wordings = run["report"]["wordings"]
    values = [
        {"method": method, "panel": panel, "measure": measure, "value": value}
        for method, arm in ARMS.items()
        for panel in SHOWN
        for measure, value in zip(MEASURES, numbers(wordings, panel, arm), strict=True)
        if value is not None
    ]
    chart(pd.DataFrame(values)).save(args.picture)


def numbers(wordings: dict[str, Any], panel: str, arm: str) -> tuple[float | None, float | None]:
    """The share of rows whose right adapter comes first, and of exact answers; None where there is no such number."""
    names = OTHER_WORDS if panel == "other words" else ("training",)
    protocol = "out-of-pool" if panel == "nothing fits" else "in-pool"
    reports = [wordings[name]["protocols"][protocol].get(arm, {}) for name in names]
    return average(reports, "top1"), average(reports, "exact_match")


def average(reports: list[dict[str, Any]], measure: str) -> float | None:
    values = [report[measure]["value"] for report in reports if measure in report]
    return mean(values) if values else None


def chart(values: pd.DataFrame) -> alt.HConcatChart:
    colour = alt.Color(
        "measure:N",
        sort=list(MEASURES),
        scale=alt.Scale(domain=list(MEASURES), range=["#b9c2d0", "#3f6fd1"]),
        legend=alt.Legend(title=None, orient="bottom", labelFontSize=15, symbolSize=160, columnPadding=60),
    )
    names = alt.Axis(title=None, labelFontSize=15, labelLimit=200, ticks=False, domain=False, labelPadding=8)

    def panel(title: str, axis: alt.Axis | None) -> alt.LayerChart:
        base = alt.Chart(values[values["panel"] == title]).encode(
            y=alt.Y("method:N", sort=list(METHODS), axis=axis, scale=alt.Scale(domain=list(METHODS), paddingInner=0.3)),
            yOffset=alt.YOffset("measure:N", sort=list(MEASURES)),
            x=alt.X("value:Q", axis=None, scale=alt.Scale(domain=[0, 1.35])),
        )
        labels = base.mark_text(align="left", dx=4, fontSize=14, fontWeight="bold", baseline="middle")
        shown = labels.encode(text=alt.Text("value:Q", format=".2f"))
        heading = alt.TitleParams(title, fontSize=15, anchor="start", frame="group")
        return (base.mark_bar().encode(color=colour) + shown).properties(width=132, height=270, title=heading)

    panels = [panel(title, None if at else names) for at, title in enumerate(SHOWN)]
    drawn: alt.HConcatChart = alt.hconcat(*panels, spacing=34).configure_view(stroke=None)
    # Browsers without the font that was measured here draw wider texts.
    return drawn.properties(background="white", padding={"left": 34, "right": 10, "top": 10, "bottom": 10})


if __name__ == "__main__":
    main()
