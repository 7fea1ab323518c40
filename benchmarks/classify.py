"""How fast a server that only selects is, and whether it selects as the library does.

    taskset -c 0 python benchmarks/classify.py BASE POOL ROWS OUT           (all on one core, clients too)

ROWS is a folder of JSONL files with a `context` per row. All prompts are sent to `POST /classify` of
`logo serve --select-only`, ten at a time.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PORT = 8114
AT_ONCE = 10


def classified(prompt: str, none: str) -> tuple[str, float]:
    """The adapter with the highest score, whatever `none` of them has, and the milliseconds of its request."""
    body = json.dumps({"inputs": prompt}).encode()
    url = f"http://127.0.0.1:{PORT}/classify"
    began = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})) as reply:
        labels = json.load(reply)
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
    with (options.out / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not is_ready():
            if server.poll() is not None:
                raise SystemExit(f"the server did not start; see {options.out / 'server.log'}")
            time.sleep(0.5)
        with ThreadPoolExecutor(AT_ONCE) as clients:
            replies = list(clients.map(lambda prompt: classified(prompt, none), prompts))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    took = [milliseconds for _, milliseconds in replies]
    shown = ", ".join(f"p{share} {np.percentile(took, share):.0f}" for share in (50, 90, 99))
    print(f"{len(prompts)} prompts, {AT_ONCE} at a time, milliseconds: {shown}", flush=True)
    expected = selected(options, prompts)
    same = sum(label == first for (label, _), first in zip(replies, expected, strict=True))
    print(f"the same first adapter as by the library: {same} of {len(prompts)}")


def is_ready() -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
