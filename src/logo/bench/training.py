"""The cost of training a pool: PEFT with transformers' Trainer, our loop one task at a time, and many tasks at once.

Every arm runs in its own process, trains on the same rows in the same order with the same recipe, and is then evaluated
on the same held-out rows by the same code.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from logo.errors import LoGoError
from logo.training.examples import Example, encode
from logo.training.factors import Bank
from logo.training.group import Group, held_out_losses
from logo.training.learner import Learner
from logo.training.plan import Prepared
from logo.training.recipe import Recipe
from logo.training.tasks import Task
from logo.training.trainer import Opening, Trainer

ARMS = ("trainer", "one", "many")


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        opening: how to load the base model.
        tasks: the tasks to train adapters for.
        recipe: the recipe of all tasks; every arm makes its `steps`.
        threads: threads of each arm; None: PyTorch's default.
    """

    opening: Opening
    tasks: tuple[Task, ...]
    recipe: Recipe
    threads: int | None = None


@dataclass(frozen=True)
class Arm:
    """One measured arm.

    Attributes:
        name: one of `ARMS`.
        seconds: duration of all steps, without loading and evaluating.
        tokens: tokens trained on.
        peak: largest memory of its process, base model included.
        losses: task -> mean loss of its held-out rows after training, in nats per token.
    """

    name: str
    seconds: float
    tokens: int
    peak: int
    losses: Mapping[str, float]

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens_per_second": self.speed}


def bench_training(wanted: Wanted, arms: Sequence[str], say: Callable[[str], None]) -> list[Arm]:
    """Measures the arms, one after the other.

    Args:
        say: called with the name of each arm when it begins.

    Raises:
        LoGoError: an arm failed.
    """
    found = []
    context = multiprocessing.get_context("spawn")
    for name in arms:
        say(name)
        mine, other = context.Pipe(duplex=False)
        process = context.Process(target=_measured, args=(wanted, name, other), daemon=True)
        process.start()
        other.close()
        try:
            outcome = mine.recv()
        except EOFError:
            process.join()
            raise LoGoError(f"arm {name}: its process ended with exit code {process.exitcode}") from None
        process.join()
        if isinstance(outcome, Exception):
            raise LoGoError(f"arm {name}: {type(outcome).__name__}: {outcome}") from outcome
        found.append(outcome)
    return found


def _measured(wanted: Wanted, name: str, answer: Any) -> None:
    """Measures an arm in its own process, and sends the result or the error through `answer`."""
    try:
        if wanted.threads is not None:
            torch.set_num_threads(wanted.threads)
        answer.send(_arm(wanted, name))
    except Exception as error:
        answer.send(LoGoError(f"{type(error).__name__}: {error}"))


def _arm(wanted: Wanted, name: str) -> Arm:
    trainer = Trainer(wanted.opening)
    recipe = replace(wanted.recipe, evaluations=1, patience=None)
    prepared = []
    for task in wanted.tasks:
        rows = encode(trainer.tokenizer, task, recipe.max_length).rows
        prepared.append(Prepared(task.name, recipe, rows, "", {}))
    learners = trainer.learners(prepared)
    held_out = {learner: learner.held_out for learner in learners}
    for learner in learners:
        learner.held_out = []  # no measurements within the timed part
    started = time.perf_counter()
    if name == "trainer":
        tokens = sum(_by_trainer(trainer.base.model, learner, trainer.base.pad) for learner in learners)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            groups = [[learner] for learner in learners] if name == "one" else [learners]
            for number, group in enumerate(groups):
                folder = Path(scratch) / str(number)
                members = {learner.name: "" for learner in group}
                Group(trainer.base, group, members, folder, lambda learner: None, float("inf")).run()
        tokens = sum(learner.course.tokens for learner in learners)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    losses = {}
    for learner in learners:
        [loss] = held_out_losses(
            trainer.base, [learner], {learner: held_out[learner]}, Bank([learner.factors])
        ).values()
        losses[learner.name] = loss
    return Arm(name, seconds, tokens, peak, losses)


def _by_trainer(model: Any, learner: Learner, pad: int) -> int:
    """Trains an adapter with PEFT and transformers' Trainer as in their documentation, and copies the result into the
    learner's factors. Returns the number of tokens trained on.
    """
    from peft import get_peft_model
    from transformers import Trainer as HuggingFaceTrainer
    from transformers import TrainingArguments

    recipe, batches = learner.recipe, []
    for step in range(learner.steps):
        learner.course.step = step
        batches.append(learner.batch())
    config = recipe.lora()
    config.inference_mode = False
    peft = get_peft_model(model, config)
    layers = {path: module for path, module in peft.base_model.model.named_modules() if path in learner.factors.A}
    with torch.no_grad():
        for path, layer in layers.items():
            layer.lora_A["default"].weight.copy_(learner.factors.A[path])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=1,  # one of our batches, so that all arms learn from the same
            max_steps=learner.steps,
            learning_rate=recipe.lr,
            lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
            warmup_steps=round(recipe.warmup * learner.steps),
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip,
            optim="adamw_torch",
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type != "cpu",
            remove_unused_columns=False,
        )
        peft.train()
        HuggingFaceTrainer(peft, arguments, train_dataset=batches, data_collator=_Padded(pad)).train()
    with torch.no_grad():
        for path, layer in layers.items():
            learner.factors.A[path].copy_(layer.lora_A["default"].weight)
            learner.factors.B[path].copy_(layer.lora_B["default"].weight.T)
    peft.unload()
    model.eval().requires_grad_(False)
    return sum(len(row) for batch in batches for row in batch)


@dataclass(frozen=True)
class _Padded:
    """A batch as the Trainer reads it: rows padded on the right, the prompts without labels."""

    pad: int

    def __call__(self, batches: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
        [rows] = batches
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        labels = torch.full((len(rows), length), -100)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row.ids)
            mask[number, : len(row)] = 1
            labels[number, row.prompt : len(row)] = ids[number, row.prompt : len(row)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
