"""Plans a server's memory for the model, the adapters, and keys and values, before any is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from logo.errors import UsageError
from logo.mixing.cache import free_bytes
from logo.models import text_config

# The default for keys and values: so much on a CPU, where other programs need memory, too, ...
_USUAL = 2e9
# ... and never more than these shares of the memory that is free beside the model; adapters get 0.3 of it.
_CPU_SHARE, _SHARE = 0.3, 0.5


@dataclass(frozen=True)
class Memory:
    """The limits of sequences: the most of one step, and memory (10⁹ bytes) for keys and values on the model's device;
    None: a share of the free memory."""

    concurrent: int = 64
    kv_cache_gb: float | None = None


@dataclass(frozen=True)
class Plan:
    """Bytes on a model's devices: of the weights, the most for adapters and for keys and values, and what is free."""

    model: int
    adapters: int
    kv: int
    free: int

    @classmethod
    def of(cls, model: Any, adapters: int, memory: Memory) -> Plan:
        """Plans the memory of a server; UsageError: it needs more than there is."""
        tensors = [*model.parameters(), *model.buffers()]
        devices = {tensor.device for tensor in tensors}
        free = free_bytes(devices)
        usual = min(_USUAL, _CPU_SHARE * free) if devices == {torch.device("cpu")} else _SHARE * free
        kv = int(usual if memory.kv_cache_gb is None else 1e9 * memory.kv_cache_gb)
        plan = cls(sum(tensor.nbytes for tensor in tensors), adapters, kv, free)
        if adapters + kv > free:
            together = "adapters and keys and values together do not fit"
            raise UsageError(f"{plan.line}: {together}; lower --adapter-memory-gb or --kv-cache-gb")
        return plan

    def tokens(self, model: Any, dtype: torch.dtype, shared: int) -> int:
        """How many tokens' keys and values have room, padding included, beside so many bytes for what prompts begin
        with; UsageError: none."""
        if shared >= self.kv:
            parts = f"{shared / 1e9:.2f} GB for prompt prefixes (--prefix-cache-gb)"
            raise UsageError(f"{parts} leave nothing of the {self.kv / 1e9:.2f} GB for keys and values (--kv-cache-gb)")
        config = text_config(model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return max(1, (self.kv - shared) // (2 * config.num_hidden_layers * heads * size * dtype.itemsize))

    @property
    def line(self) -> str:
        """The plan in one line."""
        return (
            f"Memory: model {self.model / 1e9:.2f} GB · up to {self.adapters / 1e9:.2f} GB of adapters · up to "
            f"{self.kv / 1e9:.2f} GB of keys and values · {self.free / 1e9:.2f} GB free beside the model"
        )
