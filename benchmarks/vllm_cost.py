"""What LoGo costs in vLLM: requests per second, first token and time between tokens, as `vllm bench serve` sees them.

    python benchmarks/vllm_cost.py BASE POOL ROWS OUT                        (with the Python that has vLLM and pandas)
    python benchmarks/vllm_cost.py BASE POOL ROWS OUT --lengths 40,200 --at-once 1,8

Each arm is a server of its own, on which the same prompts are measured:

    base       vLLM without LoRA
    adapter    vLLM's own LoRA, one adapter that every request names
    forced     LoGo in vLLM, the same adapter named
    k1 k4 k20  LoGo in vLLM, adapters selected for every prompt

ROWS is a folder of JSONL files with a `context` per row; prompts are such texts, one after the other until they have
the length. Every prompt is new to its server. What OUT has already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers import HOST, asked, serving

BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)


@dataclass(frozen=True)
class Cell:
    """Prompts of so many tokens, so many at a time."""

    length: int
    at_once: int

    @property
    def requests(self) -> int:
        """How many are measured."""
        return max(4, self.at_once if self.length > 500 else 2 * self.at_once)

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.length}-{self.at_once}"


@dataclass(frozen=True)
class Arm:
    """A server, the model that requests name, and what they ask of LoGo."""

    name: str
    command: Sequence[str]
    model: str
    asked: Any = None


def arms(options: argparse.Namespace, own: Sequence[str]) -> list[Arm]:
    """The arms that were asked for; `own`: vLLM's flags that `logo serve` would give, for servers without LoGo."""
    python = sys.executable
    plain = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", options.base, "--served-model-name", "base")
    plain = (*plain, "--host", HOST, "--port", str(options.port), *own, *options.flags)
    serve = (python, "-m", "logo.cli", "serve", "--engine", "vllm", "--base-model", options.base)
    logo = (*serve, "--adapters", str(options.pool), "--port", str(options.port), "--", *options.flags)
    adapter = options.pool / options.adapter
    lora = ("--enable-lora", "--max-lora-rank", str(options.rank), "--lora-modules", f"{options.adapter}={adapter}")
    known = {
        "base": Arm("base", plain, "base"),
        "adapter": Arm("adapter", (*plain, *lora), options.adapter),
        "forced": Arm("forced", logo, options.adapter),
    }
    for k in options.k:
        known[f"k{k}"] = Arm(f"k{k}", logo, "logo", {"logo": {"k": k}})
    return [known[name] for name in options.arms or known]


