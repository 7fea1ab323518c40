"""The trainer: loads a base model once, and trains one adapter after the other on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.adapters.layout import linear_shape
from logo.errors import ModelError, UsageError
from logo.identity import config_digest, library_versions, tokenizer_digest, weights_digest
from logo.models import device_of, load_base, load_config, skeleton
from logo.training.learner import Course, Learner, transposed
from logo.training.passes import Base
from logo.training.pool import course_record, write_adapter
from logo.training.prepared import Prepared
from logo.training.recipe import Recipe

USUAL_TOKENS = 2048


@dataclass(frozen=True)
class Opening:
    """How the base model is loaded and read.

    Attributes:
        base_model, model_dir, device, dtype, device_map: as `logo.models.load_base`.
        pass_tokens, recompute: as `logo.training.passes.Base`.
    """

    base_model: str
    model_dir: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    pass_tokens: int = USUAL_TOKENS
    recompute: bool = False


class Trainer:
    """A base model for training.

    Attributes:
        base: the model.
        tokenizer: its tokenizer.

    Raises:
        ModelError, HubError, UsageError: as in `logo.models.load_base`.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        model, self.tokenizer = load_base(
            opening.base_model,
            device=opening.device,
            dtype=opening.dtype,
            device_map=opening.device_map,
            model_dir=opening.model_dir,
        )
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"base model {opening.base_model}: expected a language model with an output head")
        device = device_of(model.get_input_embeddings())
        pad, vocabulary = int(self.tokenizer.pad_token_id), int(head.weight.shape[0])
        self.base = Base(model, pad, vocabulary, device, opening.pass_tokens, opening.recompute)

    @property
    def facts(self) -> dict[str, Any]:
        """Digests of the base model and its tokenizer, and the dtype."""
        model = self.base.model
        return {
            "weights": weights_digest(model),
            "config": config_digest(model.config),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that affect the last digits."""
        import peft

        return {**library_versions(), "peft": peft.__version__}

    def check(self, recipe: Recipe) -> None:
        """Raises UsageError where the targets of a recipe cannot be trained."""
        check_targets(skeleton(load_config(self._opening.base_model, model_dir=self._opening.model_dir)), recipe)

    def train(self, task: Prepared, root: Path, tell: Callable[[Course], None]) -> Course:
        """Trains the adapter of a task and writes it.

        Args:
            root: folder of the pool.
            tell: called with the progress after each step.

        Raises:
            StorageError: it cannot be written.
        """
        learner = Learner(self.base, task)
        try:
            learner.run(tell)
        finally:
            learner.close()
        if learner.best:
            config = learner.config
            config.base_model_name_or_path, config.inference_mode = self._opening.base_model, True
            config.alora_invocation_tokens = list(task.invocation) or None
            record = {**task.record, "course": course_record(learner.course), "versions": self.versions}
            write_adapter(root / task.name, learner.best, config, record, task.examples)
        return learner.course


def check_targets(model: Any, recipe: Recipe) -> None:
    """Raises UsageError where a recipe adapts no module, one that is not linear, or the output head.

    Args:
        model: on the meta device; it is changed.
    """
    from peft import inject_adapter_in_model

    linear = {path for path, module in model.named_modules() if linear_shape(module) is not None}
    head = {path for path, module in model.named_modules() if module is model.get_output_embeddings()}
    asked = ", ".join(recipe.targets)
    try:
        injected = inject_adapter_in_model(recipe.lora(transposed=transposed(model)), model)
    except ValueError as error:  # no module of these names, or one of another kind
        raise UsageError(f"targets {asked}: {' '.join(str(error).split())}") from None
    for path, module in injected.named_modules():
        if hasattr(module, "lora_A") and (path not in linear or path in head):
            what = "the output head" if path in head else "not a linear module"
            raise UsageError(f"targets {asked}: {path} is {what}, which cannot be trained here; leave it out")
