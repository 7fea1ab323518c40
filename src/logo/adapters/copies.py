"""Copies of base weights in an adapter's file: ignored if they equal the base model's own, else refused.

PEFT saves whole weights of `modules_to_save`, and of embeddings and heads that it takes for changed (an adapted
`lm_head`, a resized vocabulary). Often they were not trained, which only a comparison with the base model shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from logo.adapters.layout import core_path
from logo.adapters.weights import WeightFile

if TYPE_CHECKING:
    from torch import nn


def different(file: WeightFile, copies: Mapping[str, str], model: nn.Module) -> str | None:
    """The first of these weights that differs from the base model's, and how; None if all are equal.

    Args:
        copies: key in the file -> path of the parameter that it would replace.
        model: the base model, with its weights.
    """
    own: dict[str, list[torch.Tensor]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        own.setdefault(core_path(path), []).append(parameter)
    for key, path in copies.items():
        found = own.get(core_path(path), [])
        if len(found) != 1:
            return f"{path}, which the base model does not have"
        [base] = found
        [copy] = file.read([key]).values()
        if copy.shape != base.shape:
            return f"{path} of shape {list(copy.shape)} instead of {list(base.shape)}"
        # Compared in the dtype of the base model, in which the copy would replace the weight.
        if not torch.equal(copy.to(base.device, base.dtype), base.detach()):
            return f"{path} with other values"
    return None
