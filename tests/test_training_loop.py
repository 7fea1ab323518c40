"""What is trained here is what PEFT and transformers' Trainer train, however rows are cut into passes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from learning import ATTENTION, UNUSED, examples, gap, learn
from logo.adapters.activation import Activation
from logo.errors import NotFinite, UsageError
from logo.training import loop
from logo.training.config import TrainingConfig
from logo.training.rows import Example, Task, split

STEPS = 20
KINDS = ("llama", "gpt2", "qwen2")  # gpt2 keeps weights transposed (Conv1D); qwen2 ties its output head to the input
USUAL = TrainingConfig(r=3, alpha=6, lr=3e-3, steps=STEPS, batch_size=4, held_out=0.0)


def collated(rows: Sequence[Example], late: bool) -> dict[str, Any]:
    """A batch with the loss of completions; PEFT is told how many tokens of each padded row are activated if `late`."""
    ids, mask = tiny.padded([list(row.ids) for row in rows])
    labels, _ = tiny.padded([[-100] * row.prompt + list(row.ids[row.prompt :]) for row in rows])
    made = {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    return made | {"alora_offsets": [ids.shape[1] - row.begin for row in rows]} if late else made


def by_trainer(
    kind: str,
    config: TrainingConfig,
    rows: Sequence[Example],
    start: Mapping[str, Tensor],
    folder: Path,
    invocation: Sequence[int],
) -> tuple[dict[str, Tensor], list[float]]:
    """The factors that PEFT and the Trainer come to from the same beginning, and the loss of every step. PEFT finds the
    invocation itself, but for `UNUSED`, with which it is told where rows are activated."""
    lora = config.lora(tiny.model(kind))
    lora.alora_invocation_tokens = list(invocation) or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about Conv1D and tied weights
        wrapped = peft.get_peft_model(tiny.model(kind).train(), lora, autocast_adapter_dtype=False)
    for module in wrapped.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    peft.set_peft_model_state_dict(wrapped, dict(start))
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * STEPS),
        max_grad_norm=1.0,
        logging_steps=1,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    task = Task("task", tuple(rows))
    collate = partial(collated, late=list(invocation) == [UNUSED])
    ordered: Any = [row for step in range(STEPS) for row in task.batch(step, config)]
    trainer = transformers.Trainer(wrapped, arguments, train_dataset=ordered, data_collator=collate)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False), losses


def check_equal(
    kind: str, config: TrainingConfig, rows: Sequence[Example], folder: Path, invocation: Sequence[int] = ()
) -> None:
    """Asserts that our loop makes what PEFT and the Trainer make."""
    begun = learn(tiny.model(kind), replace(config, steps=1, lr=1e-35), rows).tensors  # before anything is learned
    expected, expected_losses = by_trainer(kind, config, rows, begun, folder, invocation)
    losses: list[float] = []
    found = learn(tiny.model(kind), config, rows, tell=lambda step, loss: losses.append(loss))
    assert found.steps == found.best.step == STEPS
    assert gap(found.tensors, expected) < 1e-4
    assert losses == pytest.approx(expected_losses, rel=1e-4, abs=1e-4)  # the Trainer rounds its losses
    # Nothing here is equal because nothing was learned.
    assert all(float((found.tensors[name] - begun[name]).norm()) > 1e-3 for name in begun)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_one_that_peft_and_the_trainer_make(kind: str, wide: bool, tmp_path: Path) -> None:
    """The same rows in the same order, AdamW, the same schedule and clipping, in float32. Batches divide the rows."""
    config = replace(USUAL, targets="all-linear" if wide else ATTENTION[kind], rslora=wide)
    check_equal(kind, config, examples(24, seed=3), tmp_path)


@pytest.mark.parametrize("activation", [Activation((UNUSED, 7)), Activation(last=3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_activated_adapter_is_the_one_of_peft_too(kind: str, activation: Activation, tmp_path: Path) -> None:
    """From the last occurrence of an invocation on, or on the last tokens of the prompt."""
    config, dice, rows = replace(USUAL, targets=ATTENTION[kind]), random.Random(0), []
    for row in examples(24, seed=3):
        prompt = list(row.ids[: row.prompt])
        place = dice.randrange(1, len(prompt) + 1)
        prompt[place:place] = activation.tokens
        rows.append(Example((*prompt, *row.ids[row.prompt :]), len(prompt), activation.begin(prompt) or 0))
    check_equal(kind, config, rows, tmp_path, activation.tokens or (UNUSED,))
    plain = learn(tiny.model(kind), config, [replace(row, begin=0) for row in rows])
    assert gap(plain.tensors, learn(tiny.model(kind), config, rows).tensors) > 1e-2  # where it acts does matter


@settings(max_examples=6)
@given(seed=st.integers(0, 99), tokens=st.sampled_from([1, 30, 70]), late=st.booleans())
def test_however_passes_are_cut(llama: nn.Module, seed: int, tokens: int, late: bool) -> None:
    """Any limit of a pass, from any place of a prompt on."""
    config = TrainingConfig(r=4, targets="all-linear", lr=2e-3, batch_size=5, steps=8, held_out=0.0)
    rows = [replace(row, begin=late * (row.prompt - 1)) for row in examples(18, seed)]
    expected = learn(llama, config, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "PASS_TOKENS", tokens)
        found = learn(llama, config, rows)
    assert gap(found.tensors, expected.tensors) < 1e-4 and found.best.step == expected.best.step


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_is_the_same_afterwards(kind: str) -> None:
    """So the next adapter is the one that it would be alone; and adapters of other names begin elsewhere."""
    model = tiny.model(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = TrainingConfig(r=2, targets=ATTENTION[kind], lr=5e-3, steps=4, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first, second = (learn(model, config, examples(18, 7), name).tensors for name in ("a", "b"))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in after.values())
    assert not any(module.training for module in model.modules())
    assert gap(second, learn(tiny.model(kind), config, examples(18, 7), "b").tensors) < 1e-6
    assert gap(first, second) > 0.1


def test_the_best_step_by_the_held_out_rows_is_kept(llama: nn.Module) -> None:
    """Whose held-out loss is that of PEFT with the kept factors."""
    config = TrainingConfig(r=8, targets="all-linear", lr=2e-2, epochs=6, batch_size=6, patience=0)
    rows = examples(60, 1)
    found = learn(llama, config, rows)
    losses = [one.held_out or 0.0 for one in found.measured]
    assert len(losses) == 10 and 0 < min(losses) < 0.95 * losses[0]  # it learned something
    assert found.best == found.measured[losses.index(min(losses))] != found.measured[-1]
    assert not found.early and found.steps == found.measured[-1].step == 54
    wrapped = peft.get_peft_model(tiny.model("llama"), config.lora(llama)).eval()
    peft.set_peft_model_state_dict(wrapped, dict(found.tensors))
    total, tokens = 0.0, 0
    for row in split("task", config, rows)[1]:
        logits = wrapped(input_ids=torch.tensor([row.ids])).logits[0, row.prompt - 1 : -1].detach()
        total += float(nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.prompt :]), reduction="sum"))
        tokens += row.completion
    assert total / tokens == pytest.approx(found.best.held_out, rel=1e-4)


def test_a_task_stops_without_patience(llama: nn.Module) -> None:
    hasty = TrainingConfig(r=8, targets="all-linear", lr=0.1, epochs=40, batch_size=4, patience=2)
    found = learn(llama, hasty, examples(20, 3))
    assert found.early and len([one for one in found.measured if one.step > found.best.step]) == 2
    assert found.steps < 200


def test_what_is_not_finite_ends_the_task(llama: nn.Module) -> None:
    """A loss, a gradient or factors; and the next task is what it would be."""
    config = TrainingConfig(r=2, lr=3e-3, steps=4, batch_size=4)
    expected = learn(llama, config, examples(16, 1))
    for steps, what in ((4, "held-out loss"), (40, "loss")):
        with pytest.raises(NotFinite, match=rf"at step \d its {what} is nan; give a lower --lr"):
            learn(llama, replace(config, lr=3e38, steps=steps), examples(16, 1))
    with pytest.raises(NotFinite, match="at step 1 its sum of factors is nan"):
        learn(llama, replace(config, lr=3e38, steps=1, held_out=0.0), examples(16, 1))

    def overflowing(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)
        return output

    handle = llama.get_submodule("model.layers.1.mlp").register_forward_hook(overflowing)
    with pytest.raises(NotFinite, match=r"at step 1 its gradient is (nan|inf)"):
        learn(llama, config, examples(16, 1))
    handle.remove()
    assert gap(learn(llama, config, examples(16, 1)).tensors, expected.tensors) == 0


def test_targets_that_cannot_be_trained() -> None:
    """And the model is as it was."""
    model = tiny.model("llama")
    for targets, message in [
        ("q_prj", "targets q_prj: .*q_prj"),
        ("lm_head", "lm_head is the output head, which cannot be trained here; leave it out"),
        ("embed_tokens", "embed_tokens is not a linear module"),
    ]:
        with pytest.raises(UsageError, match=message):
            learn(model, replace(USUAL, targets=targets), examples(12))
    assert learn(model, USUAL, examples(12)).steps == STEPS
