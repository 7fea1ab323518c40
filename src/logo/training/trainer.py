"""The trainer of one process: loads a base model once and trains groups one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logo.digests import config_digest, library_versions, tokenizer_digest, weights_digest
from logo.errors import ModelError
from logo.mixing.placement import device_of
from logo.models import load_base, load_config, skeleton
from logo.training.checkpoint import forget
from logo.training.factors import Adapted, Factors, adapted, devices_of
from logo.training.group import Base, Group
from logo.training.learner import DIVERGED, Learner
from logo.training.passes import Limits
from logo.training.plan import GroupPlan, Prepared
from logo.training.pool import course_record, record_of, write_adapter
from logo.training.progress import Status
from logo.training.recipe import Recipe

USUAL_TOKENS = 2048


@dataclass(frozen=True)
class Opening:
    """How the base model is loaded and read.

    Attributes:
        base_model, model_dir, device, dtype, device_map: as `logo.models.load_base`.
        pass_tokens: tokens of one forward pass, padding included. A larger batch is cut into several passes.
        recompute: activations are computed again in the backward pass (gradient checkpointing).
    """

    base_model: str
    model_dir: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    pass_tokens: int = USUAL_TOKENS
    recompute: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task.

    Attributes:
        task: name of the task.
        reason: why it failed or diverged; None if it did not.
        written: whether its adapter was written.
        before: whether an earlier run had written it, so that it was not trained now.
    """

    task: str
    reason: str | None
    written: bool
    before: bool = False


class Trainer:
    """A base model for training groups.

    Attributes:
        base: the model, as groups use it.
        tokenizer: its tokenizer.

    Raises:
        ModelError, HubError, UsageError: as in `logo.models.load_base`.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        model, tokenizer = load_base(
            opening.base_model,
            device=opening.device,
            dtype=opening.dtype,
            device_map=opening.device_map,
            model_dir=opening.model_dir,
        )
        self._model, self.tokenizer = model, tokenizer
        self._adapted: dict[tuple[str, ...], Adapted] = {}
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"base model {opening.base_model}: expected a language model with an output head")
        vocabulary = int(head.weight.shape[0])
        device = device_of(model.get_input_embeddings())
        limits = Limits.of(opening.pass_tokens, vocabulary, device)
        pad = int(tokenizer.pad_token_id)
        self.base = Base(model, pad, vocabulary, limits, device, opening.recompute)

    @property
    def facts(self) -> dict[str, Any]:
        """Digests of the base model and its tokenizer, and the dtype; the same in every process."""
        return {
            "weights": weights_digest(self._model),
            "config": config_digest(self._model.config),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that affect the last digits."""
        import peft

        return {**library_versions(), "peft": peft.__version__}

    def train(
        self, plan: GroupPlan, root: Path, every: float, tell: Callable[[Sequence[Status]], None] | None = None
    ) -> list[Outcome]:
        """Trains a group, from its checkpoint if there is one, and writes its adapters.

        Args:
            root: folder of the pool.
            every: seconds between two checkpoints.
            tell: called with the progress of its tasks, at the beginning and after each round.

        Raises:
            StorageError: something cannot be written.
            UsageError: a recipe's targets are not in the model.
        """
        by_name = {task.name: task for task in plan.tasks}
        learners = self.learners(plan.tasks)

        def save(learner: Learner) -> None:
            if learner.best is not None:
                self._write(root, by_name[learner.name], learner)
            learner.release()

        def stands(name: str) -> bool:
            return (record_of(root / name) or {}).get("digest") == by_name[name].digest

        group = Group(self.base, learners, plan.members, plan.folder, save, every, stands)
        ended = {learner.name for learner in learners if not learner.running}

        def say() -> None:
            if tell is not None:
                tell([_status(by_name[learner.name], learner) for learner in learners])

        say()
        group.run(say)
        if group.others:
            group.keep()
        else:
            forget(plan.folder)
        return [replace(_outcome(learner), before=learner.name in ended) for learner in learners]

    def calibrate(self, root: Path) -> None:
        """Runs the calibration of the pool, so that it opens without one.

        Raises:
            LoGoError: the pool cannot be calibrated.
        """
        from logo.adapters.pool import AdapterPool
        from logo.engine import LoGo

        logo = LoGo(self._model, self.tokenizer, AdapterPool.from_directory(root, on_bad_adapter="skip"))
        logo.calibrate()

    def learners(self, tasks: Sequence[Prepared]) -> list[Learner]:
        """A learner for each task, with initial factors.

        Raises:
            UsageError: a recipe's targets are not in the model.
        """
        learners = []
        for task in tasks:
            recipe = task.recipe
            found = self.adapted(recipe).shapes
            factors = Factors(found, devices_of(self._model, list(found)), recipe.r, recipe.seed, task.name)
            learners.append(Learner(task.name, recipe, task.rows, factors))
        return learners

    def adapted(self, recipe: Recipe) -> Adapted:
        """The modules that a recipe adapts.

        Raises:
            UsageError: as in `logo.training.factors.adapted`.
        """
        if recipe.targets not in self._adapted:
            config = load_config(self._opening.base_model, model_dir=self._opening.model_dir)
            self._adapted[recipe.targets] = adapted(skeleton(config), recipe)
        return self._adapted[recipe.targets]

    def check(self, recipes: Sequence[Recipe]) -> None:
        """Raises UsageError where the targets of a recipe are not in the model."""
        for recipe in recipes:
            self.adapted(recipe)

    def _write(self, root: Path, task: Prepared, learner: Learner) -> None:
        record = {**task.record, "course": course_record(learner.course), "versions": self.versions}
        found = self.adapted(task.recipe)
        config = task.recipe.lora(self._opening.base_model, found.targets, found.transposed, task.invocation)
        write_adapter(root / task.name, learner.best or {}, config, record)


def _status(task: Prepared, learner: Learner) -> Status:
    course = learner.course
    held_out = course.measured[-1].held_out if course.measured else None
    return Status(
        task.name, course.step, learner.steps, course.tokens, task.tokens, course.last_loss, held_out, course.status
    )


def _outcome(learner: Learner) -> Outcome:
    course = learner.course
    reason = course.reason if course.status == DIVERGED else None
    if reason is not None:
        kept = "no adapter is kept" if course.best is None else f"the adapter of step {course.best} is kept"
        reason = f"{reason}; {kept}"
    return Outcome(learner.name, reason, course.best is not None)


def same_base(own: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The differences between two processes' `facts` or `versions`, in words; None if there are none."""
    names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
    return f"{', '.join(names)} of its base model or libraries differ" if names else None
