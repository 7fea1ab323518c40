"""vLLM's adapter slots: one for each adapter of a pool, and a request is a row of weights over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from logo.adapters.pool import AdapterPool
from logo.errors import UsageError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""


@dataclass(frozen=True)
class Slots:
    """The slots for a pool.

    Attributes:
        count: `--max-loras`.
        rank: `--max-lora-rank`.
        targets: `--lora-target-modules`.
    """

    count: int
    rank: int
    targets: tuple[str, ...]

    @classmethod
    def of(cls, pool: AdapterPool) -> Slots:
        """The slots for a pool that is fitted to the base model.

        Raises:
            UsageError: an adapter's rank is larger than vLLM allows.
        """
        largest = max(pool, key=lambda adapter: max(adapter.ranks))
        rank = next((allowed for allowed in RANKS if allowed >= max(largest.ranks)), None)
        if rank is None:
            raise UsageError(
                f"adapter {largest.name!r} has rank {max(largest.ranks)}, but vLLM allows at most {RANKS[-1]}"
            )
        targets = {path.rpartition(".")[2] for adapter in pool for path in adapter.modules}
        return cls(len(pool), rank, tuple(sorted(targets)))

    @property
    def flags(self) -> tuple[str, ...]:
        """vLLM's arguments."""
        return (
            "--enable-lora",
            *("--max-loras", str(self.count)),
            *("--max-lora-rank", str(self.rank)),
            *("--lora-target-modules", *self.targets),
        )


def check_slots(pool: AdapterPool, lora: Any) -> None:
    """Raises UsageError if vLLM has too few slots for a pool, or too small ones; names the number to pass.

    Args:
        lora: vLLM's `LoRAConfig`.
    """
    needed = Slots.of(pool)
    if needed.rank > lora.max_lora_rank:
        largest = max(pool, key=lambda adapter: max(adapter.ranks))
        raise UsageError(
            f"--max-lora-rank is {lora.max_lora_rank}, but adapter {largest.name!r} has rank {max(largest.ranks)}: "
            f"pass --max-lora-rank {needed.rank} or more"
        )
    if needed.count > lora.max_loras:
        raise UsageError(
            f"--max-loras is {lora.max_loras}, but the pool has {needed.count} adapters, each of which needs a slot: "
            f"pass --max-loras {needed.count}"
        )
