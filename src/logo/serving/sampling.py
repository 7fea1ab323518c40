"""Draws the next token of every sequence of a step, for all of them in the same few calls.

A sequence's tokens depend on its own seed and not on the other sequences of its steps: the noise of its n-th draw comes
from a generator that is seeded with the sequence's seed and n. Drawing changes no state, and `count` only grows when a
step is done, so that a step that is computed again draws the same tokens.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logo.protocol import Sampling

NO_TOKEN = -1  # of a row that is not finite


@dataclass
class Drawing:
    """The draws of one sequence.

    Attributes:
        sampling: how tokens are drawn.
        count: the number of drawn tokens.
    """

    sampling: Sampling
    count: int = 0

    def __post_init__(self) -> None:
        self._seed = secrets.randbits(64) if self.sampling.seed is None else self.sampling.seed

    def add_noise(self, row: Tensor) -> None:
        """Fills a row (vocabulary,) with the exponential noise of the next draw."""
        digest = hashlib.blake2b(f"{self._seed} {self.count}".encode(), digest_size=8).digest()
        generator = torch.Generator(row.device).manual_seed(int.from_bytes(digest, "big") % 2**63)
        row.exponential_(generator=generator)


def next_tokens(scores: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """One token per row (rows,), without waiting for the device; `NO_TOKEN` for a row that is not finite.

    Args:
        scores: (rows, vocabulary) float32 logits.
        drawings: one per row.
    """
    best = scores.max(dim=-1)  # NaN counts as the largest
    tokens = best.indices
    sampled = [row for row, drawing in enumerate(drawings) if not drawing.sampling.greedy]
    if sampled:
        rows = torch.tensor(sampled).to(scores.device, non_blocking=True)
        tokens = tokens.index_copy(0, rows, _sampled(scores[rows], [drawings[row] for row in sampled]))
    return torch.where(best.values.isfinite(), tokens, NO_TOKEN)


def _sampled(scores: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """Draws a token from the distribution of each row: (rows,).

    The token with the largest quotient of probability and exponential noise is such a draw. All rows take the same few
    calls; only the noise is filled row by row.
    """
    ways = torch.tensor([[drawing.sampling.temperature, drawing.sampling.top_p] for drawing in drawings])
    temperature, top_p = ways.to(scores.device, non_blocking=True).T[:, :, None]  # (rows, 1) each
    scores = scores / temperature
    if any(drawing.sampling.top_p < 1 for drawing in drawings):
        ordered = scores.sort(dim=-1)  # ascending: the tokens with at most 1 - top_p together are dropped
        gone = ordered.values.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        gone[:, -1] = False
        scores = scores.masked_fill(gone.scatter(1, ordered.indices, gone), -torch.inf)
    noise = torch.empty_like(scores)
    for row, drawing in zip(noise, drawings, strict=True):
        drawing.add_noise(row)
    return (scores.softmax(dim=-1) / noise).argmax(dim=-1)
