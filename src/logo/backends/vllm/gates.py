"""Gated products over vLLM's adapter slots, with buffers that stay where they are so that a graph may capture them.

    y += ((x Aᵀ) ⊙ gate) B        A (slots, rank, d_in)   B (slots, rank, d_out)   gate (tokens, slots)

One token's gate is its request's mixture: a weight at the slot of each adapter, or a single 1. Pure PyTorch: knows
nothing of vLLM. What decides in a step is written into the buffers before the model runs; the products themselves have
no branch on data, so that they run alike eagerly, compiled and in a captured graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


class StepGates:
    """The gates of the step at hand.

    Args:
        tokens, requests: the most that a step may have.
        slots: of adapters.
        device: where the model runs.
        dtype: of the adapters.

    Attributes:
        tokens: (tokens, slots), the gate of every token.
        sampled: (requests, slots), of every token whose logits are computed.
        open: whether any gate of the step is not 0.
        rows: on a CPU, the tokens whose gate is not 0, where that is not all of them; else None.
    """

    def __init__(self, tokens: int, requests: int, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.tokens = torch.zeros(tokens, slots, device=device, dtype=dtype)
        self.sampled = torch.zeros(requests, slots, device=device, dtype=dtype)
        self.open = False
        self.rows: Tensor | None = None
        self._written = [0, 0]

    def write(self, mixtures: Tensor, tokens: Tensor, sampled: Tensor) -> None:
        """Sets the gates of a step.

        Args:
            mixtures: (mixtures, slots) float32 on the CPU; row 0 is the base model's, zeros.
            tokens: (tokens,) int64 on the CPU: which mixture each token has.
            sampled: (sampled tokens,) likewise.
        """
        device = self.tokens.device
        mixtures = mixtures.to(device, self.tokens.dtype)
        for i, (buffer, which) in enumerate(((self.tokens, tokens), (self.sampled, sampled))):
            count = min(len(which), len(buffer))
            buffer[:count] = mixtures[which[:count].to(device)]
            buffer[count : self._written[i]] = 0  # what an earlier, longer step has left
            self._written[i] = count
        gated = tokens != 0
        self.open = bool(gated.any())
        self.rows = None
        if device.type == "cpu" and self.open and not bool(gated.all()):
            self.rows = gated.nonzero()[:, 0]


def add_gated(y: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> None:
    """Adds `((x Aᵀ) ⊙ gate) B` to `y` in place.

    A closed gate gives 0, also where `x Aᵀ` is not finite: an adapter that overflows spoils no row but its own.

    Args:
        y: (tokens, d_out).
        x: (tokens, d_in).
        a: (slots, rank, d_in).
        b: (slots, rank, d_out), scale folded in.
        gate: (tokens, slots).
    """
    slots, rank, _ = a.shape
    shrunk = (x.to(a.dtype) @ a.flatten(0, 1).T).view(-1, slots, rank)
    weights = gate.unsqueeze(-1)
    gated = torch.where(weights != 0, shrunk * weights, 0).view(-1, slots * rank)
    y.add_((gated @ b.flatten(0, 1)).to(y.dtype))


def turned(b: Tensor) -> Tensor:
    """Zeros of the shape and the meaning of vLLM's `(slots, 1, d_out, rank)`, laid out as `(slots, 1, rank, d_out)`.

    vLLM writes adapters into it as into its own; `add_gated` multiplies it without a copy.
    """
    return b.new_zeros(b.shape[0], b.shape[1], b.shape[3], b.shape[2]).transpose(2, 3)
