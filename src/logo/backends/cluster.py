"""Where processes run: this machine or a Ray cluster, the number of processes, and the resources of each.

Only `imported` imports Ray.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

from logo.errors import LoGoError, UsageError, need

AUTO, LOCAL = "auto", "local"

# Bytes of Ray's object store on this machine, which holds rows and answers only.
_STORE = 256_000_000

# A long message that Ray prints even if its log is off; LoGo reports the same in one line.
_SAID = "^A worker died or was killed"

# Seconds within which the node of a given address has to accept a connection.
_CONNECT = 5.0


class WorkersError(LoGoError, RuntimeError):
    """Processes cannot be started, have died, or differ from each other."""


@dataclass(frozen=True)
class Layout:
    """The number of processes, their place and their resources.

    Attributes:
        count: number of processes; None: as many as there is room for.
        address: `"local"`: this machine alone; `"auto"`: the cluster that this machine belongs to; else a cluster's
            address.
        gpus: of each process; None: one if there are GPUs, else none.
        cpus: of each process; None: on this machine its share of the cores, in a cluster one.
        deadline: seconds that an item may take.
        start: seconds that a process may take to start and to open, while no other one is open.
        grace: seconds to wait for further processes after the first one is ready.
    """

    count: int | None = None
    address: str = LOCAL
    gpus: float | None = None
    cpus: int | None = None
    deadline: float = 3600.0
    start: float = 3600.0
    grace: float = 120.0

    def __post_init__(self) -> None:
        for name, value in (("workers", self.count), ("cpus", self.cpus)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: expected 1 or more, found {value}")
        if self.gpus is not None and self.gpus < 0:
            raise UsageError(f"gpus of a worker: expected 0 or more, found {self.gpus}")
        if self.deadline <= 0:
            raise UsageError(f"deadline: expected more than 0 seconds, found {self.deadline}")


def imported() -> Any:
    """The module `ray`.

    Raises:
        MissingLibrary: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports without the user's consent
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 s are too few on a busy machine
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _SAID)
    need("work in several processes", "ray")
    import ray

    return ray


@dataclass(frozen=True)
class ProcessResources:
    """The resources of each process.

    Attributes:
        count: number of processes; `room`: number for which there is room now.
        cpus, gpus: of each.
    """

    count: int
    room: int
    cpus: int
    gpus: float


def connect(ray: Any, layout: Layout) -> None:
    """Connects this process to Ray as a driver."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if ray.is_initialized():
        raise WorkersError("this process is connected to Ray already")
    if layout.address == LOCAL:
        cores = os.cpu_count() or 1
        cpus = max(cores, (layout.count or 1) * (layout.cpus or 1))  # more processes than cores share them
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=_STORE, **quiet)
        return
    _check_answers(layout.address)
    try:
        ray.init(address=layout.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # RayError: wrong token
        where = "no cluster was found" if layout.address == AUTO else f"{layout.address} does not answer"
        said = " ".join(str(error).split())[:200]
        raise WorkersError(
            f"Ray: {where} ({said}). Start one with `ray start --head`; if it asks for a token, set "
            "RAY_AUTH_MODE=token here and copy its ~/.ray/auth_token"
        ) from None


def _check_answers(address: str) -> None:
    """Checks that the cluster answers, because Ray itself tries for minutes."""
    if address == AUTO:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--ray {address}: expected auto, local or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT).close()
    except OSError as error:
        said = error.strerror or error
        raise WorkersError(
            f"Ray: {address} does not answer ({said}); start one with `ray start --head`, or correct the address"
        ) from None


def process_resources(ray: Any, layout: Layout) -> ProcessResources:
    """The resources of each process.

    Raises:
        WorkersError: there is no room for any; or on this machine, not for the requested number.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus_there, cpus_there = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("GPU", "CPU"))
    gpus = float(gpus_there > 0) if layout.gpus is None else layout.gpus
    local = layout.address == LOCAL
    alone = max(1, _shares(gpus_there, gpus)) if gpus else 1
    cpus = layout.cpus or (max(1, (os.cpu_count() or 1) // (layout.count or alone)) if local else 1)
    room = sum(_fit(node, cpus, gpus) for node in nodes)
    count = layout.count or (min(alone, room) if local else room)
    if not room or (local and room < count):
        what = f"{max(count, 1)} workers of {cpus} CPUs and {gpus:g} GPUs each"
        where = "this machine" if local else "the cluster"
        raise WorkersError(f"no room for {what}: {where} has {cpus_there:g} CPUs and {gpus_there:g} GPUs")
    return ProcessResources(count, room, cpus, gpus)


def _fit(node: dict[str, float], cpus: int, gpus: float) -> int:
    fit = int(node.get("CPU", 0.0) // cpus)
    return min(fit, _shares(node.get("GPU", 0.0), gpus)) if gpus else fit


def _shares(there: float, each: float) -> int:
    """The number of processes that the GPUs suffice for."""
    return int(there / each + 1e-6)  # 1.0 // 0.2 is 4.0
