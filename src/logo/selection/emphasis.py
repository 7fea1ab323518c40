"""The weights of a prompt's tokens in a mean: equal ones (even), or weights that grow towards the end (late).

    even   mean_t x_t
    late   Σ_t f^(T - t) x_t / Σ_t f^(T - t)        f = `FADING`, T: the last token

The topic of a prompt shows in all of its tokens; the task is often named by the last ones, and prompts of related
adapters may differ there alone ("German:", "French:"). Both kinds of sums follow from sums over parts of a prompt:

    late = f^(tokens of the second part) · late of the first part + late of the second part
"""

from __future__ import annotations

import torch
from torch import Tensor

from logo.selection.reference import prompt_means

# A token's weight divided by the next one's: the last three tokens have 58 % of the weight, the last ten 94 %.
FADING = 0.75
# The weight of the late reading of a point; the even one has weight 1.
LATE_WEIGHT = 0.5


def behind(cells: Tensor) -> Tensor:
    """How many later vectors are in the same cell, (vectors,); `cells` (vectors,) int64 is the cell of each vector."""
    order = cells.argsort(stable=True)
    counts = torch.bincount(cells)
    ends = counts.cumsum(0)[cells[order]]  # behind the last vector of each cell, in sorted order
    found = torch.empty_like(cells)
    found[order] = ends - 1 - torch.arange(len(cells), device=cells.device)
    return found


def late_weights(cells: Tensor) -> Tensor:
    """The weight of each vector in the late sum of its cell, (vectors,) float32: 1 for the cell's last vector."""
    return fading(behind(cells))


def fading(tokens: Tensor) -> Tensor:
    """The factor by which so many further tokens shrink a late sum, float32."""
    return torch.full((), FADING) ** tokens


def late_count(counts: Tensor) -> Tensor:
    """The sum of the late weights of so many tokens, float32; the sum of even weights is the count itself."""
    return (1 - fading(counts)) / (1 - FADING)


def column_weights(columns: int, points: int) -> Tensor:
    """The weight of each reading, (columns,): the even ones of all points come first, then the late ones, if any."""
    weights = torch.ones(columns)
    weights[points:] = LATE_WEIGHT
    return weights


def emphasised(values: Tensor, owners: Tensor, rows: int, late: int) -> Tensor:
    """The mean over the vectors of each row: (rows, n).

    Args:
        values: (vectors, n).
        owners: (vectors,): the row that each vector belongs to; a row's vectors are in the order of its tokens.
        late: 0 weighs all tokens alike, 1 weighs the last ones most.
    """
    return prompt_means(values, owners, rows, late_weights(owners) if late else None)
