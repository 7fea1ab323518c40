"""Options of commands that run in several processes, on this machine or on a Ray cluster."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from logo.adapters.sources import parse_sources, spec_of
from logo.cli.choices import Preset
from logo.cli.opening import open_pool
from logo.cli.options import EngineOptions, changed, option, usual
from logo.cli.output import note
from logo.cluster.processes import LOCAL, Expected, Layout
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.vllm.launch import Launch

PANEL = "Several processes"

Ray = Annotated[
    str | None,
    option(
        "`local`: this machine; `auto`: the Ray cluster that this machine is part of; or its HOST:PORT.",
        "local",
        metavar="WHERE",
        panel=PANEL,
    ),
]
Gpus = Annotated[
    float | None, option("GPUs per process.", "1 if there are GPUs, else 0", metavar="G", min=0.0, panel=PANEL)
]


@dataclass(frozen=True)
class WorkerOptions:
    """Several processes that answer rows."""

    workers: int | None = usual(
        None, "Processes that answer, each with the model (needs Ray).", False, metavar="N", min=1
    )
    ray: Ray = None
    gpus_per_worker: Gpus = None

    def layout(self, engine: EngineOptions) -> Layout | None:
        """The workers that the options ask for; None: this process answers."""
        return _layout(self, engine, "workers", "gpus_per_worker")


@dataclass(frozen=True)
class ReplicaOptions:
    """Several replicas of a server."""

    replicas: int | None = usual(
        None, "With --engine vllm: processes that answer, each with the model (needs Ray).", False, metavar="N", min=1
    )
    ray: Ray = None
    gpus_per_replica: Gpus = None

    def layout(self, engine: EngineOptions) -> Layout | None:
        """The replicas that the options ask for; None: one process serves."""
        return _layout(self, engine, "replicas", "gpus_per_replica")


def _layout(options: Any, engine: EngineOptions, what: str, gpus: str) -> Layout | None:
    """The processes that options ask for; UsageError for an option without those that it belongs to."""
    count = getattr(options, what)
    if count is None:
        for flag in changed(options).values():
            raise UsageError(f"{flag} needs --{what}; add that")
        return None
    for flag in changed(engine, "device", "device_map").values():
        raise UsageError(f"{flag}: {what} get their devices from Ray; use --{gpus.replace('_', '-')}")
    return Layout(count, options.ray or LOCAL, getattr(options, gpus))


def expected(layout: Layout, engine: EngineOptions, base_model: str, preset: Preset | None = None) -> Expected:
    """What every process has to find: the pool that these options open here. Says that the processes start."""
    note(f"starting {layout.count} processes {layout}")
    return Expected.of(functools.partial(open_pool, everywhere(engine), absolute(base_model), preset))


def serve(
    engine: EngineOptions,
    base_model: str,
    layout: Layout,
    address: tuple[str, int],
    launch: Launch,
) -> None:
    """Serves from replicas until a signal comes."""
    from logo.cluster.replicas import Plan, serve_replicas, vllm_app

    open_ = functools.partial(vllm_app, launch.command[3:])  # after `python -m MODULE`
    variables = launch.environment({})
    found = expected(layout, engine, base_model)
    serve_replicas(layout, lambda options: Plan(open_, variables, found, layout.count, options), *address, note)


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
