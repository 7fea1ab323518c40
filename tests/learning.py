"""Helpers for tests of training: tiny models, rows, and learners that train without files of examples."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from logo.training.examples import Example
from logo.training.learner import Learner
from logo.training.passes import Base
from logo.training.prepared import Prepared, split
from logo.training.recipe import Recipe

UNUSED = 95  # a token that is in no example
ATTENTION = {"llama": ("q_proj", "v_proj"), "qwen2": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}


def examples(count: int, seed: int = 0, longest: int = 14) -> tuple[Example, ...]:
    """Random rows of different lengths; a completion repeats a part of its prompt, so there is something to learn."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [dice.randrange(3, UNUSED) for _ in range(dice.randrange(1, longest))]
        completion = [prompt[-1]] * dice.randrange(1, 4) + [1]
        rows.append(Example((0, *prompt, *completion), 1 + len(prompt)))
    return tuple(rows)


def task(name: str, recipe: Recipe, rows: Sequence[Example]) -> Prepared:
    """A task of these rows."""
    return Prepared(name, recipe, *split(name, recipe, rows))


def learner(model: nn.Module, one: Prepared, tokens: int = 2048, recompute: bool = False) -> Learner:
    """What learns a task on a tiny model."""
    return Learner(Base(model, 2, 96, torch.device("cpu"), tokens, recompute), one)


def learn(model: nn.Module, one: Prepared, **how: Any) -> Learner:
    """Learns a task, and leaves the model as it was."""
    made = learner(model, one, **how)
    made.run()
    made.close()
    return made


def gap(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest distance of two tensors of one name, relative to the norm of the expected one."""
    assert found.keys() == expected.keys()
    apart = {key: (found[key] - expected[key]).detach().norm() / expected[key].detach().norm() for key in expected}
    return max(map(float, apart.values()))


# -- commands ----------------------------------------------------------------------------------------------------------


def write_base(folder: Path, kind: str = "llama", template: str | None = None) -> Path:
    """A tiny model with a tokenizer of one word a token, as a folder that `--base-model` takes."""
    from test_engine import tokenizer

    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(folder)
    tiny.model(kind).save_pretrained(folder)
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
    recipe = ["--r", "2", "--lr", "5e-3", "--steps", "6", "--batch-size", "4", "--evaluations", "3"]
    return ["train", *where, *recipe, *more]


def contents(root: Path) -> dict[str, bytes]:
    """All files below a folder, but for how the command was typed."""
    found = [file for file in sorted(root.rglob("*")) if file.is_file() and file.name != "train.json"]
    return {str(file.relative_to(root)): file.read_bytes() for file in found}
