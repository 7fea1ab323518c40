"""How much each token of a prompt counts: all alike, or the last ones most.

    even   mean_t x_t
    late   Σ_t f^(T - t) x_t / Σ_t f^(T - t)        f = `FADING`, T: the last token

What a prompt is about is in all of its tokens; what is asked of it is often said in the last ones, and near relatives
of an adapter differ there alone ("German:", "French:"). Sums with either weight can be put together from sums of parts:

    late = f^(tokens of the second part) · late of the first part + late of the second part
"""

from __future__ import annotations

import torch
from torch import Tensor

from logo.selection.reference import prompt_means

# What a token counts beside the next one: 58 % of the weight is on the last three tokens, 94 % on the last ten.
FADING = 0.75
# What the late reading of a point counts beside the even one.
LATE = 0.5


def behind(cells: Tensor) -> Tensor:
    """How many later vectors belong to the same cell: (vectors,); `cells` (vectors,) int64, each cell's in order."""
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
    """The factor by which a late sum has shrunk once so many tokens have followed it, float32."""
    return torch.full((), FADING) ** tokens


def late_count(counts: Tensor) -> Tensor:
    """The sum of the late weights of so many tokens, as `counts` is of even ones; float32."""
    return (1 - fading(counts)) / (1 - FADING)


def late_along(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Factors that turn late sums of consecutive parts of a text into late sums of the text up to the end of each part.

    Args:
        tokens: (parts,): how many tokens each part has.

    Returns:
        `M` (parts, parts) and `left` (parts,): `M @ sums + left[:, None] * before`, where `sums` (parts, n) are the
        parts' own late sums and `before` (n,) is the late sum of the text before the first part.
    """
    ends = tokens.cumsum(0)
    return fading((ends[:, None] - ends[None]).clamp_min(0)).tril(), fading(ends)


def column_weights(columns: int, points: int) -> Tensor:
    """What each reading counts, (columns,): the even ones of all points, and the late ones behind them, if any."""
    weights = torch.ones(columns)
    weights[points:] = LATE
    return weights


def emphasised(values: Tensor, owners: Tensor, rows: int, late: int) -> Tensor:
    """The mean over the vectors of each row: (rows, n).

    Args:
        values: (vectors, n).
        owners: (vectors,): the row that each vector belongs to; a row's vectors are in the order of its tokens.
        late: 0 weighs all tokens alike, 1 weighs the last ones most.
    """
    return prompt_means(values, owners, rows, late_weights(owners) if late else None)
