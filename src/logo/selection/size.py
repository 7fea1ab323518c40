"""The relative size of an adapter: how large its change of the base model's weights is, beside these weights.

    size_i = mean over the points that adapter i touches of ‖ΔW_i‖_F / ‖W‖_F        ΔW_i = s_i B_i A_i

It decides how much of a prompt an unsure mixture leaves to the base model
(`logo.selection.confidence.Evidence.weight_sum`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from logo.adapters.layout import linear_shape
from logo.errors import ModelError
from logo.models import tensor_of
from logo.selection.points import Point

# An adapter whose size is not known, such as one of a quantised base model, counts as one of this size. The weights of
# the broadest mixture of such adapters sum to 0.73.
USUAL = 0.03
# Types whose values are the weights themselves; quantised weights have scales somewhere else.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weight_norm(model: nn.Module, point: Point) -> float:
    """`‖W‖_F` of the base model at a point; NaN if its weights are quantised or not at hand.

    Args:
        model: loaded, where accelerate may keep its weights elsewhere; or a skeleton, see
            `logo.backends.vllm.skeleton`.
    """
    module = model.get_submodule(point.module)
    weight, shape = getattr(module, "weight", None), linear_shape(module)
    if weight is None or shape is None or type(weight) not in (nn.Parameter, Tensor):  # the types of quantised ones
        return math.nan
    if getattr(weight, "stored", weight.dtype) not in _PLAIN:
        return math.nan
    if weight.is_meta:
        try:
            weight = tensor_of(model, f"{point.module}.weight")
        except ModelError:  # kept by another library than accelerate
            return math.nan
    transposed = type(module).__name__ == "Conv1D"
    expected = (shape.out_features, shape.in_features)
    if weight.shape != (expected[::-1] if transposed else expected):
        return math.nan
    if point.rows is not None:
        weight = weight.index_select(int(transposed), torch.tensor(point.rows, device=weight.device))
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32)))
    return norm if 0 < norm < math.inf else math.nan


def relative_sizes(updates: Sequence[Tensor], weight_norms: Sequence[float], touched: Tensor) -> Tensor:
    """The relative size of each adapter, (adapters,); `USUAL` where it is not known.

    Args:
        updates: `‖ΔW_i‖_F` per point, each (adapters that touch it,).
        weight_norms: `‖W‖_F` per point, NaN where it is not known.
        touched: (adapters, points), bool.
    """
    ratios = torch.full(touched.shape, torch.nan)
    for at, (update, norm) in enumerate(zip(updates, weight_norms, strict=True)):
        ratios[touched[:, at], at] = update.cpu() / norm
    return ratios.nanmean(dim=1).nan_to_num(nan=USUAL)
