"""Trains a pool with adapters of different recipes, as people's collections have them.

    python tools/mixed_drawer.py --base-model GEMMA_270M --tasks DIR --out POOL [--recipes tools/other_drawer.yaml]

It has twenty tasks and four recipes (mixed_drawer.yaml) with different ranks, targets, learning rates and numbers of
steps, one of them with rsLoRA; other_drawer.yaml has sixteen other tasks and five other recipes, and in
random_drawer.yaml, other_random_drawer.yaml and wide_random_drawer.yaml each of eighteen adapters has a recipe of its
own. Closely related tasks have different recipes, so that a strongly trained neighbour stands beside a weakly trained
right adapter. This is `logo train` with that file, so the same command trains what an interrupted run has not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from logo.cli import main as logo

RECIPES = Path(__file__).with_suffix(".yaml")


def main() -> None:
    """Command line of the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True, help="the folder of Gemma 3 270M, or another base model")
    parser.add_argument("--tasks", required=True, help="folder of TASK.jsonl with the tasks of the recipes")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="tasks and recipes (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder of the pool")
    options, more = parser.parse_known_args()
    names = ",".join(yaml.safe_load(options.recipes.read_text(encoding="utf-8"))["tasks"])
    given = ["--base-model", options.base_model, "--rows", options.tasks, "--out", options.out]
    logo(["train", *given, "--tasks", names, "--recipe", str(options.recipes), *more])


if __name__ == "__main__":
    sys.exit(main())
