"""How much memory a server may take: `Memory`, the operator's limits, and `MemoryPlan`, what they mean in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from logo.errors import UsageError
from logo.mixing.cache import bytes_of, free_bytes

# The default for keys and values, which take twice as much while they are copied: this share of what is free beside the
# model, of which adapters get 0.3, too ...
_SHARE = 0.3
# ... and on a CPU, where other programs need memory, at most so many bytes.
_MOST_ON_CPUS = 2e9


@dataclass(frozen=True)
class Memory:
    """The limits of sequences.

    Attributes:
        concurrent: the most of one step.
        kv_cache_gb: memory (10⁹ bytes) for keys and values on the model's device; None: a share of the free memory.
        step_tokens: the most tokens of prompts that are read between two steps of the running answers.
    """

    concurrent: int = 64
    kv_cache_gb: float | None = None
    step_tokens: int = 512


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on a model's devices: of the weights, the most for adapters and for keys and values, and what is free."""

    model: int
    adapters: int
    kv: int
    free: int

    @classmethod
    def of(cls, model: Any, adapters: int, memory: Memory) -> MemoryPlan:
        """Plans the memory of a server; UsageError: it needs more than there is."""
        tensors = [*model.parameters(), *model.buffers()]
        devices = {tensor.device for tensor in tensors}
        free = free_bytes(devices)
        usual = min(_SHARE * free, _MOST_ON_CPUS if devices == {torch.device("cpu")} else free)
        kv = int(usual) if memory.kv_cache_gb is None else bytes_of("--kv-cache-gb", memory.kv_cache_gb)
        plan = cls(sum(tensor.nbytes for tensor in tensors), adapters, kv, free)
        if adapters + kv > free:
            together = "adapters and keys and values together do not fit"
            raise UsageError(f"{plan.line}: {together}; lower --adapter-memory-gb or --kv-cache-gb")
        return plan

    def tokens(self, token_bytes: int, prefix_bytes: int) -> int:
        """How many tokens of `token_bytes` have room, padding included, beside so many bytes for prompt prefixes;
        UsageError: none."""
        if prefix_bytes >= self.kv:
            nothing = f"leave nothing of the {self.kv / 1e9:.2f} GB for keys and values (--kv-cache-gb)"
            raise UsageError(f"{prefix_bytes / 1e9:.2f} GB for prompt prefixes {nothing}")
        return max(1, (self.kv - prefix_bytes) // token_bytes)

    @property
    def line(self) -> str:
        """The plan in one line."""
        model, adapters, kv, free = (f"{size / 1e9:.2f} GB" for size in (self.model, self.adapters, self.kv, self.free))
        most = f"up to {adapters} of adapters · up to {kv} of keys and values"
        return f"Memory: model {model} · {most} · {free} free beside the model"
