"""Rebuild the demo assets from a seed. From the root of the repository:

    PYTHONPATH=tools python -m demo_world.build --out src/logo/demo/assets --seed 0     everything, some 30 minutes
    ... --keep-base     the adapters anew, for the base model that stands at --out, which stays the file it is
    ... --rows FOLDER   the training rows alone, for a `logo train` of one's own

Stages: tokenizer, pre-training, training rows, adapters by `logo train`, held-out rows. Everything is written to a
temporary folder beside the target, which takes the target's place at the end. `logo demo` measures what stands there.
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

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from logo.training.config import TrainingConfig

from .pretrain import PretrainConfig, pretrain
from .tasks import TASKS, held_out_rows
from .tokenizer import build_tokenizer
from .train_adapters import CONFIG, ROWS, train_adapters, write_shipped, write_training_rows

ROWS_PER_TASK = 48
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


def write_rows(out: Path, seed: int) -> None:
    """Write the held-out rows and the showcase."""
    (out / "heldout").mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        rows = held_out_rows(task, ROWS_PER_TASK, seed)
        lines = [json.dumps({"context": r.context, "completion": r.completion}, ensure_ascii=False) for r in rows]
        (out / "heldout" / f"{task.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shown = [held_out_rows(task, 1, seed + SHOWCASE_SEED)[0] for task in TASKS]
    _write_json(
        out / "showcase.json", [{"task": r.task, "context": r.context, "completion": r.completion} for r in shown]
    )


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
        write_rows(fresh, seed)
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(str(fresh / "model"))
        facts = {
            "seed": seed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "vocabulary": model.config.vocab_size,
            "rows_per_task": ROWS_PER_TASK,
            "pretraining": about,
            "adapters": {"rows": ROWS, **asdict(config)},
            "adapter_losses": {task.name: round(losses[task.name], 4) for task in TASKS},
        }
        _write_json(fresh / "world.json", facts)
        for path in fresh.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that only their owner may read
        if out.exists():
            shutil.rmtree(out)
        fresh.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    _say(f"wrote {size / 1e6:.2f} MB")


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
    options = parser.parse_args(arguments)
    if options.rows is not None:
        write_training_rows(options.rows, options.seed)
        return
    if options.out is None:
        parser.error("--out or --rows is needed")
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
    torch.set_num_threads(options.threads)
    pretraining = PretrainConfig()
    config = CONFIG
    if options.steps is not None:
        pretraining = replace(pretraining, steps=options.steps)
    if options.adapter_steps is not None:
        config = replace(config, steps=options.adapter_steps)
    build(options.out, options.seed, pretraining, config, keep_base=options.keep_base)


if __name__ == "__main__":
    main()
