"""The gated product of `gates` on a GPU: two Triton kernels that multiply only the slots that some token opens.

    shrink   h[t, i] = gate[t, s] · (x[t] A[s]ᵀ)        s = the i-th slot that the block of tokens t opens
    expand   y[t] += Σ_i h[t, i] B[s]

The plain products multiply every slot for every token, which costs most where the pool is large and k small. Which
slots a block opens is written before the model runs (`gates.Opened`), so the grid is the same in every step, nothing
waits for the device, and both kernels can be captured in a CUDA graph: programs for slots that their block does not
open end at once.

Imported only if Triton is installed. `TRITON_INTERPRET=1` runs the same code on a CPU. The sizes of blocks follow from
what the products read (`gpu_check` in tools/ measures them); they were not tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from logo.backends.vllm.gates import SIZES

NAME = "logo::add_gated"

# In short steps most of a GPU would be idle, so A is split into parts of at least so many columns, each read by a
# program of its own. There are at most so many parts, since their sums have to fit into one multiprocessor's memory.
_PART, _SPLITS = 512, 8


@triton.jit
def _shrink(
    x, a, gate, slot_of, count_of, h,
    tokens, slots, rank, inside, part,
    x_row, x_column, a_slot, a_rank, a_column, gate_row, gate_column,
    TILES: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, place, split = tl.program_id(0), tl.program_id(1) // TILES, tl.program_id(2)
    if place >= tl.load(count_of + block):
        return
    slot = tl.load(slot_of + block * slots + place).to(tl.int64)
    rows = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    ranks = (tl.program_id(1) % TILES) * RANKS + tl.arange(0, RANKS)
    here, known = rows < tokens, ranks < rank
    found = tl.full((TOKENS, RANKS), 0.0, tl.float32)
    for first in range(split * part, min(split * part + part, inside), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inner = columns < inside
        hidden = tl.load(
            x + rows[:, None] * x_row + columns[None, :] * x_column, mask=here[:, None] & inner[None, :], other=0.0
        )
        factor = tl.load(
            a + slot * a_slot + ranks[None, :] * a_rank + columns[:, None] * a_column,
            mask=known[None, :] & inner[:, None],
            other=0.0,
        )
        hidden = hidden.to(factor.dtype)
        if WIDE:
            hidden, factor = hidden.to(tl.float32), factor.to(tl.float32)
        found = tl.dot(hidden, factor, found, input_precision="ieee")
    weight = tl.load(gate + rows * gate_row + slot * gate_column, mask=here, other=0.0).to(tl.float32)
    found = tl.where(weight[:, None] != 0.0, found * weight[:, None], 0.0)  # inf · 0 would be NaN
    at = ((split * tokens + rows[:, None]) * slots + place) * rank + ranks[None, :]
    tl.store(h + at, found.to(h.dtype.element_ty), mask=here[:, None] & known[None, :])


@triton.jit
def _expand(
    y, h, b, slot_of, count_of,
    tokens, slots, rank, outside,
    y_row, y_column, b_slot, b_rank, b_column,
    SPLITS: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    count = tl.load(count_of + block)
    if count == 0:
        return
    rows = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here, outer = rows < tokens, columns < outside
    found = tl.full((TOKENS, COLUMNS), 0.0, tl.float32)
    for step in range(count * TILES):
        place, ranks = step // TILES, (step % TILES) * RANKS + tl.arange(0, RANKS)
        known = ranks < rank
        slot = tl.load(slot_of + block * slots + place).to(tl.int64)
        shrunk = tl.full((TOKENS, RANKS), 0.0, tl.float32)
        for split in tl.static_range(SPLITS):
            at = ((split * tokens + rows[:, None]) * slots + place) * rank + ranks[None, :]
            shrunk += tl.load(h + at, mask=here[:, None] & known[None, :], other=0.0).to(tl.float32)
        factor = tl.load(
            b + slot * b_slot + ranks[:, None] * b_rank + columns[None, :] * b_column,
            mask=known[:, None] & outer[None, :],
            other=0.0,
        )
        shrunk = shrunk.to(factor.dtype)
        if WIDE:
            shrunk, factor = shrunk.to(tl.float32), factor.to(tl.float32)
        found = tl.dot(shrunk, factor, found, input_precision="ieee")
    at = y + rows[:, None] * y_row + columns[None, :].to(tl.int64) * y_column
    both = here[:, None] & outer[None, :]
    before = tl.load(at, mask=both, other=0.0)
    tl.store(at, (before.to(tl.float32) + found).to(before.dtype), mask=both)


def size_of(tokens: int) -> int:
    """The index into `SIZES` of the block size for a step of so many tokens."""
    return 0 if tokens <= 4 * SIZES[0] else 1


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched: constants of both, and how many parts A is read in."""

    tokens: int
    ranks: int
    tiles: int
    columns: int
    splits: int
    part: int

    @classmethod
    def of(cls, tokens: int, rank: int, inside: int, dtype: torch.dtype) -> Launch:
        """The launch for a step of `tokens` tokens, with adapters of this rank, input width and dtype."""
        size = SIZES[size_of(tokens)]
        ranks = min(max(triton.next_power_of_2(rank), 16), 64)  # `tl.dot` takes no dimension below 16
        columns = 64 if dtype.itemsize > 2 else 128
        splits = min(_SPLITS, triton.cdiv(inside, _PART)) if size == SIZES[0] else 1
        part = triton.cdiv(triton.cdiv(inside, splits), columns) * columns
        return cls(size, ranks, triton.cdiv(rank, ranks), columns, triton.cdiv(inside, part), part)

    @property
    def constants(self) -> dict[str, int]:
        """The compile-time constants that both kernels have."""
        return {"TILES": self.tiles, "TOKENS": self.tokens, "RANKS": self.ranks, "COLUMNS": self.columns}


