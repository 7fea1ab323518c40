"""Draws the next token of every sequence of a step, for all of them in the same few calls.

The noise of a sequence's n-th draw comes from a generator that is seeded with its own seed and n, so that its tokens do
not depend on the other sequences, and a step that is computed again draws the same.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NO_TOKEN = -1  # of a row that is not finite
# A lower temperature is greedy decoding, as in vLLM, since dividing by it would overflow.
_GREEDY = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How one answer is decoded: the most new tokens, the temperature (0 is greedy), the share of the probability mass
    that is sampled from, the seed of its draws (None: random), and whether it goes on behind tokens that end it."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _GREEDY


class Draw(NamedTuple):
    """The draw of a sequence's token with this number, counted from 0."""

    sampling: Sampling
    number: int

    def add_noise(self, row: Tensor) -> None:
        """Fills a row (vocabulary,) with exponential noise."""
        seed = secrets.randbits(64) if self.sampling.seed is None else self.sampling.seed
        digest = hashlib.blake2b(f"{seed} {self.number}".encode(), digest_size=8).digest()
        generator = torch.Generator(row.device).manual_seed(int.from_bytes(digest, "big") % 2**63)
        row.exponential_(generator=generator)


def next_tokens(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token per row (rows,) from float32 logits (rows, vocabulary), without waiting for the device; `NO_TOKEN` for
    a row that is not finite."""
    best = scores.max(dim=-1)  # NaN counts as the largest
    tokens = best.indices
    if sampled := [row for row, draw in enumerate(draws) if not draw.sampling.greedy]:
        rows = torch.tensor(sampled).to(scores.device, non_blocking=True)
        tokens = tokens.index_copy(0, rows, _sampled(scores[rows], [draws[row] for row in sampled]))
    return torch.where(best.values.isfinite(), tokens, NO_TOKEN)


def _sampled(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draws a token from the distribution of each row (rows,): the one with the largest quotient of probability and
    exponential noise is such a draw. Only the noise is filled row by row."""
    ways = torch.tensor([[draw.sampling.temperature, draw.sampling.top_p] for draw in draws])
    temperature, top_p = ways.to(scores.device, non_blocking=True).T[:, :, None]  # (rows, 1) each
    scores = scores / temperature
    if any(draw.sampling.top_p < 1 for draw in draws):
        ordered = scores.sort(dim=-1)  # ascending: the tokens with at most 1 - top_p together are dropped
        gone = ordered.values.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        gone[:, -1] = False
        scores = scores.masked_fill(gone.scatter(1, ordered.indices, gone), -torch.inf)
    noise = torch.empty_like(scores)
    for row, draw in zip(noise, draws, strict=True):
        draw.add_noise(row)
    return (scores.softmax(dim=-1) / noise).argmax(dim=-1)
