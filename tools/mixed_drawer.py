"""Trains a pool with adapters of different training configs, as people's collections have them.

    python tools/mixed_drawer.py --base-model SMOLLM2_135M --rows DIR --out POOL [--configs FILE]

It has twenty tasks and four configs (mixed_drawer.yaml) with different ranks, targets, learning rates and numbers of
steps, one of them with rsLoRA. Closely related tasks have different configs, so that a strongly trained neighbour
stands beside a weakly trained right adapter. This is one `logo train` per task, so the same command trains what an
interrupted run has not. docs/study.md has measurements on such a pool.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from logo.training.config import TrainingConfig
from logo.training.pool import train


def main() -> None:
    """Command line of the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True, help="Hub id or folder")
    parser.add_argument("--rows", required=True, type=Path, help="folder of TASK.jsonl with the tasks of the configs")
    parser.add_argument("--configs", type=Path, default=Path(__file__).with_suffix(".yaml"), help="tasks and configs")
    parser.add_argument("--out", required=True, type=Path, help="folder of the pool")
    options = parser.parse_args()
    shared = yaml.safe_load(options.configs.read_text(encoding="utf-8"))
    for name, own in shared.pop("tasks").items():
        run = train(options.rows, options.base_model, options.out, TrainingConfig(**shared, **own), tasks=name)
        if name in run.failed:
            print(name, run.failed[name])
        else:
            record = run.trained.get(name) or run.done[name]
            print(name, record["result"]["held_out_loss"])


if __name__ == "__main__":
    main()
