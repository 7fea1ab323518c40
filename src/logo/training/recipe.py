"""How adapters are trained: one recipe for all tasks, and other values for single tasks."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from logo.adapters.activation import Activation
from logo.errors import StorageError, UsageError, closest

if TYPE_CHECKING:
    from peft import LoraConfig

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES = typing.get_args(Schedule)
ALL_LINEAR = "all-linear"

# A task with fewer rows has none held out: they would be too few to measure on, and it needs them for training.
FEWEST_TO_HOLD_OUT = 10
MOST_HELD_OUT = 64

# Values of a recipe's `activation`, besides `last:N`.
EVERYWHERE, INVOCATION, ACTIVATED = "everywhere", "invocation", "activated"

# Fields, what is expected of their values, and whether a value is so.
_LIMITS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("r", "batch_size", "evaluations", "steps", "patience"), "1 or more", lambda value: value is None or value >= 1),
    (("max_length",), "2 or more", lambda value: value >= 2),
    (("alpha", "lr", "epochs", "clip"), "a number above 0", lambda value: 0 < value < math.inf),
    (("weight_decay",), "0 or more", lambda value: 0 <= value < math.inf),
    (("warmup", "held_out"), "a share from 0 to below 1", lambda value: 0 <= value < 1),
    (("schedule",), f"one of {', '.join(SCHEDULES)}", lambda value: value in SCHEDULES),
    (("targets",), f"names of modules or {ALL_LINEAR}", lambda value: bool(value) and all(value)),
)


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule of an adapter.

    Attributes:
        r, alpha, rslora: rank, and the scale `alpha / r` of the update, or `alpha / sqrt(r)` with rsLoRA.
        targets: names of the linear modules that are adapted, as PEFT's `target_modules`; `("all-linear",)`: all of
            them but the output head.
        lr: the highest learning rate.
        epochs: how often every row is learned from; `steps`: optimiser steps instead, where they are given.
        batch_size: rows of one step.
        max_length: tokens of a row, at most those that the base model reads; longer prompts lose their beginning.
        seed: of the initial factors, of the order of the rows and of which of them are held out.
        warmup: share of the steps in which the learning rate rises; `schedule`: how it falls afterwards.
        weight_decay, clip: of AdamW, and the largest norm of a step's gradient.
        held_out: share of the rows on which progress is measured, at most 64 of them.
        evaluations: how often it is measured.
        patience: number of measurements without a better one after which the task is stopped; None: never.
        activation: where the adapter acts, in training as afterwards: `"everywhere"`; `"last:N"`, from the last N
            tokens of the prompt on; `"invocation"`, from the last place on at which the prompt has the text
            `invocation`; `"activated"`, chosen by the rows (`logo.training.activation`).
        invocation: that text; empty: none.
    """

    r: int = 8
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    lr: float = 2e-4
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    max_length: int = 1024
    seed: int = 0
    warmup: float = 0.03
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    held_out: float = 0.1
    evaluations: int = 10
    patience: int | None = 3
    activation: str = EVERYWHERE
    invocation: str = ""

    def __post_init__(self) -> None:
        for names, expected, right in _LIMITS:
            for name in names:
                if not right(getattr(self, name)):
                    raise UsageError(f"{name}: expected {expected}, found {getattr(self, name)!r}")
        if self.activation == INVOCATION and not self.invocation:
            raise UsageError(
                f"activation invocation: give the text from which adapters act (invocation), or use {ACTIVATED}"
            )
        if self.invocation and self.activation != INVOCATION:
            raise UsageError(
                f"give either an invocation or activation {self.activation}, found both (invocation "
                f"{self.invocation!r:.60})"
            )
        if self.activation not in (INVOCATION, ACTIVATED):
            Activation.parse(self.activation)

    def lora(self, transposed: bool = False) -> LoraConfig:
        """The PEFT configuration of the adapter.

        Args:
            transposed: the modules store their weights transposed (Conv1D, as in GPT-2).
        """
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # PEFT takes fractions, too
            use_rslora=self.rslora,
            target_modules=ALL_LINEAR if self.targets == (ALL_LINEAR,) else list(self.targets),
            fan_in_fan_out=transposed,
            task_type="CAUSAL_LM",
        )

    def length(self, rows: int) -> int:
        """Number of optimiser steps for this number of rows."""
        return self.steps or max(1, math.ceil(self.epochs * math.ceil(rows / self.batch_size)))

    def held_out_rows(self, rows: int) -> int:
        """How many of `rows` rows are held out."""
        if not self.held_out or rows < FEWEST_TO_HOLD_OUT:
            return 0
        return min(MOST_HELD_OUT, max(1, round(self.held_out * rows)))

    def as_dict(self) -> dict[str, Any]:
        """The recipe for JSON."""
        return {**asdict(self), "targets": list(self.targets)}