def flags_of(options: argparse.Namespace) -> list[str]:
    """The flags of vLLM that do not concern adapters, as `logo serve --dry-run` prints them."""
    serve = [sys.executable, "-m", "logo.cli", "serve", "--engine", "vllm", "--dry-run"]
    shown = subprocess.run(
        [*serve, "--base-model", options.base, "--adapters", str(options.pool)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    flags: list[str] = []
    for name in ("--dtype", "--max-num-seqs", "--kv-cache-memory-bytes", "--block-size"):
        if name in shown:
            flags += [name, shown[shown.index(name) + 1]]
    for name in ("--no-enable-chunked-prefill", "--enforce-eager"):
        if name in shown:
            flags.append(name)
    return flags


def write_prompts(options: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """Writes the prompts of all cells; no two begin alike."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(options.base)
    texts = [json.loads(line)["context"] for file in sorted(options.rows.glob("*.jsonl")) for line in file.open()]
    drawn = random.Random(0)
    for cell in cells:
        with (options.out / f"prompts-{cell.name}.jsonl").open("w") as file:
            for _ in range(cell.requests):
                ids: list[int] = []
                while len(ids) < cell.length:
                    ids += tokenizer(drawn.choice(texts) + "\n\n", add_special_tokens=False).input_ids
                prompt = tokenizer.decode(ids[: cell.length])
                file.write(json.dumps({"prompt": prompt, "output_tokens": options.tokens}) + "\n")


def server(arm: Arm, options: argparse.Namespace) -> AbstractContextManager[object]:
    """The arm's server, which is up when it has answered once."""
    has_logo = arm.model == "logo" or arm.name == "forced"
    environment = os.environ if has_logo else {**os.environ, "VLLM_PLUGINS": ""}
    body = {"model": arm.model, "prompt": "Hello there", "max_tokens": 4, "temperature": 0, **(arm.asked or {})}
    log = options.out / f"{arm.name}.log"
    return serving(arm.command, lambda: asked(options.port, "v1/completions", body) is not None, log, environment)


def measure(arm: Arm, cell: Cell, options: argparse.Namespace) -> None:
    """Runs `vllm bench serve` on one cell."""
    command = [sys.executable, "-c", BENCH, "--backend", "openai", "--base-url", f"http://{HOST}:{options.port}"]
    command += ["--model", arm.model, "--tokenizer", options.base, "--dataset-name", "custom"]
    command += ["--dataset-path", str(options.out / f"prompts-{cell.name}.jsonl"), "--skip-chat-template"]
    command += ["--custom-output-len", str(options.tokens), "--num-prompts", str(cell.requests), "--disable-shuffle"]
    command += ["--max-concurrency", str(cell.at_once), "--temperature", "0", "--ignore-eos", "--save-result"]
    command += ["--result-filename", str(result_of(arm, cell, options))]
    if arm.asked is not None:
        command += ["--extra-body", json.dumps(arm.asked)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{arm.name}, {cell.name}: vllm bench serve failed\n{ran.stderr[-2000:]}")


def result_of(arm: Arm, cell: Cell, options: argparse.Namespace) -> Path:
    """The file of a cell's result."""
    path: Path = options.out / f"{arm.name}-{cell.name}.json"
    return path


def table(all_arms: Sequence[Arm], cells: Sequence[Cell], options: argparse.Namespace) -> str:
    """What was measured: an arm per line."""
    lines = [
        f"{'tokens':>6} {'at once':>7}  {'arm':8} {'requests/s':>10} {'of base':>8} {'first s':>8} {'between ms':>10}"
    ]
    for cell in cells:
        base = None
        for arm in all_arms:
            file = result_of(arm, cell, options)
            if not file.is_file():
                continue
            found = json.loads(file.read_text())
            if found["failed"]:
                lines.append(
                    f"{cell.length:6} {cell.at_once:7}  {arm.name:8} {found['failed']} of {cell.requests} failed"
                )
                continue
            rate = found["request_throughput"]
            base = rate if arm.name == "base" else base
            share = "" if base is None else f"{rate / base:.2f}"
            lines.append(
                f"{cell.length:6} {cell.at_once:7}  {arm.name:8} {rate:10.2f} {share:>8} "
                f"{found['median_ttft_ms'] / 1e3:8.2f} {found['median_tpot_ms']:10.0f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing, and prints the table."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the base model")
    parser.add_argument("pool", type=Path, help="a folder of adapters")
    parser.add_argument("rows", type=Path, help="a folder of JSONL files with a `context` per row")
    parser.add_argument("out", type=Path, help="a folder for results")
    parser.add_argument("--adapter", help="the adapter that is named (default: the pool's first)")
    parser.add_argument("--rank", type=int, default=16, help="vLLM's --max-lora-rank for that adapter (default: 16)")
    parser.add_argument("--lengths", type=numbers, default=[40, 200, 1000], help="tokens (default: 40,200,1000)")
    parser.add_argument("--at-once", type=numbers, default=[1, 8, 32], help="requests at a time (default: 1,8,32)")
    parser.add_argument("--k", type=numbers, default=[1, 4, 20], help="adapters of a prompt (default: 1,4,20)")
    parser.add_argument("--tokens", type=int, default=16, help="that each answer has (default: 16)")
    parser.add_argument("--arms", type=lambda text: text.split(","), help="base,k4 (default: all)")
    parser.add_argument("--flags", type=str.split, default=[], help='for all servers: "--max-num-seqs 64"')
    parser.add_argument("--port", type=int, default=8111)
    options = parser.parse_args()
    options.adapter = options.adapter or min(path.name for path in options.pool.iterdir() if path.is_dir())
    options.out.mkdir(parents=True, exist_ok=True)
    cells = [Cell(length, at_once) for length in options.lengths for at_once in options.at_once]
    write_prompts(options, cells)
    all_arms = arms(options, flags_of(options))
    for arm in all_arms:
        left = [cell for cell in cells if not result_of(arm, cell, options).is_file()]
        if left:
            with server(arm, options):
                for cell in left:
                    began = time.monotonic()
                    measure(arm, cell, options)
                    print(f"{arm.name} {cell.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(all_arms, cells, options))


if __name__ == "__main__":
    main()
