"""Where processes run, on this machine or on a Ray cluster, and what each of them has to find there.

Ray itself is imported in `connected` only.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from logo import plugins
from logo.errors import LoGoError, UsageError, need
from logo.evaluation.results import described, differences

if TYPE_CHECKING:
    from logo.adapters.pool import AdapterPool

AUTO, LOCAL = "auto", "local"
_STORE = 256_000_000  # bytes of Ray's object store on this machine, which holds rows and answers only
_CONNECT = 5.0  # seconds within which the node of an address has to accept a connection; Ray itself tries for minutes


class ClusterError(LoGoError, RuntimeError):
    """Processes cannot be started, have died, or differ from each other."""


def usual_address() -> str:
    """Where processes start if the user does not say."""
    return os.environ.get("RAY_ADDRESS") or LOCAL


@dataclass(frozen=True)
class Layout:
    """The number of processes, their place and their GPUs.

    Attributes:
        count: number of processes.
        address: `"local"`: this machine alone; `"auto"`: the cluster that this machine belongs to; else its HOST:PORT.
        gpus: of each process; None: one if there are GPUs, else none.
    """

    count: int
    address: str = field(default_factory=usual_address)
    gpus: float | None = None

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if self.address not in (AUTO, LOCAL) and (not (host and port.isdigit()) or "://" in host):
            raise UsageError(f"{self.address!r} (--ray or RAY_ADDRESS): expected auto, local or HOST:PORT")

    def __str__(self) -> str:
        return "on this machine" if self.address == LOCAL else f"on the Ray cluster {self.address}"


@dataclass(frozen=True)
class Expected:
    """What the command has found, and every process has to find, too.

    Attributes:
        pool: opens the pool, in any working directory.
        found: the pool's digest, and the versions of libraries on which results depend.
    """

    pool: Callable[[], AdapterPool]
    found: dict[str, str]

    @classmethod
    def of(cls, pool: Callable[[], AdapterPool]) -> Expected:
        """What this process finds."""
        from logo.identity import library_versions

        return cls(pool, {"pool": pool().digest, **library_versions()})

    def check(self) -> None:
        """Raises ClusterError where this process finds something else."""
        different = differences(self.found, self.of(self.pool).found)
        if different:
            raise ClusterError(
                f"a process finds something else than the command: {described(different)}; put the same adapters, "
                "example prompts and libraries in both places"
            )


@contextmanager
def connected(layout: Layout) -> Iterator[dict[str, Any]]:
    """Connects this process to Ray, starting one for a local layout, and gives the options of each process: its CPUs,
    GPUs and environment variables. Processes end with the connection.

    Raises:
        MissingLibrary: Ray is not installed.
        ClusterError: no cluster answers, or it has no room.
    """
    is_local = layout.address == LOCAL
    _set_variables(is_local)
    need("work in several processes", "ray")
    ray: Any = importlib.import_module("ray")
    cpus = max(1, (os.cpu_count() or 1) // layout.count) if is_local else 1  # more processes than cores share them
    _connect(ray, layout, cpus)
    try:
        gpus = _gpus_of_each(ray, layout)
        variables = {"OMP_NUM_THREADS": str(cpus), **plugins.environment()}
        yield {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": variables}}
    finally:
        ray.shutdown()


def _set_variables(is_local: bool) -> None:
    """Sets what Ray reads when it is imported, unless the user has."""
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",  # no reports without the user's consent
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 s are too few on a busy machine
        "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",  # long; what follows is said
    }
    if is_local:
        # All of it listens on the loopback interface alone, as by default on other systems than Linux.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        variables["RAY_worker_niceness"] = "0"  # they do this command's own work; by default others go first
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _connect(ray: Any, layout: Layout, cpus: int) -> None:
    """Starts Ray here, with so many CPUs for each process, or joins a cluster; ClusterError: none answers."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if layout.address == LOCAL:
            ray.init(
                address=LOCAL,
                num_cpus=cpus * layout.count,
                include_dashboard=False,
                object_store_memory=_STORE,
                **quiet,
            )
        else:
            if layout.address != AUTO:
                host, _, port = layout.address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=_CONNECT).close()
            ray.init(address=layout.address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # RayError: a wrong token
        where = "no cluster was found" if layout.address == AUTO else f"{layout.address} does not answer"
        raise ClusterError(
            f"Ray: {where} ({' '.join(str(error).split())[:200]}). Start one with `ray start --head`; if it asks for a "
            "token, set RAY_AUTH_MODE=token here and copy its ~/.ray/auth_token"
        ) from None


def _gpus_of_each(ray: Any, layout: Layout) -> float:
    """The GPUs of each process; ClusterError: there is no room for them."""
    gpus_there = ray.cluster_resources().get("GPU", 0.0)
    gpus = float(gpus_there > 0) if layout.gpus is None else layout.gpus
    # Further machines may join a cluster, and further processes start then.
    count = layout.count if layout.address == LOCAL else 1
    if count * gpus > gpus_there + 1e-6:
        raise ClusterError(f"no room for {count} processes with {gpus:g} GPUs each: there are {gpus_there:g} GPUs")
    return gpus
