"""Options of `logo train`: the recipe of adapters, and the course of the training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from logo.cli.options import Device, DeviceMap, ModelDir, rare, usual
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.training.recipe import Recipes

RECIPE = "Recipe (also in a --recipe file)"
COURSE = "Course"


Schedules = Literal["cosine", "linear", "constant"]


def _usual(help: str, default: object, *names: str) -> Any:
    """An option of the recipe. Its default is that of `Recipe`, unless a recipe file says otherwise."""
    return usual(None, help, str(default), *names)


def _rare(help: str, default: object, *names: str, **more: Any) -> Any:
    return rare(None, help, str(default), *names, panel=RECIPE, **more)


@dataclass(frozen=True)
class RecipeOptions:
    """The fields of `logo.training.recipe.Recipe`; None: as the recipe file has it, or as usual."""

    r: int | None = _usual("Rank.", 8, "--r")
    alpha: float | None = _rare("The update is scaled by alpha / r.", 16)
    rslora: bool | None = _rare("Scale by alpha / sqrt(r) instead.", "no-rslora", "--rslora/--no-rslora")
    targets: str | None = _usual("Names of the modules that are adapted, or `all-linear`.", "q_proj,v_proj")
    lr: float | None = _usual("Peak learning rate.", 0.0002)
    epochs: float | None = _usual("Passes over the rows.", 3)
    steps: int | None = _usual("Optimiser steps, instead of epochs.", "none")
    batch_size: int | None = _rare("Rows per optimiser step.", 8)
    max_length: int | None = _rare("Tokens of a row; longer prompts lose their beginning.", 1024)
    seed: int | None = _rare("Random seed of initial factors, row order and held-out rows.", 0)
    warmup: float | None = _rare("Share of the steps over which the learning rate rises.", 0.03)
    schedule: Schedules | None = _rare("How the learning rate falls after that.", "cosine")
    weight_decay: float | None = _rare("Weight decay of AdamW.", 0)
    clip: float | None = _rare("Clip the gradient of a step to this norm.", 1)
    held_out: float | None = _rare("Share of the rows held out to measure the loss, at most 64 rows.", 0.1)
    evaluations: int | None = _rare("How often the loss of the held-out rows is measured.", 10)
    patience: int | None = _rare("Stop a task after this many measurements without a lower loss.", 3)
    activated: bool = usual(
        False, "Adapters act only near the end of the prompt, which is read once (docs/make-a-pool.md).", "no"
    )
    invocation: str | None = _rare(
        "Activated adapters that act from the last occurrence of this text on; every prompt has to contain it.",
        "none",
        metavar="TEXT",
    )
    last: int | None = _rare(
        "Activated adapters that act from the last N tokens of the prompt on.", "none", metavar="N"
    )
    recipe: Path | None = usual(
        None,
        "YAML file with these fields, and with fields of single tasks under `tasks:`, by name or pattern.",
        "none",
        metavar="FILE",
    )

    def recipes(self) -> Recipes:
        """The recipes that these options and the file make.

        Raises:
            UsageError, StorageError: as `read_recipes`.
        """
        from logo.training.recipe import ACTIVATED, Recipe, read_recipes, targets_of

        given = {one.name: getattr(self, one.name) for one in fields(Recipe) if one.name != "activation"}
        given = {name: value for name, value in given.items() if value is not None}
        if self.targets is not None:
            given["targets"] = targets_of(self.targets)
        if self.schedule is not None:
            given["schedule"] = str(self.schedule)
        if self.invocation is not None and self.last is not None:
            raise UsageError("give either --invocation or --last, found both")
        if self.invocation is not None and not self.invocation.strip():
            raise UsageError(f"--invocation: expected a text that all prompts contain, found {self.invocation!r}")
        if self.last is not None:
            given["activation"] = f"last:{self.last}"
        elif self.activated and self.invocation is None:
            given["activation"] = ACTIVATED
        return read_recipes(self.recipe, given)


@dataclass(frozen=True)
class CourseOptions:
    """Options of the course of a training, which change an adapter in its last digits at most."""

    pass_tokens: int = rare(
        2048,
        "Tokens of one forward pass, padding included. A larger step is cut into several passes, and their "
        "gradients are added up.",
        min=1,
        panel=COURSE,
    )
    recompute: bool = rare(
        False,
        "Recompute activations in the backward pass instead of keeping them (gradient checkpointing).",
        panel=COURSE,
    )
    retrain: bool = usual(False, "Replace adapters trained from other rows or with another recipe.")
    examples: int = rare(
        4,
        "Leave the first N prompts of each task, without answers, beside its adapter: prompts like them are "
        "recognised by it. They stay in the pool's folder; `logo pool push` does not send them.",
        metavar="N",
        min=0,
        panel=COURSE,
    )


@dataclass(frozen=True)
class DeviceOptions:
    """Where the base model is, and in which dtype."""

    device: Device = "auto"
    dtype: str = usual("auto", "Dtype of the base model; adapters are trained in float32.")
    device_map: DeviceMap = None
    model_dir: ModelDir = "./hf_models"
