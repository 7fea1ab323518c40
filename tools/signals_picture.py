"""The README's picture: how often signals find the right adapter, and what answers are worth, as a study measured it.

    PYTHONPATH=src python tools/signals_picture.py study docs/images/signals.svg

Reads what `logo eval study --signals calibrated,norm,entropy --save study` wrote. Text becomes paths, so that it
looks the same everywhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

OURS, PAPER, OTHER, EDGE = "#3f6fd1", "#d98a3d", "#b9c2d0", "#1c2536"
LABELS = {
    "calibrated": "LoGo",
    "norm": "paper: norm",
    "entropy": "paper: entropy",
    "target": "right adapter",
    "uniform": "all alike",
    "base": "no adapter",
    "chance": "chance",
}
COLOURS = {"calibrated": OURS, "norm": PAPER, "entropy": PAPER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    study = json.loads((args.study / "run.json").read_text())
    arms = study["report"]["protocols"]["in-pool"]
    found = {name: arms[name]["top1"]["value"] for name in ("calibrated", "norm", "entropy")}
    found["chance"] = 1 / len(study["identity"]["pool"])
    worth = {name: arm["exact_match"]["value"] for name, arm in arms.items()}
    order = ("target", "calibrated", "uniform", "norm", "entropy", "base")
    plt.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "logo", "font.size": 13}
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04)
    bars(left, found, "finds the right adapter", limit=1.0)
    bars(right, {name: worth[name] for name in order}, "answers exactly", limit=None)
    figure.savefig(args.picture, metadata={"Date": None}, facecolor="white")


def bars(axes: Any, values: dict[str, float], title: str, limit: float | None) -> None:
    names = list(values)
    drawn = axes.barh(names, list(values.values()), color=[COLOURS.get(name, OTHER) for name in names], height=0.66)
    axes.bar_label(drawn, [f"{value:.2f}" for value in values.values()], padding=4, color=EDGE, fontweight="bold")
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names], color=EDGE)
    axes.set_title(title, loc="left", color=EDGE, fontweight="bold", fontsize=14)
    axes.set_xlim(0, (limit or max(values.values())) * 1.14)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    main()
