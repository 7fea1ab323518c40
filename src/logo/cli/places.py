"""Where the processes of a command run, as options of the command line: on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from logo.adapters.sources import parse_sources, spec_of
from logo.backends.cluster import LOCAL, Layout
from logo.cli.options import EngineOptions, changed, option
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.baselines import Method

PROCESSES = "Several processes"

Ray = Annotated[
    str | None,
    option(
        "`local`: this machine; `auto`: the Ray cluster that this machine is part of; or its HOST:PORT.",
        "local, with several processes",
        metavar="WHERE",
        panel=PROCESSES,
    ),
]
Gpus = Annotated[
    float | None,
    option("GPUs per process.", "1 if there are GPUs, else 0", metavar="G", min=0.0, panel=PROCESSES),
]
Cpus = Annotated[
    int | None,
    option(
        "CPU cores and threads per process.",
        "local: an equal share of all; else 1",
        metavar="C",
        min=1,
        panel=PROCESSES,
    ),
]


def check_alone(options: Any, needed: str, *names: str) -> None:
    """Raises UsageError for the first of these options that was given, since it means nothing without another one.

    Args:
        needed: the other one, in words.
    """
    for flag in changed(options, *names).values():
        raise UsageError(f"{flag} needs {needed}; add that")


def processes(
    options: Any, engine: Any, count: int | None, what: str, one: str, needed: str, *others: str, **more: float
) -> Layout | None:
    """The processes that options ask for; None: this process does the work.

    Args:
        options: with `ray`, `gpus_per_{one}` and `cpus_per_{one}`, which mean nothing, as `others`, without what is
            `needed`.
        engine: with `device` and `device_map`, which must not be given, since Ray gives each process its own device.
        what: the processes in words; `one`: the word for one of them in their options.
        more: further fields of `Layout`.

    Raises:
        UsageError: an option without those that it belongs to, or that cannot be used.
    """
    gpus, cpus = f"gpus_per_{one}", f"cpus_per_{one}"
    if count is None and options.ray is None:
        check_alone(options, needed, gpus, cpus, *others)
        return None
    for flag in changed(engine, "device", "device_map").values():
        raise UsageError(f"{flag}: {what} get their devices from Ray; use --{gpus.replace('_', '-')}")
    return Layout(count, options.ray or LOCAL, getattr(options, gpus), getattr(options, cpus), **more)


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
            found[name] = spec_of(parse_sources(value))
        elif value and (name in ("model_dir", "cache") or os.path.exists(value)):
            found[name] = type(value)(os.path.abspath(value))
    return replace(options, **found)


def absolute(name: str) -> str:
    """A model's name for a process with another working directory: a path that exists becomes absolute."""
    return os.path.abspath(name) if os.path.exists(name) else name


def anywhere(method: Method | None) -> Method | None:
    """The method with absolute paths, for a process with another working directory."""
    from logo.baselines.retrieval import LoraRetriever

    if not isinstance(method, LoraRetriever):
        return method
    return replace(method, embedding_model=absolute(method.embedding_model))
