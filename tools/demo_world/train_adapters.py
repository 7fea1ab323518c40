"""One adapter per task, made by `logo train` from ordinary rows of that task and from nothing else.

    training rows (TASK.jsonl) -> `logo train` (CONFIG) -> float16

The rows are cheap, so there are as many as the steps can read, and none is read twice.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from logo.adapters.examples import write_examples
from logo.adapters.peft import NOTES, read_raw
from logo.adapters.pool import AdapterPool
from logo.adapters.write import plain_tensors, save_adapter
from logo.models import DEMO_K
from logo.training.config import TrainingConfig
from logo.training.pool import train

from .tasks import TASKS, train_row

BASE_NAME = "demo"
ROWS = 4800  # per task: each of them is learned from once
CONFIG = TrainingConfig(r=8, alpha=16, targets="q_proj,v_proj", lr=2e-3, steps=200, batch_size=24, held_out=0.0)


def write_training_rows(folder: Path, seed: int, count: int = ROWS) -> None:
    """Write ``count`` training rows of every task to ``folder``/TASK.jsonl, as `logo train --rows` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        rng = random.Random(f"training:{task.name}:{seed}")
        rows = (train_row(task, rng) for _ in range(count))
        lines = [json.dumps({"context": r.context, "completion": r.completion}, ensure_ascii=False) for r in rows]
        (folder / f"{task.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_adapters(model: Path, rows: Path, pool: Path, config: TrainingConfig = CONFIG) -> dict[str, float]:
    """Train an adapter for the base model in the folder ``model`` on each file of ``rows``, and return the last losses.

    ``pool`` is what `logo train` makes, in float32 and with its records; what of it stands already is not made again.
    """
    run = train(rows, str(model), pool, config, device="cpu")
    if run.failed:
        raise RuntimeError(f"adapters that could not be trained: {dict(run.failed)}")
    return {name: record["result"]["train_loss"] for name, record in {**run.trained, **run.done}.items()}


def write_shipped(pool: Path, out: Path) -> None:
    """Write the adapters of ``pool`` to ``out`` as they ship: float16, the base model by its name, no records.

    The example prompts that `logo train` has left beside them go with them.
    """
    for adapter in AdapterPool.open(pool):
        tensors = {key: tensor.half() for key, tensor in plain_tensors(adapter.read()).items()}
        save_adapter(out / adapter.name, tensors, read_raw(adapter.folder) | {"base_model_name_or_path": BASE_NAME})
        write_examples(out / adapter.name, adapter.examples)
    (out / NOTES).write_text(json.dumps({"k": DEMO_K}, indent=2) + "\n", encoding="utf-8")
