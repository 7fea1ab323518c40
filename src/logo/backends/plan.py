"""Whether a base model, a pool and a number of simultaneous requests fit on GPUs of one size, inside vLLM.

    ModelShape, PoolShape, requests, memory -> Plan: how mixtures are made, with which slots, and bytes of each part

All bytes are those of one GPU. vLLM's slots are computed as vLLM 0.32 makes them: a pair of tensors for every slice of
every layer that `--lora-target-modules` selects; a packed layer (`qkv_proj`) has all of its slices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from logo.adapters.layout import LinearShape
from logo.backends.shapes import ModelShape, PoolShape
from logo.errors import UsageError

Mode = Literal["gate", "merge"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""

UTILISATION = 0.9

_FLOAT32 = 4
# Set aside for activations and captured graphs; an allowance, since it depends on kernels and on how vLLM is started.
_WORKING, _WORKING_SHARE = 2e9, 0.05

# Modules of a checkpoint that vLLM computes as one layer: slots are made for all or none of them.
_PACKED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
# Layers whose input is divided under tensor parallelism; all others divide their output.
_INPUT_DIVIDED = frozenset(
    {"o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "wo", "w2"}
)


@dataclass(frozen=True)
class Slots:
    """vLLM's adapter slots in one of the two modes.

    Attributes:
        mode: `"gate"`: one slot for every adapter of the pool, and a request is a row of gates; `"merge"`: one for
            every request, which holds its mixture.
        count: `--max-loras`.
        rank: `--max-lora-rank`.
        bytes: of all of them, on one GPU.
    """

    mode: Mode
    count: int
    rank: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The content of one GPU.

    Attributes:
        slots: those of the chosen mode.
        reason: why it was chosen.
        other: those of the other mode; None: it is not possible.
        targets: `--lora-target-modules`.
        weights, index, cache, working: bytes of the base model, of the scoring index, of the keys and values of all
            requests, and of the allowance for computing.
        pool: bytes of the adapters' files in the dtype of the base model. They are not on the GPU: gates use the slots,
            and mixtures are merged from host memory.
        usable: bytes that vLLM may use; None without a GPU.
        most: number of requests of this length that fit; None without a GPU.
        tensor_parallel: GPUs that share the model.
    """

    slots: Slots
    reason: str
    other: Slots | None
    targets: tuple[str, ...]
    weights: int
    index: int
    cache: int
    working: int
    pool: int
    usable: int | None
    most: int | None
    tensor_parallel: int

    @property
    def mode(self) -> Mode:
        """How mixtures are made."""
        return self.slots.mode

    @property
    def max_loras(self) -> int:
        """vLLM's `--max-loras`."""
        return self.slots.count

    @property
    def max_lora_rank(self) -> int:
        """vLLM's `--max-lora-rank`."""
        return self.slots.rank

    @property
    def total(self) -> int:
        """Bytes of everything on one GPU."""
        return self.weights + self.slots.bytes + self.index + self.cache + self.working

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None without a GPU."""
        return None if self.usable is None else self.total <= self.usable

    @property
    def slot_flags(self) -> tuple[str, ...]:
        """vLLM's arguments for its slots."""
        return (
            "--enable-lora",
            *("--max-loras", str(self.max_loras)),
            *("--max-lora-rank", str(self.max_lora_rank)),
            *("--lora-target-modules", *self.targets),
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags to start vLLM with."""
        parallel = ("--tensor-parallel-size", str(self.tensor_parallel)) if self.tensor_parallel > 1 else ()
        return (*self.slot_flags, *parallel)


def plan(
    shape: ModelShape,
    pool: PoolShape,
    *,
    concurrency: int,
    context: int,
    dtype_bytes: int = 2,
    device_bytes: int | None = None,
    tensor_parallel: int = 1,
    utilisation: float = UTILISATION,
    mode: Mode | None = None,
) -> Plan:
    """The better way to make mixtures, and its memory.

    Args:
        concurrency: simultaneous requests, each with its own mixture.
        context: tokens of each, prompt and answer.
        dtype_bytes: bytes per number of the base model, the slots, and the keys and values.
        device_bytes: memory of one GPU.
        tensor_parallel: GPUs that share the model.
        utilisation: share of a GPU's memory that vLLM may use, `--gpu-memory-utilization`.
        mode: None: the one with smaller slots.

    Raises:
        UsageError: an impossible number, or ranks for which vLLM has no slots.
    """
    _check(shape, concurrency, context, tensor_parallel, utilisation)
    each = _per_rank(shape, pool.targets, tensor_parallel) * dtype_bytes
    gate = _slots("gate", len(pool), max(pool.ranks), each)
    summed = sum(sorted(pool.ranks, reverse=True)[: pool.k])
    merge = _slots("merge", concurrency, summed, each)
    slots, reason = _chosen(gate, merge, pool, summed, mode)
    per_token = dtype_bytes * shape.cached * max(1, shape.cached_heads // tensor_parallel) // shape.cached_heads
    fixed = {
        "weights": shape.weights(dtype_bytes) // tensor_parallel,
        "index": pool.points * sum(pool.ranks) * pool.width * _FLOAT32,
        "working": 0 if device_bytes is None else int(min(_WORKING, _WORKING_SHARE * device_bytes)),
    }
    usable = None if device_bytes is None else int(utilisation * device_bytes)
    allowed = [one for one in (gate, merge) if one is not None and mode in (None, one.mode)]
    rest = None if usable is None else usable - sum(fixed.values())
    return Plan(
        slots=slots,
        reason=reason,
        other=merge if slots.mode == "gate" else gate,
        targets=pool.targets,
        cache=concurrency * context * per_token,
        pool=pool.numbers * dtype_bytes,
        usable=usable,
        most=None if rest is None else max(_most(one, rest, context * per_token) for one in allowed),
        tensor_parallel=tensor_parallel,
        **fixed,
    )


def slot_rank(rank: int) -> int | None:
    """The smallest rank of vLLM's slots that holds this rank; None if there is none."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)


def slotted(linears: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The modules of `linears` for which vLLM makes slots: the targets, and modules packed into a layer with one."""
    wanted = set(targets)
    wanted |= {name for packed in _PACKED if wanted & set(packed) for name in packed}
    return [path for path in linears if path.rpartition(".")[2] in wanted]


def _per_rank(shape: ModelShape, targets: Iterable[str], tensor_parallel: int) -> int:
    """The number of values in one slot of rank 1, on one GPU."""
    return sum(_divided(path, shape.linears[path], tensor_parallel, shape) for path in slotted(shape.linears, targets))


def _divided(path: str, linear: LinearShape, parts: int, shape: ModelShape) -> int:
    name = path.rpartition(".")[2]
    if name in _INPUT_DIVIDED:
        return linear.in_features // parts + linear.out_features
    if name in ("k_proj", "v_proj", "key", "value", "wk", "wv"):  # every GPU holds at least one head
        parts = min(parts, shape.cached_heads)
    return linear.in_features + linear.out_features // parts


def _slots(mode: Mode, count: int, rank: int, each: int) -> Slots | None:
    allowed = slot_rank(rank)
    return None if allowed is None else Slots(mode, count, allowed, count * allowed * each)


def _chosen(
    gate: Slots | None, merge: Slots | None, pool: PoolShape, summed: int, mode: Mode | None
) -> tuple[Slots, str]:
    """The slots to take, and why."""
    largest = f"the largest adapter has rank {max(pool.ranks)}"
    together = f"the ranks of the {pool.k} largest adapters add up to {summed}"
    ends = f"but vLLM allows at most {RANKS[-1]}"
    if gate is None:  # then merging is impossible, too: its rank is no smaller
        raise UsageError(f"{largest}, {ends}")
    if mode == "gate":
        return gate, "as requested"
    if merge is None:
        if mode == "merge":
            raise UsageError(f"merging is not possible: {together}, {ends}; choose a smaller k, or mode gate")
        return gate, f"merging is not possible: {together}, {ends}"
    if mode == "merge":
        return merge, "as requested"
    ours, theirs = (f"{one.count:,} x rank {one.rank}" for one in (gate, merge))
    if gate.count * gate.rank <= merge.count * merge.rank:
        return gate, f"one slot per adapter ({ours}) takes no more than one per request ({theirs})"
    return merge, f"one slot per request ({theirs}) takes less than one per adapter ({ours})"


def _most(slots: Slots, rest: int, sequence: int) -> int:
    """Number of requests that fit into the memory left beside the model."""
    if slots.mode == "gate":
        return max(0, (rest - slots.bytes) // max(1, sequence))
    return max(0, rest // (sequence + slots.bytes // slots.count))


def _check(shape: ModelShape, concurrency: int, context: int, tensor_parallel: int, utilisation: float) -> None:
    for name, value in (
        ("concurrency", concurrency),
        ("context", context),
        ("tensor_parallel", tensor_parallel),
    ):
        if value < 1:
            raise UsageError(f"{name}: expected 1 or more, found {value}")
    if shape.context is not None and context > shape.context:
        raise UsageError(f"context: this model reads {shape.context} tokens at most, found {context}")
    if shape.heads % tensor_parallel:
        raise UsageError(
            f"tensor_parallel: {shape.heads} attention heads cannot be divided among {tensor_parallel} GPUs evenly"
        )
    if not 0 < utilisation <= 1:
        raise UsageError(f"utilisation: expected a share above 0 and up to 1, found {utilisation}")
