"""Options of `logo train`: the recipe of adapters, and the course of the training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from logo.cli.options import Device, DeviceMap, ModelDir, rare, usual
from logo.cli.places import Cpus, Gpus, Ray
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.training.recipe import Recipes

RECIPE = "Recipe (also in a --recipe file)"
COURSE = "Course"


Schedules = Literal["cosine", "linear", "constant"]


def _usual(help: str, default: object, *names: str) -> Any:
    """An option of the recipe. Its default is that of `Recipe`, unless a recipe file says otherwise."""
    return usual(help, str(default), *names)


def _rare(help: str, default: object, *names: str, **more: Any) -> Any:
    return rare(help, str(default), *names, panel=RECIPE, **more)


@dataclass(frozen=True)
class RecipeOptions:
    """The fields of `logo.training.recipe.Recipe`; None: as the recipe file has it, or as usual."""

    r: Annotated[int | None, _usual("Rank.", 8, "--r")] = None
    alpha: Annotated[float | None, _rare("The update is scaled by alpha / r.", 16)] = None
    rslora: Annotated[bool | None, _rare("Scale by alpha / sqrt(r) instead.", "no-rslora", "--rslora/--no-rslora")] = (
        None
    )
    targets: Annotated[
        str | None, _usual("Names of the modules that are adapted, or `all-linear`.", "q_proj,v_proj")
    ] = None
    lr: Annotated[float | None, _usual("Peak learning rate.", 0.0002)] = None
    epochs: Annotated[float | None, _usual("Passes over the rows.", 3)] = None
    steps: Annotated[int | None, _usual("Optimiser steps, instead of epochs.", "none")] = None
    batch_size: Annotated[int | None, _rare("Rows per optimiser step.", 8)] = None
    max_length: Annotated[int | None, _rare("Tokens of a row; longer prompts lose their beginning.", 1024)] = None
    seed: Annotated[int | None, _rare("Random seed of initial factors, row order and held-out rows.", 0)] = None
    warmup: Annotated[float | None, _rare("Share of the steps over which the learning rate rises.", 0.03)] = None
    schedule: Annotated[Schedules | None, _rare("How the learning rate falls after that.", "cosine")] = None
    weight_decay: Annotated[float | None, _rare("Weight decay of AdamW.", 0)] = None
    clip: Annotated[float | None, _rare("Clip the gradient of a step to this norm.", 1)] = None
    held_out: Annotated[
        float | None, _rare("Share of the rows held out to measure the loss, at most 64 rows.", 0.1)
    ] = None
    evaluations: Annotated[int | None, _rare("How often the loss of the held-out rows is measured.", 10)] = None
    patience: Annotated[int | None, _rare("Stop a task after this many measurements without a lower loss.", 3)] = None
    activated: Annotated[
        bool,
        _usual(
            "Adapters act only near the end of the prompt, which is read once (docs/make-a-pool.md).",
            "no",
            "--activated",
        ),
    ] = False
    invocation: Annotated[
        str | None,
        _rare(
            "Activated adapters that act from the last occurrence of this text on; every prompt has to contain it.",
            "none",
            metavar="TEXT",
        ),
    ] = None
    last: Annotated[
        int | None, _rare("Activated adapters that act from the last N tokens of the prompt on.", "none", metavar="N")
    ] = None
    recipe: Annotated[
        Path | None,
        usual(
            "YAML file with these fields, and with fields of single tasks under `tasks:`, by name or pattern.",
            "none",
            metavar="FILE",
        ),
    ] = None

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

    at_once: Annotated[
        int | None,
        rare(
            "Number of tasks whose rows share forward passes.",
            "16; with --jobs an equal share, at most 16",
            min=1,
            panel=COURSE,
        ),
    ] = None
    pass_tokens: Annotated[
        int,
        rare(
            "Tokens of one forward pass, padding included. A larger step is cut into several passes, and their "
            "gradients are added up.",
            min=1,
            panel=COURSE,
        ),
    ] = 2048
    recompute: Annotated[
        bool,
        rare(
            "Recompute activations in the backward pass instead of keeping them (gradient checkpointing).",
            True,
            "--recompute",
            panel=COURSE,
        ),
    ] = False
    checkpoint_every: Annotated[float, rare("Seconds between two checkpoints.", min=0.0, panel=COURSE)] = 60.0
    retrain: Annotated[
        bool, usual("Replace adapters trained from other rows or with another recipe.", True, "--retrain")
    ] = False
    calibrate: Annotated[
        bool,
        rare(
            "Write each adapter's calibration beside it, so that the pool answers at once.",
            True,
            "--calibrate/--no-calibrate",
            panel=COURSE,
        ),
    ] = True
    examples: Annotated[
        int,
        rare(
            "Leave the first N prompts of each task, without answers, beside its adapter: prompts like them are "
            "recognised by it. They stay in the pool's folder; `logo pool push` does not send them.",
            metavar="N",
            min=0,
            panel=COURSE,
        ),
    ] = 4
    jobs: Annotated[
        int | None, usual("Processes that train, each with the model (needs Ray).", False, metavar="N", min=1)
    ] = None
    ray: Ray = None
    gpus_per_worker: Gpus = None
    cpus_per_worker: Cpus = None


@dataclass(frozen=True)
class DeviceOptions:
    """Where the base model is, and in which dtype."""

    device: Device = "auto"
    dtype: Annotated[str, usual("Dtype of the base model; adapters are trained in float32.")] = "auto"
    device_map: DeviceMap = None
    model_dir: ModelDir = "./hf_models"
