"""What vLLM has to be started with so that a pool fits into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from logo.adapters.pool import AdapterPool
from logo.backends.plan import RANKS, slot_rank
from logo.backends.vllm.options import Mode
from logo.backends.vllm.pool import rank_of
from logo.errors import UsageError

# Mixtures in one batch, in merge mode; in gate mode there may be any number of them.
_MERGED = 8


@dataclass(frozen=True)
class LoraFlags:
    """Of vLLM's flags, those that say what adapters there may be.

    Attributes:
        max_loras: slots.
        max_lora_rank: of each slot.
        modules: last parts of the names of the modules that get slots.
    """

    max_loras: int
    max_lora_rank: int
    modules: tuple[str, ...]

    @classmethod
    def of(cls, pool: AdapterPool, k: int, mode: Mode, probed: Sequence[str] = ()) -> LoraFlags:
        """For a pool that is fitted to its base model.

        Args:
            k: adapters per mixture.
            mode: `"auto"` is gates, which need a slot for every adapter.
            probed: modules that are read besides those that adapters act on.

        Raises:
            UsageError: vLLM has no slots of such a rank.
        """
        ranks = sorted((rank_of(adapter) for adapter in pool), reverse=True)
        slots, needed = (_MERGED, sum(ranks[:k])) if mode == "merge" else (len(pool), ranks[0])
        modules = {path for adapter in pool for path in adapter.modules} | set(probed)
        rank = slot_rank(needed)
        if rank is None:
            whose = f"{k} adapters of this pool have rank {needed} together" if mode == "merge" else f"one has {needed}"
            raise UsageError(f"vLLM's slots hold adapters up to rank {RANKS[-1]}, and {whose}")
        return cls(slots, rank, tuple(sorted({path.rpartition(".")[2] for path in modules})))
