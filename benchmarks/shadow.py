"""What a shadow costs, and what it finds: `logo serve --shadow` under load, and with one name in ten wrong.

    python benchmarks/shadow.py BASE POOL ROWS OUT [--engine vllm]

ROWS is a folder of TASK.jsonl files with a `context` per row, whose names are those of the adapters.

Requests per second are measured with prompts of 200 tokens that name an adapter, eight at a time, with and without a
shadow in turn. Rows of all tasks name their adapters, one in ten another one, and `logo eval shadow` reads the log.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from logo.evaluation.shadow import CLEAR, ShadowRow, read_log
from servers import answered, asked, serving

PORT = 8113
AT_ONCE = 8
LENGTH = 200  # tokens of the prompts that requests per second are measured with
ANSWER = 32  # tokens of their answers
WRONG = 0.1  # the share of wrong names

Request = tuple[str, str]  # the adapter that is named, and the prompt


def ask(request: Request, tokens: int) -> None:
    """Sends a request; SystemExit unless it is answered."""
    name, prompt = request
    body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answered(PORT, "v1/completions", body)


def rate(requests: Sequence[Request], tokens: int) -> float:
    """Requests per second."""
    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as clients:
        list(clients.map(lambda request: ask(request, tokens), requests))
    return len(requests) / (time.perf_counter() - began)


def server(options: argparse.Namespace, shadow: Path | None) -> AbstractContextManager[object]:
    """A server, with a shadow that writes to this file, or without one."""
    command = [sys.executable, "-m", "logo.cli", "serve", "--engine", options.engine, "--base-model", options.base]
    command += ["--adapters", str(options.pool), "--port", str(PORT)]
    if shadow is not None:
        command += ["--shadow", str(shadow), "--log", "prompts"]
    return serving(command, lambda: asked(PORT, "ready") is not None, options.out / "server.log")


def long_prompts(options: argparse.Namespace, texts: Sequence[str], drawn: random.Random) -> list[Request]:
    """Prompts of `LENGTH` tokens that all name the pool's first adapter."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(options.base)
    name = min(path.name for path in options.pool.iterdir() if path.is_dir())
    requests = []
    for _ in range(options.requests):
        ids: list[int] = []
        while len(ids) < LENGTH:
            ids += tokenizer(drawn.choice(texts) + "\n\n", add_special_tokens=False).input_ids
        requests.append((name, tokenizer.decode(ids[:LENGTH])))
    return requests


def measure_cost(options: argparse.Namespace, requests: Sequence[Request]) -> None:
    """Prints requests per second with and without a shadow, which take turns."""
    rates: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(options.turns):
        for arm in ("without", "with"):
            shadow = options.out / f"cost-{turn}.jsonl" if arm == "with" else None
            with server(options, shadow):
                rate(requests[:AT_ONCE], ANSWER)  # warms up
                rates[arm].append(rate(requests[AT_ONCE:], ANSWER))
            print(f"{arm:8} {rates[arm][-1]:.3f} requests/s", flush=True)
    apart = statistics.median(rates["with"]) / statistics.median(rates["without"]) - 1
    print(f"a shadow changes the requests per second by {100 * apart:+.1f} % (medians of {options.turns})")


def measure_finds(options: argparse.Namespace, rows: Sequence[tuple[str, str]], drawn: random.Random) -> None:
    """Prints how many wrong names a shadow finds."""
    log = options.out / "finds.jsonl"
    log.unlink(missing_ok=True)
    tasks = sorted({task for task, _ in rows})
    truth = {}
    requests = []
    for task, prompt in rows:
        name = drawn.choice([other for other in tasks if other != task]) if drawn.random() < WRONG else task
        truth[prompt] = name == task
        requests.append((name, prompt))
    with server(options, log):
        rate(requests, 4)
        lines = -1
        while log.is_file() and lines != (lines := len(log.read_text().splitlines())):
            time.sleep(5)  # what waits is selected for when it is quiet
    rows_read, _ = read_log([log])
    known = [row for row in rows_read if row.prompt in truth]
    wrong = [row for row in known if not truth[row.prompt]]
    right = [row for row in known if truth[row.prompt]]
    print(f"{len(requests)} requests, {len(rows_read)} read by the shadow, {len(known)} with a prompt that was not cut")
    for what, flags in (("comes first", lambda row: not row.agrees), (f"has {CLEAR:g} or more", is_clear)):
        hits = sum(map(flags, wrong))
        alarms = sum(map(flags, right))
        print(f"another {what}: {hits} of {len(wrong)} wrong names found, {alarms} of {len(right)} right ones flagged")
    subprocess.run([sys.executable, "-m", "logo.cli", "eval", "shadow", str(log)], check=True)


def is_clear(row: ShadowRow) -> bool:
    """Whether another adapter than the named one is clearly first."""
    return row.is_clear


def main() -> None:
    """Measures both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the base model")
    parser.add_argument("pool", type=Path, help="a folder of adapters")
    parser.add_argument("rows", type=Path, help="a folder of TASK.jsonl files")
    parser.add_argument("out", type=Path, help="a folder for logs")
    parser.add_argument("--engine", default="local", help="local or vllm (default: local)")
    parser.add_argument("--requests", type=int, default=72, help="of 200 tokens, in each turn (default: 72)")
    parser.add_argument("--turns", type=int, default=3, help="how often both are measured (default: 3)")
    parser.add_argument("--per-task", type=int, default=23, help="rows of each task (default: 23)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0)
    names = sorted(path.name for path in options.pool.iterdir() if path.is_dir())
    rows = []
    for name in names:
        lines = (options.rows / f"{name}.jsonl").read_text().splitlines()[: options.per_task]
        rows += [(name, json.loads(line)["context"]) for line in lines]
    drawn.shuffle(rows)
    measure_finds(options, rows, drawn)
    measure_cost(options, long_prompts(options, [text for _, text in rows], drawn))


if __name__ == "__main__":
    main()
