"""The relative size of an adapter: how large its change of the base model's weights is, beside these weights.

    size_i = mean over the points that adapter i touches of ‖ΔW_i‖_F / ‖W‖_F        ΔW_i = s_i B_i A_i

It decides how much of a prompt an unsure mixture leaves to the base model (`logo.selection.confidence.total`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from logo.digests import values
from logo.errors import ModelError
from logo.selection.points import Point

# Stands for a size that is not known, as that of adapters of a quantised model. With it, the sum of a broadest
# mixture's weights is 0.73.
USUAL = 0.03
# Kinds of numbers whose values are the weights themselves; quantised weights have scales somewhere else.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weight_norm(model: nn.Module, point: Point) -> float:
    """`‖W‖_F` of the base model at a point; NaN if its weights are quantised or not at hand.

    Args:
        model: loaded, or a skeleton whose parameters have a function `read`; accelerate may keep its weights elsewhere.
    """
    module = model.get_submodule(point.module)
    if not isinstance(getattr(module, "weight", None), Tensor):
        return math.nan
    try:
        weight = values(model, f"{point.module}.weight")
    except ModelError:  # kept by another library than accelerate
        return math.nan
    if weight.dtype not in _PLAIN or not weight.numel():
        return math.nan
    if point.rows is not None:
        rows = torch.tensor(point.rows, device=weight.device)
        weight = weight.index_select(int(type(module).__name__ == "Conv1D"), rows)  # which stores W transposed
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))


def relative_sizes(sizes: Sequence[Tensor], touched: Tensor) -> Tensor:
    """The relative size of each adapter, (adapters,); `USUAL` where it is not known.

    Args:
        sizes: `‖ΔW_i‖ / ‖W‖` per point, each (adapters that touch it,), NaN where it is not known.
        touched: (adapters, points), bool.
    """
    ratios = torch.full(touched.shape, torch.nan)
    for at, part in enumerate(sizes):
        ratios[touched[:, at], at] = part.cpu()
    return ratios.nanmean(dim=1).nan_to_num(nan=USUAL)