# Compiler options of each kernel: warps per program, and the number of loads in flight.
SHRINK = {"num_warps": 4, "num_stages": 3}
EXPAND = {"num_warps": 4, "num_stages": 2}


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor, slot_of: Tensor, count_of: Tensor) -> None:
    """`gates.add_gated` for one slice, given the open slots of each block in the size that the step uses."""
    (tokens, inside), (slots, rank, _), outside = x.shape, a.shape, y.shape[1]
    how = Launch.of(tokens, rank, inside, a.dtype)
    blocks = triton.cdiv(tokens, how.tokens)
    # Parts are summed in float32; the whole is rounded as the plain products round it.
    kept = torch.float32 if how.splits > 1 else a.dtype
    h = torch.empty(how.splits, tokens, slots, rank, device=x.device, dtype=kept)
    # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    wide = a.dtype == torch.bfloat16 and not isinstance(_shrink, triton.runtime.JITFunction)
    _shrink[(blocks, slots * how.tiles, how.splits)](
        x, a, gate, slot_of, count_of, h,
        tokens, slots, rank, inside, how.part,
        *x.stride(), *a.stride(), *gate.stride(),
        WIDE=wide, **how.constants, **SHRINK,
    )  # fmt: skip
    _expand[(blocks, triton.cdiv(outside, how.columns))](
        y, h, b, slot_of, count_of,
        tokens, slots, rank, outside,
        *y.stride(), *b.stride(),
        SPLITS=how.splits, WIDE=wide, **how.constants, **EXPAND,
    )  # fmt: skip


@torch.library.custom_op(NAME, mutates_args=("y",))
def add_gated(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    starts: Sequence[int],
    widths: Sequence[int],
    gate: Tensor,
    slot_of: Sequence[Tensor],
    count_of: Sequence[Tensor],
) -> None:
    """`gates.add_gated` for several slices of `y`, as one operator, which a compiler does not look into.

    Args:
        y: (tokens, d_out), changed in place.
        x: (tokens, d_in).
        a: of each slice (slots, rank, d_in), with any strides.
        b: of each slice (slots, rank, width), with any strides.
        starts, widths: the columns of `y` that each slice is added to.
        gate: (tokens or more, slots).
        slot_of, count_of: of `gates.Opened`.
    """
    if x.shape[0] == 0:
        return
    i = size_of(x.shape[0])
    for factor, other, start, width in zip(a, b, starts, widths, strict=True):
        _add(y[:, start : start + width], x, factor, other, gate, slot_of[i], count_of[i])


@add_gated.register_fake
def _(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    starts: Sequence[int],
    widths: Sequence[int],
    gate: Tensor,
    slot_of: Sequence[Tensor],
    count_of: Sequence[Tensor],
) -> None:
    return None