@dataclass(frozen=True)
class Recipes:
    """A recipe, and other values for single tasks.

    Attributes:
        usual: the recipe of tasks without values of their own.
        other: name or pattern of tasks -> fields of the recipe; later entries override earlier ones.
    """

    usual: Recipe
    other: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, task: str) -> Recipe:
        """The recipe of a task."""
        found: dict[str, Any] = {}
        for pattern, values in self.other.items():
            if pattern == task or fnmatch.fnmatchcase(task, pattern):
                if values.get("steps") is not None:
                    found.pop("epochs", None)
                found = _over(found, values)
        return replace(self.usual, **_over({}, found))

    def check(self, tasks: typing.Collection[str]) -> None:
        """Raises UsageError for an entry that matches no task."""
        for pattern in self.other:
            if not any(pattern == task or fnmatch.fnmatchcase(task, pattern) for task in tasks):
                raise UsageError(f"recipe: no task is called {pattern!r}{closest(pattern, tasks)}")


def read_recipes(file: Path | None, given: Mapping[str, Any]) -> Recipes:
    """The recipes of a YAML file and of the `given` fields.

        lr: 2.0e-3            # fields of `Recipe`
        tasks:                # for single tasks, by name or pattern
          "word_*": {r: 16, targets: all-linear}

    Args:
        file: the YAML file; None: the given fields only.
        given: fields that override the file's fields of all tasks, but not those of single tasks.

    Raises:
        UsageError: a field is unknown, or its value has the wrong type.
        StorageError: the file cannot be read.
    """
    raw = {} if file is None else _yaml(file)
    where = "recipe" if file is None else f"recipe {file}"
    tasks = raw.pop("tasks", None) or {}
    if not isinstance(tasks, dict):
        raise UsageError(f"{where}: 'tasks' must hold names of tasks with their own values, found {tasks!r:.60}")
    usual = Recipe(**_over(_over({}, _values(raw, where), where), given, "options"))
    other = {str(name): _values(values, f"{where}: task {str(name)!r}") for name, values in tasks.items()}
    made = Recipes(usual, other)
    for name in other:
        made.of(name)
    return made


def _over(below: Mapping[str, Any], above: Mapping[str, Any], where: str = "recipe") -> dict[str, Any]:
    """Fields with others that override them. A number of epochs replaces a number of steps and vice versa, and another
    activation removes the invocation.

    Raises:
        UsageError: one source has both.
    """
    if above.get("steps") is not None and above.get("epochs") is not None:
        raise UsageError(
            f"{where}: give either epochs or steps, found epochs {above['epochs']}, steps {above['steps']}"
        )
    instead: dict[str, Any] = {"steps": None} if "epochs" in above else {}
    if above.get("activation", INVOCATION) != INVOCATION:
        instead["invocation"] = ""
    elif above.get("invocation") and "activation" not in above:
        instead["activation"] = INVOCATION
    return {**below, **instead, **above}


def targets_of(text: str) -> tuple[str, ...]:
    """Names of modules, separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"recipe {file}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {file}: is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UsageError(f"recipe {file}: expected fields such as `lr: 0.001`, found {type(raw).__name__}")
    return {str(key): value for key, value in raw.items()}


def _values(raw: Any, where: str) -> dict[str, Any]:
    """The fields of a recipe, checked and converted to their types."""
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected fields such as `lr: 0.001`, found {raw!r:.60}")
    known = {one.name for one in fields(Recipe)}
    hints = typing.get_type_hints(Recipe)
    found = {}
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"{where}: unknown field {key!r}{closest(name, known)}; known: {', '.join(known)}")
        found[name] = _value(name, value, hints[name], where)
    return found


def _value(name: str, value: Any, hint: Any, where: str) -> Any:
    if name == "targets":
        names = targets_of(value) if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
            raise UsageError(f"{where}: targets: expected names of modules, found {value!r:.60}")
        return tuple(names)
    kinds = (str,) if typing.get_origin(hint) is Literal else typing.get_args(hint) or (hint,)
    if float in kinds and type(value) in (int, str):  # YAML 1.1 reads 2e-3 as a text
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) in kinds:  # a bool is not an int
        return value
    expected = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
    raise UsageError(f"{where}: {name}: expected {expected}, found {value!r:.60}")
