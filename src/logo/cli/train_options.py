"""Options of `logo train`: the recipe of adapters, and the course of the training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logo.cli.options import DEVICE, Choice
from logo.cli.places import PROCESSES, Cpus, Gpus, Ray

if TYPE_CHECKING:
    from logo.training.recipe import Recipes

RECIPE = "Recipe (a file that --recipe names may have the same)"
COURSE = "Course"


class Schedules(Choice):
    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


def _said(help: str, default: object, *names: str) -> Any:
    """An option of the recipe. What it is without stands in `Recipe`, unless a recipe file says otherwise."""
    return typer.Option(*names, help=help, show_default=str(default), rich_help_panel=RECIPE)


@dataclass(frozen=True)
class RecipeOptions:
    """The fields of `logo.training.recipe.Recipe`; None: as the recipe file has it, or as usual."""

    r: Annotated[int | None, _said("Rank.", 8, "--r")] = None
    alpha: Annotated[float | None, _said("The update is scaled by alpha / r.", 16)] = None
    rslora: Annotated[bool | None, _said("Scale by alpha / sqrt(r) instead.", "no-rslora", "--rslora/--no-rslora")] = (
        None
    )
    targets: Annotated[
        str | None, _said("Names of the modules that are adapted, or `all-linear`.", "q_proj,v_proj")
    ] = None
    lr: Annotated[float | None, _said("Learning rate at its highest.", 0.0002)] = None
    epochs: Annotated[float | None, _said("How often every row is learned from.", 3)] = None
    steps: Annotated[int | None, _said("Optimiser steps, instead of epochs.", "none")] = None
    batch_size: Annotated[int | None, _said("Rows of a step.", 8)] = None
    max_length: Annotated[int | None, _said("Tokens of a row; longer prompts lose their beginning.", 1024)] = None
    seed: Annotated[
        int | None, _said("Random seed of initial factors, of the order of rows and of which are held out.", 0)
    ] = None
    warmup: Annotated[float | None, _said("Share of the steps over which the learning rate rises.", 0.03)] = None
    schedule: Annotated[Schedules | None, _said("How the learning rate falls after that.", "cosine")] = None
    weight_decay: Annotated[float | None, _said("Weight decay of AdamW.", 0)] = None
    clip: Annotated[float | None, _said("Clip the gradient of a step to this norm.", 1)] = None
    held_out: Annotated[
        float | None, _said("Share of the rows that is held out to measure the loss on, at most 64 rows.", 0.1)
    ] = None
    evaluations: Annotated[int | None, _said("How often the loss of the held-out rows is measured.", 10)] = None
    patience: Annotated[int | None, _said("Stop a task after this many measurements without a lower loss.", 3)] = None
    activated: Annotated[
        bool,
        _said(
            "Train adapters that act only from a place near the end of the prompt on, so that a prompt is read once: "
            "in conversations from where the assistant's turn opens, elsewhere from the last 4 tokens.",
            "no",
            "--activated",
        ),
    ] = False
    invocation: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Activated, from the last place on at which the prompt has this text; every prompt has to have it.",
            show_default="none",
            rich_help_panel=RECIPE,
        ),
    ] = None
    last: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Activated, from the last N tokens of the prompt on.",
            show_default="none",
            rich_help_panel=RECIPE,
        ),
    ] = None
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML: the same fields, and under `tasks:` those of single tasks, by name or pattern.",
            show_default="none",
            rich_help_panel=RECIPE,
        ),
    ] = None

    def recipes(self) -> Recipes:
        """The recipes that these options and the file make.

        Raises:
            UsageError, StorageError: as `read_recipes`.
        """
        from logo.errors import UsageError
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
            raise UsageError(f"--invocation: expected a text that prompts have, found {self.invocation!r}")
        if self.last is not None:
            given["activation"] = f"last:{self.last}"
        elif self.activated and self.invocation is None:
            given["activation"] = ACTIVATED
        return read_recipes(self.recipe, given)


@dataclass(frozen=True)
class CourseOptions:
    """How the training goes, which changes no adapter but in its last digits."""

    at_once: Annotated[
        int | None,
        typer.Option(
            help="Train at most this many tasks together, whose rows share forward passes.",
            show_default="16; with --jobs an equal share, at most 16",
            min=1,
            rich_help_panel=COURSE,
        ),
    ] = None
    pass_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of one forward pass, padding included. A larger step is cut into several passes, and their "
            "gradients are added up.",
            min=1,
            rich_help_panel=COURSE,
        ),
    ] = 2048
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Compute activations again in the backward pass instead of keeping them (gradient checkpointing).",
            rich_help_panel=COURSE,
        ),
    ] = False
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between two checkpoints.", min=0.0, rich_help_panel=COURSE)
    ] = 60.0
    retrain: Annotated[
        bool,
        typer.Option(
            "--retrain",
            help="Replace adapters that were made from other rows or with another recipe.",
            rich_help_panel=COURSE,
        ),
    ] = False
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Write beside the adapters what each responds to neutral text, so that the pool answers at once.",
            rich_help_panel=COURSE,
        ),
    ] = True
    examples: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Leave the first N prompts of each task, without answers, beside its adapter: prompts like them are "
            "recognised by it. They stay in the pool's folder; `logo pool push` does not send them.",
            min=0,
            rich_help_panel=COURSE,
        ),
    ] = 4
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes that train, each with the model. Needs Ray: pip install 'lora-on-the-go[ray]'.",
            show_default="this process alone; with --ray, as many as there is room for",
            min=1,
            rich_help_panel=PROCESSES,
        ),
    ] = None
    ray: Ray = None
    gpus_per_worker: Gpus = None
    cpus_per_worker: Cpus = None


@dataclass(frozen=True)
class DeviceOptions:
    """Where the base model is, and in which dtype."""

    gpu: Annotated[
        int,
        typer.Option(help="GPU number; -1 for the CPU (used anyway where there is no GPU).", rich_help_panel=DEVICE),
    ] = 0
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the base model: float32, bfloat16, float16 or auto (float32 on the CPU, else the checkpoint's). "
            "Adapters are learned in float32.",
            rich_help_panel=DEVICE,
        ),
    ] = "auto"
    device_map: Annotated[
        str | None,
        typer.Option(
            help="`auto` spreads a large model over several GPUs.", show_default="none", rich_help_panel=DEVICE
        ),
    ] = None
    model_dir: Annotated[str, typer.Option(help="Looked in first for base models.", rich_help_panel=DEVICE)] = (
        "./hf_models"
    )
