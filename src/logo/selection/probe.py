"""One short forward pass: runs the base model on prompts up to the last point that is asked for, and stops there.

Knows where to read and which token; knows nothing about adapters. To probe with adapters active, call it inside
`GatedLoRA.active`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from logo.errors import ModelError
from logo.selection.points import Point

ProbeInput = Literal["residual", "projection"]
ProbeToken = Literal["last", "mean"]


class _Stop(Exception):
    """Everything asked for has been read; unwinds the forward pass."""


class Probe:
    """Reads the hidden vectors at fixed points of one model.

    Args:
        model: a Hugging Face causal LM.
        points: where to read.
        read: `"residual"`, the residual stream that enters the layer, before its input norm (the official choice:
            `hidden_states[layer]`), or `"projection"`, what the point's own module receives.
        token: `"last"`, the last prompt token's vector, or `"mean"`, the mean over all prompt tokens.
    """

    def __init__(
        self, model: nn.Module, points: Sequence[Point], read: ProbeInput = "residual", token: ProbeToken = "last"
    ) -> None:
        self.model = model
        self.points = tuple(points)
        self.token = token
        # Several modules of one layer may share what they read: one hook for each distinct place.
        self._places = {
            point: point.layer_path if read == "residual" else point.module for point in self.points
        }  # fmt: skip
        self._modules = {place: model.get_submodule(place) for place in dict.fromkeys(self._places.values())}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """Hidden vectors of a batch of prompts.

        Args:
            input_ids: (rows, length), padded on the right, so that positions count from each row's first token.
            attention_mask: (rows, length), 1 on prompt tokens.

        Returns:
            One float32 tensor (rows, d) per point, on the device of the point's layer.
        """
        hidden: dict[str, Tensor] = {}

        def reader(place: str) -> Any:
            def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden[place] = self._reduce(args[0] if args else kwargs["hidden_states"], attention_mask)
                if len(hidden) == len(self._modules):
                    raise _Stop

            return read

        handles = [
            module.register_forward_pre_hook(reader(place), with_kwargs=True) for place, module in self._modules.items()
        ]
        try:
            self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _Stop:
            return [hidden[self._places[point]] for point in self.points]
        finally:
            for handle in handles:
                handle.remove()
        missing = ", ".join(place for place in self._modules if place not in hidden)
        raise ModelError(f"the forward pass of {type(self.model).__name__} never reached {missing}")

    def _reduce(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(rows, length, d) to one float32 vector per row."""
        mask = attention_mask.to(hidden.device)
        if hidden.dim() == 2:  # flattened tokens, as OPT's MLP receives them
            hidden = hidden.view(*mask.shape, -1)
        if self.token == "last":
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            return hidden[rows, mask.sum(dim=1) - 1].float()
        weights = mask.float() / mask.sum(dim=1, keepdim=True)
        return torch.einsum("rtd,rt->rd", hidden.float(), weights)
