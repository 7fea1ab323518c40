"""`logo serve --ray`: the same server as several replicas through Ray Serve."""

from __future__ import annotations

import logging
import math
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logo.backends.cluster import Layout
from logo.cli.opening import open_pool
from logo.cli.options import EngineOptions, rare, usual
from logo.cli.output import note
from logo.cli.places import PROCESSES, Cpus, Gpus, Ray, check_alone, processes, starting
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.serving.replicas import Plan


@dataclass(frozen=True)
class ReplicaOptions:
    """Several replicas, on this machine or on a cluster."""

    replicas: int | None = usual(
        None, "Processes that answer, each with the model (needs Ray).", False, metavar="N", min=1
    )
    ray: Ray = None
    autoscale: tuple[int, int] | None = rare(
        None,
        "Adapt the number of replicas to the load, between MIN and MAX.",
        "always --replicas",
        metavar="MIN MAX",
        panel=PROCESSES,
    )
    autoscale_after: tuple[float, float] | None = rare(
        None,
        "Seconds before replicas are added, and before they are removed.",
        "30 600",
        metavar="UP DOWN",
        panel=PROCESSES,
    )
    gpus_per_replica: Gpus = None
    cpus_per_replica: Cpus = None


def layout_of(options: ReplicaOptions, engine: EngineOptions) -> Layout | None:
    """The replicas that the options ask for; None: one process serves.

    Raises:
        UsageError: an option without those that it belongs to, or that cannot be used.
    """
    count, after = options.replicas, options.autoscale_after
    if options.autoscale is None:
        check_alone(options, "--autoscale", "autoscale_after")
    else:
        least, most = options.autoscale
        if count is not None:
            raise UsageError("--autoscale MIN MAX and --replicas N: give only one of them")
        if not 1 <= least <= most:
            raise UsageError(f"--autoscale: expected a MIN of 1 or more and a MAX not below it, found {least} {most}")
        count = least
    if after is not None and not all(math.isfinite(seconds) and seconds >= 0 for seconds in after):
        raise UsageError(f"--autoscale-after: expected 0 seconds or more, found {after[0]:g} {after[1]:g}")
    return processes(options, engine, count, "replicas", "replica", "--replicas or --ray")


def serve(
    engine: EngineOptions,
    base_model: str,
    options: ReplicaOptions,
    layout: Layout,
    address: tuple[str, int],
    plan: Plan,
) -> Any:
    """Serves until a signal comes; if `application` calls it, returns the application for Ray Serve instead."""
    from logo.api.names import check_pool
    from logo.serving.driver import serve_replicas
    from logo.serving.replica import ServerPlan, digest
    from logo.serving.replicas import Scale
    from logo.serving.replicas import application as build

    scale = Scale(layout)
    if options.autoscale is not None:
        after = options.autoscale_after or (scale.rise, scale.fall)
        scale = Scale(layout, options.autoscale[1], *after)
    if _described.get():
        return build(plan, scale, layout.cpus or 1, layout.gpus or 0.0)
    pool = open_pool(engine, base_model)  # raises its errors before anything is started
    if isinstance(plan, ServerPlan):
        check_pool(plan.settings.base_model, pool.names)
    # A log that programs read is JSON from its first line to its last.
    tell = logging.getLogger("logo.serving").info if plan.log_json else note
    tell(starting(layout, "replicas"))
    serve_replicas(plan, scale, address, digest(pool), lambda url: tell(f"Serving on {url}"), tell)
    return None


def application(arguments: dict[str, Any]) -> Any:
    """For `serve run` and RayService: `import_path: logo.cli.serve_ray:application`, with options of `logo serve` as
    `args`, such as `max_concurrent: 32`. Ray Serve itself decides where it listens.

    Raises:
        LoGoError, and what typer raises: an option that does not exist or cannot be used.
    """
    from typer.main import get_command

    from logo.cli.app import app

    given = {"host": "0.0.0.0", "ray": "auto", **arguments, "port": 0}
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
    if option in ("--autoscale", "--autoscale-after"):
        return [option, *map(str, value)]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [part for one in values for part in (option, str(one))]


# Whether `logo serve` only returns the application that it would run.
_described: ContextVar[bool] = ContextVar("described", default=False)
