"""What is trained here is what PEFT and transformers' Trainer train, and together is what each would be alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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
from learning import ATTENTION, examples, gap, learn, learner
from logo.training.learner import Learner
from logo.training.recipe import Recipe

STEPS = 20
KINDS = ("llama", "gpt2", "qwen2")  # gpt2 keeps weights transposed (Conv1D); qwen2 ties its output head to the input
REST: dict[str, Any] = {"held_out": 0.0, "warmup": 0.15, "evaluations": 4, "weight_decay": 0.01}


def peft_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors as `Factors.copy` gives them, as PEFT has them."""
    found = {}
    for key, tensor in tensors.items():
        side, _, path = key.partition(".")
        found[f"base_model.model.{path}.lora_{side}.default.weight"] = tensor if side == "A" else tensor.T
    return found


class Given(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows in the order in which they are to be read, as a Trainer takes them: the loss is that of completions.

    Those that are activated late, and not by an invocation, say how many of their tokens are.
    """

    def __init__(self, learner: Learner) -> None:
        self.rows = []
        for step in range(STEPS):
            learner.course.step = step
            self.rows += learner.batch()
        learner.course.step = 0

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
    kind: str, one: Learner, folder: Path, invocation: Sequence[int] = (), collated: Any = collated
) -> tuple[dict[str, Tensor], list[float]]:
    """The factors that PEFT and the Trainer come to from the same beginning, and the loss of every step."""
    recipe = one.recipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about Conv1D and tied weights
        wrapped = peft.get_peft_model(
            tiny.model(kind).train(), recipe.lora(invocation=invocation), autocast_adapter_dtype=False
        )
    for module in wrapped.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start = peft_names(one.factors.copy())
    trainable = {name: parameter for name, parameter in wrapped.named_parameters() if "lora_" in name}
    assert trainable.keys() == start.keys()
    for name, parameter in trainable.items():
        parameter.data.copy_(start[name])
        parameter.requires_grad_(True)
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


def watched(one: Learner) -> list[float]:
    """The loss of every step that it makes from now on."""
    seen: list[float] = []
    step = one.step

    def stepping(loss: float, batch: Any) -> None:
        seen.append(loss)
        step(loss, batch)

    one.step = stepping  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_one_that_peft_and_the_trainer_make(kind: str, schedule: Any, tmp_path: Path) -> None:
    """The same rows in the same order, AdamW, the same schedule and clipping, in float32. Batches divide the rows."""
    targets = {"cosine": ATTENTION[kind], "linear": ("all-linear",), "constant": ATTENTION[kind]}[schedule]
    rslora = schedule == "linear"
    recipe = Recipe(
        r=3, alpha=6, rslora=rslora, targets=targets, lr=3e-3, steps=STEPS, batch_size=4, schedule=schedule, **REST
    )
    one = learner(kind, "task", recipe, examples(24, seed=3))
    expected, losses = by_trainer(kind, one, tmp_path)
    begun = peft_names(one.factors.copy())
    seen = watched(one)
    learn(tiny.model(kind), [one])
    found = peft_names(one.factors.copy())
    assert one.course.step == STEPS
    assert gap(found, expected) < 1e-4
    assert seen == pytest.approx(losses, rel=1e-4, abs=1e-4)  # the Trainer rounds its losses
    moved = [name for name in found if float((found[name] - begun[name]).norm()) > 1e-3]
    assert len(moved) == len(found)  # nothing here is equal because nothing was learned


def mixed(kind: str, seed: int, steps: int | None = None) -> list[Learner]:
    """Learners of other ranks, targets, rates, lengths and scales."""
    q = ATTENTION[kind]
    made = [
        ("short", Recipe(r=2, alpha=4, targets=q[:1], lr=4e-3, batch_size=3, steps=steps or 7, **REST)),
        ("rslora", Recipe(r=5, alpha=8, rslora=True, targets=q, lr=1e-3, batch_size=4, steps=steps or 20, **REST)),
        ("wide", Recipe(r=8, alpha=16, targets=("all-linear",), lr=2e-3, batch_size=5, steps=steps or 16, **REST)),
        ("clipped", Recipe(r=1, alpha=1, targets=q, lr=1e-2, batch_size=2, clip=0.05, steps=steps or 20, **REST)),
    ]
    return [learner(kind, name, recipe, examples(18, seed + place)) for place, (name, recipe) in enumerate(made)]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_are_learned_together_are_those_that_are_learned_alone(kind: str) -> None:
    model = tiny.model(kind)
    together, alone = mixed(kind, seed=10), mixed(kind, seed=10)
    seen = [watched(one) for one in together]
    learn(model, together)
    for number, one in enumerate(alone):
        expected = watched(one)
        learn(model, [one])
        other = together[number]
        assert other.course.step == one.course.step == other.steps
        assert gap(other.factors.copy(), one.factors.copy()) < 1e-4
        assert seen[number] == pytest.approx(expected, rel=1e-4)
        assert other.course.best == one.course.best and other.course.tokens == one.course.tokens


@settings(max_examples=4)
@given(data=st.data())
def test_whoever_is_learned_beside_it_and_however_passes_are_cut(llama: nn.Module, data: st.DataObject) -> None:
    """Any neighbours, any rows, any limit of a pass, activations kept or computed again: 8 steps."""
    chosen = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True), label="neighbours")
    seed = data.draw(st.integers(0, 99), label="seed")
    tokens = data.draw(st.sampled_from([1, 30, 70, 2048]), label="tokens")
    recompute = data.draw(st.booleans(), label="recompute")
    alone, group = mixed("llama", seed, steps=8), mixed("llama", seed, steps=8)
    learn(llama, [group[number] for number in chosen], tokens=tokens, recompute=recompute)
    learn(llama, [alone[chosen[0]]])
    assert gap(group[chosen[0]].factors.copy(), alone[chosen[0]].factors.copy()) < 1e-4


def test_held_out_losses_of_whole_runs_are_the_same() -> None:
    """Within half a percent, after Adam has had time to make rounding larger; the best step is kept."""
    model = tiny.model("llama")

    def learners() -> list[Learner]:
        recipes = {
            "a": Recipe(r=4, targets=("q_proj", "v_proj"), lr=5e-3, epochs=6, batch_size=6, patience=None),
            "b": Recipe(r=8, targets=("all-linear",), lr=2e-3, epochs=6, batch_size=8, patience=None),
        }
        return [
            learner("llama", name, recipe, examples(60, seed)) for seed, (name, recipe) in enumerate(recipes.items())
        ]

    together, alone = learners(), learners()
    learn(model, together)
    for one, other in zip(alone, together, strict=True):
        learn(model, [one])
        found = [measured.held_out for measured in other.course.measured]
        expected = [measured.held_out for measured in one.course.measured]
        assert found == pytest.approx(expected, rel=0.005)
        assert expected[0] is not None and min(filter(None, expected)) < 0.95 * expected[0]  # it learned something
        best = min(one.course.measured, key=lambda measured: measured.held_out or 0.0)
        assert one.course.best == best.step
