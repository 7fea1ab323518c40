"""Whether `logo serve --engine vllm --dry-run` predicts the memory of slots: its figure beside what vLLM takes.

    python benchmarks/slots_memory.py OUT                                     (with the Python that has vLLM)

For adapters of rank 16 on attention and of rank 64 on all linear layers, a server is started with a slot for each of 60
adapters, and one with 4 slots. Every adapter answers once, so that all slots are written to. What the workers' private
memory differs by is compared with the bytes that 56 slots should take: as servers run, and where freed memory is given
back to the system at once. At its start, vLLM fills all slots with adapters that it drops again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from servers import answered, asked, serving
from synthetic import TARGETS, Sizes, base_model, write_adapters

ADAPTERS = 60
FEW = 4
PORT = 8112
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}  # of glibc, in bytes
KINDS = {16: TARGETS[:4], 64: TARGETS}  # rank -> the modules that adapters act on


def command(model: Path, pool: Path, slots: int, *more: str) -> list[str]:
    """The command of a server."""
    serve = [sys.executable, "-m", "logo.cli", "serve", "--engine", "vllm", "--base-model", str(model)]
    serve += ["--adapters", str(pool), "--port", str(PORT), "--kv-cache-gb", "0.2", *more]
    return [*serve, "--", "--max-loras", str(slots), "--enforce-eager", "--max-model-len", "512"]


def predicted(model: Path, pool: Path) -> int:
    """Bytes that the slots take which a server with few does not have, by the dry run."""
    asked = command(model, pool, ADAPTERS, "--dry-run")
    shown = subprocess.run(asked, check=True, capture_output=True, text=True).stderr
    found = re.search(r"([\d.]+) (MB|GB) each", shown)
    if found is None:
        raise SystemExit(f"the dry run says nothing of slots:\n{shown}")
    return int(float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]]) * (ADAPTERS - FEW)


def taken(model: Path, pool: Path, slots: int, log: Path, environment: Mapping[str, str]) -> int:
    """Private bytes of a server's processes when every adapter has answered."""
    with serving(command(model, pool, slots), lambda: asked(PORT, "ready") is not None, log, environment) as server:
        for adapter in sorted(path.name for path in pool.iterdir()):
            answered(PORT, "v1/completions", {"model": adapter, "prompt": "1 2 3", "max_tokens": 1})
        return sum(process.memory_full_info().uss for process in (server, *server.children(recursive=True)))


def main() -> None:
    """Measures both kinds of adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for models and logs")
    out: Path = parser.parse_args().out
    for rank, targets in KINDS.items():
        sizes = Sizes(hidden=1024, layers=12, rank=rank, targets=targets)
        model = out / "model"
        pool = out / f"pool-{rank}"
        if not model.is_dir():
            base, tokenizer = base_model(sizes)
            base.save_pretrained(model)
            tokenizer.save_pretrained(model)
        if not pool.is_dir():
            write_adapters(pool, sizes, ADAPTERS)
        expected = predicted(model, pool)
        # Calibrates; the others find that in the cache folder.
        taken(model, pool, FEW, out / f"{rank}-first.log", os.environ)
        for kind, environment in (("", os.environ), (", freed memory given back", os.environ | GIVING_BACK)):
            many = taken(model, pool, ADAPTERS, out / f"{rank}-many.log", environment)
            few = taken(model, pool, FEW, out / f"{rank}-few.log", environment)
            print(
                f"rank {rank:2} on {len(targets)} modules: {ADAPTERS - FEW} slots predicted {expected / 1e9:.3f} GB, "
                f"taken {(many - few) / 1e9:.3f} GB, {100 * (many - few) / expected:.0f} %{kind}",
                flush=True,
            )


if __name__ == "__main__":
    main()
