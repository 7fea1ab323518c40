"""Rebuild the demo assets from a seed. From the root of the repository:

    PYTHONPATH=tools python -m demo_world.build --out src/logo/demo/assets --seed 0     everything, some 30 minutes
    ... --keep-base     the adapters anew, for the base model that stands at --out, which stays the file it is
    ... --measure       the measurement of what stands at --out, and nothing is written
    ... --rows FOLDER   the training rows alone, for a `logo train` of one's own

Stages: tokenizer, pre-training, training rows, adapters by `logo train`, held-out rows, measurement. Everything is
written to a temporary folder beside the target, which takes the target's place at the end.
"""

from __future__ import annotations

import os

# Spinning OpenMP workers halve the speed of a shared machine; this has to stand before torch starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from logo.training.config import TrainingConfig

from .evaluate import exact_match, load_deltas, mixed, signals
from .pretrain import PretrainConfig, pretrain
from .tasks import TASKS, Row, held_out_rows
from .tokenizer import build_tokenizer
from .train_adapters import CONFIG, ROWS, train_adapters, write_shipped, write_training_rows

ROWS_PER_TASK = 48
CROSS_ROWS = 12  # held-out rows per task on which every foreign adapter is tried
SHOWCASE_SEED = 1000


def _say(text: str) -> None:
    print(text, flush=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the base model in float16 with its tokenizer.

    Adapters are trained on the rounded weights, so that every number holds for what is shipped.
    """
    model.half().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def load_model(folder: Path) -> LlamaForCausalLM:
    """The base model in float32, in evaluation mode."""
    loaded: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return loaded.eval()


def write_rows(out: Path, seed: int) -> dict[str, list[Row]]:
    """Write the held-out rows and the showcase, and return the held-out rows by task."""
    rows = {task.name: held_out_rows(task, ROWS_PER_TASK, seed) for task in TASKS}
    (out / "heldout").mkdir(parents=True, exist_ok=True)
    for name, held in rows.items():
        lines = [json.dumps({"context": r.context, "completion": r.completion}, ensure_ascii=False) for r in held]
        (out / "heldout" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shown = [held_out_rows(task, 1, seed + SHOWCASE_SEED)[0] for task in TASKS]
    _write_json(
        out / "showcase.json", [{"task": r.task, "context": r.context, "completion": r.completion} for r in shown]
    )
    return rows


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, adapters: Path, rows: dict[str, list[Row]]
) -> dict[str, Any]:
    """Exact match on held-out rows of the base, the task's own adapter, a uniform mixture and foreign adapters."""
    pool = {name: load_deltas(adapters / name) for name in rows}
    base = {}
    oracle = {}
    uniform = {}
    foreign = {}
    with mixed(model, [(deltas, 1 / len(pool)) for deltas in pool.values()]):
        for name, held in rows.items():
            uniform[name] = round(exact_match(model, tokenizer, held), 4)
    everything = [row for held in rows.values() for row in held[:CROSS_ROWS]]
    for name, held in rows.items():
        base[name] = round(exact_match(model, tokenizer, held), 4)
        with mixed(model, [(pool[name], 1.0)]):
            oracle[name] = round(exact_match(model, tokenizer, held), 4)
            strange = [row for row in everything if row.task != name]
            foreign[name] = round(exact_match(model, tokenizer, strange), 4)
        _say(
            f"{name:14s} base {base[name]:.2f} own {oracle[name]:.2f} uniform {uniform[name]:.2f} "
            f"on other tasks {foreign[name]:.2f}"
        )
    all_rows = [row for held in rows.values() for row in held]
    top1 = {name: round(value, 4) for name, value in signals(model, tokenizer, pool, all_rows).items()}
    tables = {"base": base, "oracle": oracle, "uniform": uniform, "foreign": foreign}
    average = {name: round(sum(table.values()) / len(table), 4) for name, table in tables.items()}
    _say(f"average {average} top-1 of the signals {top1}")
    return {"average": average, "signal_top1": top1, "exact_match": tables}


def build(
    out: Path, seed: int, pretraining: PretrainConfig, config: TrainingConfig, *, keep_base: bool = False
) -> None:
    """Build all assets from ``seed`` and put them at ``out``, replacing what is there.

    ``keep_base``: but for the base model that stands there, whose files are copied.
    """
    clock = time.monotonic()

    def lap(stage: str) -> None:
        nonlocal clock
        _say(f"{stage}: {time.monotonic() - clock:.1f}s")
        clock = time.monotonic()

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".demo-build-") as scratch:
        fresh = Path(scratch) / "assets"
        if keep_base:
            shutil.copytree(out / "model", fresh / "model")
            about = json.loads((out / "world.json").read_text(encoding="utf-8"))["pretraining"]
        else:
            tokenizer = build_tokenizer()
            write_model(pretrain(tokenizer, pretraining, seed, _say), tokenizer, fresh / "model")
            about = asdict(pretraining)
            lap("pretrain")
        write_training_rows(Path(scratch) / "rows", seed)
        losses = train_adapters(fresh / "model", Path(scratch) / "rows", Path(scratch) / "pool", config)
        write_shipped(Path(scratch) / "pool", fresh / "adapters")
        lap("adapters")
        model = load_model(fresh / "model")
        tokenizer = AutoTokenizer.from_pretrained(str(fresh / "model"))
        rows = write_rows(fresh, seed)
        numbers = measure(model, tokenizer, fresh / "adapters", rows)
        lap("measure")
        facts = {
            "seed": seed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "vocabulary": len(tokenizer),
            "rows_per_task": ROWS_PER_TASK,
            "pretraining": about,
            "adapters": {"rows": ROWS, **asdict(config)},
            "adapter_losses": {task.name: round(losses[task.name], 4) for task in TASKS},
        }
        _write_json(fresh / "world.json", numbers | facts)
        for path in fresh.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that only their owner may read
        if out.exists():
            shutil.rmtree(out)
        fresh.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    _say(f"wrote {size / 1e6:.2f} MB")


def remeasure(out: Path) -> None:
    """Measure the assets at ``out`` again and print the numbers."""
    model = load_model(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(str(out / "model"))
    seed = json.loads((out / "world.json").read_text(encoding="utf-8"))["seed"]
    rows = {task.name: held_out_rows(task, ROWS_PER_TASK, seed) for task in TASKS}
    measure(model, tokenizer, out / "adapters", rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(
        prog="python -m demo_world.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the assets")
    parser.add_argument("--rows", type=Path, help="only write the training rows, to this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="pre-training steps")
    parser.add_argument("--adapter-steps", type=int, default=None, help="training steps per adapter")
    parser.add_argument("--keep-base", action="store_true", help="keep the base model that stands at --out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help="only measure the assets that stand at --out")
    options = parser.parse_args(arguments)
    if options.rows is not None:
        write_training_rows(options.rows, options.seed)
        return
    if options.out is None:
        parser.error("--out or --rows is needed")
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
    torch.set_num_threads(options.threads)
    if options.measure:
        remeasure(options.out)
        return
    pretraining = PretrainConfig()
    config = CONFIG
    if options.steps is not None:
        pretraining = replace(pretraining, steps=options.steps)
    if options.adapter_steps is not None:
        config = replace(config, steps=options.adapter_steps)
    build(options.out, options.seed, pretraining, config, keep_base=options.keep_base)


if __name__ == "__main__":
    main()
