"""Copies of base weights in an adapter's file: left out where they equal the base model's own, refused otherwise.

PEFT saves whole weights of `modules_to_save`, and of embeddings and heads that it takes for changed (an adapted
`lm_head`, a vocabulary that it believes resized). Often nothing in them was trained. Only the loaded base model can
tell.
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
    """Which of these weights is not the base model's own, and how; None: all of them are.

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
        # In the dtype in which the base model holds it, since that is what it would be replaced in.
        if not torch.equal(copy.to(base.device, base.dtype), base.detach()):
            return f"{path} with other values"
    return None
