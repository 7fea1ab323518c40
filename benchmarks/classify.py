"""How fast a server that only selects is, and whether it selects as the library does.

    taskset -c 0 python benchmarks/classify.py BASE POOL ROWS OUT           (all on one core, clients too)

ROWS is a folder of JSONL files with a `context` per row. All prompts are sent to `POST /classify` of
`logo serve --select-only`, ten at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from servers import answered, asked, serving

PORT = 8114
AT_ONCE = 10


def classified(prompt: str, none: str) -> tuple[str, float]:
    """The adapter with the highest score, whatever `none` of them has, and the milliseconds of its request."""
    began = time.perf_counter()
    labels = json.loads(answered(PORT, "classify", {"inputs": prompt}))
    took = 1e3 * (time.perf_counter() - began)
    [scores] = labels if isinstance(labels[0], list) else [labels]
    ranked = sorted(scores, key=lambda entry: -entry["score"])
    return next(entry["label"] for entry in ranked if entry["label"] != none), took


def selected(options: argparse.Namespace, prompts: list[str]) -> list[str]:
    """What each prompt selects first by the library, which `logo select` is."""
    from logo import LoGo

    logo = LoGo.from_pretrained(options.base, options.pool, dtype="auto")
    return [next(iter(logo.select(prompt).adapters)) for prompt in prompts]


def main() -> None:
    """Measures, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the base model")
    parser.add_argument("pool", type=Path, help="a folder of adapters")
    parser.add_argument("rows", type=Path, help="a folder of JSONL files")
    parser.add_argument("out", type=Path, help="a folder for logs")
    parser.add_argument("--count", type=int, default=500, help="prompts (default: 500)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    none = Path(options.base).name  # which the base model is called by clients
    by_file = [file.read_text().splitlines() for file in sorted(options.rows.glob("*.jsonl"))]
    lines = [line for nth in zip(*by_file, strict=False) for line in nth][: options.count]
    prompts = [json.loads(line)["context"] for line in lines]
    command = [sys.executable, "-m", "logo.cli", "serve", "--select-only", "--base-model", options.base]
    command += ["--adapters", str(options.pool), "--port", str(PORT)]
    server = serving(command, lambda: asked(PORT, "ready") is not None, options.out / "server.log")
    with server, ThreadPoolExecutor(AT_ONCE) as clients:
        replies = list(clients.map(lambda prompt: classified(prompt, none), prompts))
    took = [milliseconds for _, milliseconds in replies]
    shown = ", ".join(f"p{share} {np.percentile(took, share):.0f}" for share in (50, 90, 99))
    print(f"{len(prompts)} prompts, {AT_ONCE} at a time, milliseconds: {shown}", flush=True)
    expected = selected(options, prompts)
    same = sum(label == first for (label, _), first in zip(replies, expected, strict=True))
    print(f"the same first adapter as by the library: {same} of {len(prompts)}")


if __name__ == "__main__":
    main()
