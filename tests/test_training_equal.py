"""What is trained here is what PEFT and transformers' Trainer train, however rows are cut into passes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from learning import ATTENTION, examples, gap, learn, learner, task
from logo.training.examples import Example
from logo.training.passes import Base
from logo.training.prepared import Prepared
from logo.training.recipe import Recipe

STEPS = 20
KINDS = ("llama", "gpt2", "qwen2")  # gpt2 keeps weights transposed (Conv1D); qwen2 ties its output head to the input
REST: dict[str, Any] = {"held_out": 0.0, "warmup": 0.15, "evaluations": 4, "weight_decay": 0.01}


class Given(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows in the order in which they are to be read, as a Trainer takes them: the loss is that of completions.

    Those that are activated late, and not by an invocation, say how many of their tokens are.
    """

    def __init__(self, one: Prepared) -> None:
        self.rows = [row for step in range(STEPS) for row in one.batch(step)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        row = self.rows[place]
        labels = [-100] * row.prompt + list(row.ids[row.prompt :])
        return {"input_ids": list(row.ids), "labels": labels, "acting": [len(row) - row.begin]}


def collated(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    ids, mask = tiny.padded([row["input_ids"] for row in rows])
    labels, _ = tiny.padded([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def told(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
    """With what PEFT works out from an invocation: the place, from the end of the padded row, where it acts."""
    made = collated(rows)
    padding = (made["attention_mask"] == 0).sum(dim=1).tolist()
    offsets = [row["acting"][0] + padded for row, padded in zip(rows, padding, strict=True)]
    return {**made, "alora_offsets": offsets}


def by_trainer(
    kind: str,
    one: Prepared,
    start: Mapping[str, Tensor],
    folder: Path,
    invocation: Sequence[int] = (),
    collated: Any = collated,
) -> tuple[dict[str, Tensor], list[float]]:
    """The factors that PEFT and the Trainer come to from the same beginning, and the loss of every step."""
    recipe = one.recipe
    config = recipe.lora()
    config.alora_invocation_tokens = list(invocation) or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about Conv1D and tied weights
        wrapped = peft.get_peft_model(tiny.model(kind).train(), config, autocast_adapter_dtype=False)
    for module in wrapped.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainable = {name: parameter for name, parameter in wrapped.named_parameters() if "lora_" in name}
    assert trainable.keys() == start.keys()
    for name, parameter in trainable.items():
        parameter.data.copy_(start[name])
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule),
        warmup_steps=round(recipe.warmup * STEPS),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        logging_steps=1,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = transformers.Trainer(wrapped, arguments, train_dataset=Given(one), data_collator=collated)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: parameter.detach() for name, parameter in trainable.items()}, losses


def check_equal(kind: str, one: Prepared, folder: Path, *how: Any) -> dict[str, Tensor]:
    """Asserts that our loop makes what PEFT and the Trainer make, and returns that."""
    made = learner(tiny.model(kind), one)
    begun = {name: factor.detach().clone() for name, factor in made.factors.items()}
    expected, expected_losses = by_trainer(kind, one, begun, folder, *how)
    seen: list[float | None] = []
    made.run(lambda course: seen.append(course.last))
    assert made.course.step == STEPS
    assert gap(made.factors, expected) < 1e-4
    assert seen == pytest.approx(expected_losses, rel=1e-4, abs=1e-4)  # the Trainer rounds its losses
    # Nothing here is equal because nothing was learned.
    assert all(float((made.factors[name].detach() - begun[name]).norm()) > 1e-3 for name in begun)
    return expected


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_one_that_peft_and_the_trainer_make(kind: str, schedule: Any, tmp_path: Path) -> None:
    """The same rows in the same order, AdamW, the same schedule and clipping, in float32. Batches divide the rows."""
    targets = {"cosine": ATTENTION[kind], "linear": ("all-linear",), "constant": ATTENTION[kind]}[schedule]
    rslora = schedule == "linear"
    recipe = Recipe(
        r=3, alpha=6, rslora=rslora, targets=targets, lr=3e-3, steps=STEPS, batch_size=4, schedule=schedule, **REST
    )
    check_equal(kind, task("task", recipe, examples(24, seed=3)), tmp_path)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 99),
    tokens=st.sampled_from([1, 30, 70]),
    recompute=st.booleans(),
    late=st.booleans(),
    clip=st.sampled_from([0.05, 1.0]),
)
def test_however_passes_are_cut(
    llama: nn.Module, seed: int, tokens: int, recompute: bool, late: bool, clip: float
) -> None:
    """Any limit of a pass, activations kept or computed again, from any place of a prompt on."""
    recipe = Recipe(r=4, targets=("all-linear",), lr=2e-3, batch_size=5, steps=8, clip=clip, **REST)
    rows = tuple(replace(row, begin=late * (row.prompt - 1)) for row in examples(18, seed))
    expected = learn(llama, task("a", recipe, rows))
    found = learn(llama, task("a", recipe, rows), tokens=tokens, recompute=recompute)
    assert gap(found.factors, expected.factors) < 1e-4
    assert found.course.best == expected.course.best and found.course.tokens == expected.course.tokens
    assert not any(module.training for module in llama.modules())


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), max_size=24),
    tokens=st.integers(1, 200),
    positions=st.integers(1, 40),
)
def test_every_row_is_in_one_pass_within_limits(sizes: list[tuple[int, int]], tokens: int, positions: int) -> None:
    rows = [Example((3,) * (prompt + completion), prompt) for prompt, completion in sizes]
    found = Base(None, 0, 2**27 // positions, torch.device("cpu"), tokens).cut(rows)
    assert sorted(id(row) for part in found for row in part) == sorted(map(id, rows))
    allowed = 2**27 // (2**27 // positions)
    for part in found:
        fits = len(part) * len(part[0]) <= tokens and sum(row.completion for row in part) <= allowed
        assert len(part) == 1 or fits
        assert len(part[0]) == max(map(len, part))


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_is_the_same_afterwards(kind: str) -> None:
    """So the next adapter is the one that it would be alone."""
    model = tiny.model(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recipe = Recipe(r=2, targets=ATTENTION[kind], lr=5e-3, steps=4, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first, second = (learn(model, task(name, recipe, examples(18, 7))) for name in ("a", "b"))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in after.values())
    assert gap(second.factors, learn(tiny.model(kind), task("b", recipe, examples(18, 7))).factors) < 1e-6
    assert gap(first.factors, second.factors) > 0.1


def test_the_best_step_by_the_held_out_rows_is_kept(llama: nn.Module) -> None:
    recipe = Recipe(r=8, targets=("all-linear",), lr=5e-3, epochs=6, batch_size=6, patience=None)
    found = learn(llama, task("a", recipe, examples(60, 1)))
    losses = [measured.held_out or math.inf for measured in found.course.measured]
    assert min(losses) < 0.95 * losses[0]  # it learned something
    assert found.course.best == found.course.measured[losses.index(min(losses))].step
