"""How often a comparison marks a difference where there is none: two equal runs over 26 datasets of 150 rows.

    python benchmarks/equal_runs.py [REPETITIONS]

The datasets are in the paper's groups, with its metrics. A row is as hard for one run as for the other, and each run
draws its value anew. At most one in twenty comparisons may mark anything (Holm's method, at 0.05).
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pandas

from logo.evaluation.compare import compare
from logo.evaluation.metrics import measures, scale_of
from logo.evaluation.statistics import ALPHA

ROWS = 150
DATASETS = {"bbh": (8, "em"), "wmt14": (2, "bleu"), "wmt16": (4, "bleu"), "gem": (4, "rouge")}
DATASETS |= {"ai2_arc": (2, "em"), "nq": (1, "em"), "tqa": (1, "em"), "anli": (3, "em"), "glue": (1, "em")}


def equal_runs(seed: int, rows: int = ROWS) -> pandas.DataFrame:
    """A table of results of two runs that are equally good."""
    random = np.random.default_rng(seed)
    table = []
    for main, (count, metric) in DATASETS.items():
        for number in range(count):
            hard = random.beta(2, 2, rows)
            for run in ("one", "other"):
                for value in drawn(random, hard, metric):
                    row = {"run": run, "dataset": f"{main}.{number}", "metric": metric, "scale": scale_of(metric)}
                    table.append({**row, "value": value})
    return pandas.DataFrame(table)


def drawn(random: np.random.Generator, hard: np.ndarray, metric: str) -> list[Any]:
    """Values of rows of this difficulty."""
    if metric == "em":
        return [int(value) for value in random.random(len(hard)) < hard]
    columns = {name: np.clip(random.normal(hard, 0.2), 0, 1) for name in measures(metric)}
    if metric == "bleu":
        return [float(value) for value in columns["bleu"]]
    return [dict(zip(columns, map(float, values), strict=True)) for values in zip(*columns.values(), strict=True)]


def marks_anything(seed: int, rows: int = ROWS) -> bool:
    """Whether a comparison of two equal runs marks a line."""
    return any(line.pair.is_marked for line in compare(equal_runs(seed, rows), seed=seed).lines)


if __name__ == "__main__":
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        marked = sum(pool.map(marks_anything, range(repetitions), chunksize=5))
    print(f"{marked} of {repetitions} comparisons of equal runs mark a difference ({marked / repetitions:.1%})")
    sys.exit(marked > ALPHA * repetitions)
