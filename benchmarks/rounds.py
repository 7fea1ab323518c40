"""Arms in turn: every arm runs once per round, and medians over the rounds are compared.

A period in which the machine is slow then affects all arms.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timed:
    """One arm.

    Attributes:
        seconds: median over the measured rounds.
        rounds: seconds of each.
        peak_bytes: most additional memory; None if the system does not report it.
    """

    seconds: float
    rounds: tuple[float, ...]
    peak_bytes: int | None


def side_by_side(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | None = None,
) -> dict[str, Timed]:
    """Runs all arms for `rounds` rounds, after a warm-up round.

    Args:
        arms: by name.
        rounds: at least 1.
        device: synchronised after each arm, if it computes asynchronously.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    peaks: dict[str, int | None] = {}
    for round_ in range(rounds + 1):
        for name, run in arms.items():
            with peak_memory(device) as peak:
                spent = timed(run, device)
            if round_:
                times[name].append(spent)
                peaks[name] = None if peak[0] is None else max(peak[0], peaks.get(name) or 0)
    return {name: Timed(statistics.median(spent), tuple(spent), peaks[name]) for name, spent in times.items()}


def timed(run: Callable[[], object], device: torch.device | None = None) -> float:
    """The duration of one call, in seconds."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device | None) -> None:
    """Waits until an accelerator has finished."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[list[int | None]]:
    """Yields a list whose one entry is set at the end of the block: the most additional bytes, None if unknown."""
    result: list[int | None] = [None]
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result[0] = torch.cuda.max_memory_allocated(device) - before
        return
    reset = _reset_peak()
    before = resident() if reset else 0
    yield result
    if reset:
        result[0] = max(0, _status("VmHWM") - before)


def resident() -> int:
    """Bytes of memory of this process."""
    return _status("VmRSS")


def _reset_peak() -> bool:
    """Resets Linux's record of the process's peak memory; False on systems without one."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """Bytes of a field of the process's status; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
