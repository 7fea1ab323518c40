"""`Sizing`: what vLLM's slots for a pool take, before anything is started."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from logo.adapters.layout import LinearShape
from logo.adapters.pool import AdapterPool

# Modules that vLLM computes as one, and allocates slots for as soon as one of them is a target.
_PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Modules whose inputs tensor parallelism shares out among GPUs; of all others it shares out the outputs.
_BY_INPUTS = ("o_proj", "down_proj", "out_proj", "dense_4h_to_h", "c_proj", "fc2")


@dataclass(frozen=True)
class Sizing:
    """The slots of one server.

    Attributes:
        adapters: how many the pool has.
        k: how many answer a prompt, at most.
        slots: `--max-loras`.
        rank: `--max-lora-rank`.
        slot_bytes: of one slot, on each GPU.
        above: adapters of a higher rank, which do not fit.
    """

    adapters: int
    k: int
    slots: int
    rank: int
    slot_bytes: int
    above: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Two lines for a person; a third one names what does not fit."""
        total = self.slots * self.slot_bytes
        lines = [
            f"{self.adapters} adapters, {self.slots} slots of rank {self.rank}: {_amount(self.slot_bytes)} each, "
            f"{_amount(total)} in all",
            f"up to {self.k} adapters answer a prompt; prompts whose adapters find no free slots wait",
        ]
        if self.above:
            lines.append(f"above --max-lora-rank {self.rank}: {', '.join(self.above)}")
        return "\n".join(lines)


def _amount(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def slot_bytes(
    shapes: Mapping[str, LinearShape], targets: Collection[str], rank: int, item: int, tensor_parallel: int = 1
) -> int:
    """The bytes of a slot on each of so many GPUs.

    Args:
        shapes: of the base model's linear modules, by path.
        targets: the last parts of the paths that have slots.
        item: bytes of a number.
    """
    wanted = set(targets)
    for packed in _PACKED:
        if wanted.intersection(packed):
            wanted.update(packed)
    numbers = 0
    for path, shape in shapes.items():
        module = path.rpartition(".")[2]
        if module not in wanted:
            continue
        inputs = shape.in_features
        outputs = shape.out_features
        if module in _BY_INPUTS:
            inputs //= tensor_parallel
        else:
            outputs //= tensor_parallel
        numbers += rank * (inputs + outputs)
    return numbers * item


def above(pool: AdapterPool, rank: int) -> tuple[str, ...]:
    """The names of the adapters of a pool whose rank is higher."""
    return tuple(adapter.name for adapter in pool if max(adapter.ranks) > rank)


def given(flags: Sequence[str], name: str, *others: str) -> int | None:
    """The number that a user gives for a flag of vLLM, under one of its names; None: none that can be read."""
    value = None
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("-") else [flag])]
    for word, following in pairwise(words):
        if word.replace("_", "-") in (name, *others) and following.isdigit():
            value = int(following)
    return value
