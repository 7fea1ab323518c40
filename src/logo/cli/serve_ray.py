"""`logo serve --engine vllm --replicas N`: vLLM's server as several replicas through Ray Serve."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logo.backends.cluster import Layout
from logo.cli.opening import open_pool
from logo.cli.options import EngineOptions, rare, usual
from logo.cli.output import note
from logo.cli.places import PROCESSES, Cpus, Gpus, Ray, absolute, everywhere, processes, starting
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.backends.vllm.launch import Launch


@dataclass(frozen=True)
class ReplicaOptions:
    """Several replicas, on this machine or on a cluster."""

    replicas: int | None = usual(
        None, "With --engine vllm: processes that answer, each with the model (needs Ray).", False, metavar="N", min=1
    )
    ray: Ray = None
    autoscale: tuple[int, int] | None = rare(
        None,
        "Adapt the number of replicas to the load, between MIN and MAX.",
        "always --replicas",
        metavar="MIN MAX",
        panel=PROCESSES,
    )
    gpus_per_replica: Gpus = None
    cpus_per_replica: Cpus = None


def layout_of(options: ReplicaOptions, engine: EngineOptions) -> Layout | None:
    """The replicas that the options ask for; None: one process serves.

    Raises:
        UsageError: an option without those that it belongs to, or that cannot be used.
    """
    count = options.replicas
    if options.autoscale is not None:
        least, most = options.autoscale
        if count is not None:
            raise UsageError("--autoscale MIN MAX and --replicas N: give only one of them")
        if not 1 <= least <= most:
            raise UsageError(f"--autoscale: expected a MIN of 1 or more and a MAX not below it, found {least} {most}")
        count = least
    return processes(options, engine, count, "replicas", "replica", "--replicas or --ray")


def serve(
    engine: EngineOptions,
    base_model: str,
    options: ReplicaOptions,
    layout: Layout,
    address: tuple[str, int],
    concurrent: int,
    launch: Launch,
    front: Mapping[str, str],
) -> Any:
    """Serves until a signal comes; if `application` calls it, returns the application for Ray Serve instead.

    Args:
        concurrent: the number of requests that keep a replica busy.
        launch, front: see `logo.backends.replicas.Plan`.
    """
    from logo.backends.replicas import Plan, digest, serve_replicas
    from logo.backends.replicas import application as build

    opened = functools.partial(open_pool, everywhere(engine), absolute(base_model))
    plan = Plan(launch, front, opened, digest(opened()), concurrent)
    most = None if options.autoscale is None else options.autoscale[1]
    if _described.get():
        return build(plan, layout, most, layout.cpus or 1, layout.gpus or 0.0)
    note(starting(layout, "replicas"))
    serve_replicas(plan, layout, most, address, lambda url: note(f"Serving on {url}"), note)
    return None


def application(arguments: dict[str, Any]) -> Any:
    """For `serve run` and RayService: `import_path: logo.cli.serve_ray:application`, with options of `logo serve` as
    `args`, such as `max_concurrent: 32`. Ray Serve itself decides where it listens.

    Raises:
        LoGoError, and what typer raises: an option that does not exist or cannot be used.
    """
    from typer.main import get_command

    from logo.cli.app import app

    given = {"host": "0.0.0.0", "ray": "auto", "engine": "vllm", **arguments, "port": 0}
    flags = [flag for name, value in given.items() for flag in flags_of(f"--{name.replace('_', '-')}", value)]
    token = _described.set(True)
    try:
        return get_command(app).main(["serve", *flags], standalone_mode=False)
    finally:
        _described.reset(token)


def flags_of(option: str, value: Any) -> list[str]:
    """The command-line arguments for an option with this value."""
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    if option == "--autoscale":
        return [option, *map(str, value)]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [part for one in values for part in (option, str(one))]


# Whether `logo serve` only returns the application that it would run.
_described: ContextVar[bool] = ContextVar("described", default=False)
