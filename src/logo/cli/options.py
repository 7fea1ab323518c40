"""Options that several commands share; `logo.cli.opening` makes an engine of them.

Options that belong together are a frozen dataclass, whose fields a command gets as one parameter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter, Token
from cyclopts.validators import Number

from logo import plugins
from logo.errors import UsageError
from logo.recorded import without_secrets

if TYPE_CHECKING:
    from logo.baselines import Method

Context = Literal["base", "pool", "carry"]
ProbeText = Literal["all", "last-user", "conversation"]
WhenUnsure = Literal["mix", "base", "refuse"]
Engine = Literal["local", "vllm"]

POOL = Group("Model, pool and selection", sort_key=4)

positive = Number(gte=1)
not_negative = Number(gte=0)


def in_words(default: str, *, of: Group | None = None, **more: Any) -> Parameter:
    """An option whose default is told in words."""
    if of is not None:  # a group of None is none at all: such options are not shown
        more["group"] = of
    return Parameter(show_default=default, **more)


def device_name(kind: type, tokens: Sequence[Token]) -> str:
    """The checked value of `--device`, of which `logo.cli.opening.device_of` makes a device."""
    text = tokens[-1].value
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?|\d+|-1|spread", text):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N, mps or spread, found {text!r}")
    return text


def changed(options: Any, *names: str) -> dict[str, str]:
    """Field -> flag of those of these options that do not have their defaults, in the order of the fields.

    Args:
        options: a dataclass of options.
        names: of its fields; none: all of them.
    """
    flags: dict[str, str] = {}
    for field in fields(options):
        if names and field.name not in names:
            continue
        if getattr(options, field.name) != field.default:
            flags[field.name] = f"--{field.name.replace('_', '-')}"
    return flags


def command_record(name: str, *options: Any) -> dict[str, Any]:
    """What a command writes beside its results, for `--config`: its name, the options of these dataclasses that do not
    have their defaults, without secrets, and the plugins."""
    values = {name: getattr(group, name) for group in options for name in changed(group)}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    command = {"name": name, "options": without_secrets(plain)}
    if plugins.named():
        command["plugins"] = plugins.named()
    return command


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and which pool."""

    base_model: Annotated[str | None, in_words("demo", of=POOL)] = None
    """Hub id, folder or short name."""

    adapters: Annotated[list[str] | None, in_words("the base model's own", of=POOL)] = None
    """Folder, Hub repo or manifest; several with commas."""

    device: Annotated[str, Parameter(group=POOL, converter=device_name, n_tokens=1)] = "auto"
    """auto, cpu, mps, cuda, cuda:N, or spread: over all GPUs."""

    @property
    def sources(self) -> str | None:
        """The sources of `adapters` as one text."""
        return None if self.adapters is None else ",".join(self.adapters)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SelectionOptions(ModelOptions):
    """The same, and what every selection depends on."""

    n_selected_modules: Annotated[
        int | None, in_words("20; demo: 3", of=POOL, name=("--n-selected-modules", "-k"), validator=positive)
    ] = None
    """The most adapters of a prompt."""

    prior: Annotated[float, Parameter(group=POOL, validator=Number(gt=0, lt=1))] = 0.8
    """How likely it is that a prompt belongs to some adapter of the pool."""

    encoder: Annotated[str | None, in_words("none", of=POOL)] = None
    """Text encoder, for examples and descriptions: `all-MiniLM-L6-v2`."""

    dtype: Annotated[str, Parameter(group=POOL)] = "auto"
    """float32, bfloat16, float16, or auto: as the model is stored."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EngineOptions(SelectionOptions):
    """The same, and all else that an engine is opened with."""

    signal: Annotated[str | None, in_words("calibrated", of=POOL)] = None
    """`calibrated`, `norm` or `entropy`."""

    when_unsure: Annotated[WhenUnsure, Parameter(group=POOL, show_default=False)] = "mix"
    """If unsure, answer by a mixture, by the base model, or not."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Several processes that answer rows."""

    workers: Annotated[int | None, in_words("this process", validator=positive)] = None
    """Processes that answer, each with the model (needs Ray)."""

    ray: Annotated[str | None, in_words("RAY_ADDRESS, else local")] = None
    """Where they are: local, auto (the Ray cluster of this machine) or HOST:PORT."""

    def check(self, device: str) -> None:
        """Raises UsageError for a `--device` beside workers, and for `--ray` without."""
        if self.workers is None and self.ray is not None:
            raise UsageError("--ray is for workers; add --workers N, or leave it out")
        if self.workers is not None and device != "auto":
            raise UsageError("--device: workers get their devices from Ray; leave it out")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Which method selects, and its own options."""

    method: str = "logo"
    """logo, base, uniform, random, target, best-single, lorahub, loraretriever or arrow."""

    method_args: str | None = None
    """Options of the method, such as `rows=16,budget=40` or `embedding_model=DIR`."""

    def make(self, k: int | None, seed: int) -> Method | None:
        """The method; None for the engine's own selection.

        Raises:
            UsageError: there is no such method or option, or an option cannot be used.
        """
        from logo.baselines import get_method

        if self.method == "logo":
            if self.method_args:
                raise UsageError("--method-args is for --method; the method is logo, whose options are --signal and -k")
            return None
        options = method_arguments(self.method_args)
        if k is not None and "k" in options:
            raise UsageError(f"--method-args k={options['k']}: expected either this or -k, found both")
        return get_method(self.method, seed=seed, **{"k": k, **options})


def arguments(option: str, text: str) -> dict[str, str]:
    """The value `a=1,b=x` of an option as names and texts.

    Raises:
        UsageError: it is something else.
    """
    values: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{option} {part!r}: expected NAME=VALUE, several with commas")
        values[name.strip().replace("-", "_")] = value
    return values


def method_arguments(text: str | None) -> dict[str, Any]:
    """The options in `--method-args`, with an absolute path for a model in a folder, since workers may have another
    working directory; UsageError if the seed is among them."""
    options = arguments("--method-args", text or "")
    if "seed" in options:
        raise UsageError("--method-args seed: expected options of the method alone; the seed is `--seed` of a run")
    model = options.get("embedding_model", "")
    if os.path.exists(model):
        options["embedding_model"] = os.path.abspath(model)
    return options
