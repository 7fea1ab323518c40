"""Gated products over vLLM's adapter slots, with fixed buffers so that a CUDA graph can capture them.

    y += ((x Aᵀ) ⊙ gate) B        A (slots, rank, d_in)   B (slots, rank, d_out)   gate (tokens, slots)

One token's gate is its request's mixture: a weight at the slot of each adapter, or a single 1. This is pure PyTorch and
knows nothing of vLLM. The inputs of a step are written into the buffers before the model runs. The products do not
branch on data, so they run alike eagerly, compiled and in a captured graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = (16, 64)
"""Tokens per block. In short steps, as few as a GPU multiplies at once, so that a block opens few slots; in long steps
more, since neighbouring tokens mostly belong to one prompt."""

FEW = 4
"""On a CPU, the factors of open slots are copied if at most one slot in so many is open. With 43 slots of rank 16 and
640 inputs, on two cores and for 4, 16 and 64 tokens, copying and multiplying 10 slots took 0.63, 0.59 and 0.45 of the
time that multiplying all of them takes; 21 slots took 1.13, 1.13 and 0.82 of it."""


class Opened:
    """The slots that the tokens of each block open, in buffers whose addresses do not change.

    Args:
        gate: (tokens, slots), the buffer of gates to summarise.

    Attributes:
        slot_of: for each of `SIZES`: (blocks, slots) int32, the slots of the block, open ones first.
        count_of: for each of `SIZES`: (blocks,) int32, the number of open slots.
    """

    def __init__(self, gate: Tensor) -> None:
        self._gate = gate
        blocks = [-(-len(gate) // size) for size in SIZES]
        self.slot_of = [torch.zeros(n, gate.shape[1], device=gate.device, dtype=torch.int32) for n in blocks]
        self.count_of = [torch.zeros(n, device=gate.device, dtype=torch.int32) for n in blocks]

    def write(self, tokens: int) -> None:
        """Updates the buffers from the gates of the first `tokens` tokens, on the device and without waiting for it."""
        for size, slot_of, count_of in zip(SIZES, self.slot_of, self.count_of, strict=True):
            blocks = -(-tokens // size)
            gate = self._gate[: blocks * size]
            if len(gate) < blocks * size:  # the last block of the buffer is not whole
                gate = torch.cat([gate, gate.new_zeros(blocks * size - len(gate), gate.shape[1])])
            opened = (gate.view(blocks, size, gate.shape[1]) != 0).any(dim=1)
            count_of[:blocks] = opened.sum(dim=1)
            slot_of[:blocks] = opened.int().argsort(dim=1, descending=True, stable=True)


class StepGates:
    """The gates of the current step.

    Args:
        tokens, requests: the most that a step may have.
        slots: the number of adapter slots.
        device: where the model runs.
        dtype: of the adapters.
        listed: whether the slots that blocks of tokens open are listed, which `kernels` needs.

    Attributes:
        tokens: (tokens, slots), the gate of every token.
        sampled: (requests, slots), of every token whose logits are computed.
        opened: the open slots of each block, for `tokens` and for `sampled`; None unless `listed`.
        open: whether any gate of the step is not 0.
        rows: on a CPU, the tokens with a mixture, if some tokens have none; else None.
        slots: on a CPU, the slots that some token of the step opens, if they are so few that copying their factors side
            by side costs less than multiplying by those of all slots; else None.
    """

    def __init__(
        self,
        tokens: int,
        requests: int,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        listed: bool = False,
    ) -> None:
        self.tokens = torch.zeros(tokens, slots, device=device, dtype=dtype)
        self.sampled = torch.zeros(requests, slots, device=device, dtype=dtype)
        self.opened = (Opened(self.tokens), Opened(self.sampled)) if listed else None
        self.open = False
        self.rows: Tensor | None = None
        self.slots: Tensor | None = None
        self._written = [0, 0]

    def write(self, mixtures: Tensor, tokens: Tensor, sampled: Tensor) -> None:
        """Sets the gates of a step.

        Args:
            mixtures: (mixtures, slots) float32 on the CPU; row 0 is the base model's, zeros.
            tokens: (tokens,) int64 on the CPU: which mixture each token has.
            sampled: (sampled tokens,) likewise.
        """
        device = self.tokens.device
        gated = tokens != 0
        self.open = bool(gated.any())
        self.rows = self.slots = None
        if device.type == "cpu" and self.open:
            self.rows = None if bool(gated.all()) else gated.nonzero()[:, 0]
            used = torch.bincount(tokens, minlength=len(mixtures)) > 0
            opened = (mixtures[used] != 0).any(dim=0).nonzero()[:, 0]
            self.open = len(opened) > 0
            self.slots = opened if 0 < len(opened) * FEW <= mixtures.shape[1] else None
        mixtures = mixtures.to(device, self.tokens.dtype)
        for i, (buffer, which) in enumerate(((self.tokens, tokens), (self.sampled, sampled))):
            count = min(len(which), len(buffer))
            buffer[:count] = mixtures[which[:count].to(device)]
            buffer[count : self._written[i]] = 0  # what an earlier, longer step has left
            if self.opened is not None:
                self.opened[i].write(max(count, self._written[i]))
            self._written[i] = count


def gated(x: Tensor, a: Tensor, b: Tensor, gate: Tensor, slots: Tensor | None = None) -> Tensor:
    """`((x Aᵀ) ⊙ gate) B`, (tokens, d_out) in the type of the adapters.

    A closed gate gives 0, even if `x Aᵀ` is not finite, so an adapter that overflows affects only its own rows.

    Args:
        x: (tokens, d_in).
        a: (slots, rank, d_in).
        b: (slots, rank, d_out), scale folded in.
        gate: (tokens, slots).
        slots: (n,) int64, the slots whose gate is not 0 for some token; None: all slots are multiplied.
    """
    if slots is not None:
        a, b, gate = a[slots], b[slots], gate[:, slots]
    count, rank, _ = a.shape
    shrunk = (x.to(a.dtype) @ a.flatten(0, 1).T).view(-1, count, rank)
    weights = gate.unsqueeze(-1)
    opened = torch.where(weights != 0, shrunk * weights, 0).view(-1, count * rank)
    return opened @ b.flatten(0, 1)


def add_gated(y: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor, slots: Tensor | None = None) -> None:
    """Adds `gated` to `y` (tokens, d_out) in place."""
    y.add_(gated(x, a, b, gate, slots).to(y.dtype))


def turned(b: Tensor) -> Tensor:
    """Zeros of the shape of vLLM's stacked B, `(slots, 1, d_out, rank)`, stored in memory as `(slots, 1, rank, d_out)`.

    vLLM writes adapters into it as into its own tensor; `add_gated` multiplies it without a copy.
    """
    return b.new_zeros(b.shape[0], b.shape[1], b.shape[3], b.shape[2]).transpose(2, 3)
