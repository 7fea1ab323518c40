"""Helpers for tests of training: tiny models, rows, and the command."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

import tiny
from logo.training.config import TrainingConfig
from logo.training.loop import Base, Fitted, fit
from logo.training.rows import Example, Task, split
from test_engine import tokenizer

UNUSED = 95  # a token that is in no example
ATTENTION = {"llama": "q_proj,v_proj", "qwen2": "q_proj,v_proj", "gpt2": "c_attn"}


def examples(count: int, seed: int = 0, longest: int = 14) -> tuple[Example, ...]:
    """Random rows of different lengths; a completion repeats a part of its prompt, so there is something to learn."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [dice.randrange(3, UNUSED) for _ in range(dice.randrange(1, longest))]
        completion = [prompt[-1]] * dice.randrange(1, 4) + [1]
        made.append(Example((0, *prompt, *completion), 1 + len(prompt)))
    return tuple(made)


def learn(model: nn.Module, config: TrainingConfig, some: Sequence[Example], name: str = "task", **how: Any) -> Fitted:
    """Learns rows, and leaves the model as it was."""
    return fit(Base(model, tokenizer()), Task(name, *split(name, config, some)), config, **how)


def gap(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest distance of two tensors of one name, relative to the norm of the expected one."""
    assert found.keys() == expected.keys()
    apart = {key: (found[key] - expected[key]).detach().norm() / expected[key].detach().norm() for key in expected}
    return max(map(float, apart.values()))


# -- commands ----------------------------------------------------------------------------------------------------------


def write_base(folder: Path, kind: str = "llama", template: str | None = None, **settings: Any) -> Path:
    """A tiny model with a tokenizer of one word a token, as a folder that `--base-model` takes."""
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(folder)
    tiny.model(kind, **settings).save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of a file: a few words, and one of them again."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        words = [f"w{dice.randrange(3, 90)}" for _ in range(dice.randrange(1, 9))]
        made.append({"context": " ".join(words), "completion": words[-1]})
    return made


def write_rows(file: Path, some: Sequence[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in some))
    return file


def command(base_model: Path, tasks: Path, pool: Path, *more: str) -> list[str]:
    """A short training."""
    where = ["--base-model", str(base_model), "--rows", str(tasks), "--out", str(pool), "--device", "cpu"]
    config = ["--r", "2", "--lr", "5e-3", "--steps", "6", "--batch-size", "4"]
    return ["train", *where, *config, *more]


def contents(root: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def record(folder: Path) -> Any:
    """What the `logo.yaml` of an adapter says."""
    return yaml.safe_load((folder / "logo.yaml").read_text())
