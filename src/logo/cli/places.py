"""Where the processes of a command run, as options of the command line: on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from logo.adapters.places import parse_places, places_text
from logo.backends.cluster import LOCAL, Layout
from logo.cli.options import EngineOptions, rare
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.baselines import Method

PROCESSES = "Several processes"

Ray = Annotated[
    str | None,
    rare(
        "`local`: this machine; `auto`: the Ray cluster that this machine is part of; or its HOST:PORT.",
        "local, with several processes",
        metavar="WHERE",
        panel=PROCESSES,
    ),
]
Gpus = Annotated[
    float | None, rare("GPUs per process.", "1 if there are GPUs, else 0", metavar="G", min=0.0, panel=PROCESSES)
]
Cpus = Annotated[
    int | None,
    rare(
        "CPU cores and threads per process.",
        "local: an equal share of all; else 1",
        metavar="C",
        min=1,
        panel=PROCESSES,
    ),
]


def check_alone(given: dict[str, bool], needed: str) -> None:
    """Raises UsageError for an option that means nothing without another one.

    Args:
        given: whether each of these options was given.
        needed: the other one, in words.
    """
    for option, is_given in given.items():
        if is_given:
            raise UsageError(f"{option} needs {needed}; add that")


def check_devices(engine: EngineOptions, what: str, gpus: str) -> None:
    """Raises UsageError for options that choose a device, since Ray gives each process its own.

    Args:
        what: the processes.
        gpus: the option to use instead.
    """
    for name in ("device", "device_map"):
        if getattr(engine, name) != getattr(EngineOptions(), name):
            raise UsageError(f"--{name.replace('_', '-')}: {what} get their devices from Ray; use {gpus}")


def starting(layout: Layout, what: str) -> str:
    """A line that says what is being started, and where."""

    count = f"{layout.count} {what}" if layout.count else f"as many {what} as there is room for"
    where = "on this machine" if layout.address == LOCAL else f"on the Ray cluster {layout.address}"
    return f"starting {count} {where}"


def everywhere(options: EngineOptions) -> EngineOptions:
    """The options with absolute paths, for a process with another working directory. A text that may also be a name on
    the Hub is a path if it exists; folders that are searched or created need not exist."""

    found: dict[str, Any] = {}
    for name in ("base_model", "adapters", "calibration_prompts", "model_dir", "cache"):
        value = getattr(options, name)
        if value and name == "adapters":
            found[name] = places_text(parse_places(value))
        elif value and (name in ("model_dir", "cache") or os.path.exists(value)):
            found[name] = type(value)(os.path.abspath(value))
    return replace(options, **found)


def absolute(name: str) -> str:
    """A model's name for a process with another working directory: a path that exists becomes absolute."""
    return os.path.abspath(name) if os.path.exists(name) else name


def anywhere(method: Method | None) -> Method | None:
    """The method with absolute paths, for a process with another working directory."""
    from logo.baselines.lorauter import LoRAuter
    from logo.baselines.retrieval import Retrieval

    if not isinstance(method, (Retrieval, LoRAuter)):
        return method
    return replace(method, embedding_model=absolute(method.embedding_model))
