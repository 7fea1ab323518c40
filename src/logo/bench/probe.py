"""What selecting costs beside a plain prefill of the same prompts by the base model.

Arms run alternately for several rounds in one process, each prompt alone, and medians are reported: a machine that is
slower for a while is slower for all of them.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from logo.engine import LoGo

PREFILL = "prefill"


@dataclass(frozen=True)
class Arm:
    """One way through all prompts.

    Attributes:
        seconds: median over rounds, for one pass over all prompts.
        ratio: of that to the plain prefill's.
        peak_bytes: memory above what was held before, at most; None where the system does not say.
        points: places read; 0 for the prefill.
        index_bytes: what the scoring index holds.
    """

    seconds: float
    ratio: float
    peak_bytes: int | None
    points: int
    index_bytes: int


@dataclass(frozen=True)
class ProbeBench:
    """A finished measurement; `tokens` and `prompts` are those of one round."""

    arms: Mapping[str, Arm]
    rounds: int
    prompts: int
    tokens: int
    threads: int
    device: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def probe_bench(
    engines: Mapping[str, LoGo], prompts: Sequence[str], rounds: int = 5, on_round: Callable[[], None] | None = None
) -> ProbeBench:
    """Times `LoGo.select` of each engine against a plain prefill of the base model.

    Args:
        engines: by signal, on one model.
        prompts: each is taken alone.
        rounds: after one that is not counted.
        on_round: called after each.
    """
    first = next(iter(engines.values()))
    rows = first.prompts.encode(prompts)
    runs: dict[str, Callable[[], None]] = {PREFILL: lambda: _prefill(first, rows)}
    runs |= {name: _selecting(logo, prompts) for name, logo in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int | None] = {}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            with _peak(first) as peak:
                started = time.perf_counter()
                run()
                _wait(first)
                spent = time.perf_counter() - started
            if round_:
                times[name].append(spent)
                peaks[name] = None if peak[0] is None else max(peak[0], peaks.get(name) or 0)
        if on_round is not None:
            on_round()
    medians = {name: statistics.median(values) for name, values in times.items()}
    arms = {
        name: Arm(
            seconds,
            seconds / medians[PREFILL],
            peaks[name],
            len(engines[name].router.points) if name in engines else 0,
            engines[name].router.index_bytes if name in engines else 0,
        )
        for name, seconds in medians.items()
    }
    device = str(first.model.device)
    return ProbeBench(arms, rounds, len(rows), sum(map(len, rows)), torch.get_num_threads(), device)


def _selecting(logo: LoGo, prompts: Sequence[str]) -> Callable[[], None]:
    def run() -> None:
        for prompt in prompts:
            logo.select(prompt)

    return run


@torch.no_grad()
def _prefill(logo: LoGo, rows: Sequence[Sequence[int]]) -> None:
    """As `generate` begins: the whole prompt, a cache for what follows, logits of the last token only."""
    device = logo.model.get_input_embeddings().weight.device
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(logo.model.forward).parameters else {}
    for row in rows:
        logo.model(input_ids=torch.tensor([row], device=device), use_cache=True, **last)


def _wait(logo: LoGo) -> None:
    if logo.model.device.type == "cuda":
        torch.cuda.synchronize(logo.model.device)


@contextmanager
def _peak(logo: LoGo) -> Iterator[list[int | None]]:
    """One number, set when the block is left: the most bytes held inside above those held before."""
    result: list[int | None] = [None]
    if logo.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(logo.model.device)
        before = torch.cuda.memory_allocated(logo.model.device)
        yield result
        result[0] = torch.cuda.max_memory_allocated(logo.model.device) - before
        return
    reset = _reset_peak()
    before = _status("VmRSS") if reset else 0
    yield result
    if reset:
        result[0] = max(0, _status("VmHWM") - before)


def _reset_peak() -> bool:
    """Makes Linux forget the process's peak; False where there is no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """Bytes of a field of the process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
