"""One short forward pass: runs the base model on prompts up to the last point that is asked for, and stops there.

Knows where to read and which token; knows nothing about adapters. To probe with adapters active, call it inside
`GatedLoRA.active`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from logo.errors import ModelError
from logo.selection.points import Point
from logo.selection.signals import ProbeInput, ProbeToken


class _Stop(Exception):
    """Everything asked for has been read; unwinds the forward pass."""


class Probe:
    """Reads the hidden vectors at fixed points of one model.

    Args:
        model: a Hugging Face causal LM.
        points: where to read.
        read: `"residual"`, the residual stream that enters the layer, before its input norm (the official choice:
            `hidden_states[layer]`), or `"projection"`, what the point's own module receives.
        token: `"last"`, the last prompt token's vector, `"mean"`, the mean over all prompt tokens, or `"each"`, the
            vectors of all prompt tokens but the one that begins every text.
        bos: the token that begins every text; None if there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[Point],
        read: ProbeInput = "residual",
        token: ProbeToken = "last",
        bos: int | None = None,
    ) -> None:
        self.model = model
        self.points = tuple(points)
        self.token = token
        self.bos = bos
        # Several modules of one layer may share what they read: one hook for each distinct place.
        self._places = {
            point: point.layer_path if read == "residual" else point.module for point in self.points
        }  # fmt: skip
        self._modules = {place: model.get_submodule(place) for place in dict.fromkeys(self._places.values())}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache | None = None) -> list[Tensor]:
        """Hidden vectors of a batch of prompts.

        Args:
            input_ids: (rows, length), padded on the right, so that positions count from each row's first token.
            attention_mask: (rows, length), 1 on prompt tokens; with a cache, (rows, its length + length).
            cache: keys and values of a prefix, which all rows begin with; those of the rows are added to it.

        Returns:
            One float32 tensor (rows, d) per point, on the device of the point's layer; with `token="each"`, one
            (tokens, d) in the order of `owners`. Points that read the same vectors share one tensor.
        """
        hidden: dict[str, Tensor] = {}
        mask = self._read_tokens(input_ids, attention_mask)[:, -input_ids.shape[1] :]
        latest: list[Tensor] = []  # what was read last and what became of it: q, k and v receive the same tensor

        def reader(place: str) -> Any:
            def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entering = args[0] if args else kwargs["hidden_states"]
                if not latest or latest[0] is not entering:
                    latest[:] = entering, self._reduce(entering, mask)
                hidden[place] = latest[1]
                if len(hidden) == len(self._modules):
                    raise _Stop

            return read

        handles = [
            module.register_forward_pre_hook(reader(place), with_kwargs=True) for place, module in self._modules.items()
        ]
        try:
            kept: dict[str, Any] = {"use_cache": cache is not None}
            if cache is not None:
                kept[cache_argument(self.model) or ""] = cache
            self.model(input_ids=input_ids, attention_mask=attention_mask, **kept)
        except _Stop:
            return [hidden[self._places[point]] for point in self.points]
        finally:
            for handle in handles:
                handle.remove()
        missing = ", ".join(place for place in self._modules if place not in hidden)
        raise ModelError(f"the forward pass of {type(self.model).__name__} never reached {missing}")

    def owners(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(vectors,) int64 on the CPU: which row each hidden vector belongs to."""
        if self.token != "each":
            return torch.arange(len(input_ids))
        return self.places(input_ids, attention_mask)[0]

    def places(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """With `token="each"`, row and column of each hidden vector in `input_ids`: (vectors,) int64, on the CPU."""
        mask = self._read_tokens(input_ids, attention_mask)[:, -input_ids.shape[1] :]
        rows, columns = mask.nonzero().cpu().T
        return rows, columns

    def _read_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Like `attention_mask`: 1 on the tokens that are read."""
        if self.token != "each" or self.bos is None or attention_mask.shape != input_ids.shape:
            return attention_mask  # after a prefix, no text begins
        # A prompt of nothing but that token is still a prompt.
        left_out = (input_ids[:, 0] == self.bos) & (attention_mask.sum(dim=1) > 1)
        mask = attention_mask.clone()
        mask[left_out, 0] = 0
        return mask

    def _reduce(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(rows, length, d) to float32 vectors: one per row, or all that are read."""
        mask = mask.to(hidden.device)
        if hidden.dim() == 2:  # flattened tokens, as OPT's MLP receives them
            hidden = hidden.view(*mask.shape, -1)
        if self.token == "last":
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            return hidden[rows, mask.sum(dim=1) - 1].float()
        if self.token == "each":
            return hidden[mask.bool()].float()
        weights = mask.float() / mask.sum(dim=1, keepdim=True)
        return torch.einsum("rtd,rt->rd", hidden.float(), weights)


def cache_argument(model: nn.Module) -> str | None:
    """What a model's forward pass calls the cache of keys and values; None where it takes none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)
