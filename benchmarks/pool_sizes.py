"""How the confidence depends on the size of a pool: rows whose adapter is there, and rows whose adapter is not.

    python benchmarks/pool_sizes.py BASE POOL ROWS

ROWS is a folder of NAME.jsonl files, whose rows are the adapter NAME's: `{"context": ...}`, or `{"messages": [...]}`
that ends with the assistant's answer. Smaller pools are random parts of POOL, which a call names as its candidates.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from logo import LoGo

SURE = 0.5  # from which confidence on a selection is not unsure


def prompt_of(row: dict[str, Any]) -> Any:
    """What a row asks: a text, or a conversation."""
    return row["messages"][:-1] if "messages" in row else row["context"]


def share_of_sure(confidences: Sequence[float]) -> float:
    """Which share of selections is not unsure."""
    return mean(confidence >= SURE for confidence in confidences)


def main() -> None:
    """Measures every size, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the base model")
    parser.add_argument("pool", help="a folder of adapters")
    parser.add_argument("rows", type=Path, help="a folder of JSONL files")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8], help="of parts of the pool (default: 2 4 8)")
    parser.add_argument("--draws", type=int, default=6, help="how many parts of each size (default: 6)")
    parser.add_argument("--limit", type=int, default=4, help="rows of each adapter (default: 4)")
    options = parser.parse_args()
    logo = LoGo.from_pretrained(options.base, options.pool)
    rows: list[tuple[str, Any]] = []  # the right adapter, and the prompt
    for name in logo.names:
        file = options.rows / f"{name}.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines()[: options.limit] if file.is_file() else ():
            rows.append((name, prompt_of(json.loads(line))))
    drawn = random.Random(0)
    print(f"{len(rows)} rows of {len({name for name, _ in rows})} adapters, in parts of a pool of {len(logo.names)}")
    print(f"{'adapters':>8}  {'its adapter there: mean':>24}  {'sure':>4}  {'not there: mean':>16}  {'sure':>4}")
    for size in options.sizes:
        there: list[float] = []
        not_there: list[float] = []
        for _ in range(options.draws):
            candidates = drawn.sample(logo.names, size)
            selections = logo.select([prompt for _, prompt in rows], candidates=candidates)
            for (name, _), selection in zip(rows, selections, strict=True):
                (there if name in candidates else not_there).append(selection.confidence)
        print(
            f"{size:>8}  {mean(there):>24.2f}  {share_of_sure(there):>4.2f}  {mean(not_there):>16.2f}  "
            f"{share_of_sure(not_there):>4.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
