"""`Probe`: one short forward pass, which runs the base model on prompts up to the last point and stops there.

A probe knows where to read and which tokens, and nothing about adapters. To probe with adapters active, call it inside
`Mixer.active`.

The first token of a text is not read where all tokens count. It sees no other token, and language models use it as a
sink of attention, whether it is a token that begins every text or a word: its hidden vectors are very long, and in the
middle layers hardly depend on the token (arXiv 2309.17453).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from logo.adapters.activation import Activation, earliest
from logo.errors import ModelError
from logo.selection.points import Point, decoder_layers
from logo.selection.signals import ProbeInput, ProbeToken


class _Stop(Exception):
    """Ends the forward pass once everything has been read."""


class Probe:
    """Reads the hidden vectors at fixed points of one model.

    Args:
        model: a Hugging Face causal LM.
        points: where to read.
        read: `"residual"`, the residual stream that enters the layer, before its input norm (the official choice:
            `hidden_states[layer]`), or `"projection"`, what the point's own module receives.
        token: `"last"`, the vector of the last prompt token; `"mean"`, the mean over all prompt tokens; `"each"`, the
            vectors of all prompt tokens but the first (see above); or `"tail"`, the vectors of the tokens on which
            adapters act.
        activations: of the adapters; for `"tail"`.
        whole: do not stop at the last point before the cache holds the keys and values of all layers.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[Point],
        read: ProbeInput = "residual",
        token: ProbeToken = "last",
        activations: Sequence[Activation] = (),
        whole: bool = False,
    ) -> None:
        self.model = model
        self.points = tuple(points)
        self.token = token
        self.activations = tuple(activations)
        self._whole = whole
        self._layers: Sequence[nn.Module] = list(decoder_layers(model)[1]) if whole else []
        self._head = model.get_output_embeddings() if whole else None  # type: ignore[operator]
        # Several modules of one layer may read the same vectors: there is one hook for each distinct place.
        self._places = {
            point: point.layer_path if read == "residual" else point.module for point in self.points
        }  # fmt: skip
        self._modules = {place: model.get_submodule(place) for place in dict.fromkeys(self._places.values())}

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache | None = None, **options: Any
    ) -> list[Tensor]:
        """Hidden vectors of a batch of prompts.

        Args:
            input_ids: (rows, length), padded on the right, so that positions count from each row's first token.
            attention_mask: (rows, length), 1 on prompt tokens; with a cache, (rows, its length + length).
            cache: keys and values of the beginning of the rows; those of the rest are added to it.
            options: further arguments of the model's forward pass.

        Returns:
            One float32 tensor (rows, d) per point, on the device of the point's layer; with `token="each"` or `"tail"`,
            one (tokens, d) in the order of `owners`. Points that read the same vectors share one tensor.
        """
        hidden: dict[str, Tensor] = {}
        mask = self._read_tokens(input_ids, attention_mask)[:, -input_ids.shape[1] :]
        latest: list[Tensor] = []  # the last tensor and its vectors, since q, k and v receive the same one

        def reader(place: str) -> Any:
            def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entering = args[0] if args else kwargs["hidden_states"]
                if not latest or latest[0] is not entering:
                    latest[:] = entering, self._reduce(entering, mask)
                hidden[place] = latest[1]
                if len(hidden) == len(self._modules) and not self._whole:
                    raise _Stop

            return read

        handles = [
            module.register_forward_pre_hook(reader(place), with_kwargs=True) for place, module in self._modules.items()
        ]

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            everything = len(hidden) == len(self._modules) and self._cached(cache, attention_mask.shape[1])
            if module is self._head or everything:
                raise _Stop

        # Once the keys and values of the last layer are cached, its other modules and the head have nothing to add.
        ends = [*self._layers[-1].modules(), self._head] if self._whole else []
        handles += [module.register_forward_pre_hook(stop) for module in ends if module is not None]
        try:
            kept: dict[str, Any] = {"use_cache": cache is not None, **options}
            if cache is not None:
                kept[cache_argument(self.model) or ""] = cache
            with suppress(_Stop):
                self.model(input_ids=input_ids, attention_mask=attention_mask, **kept)
        finally:
            for handle in handles:
                handle.remove()
        missing = ", ".join(place for place in self._modules if place not in hidden)
        if missing:
            raise ModelError(f"the forward pass of {type(self.model).__name__} never reached {missing}")
        return [hidden[self._places[point]] for point in self.points]

    def _cached(self, cache: DynamicCache | None, columns: int) -> bool:
        """Whether the cache holds so many columns of all layers; False if some layers share those of others."""
        if cache is None or len(cache.layers) != len(self._layers):
            return False
        return int(cache.layers[-1].get_seq_length()) == columns

    def owners(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The row that each hidden vector belongs to: (vectors,) int64 on the CPU."""
        if self.token not in ("each", "tail"):
            return torch.arange(len(input_ids))
        return self.places(input_ids, attention_mask)[0]

    def places(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of each hidden vector in `input_ids`: (vectors,) int64, on the CPU."""
        mask = self._read_tokens(input_ids, attention_mask)[:, -input_ids.shape[1] :]
        if self.token in ("each", "tail"):
            rows, columns = mask.nonzero().cpu().T
            return rows, columns
        return torch.arange(len(input_ids)), mask.sum(dim=1).cpu() - 1

    def among(self, other: Probe, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Which of the vectors that another probe reads this one reads, too: (vectors,) bool on the CPU."""
        mine = self._read_tokens(input_ids, attention_mask).bool()
        return mine[other._read_tokens(input_ids, attention_mask).bool()].cpu()

    def _read_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """A mask like `attention_mask` with 1 on the tokens that are read."""
        width = input_ids.shape[1]
        mask = self._tail(input_ids, attention_mask) if self.token == "tail" else attention_mask
        if self.token not in ("each", "tail"):
            return mask
        # Behind a cached beginning no text begins, and a prompt of one token keeps it.
        begins = attention_mask[:, :-width].sum(dim=1) == 0
        left_out = (attention_mask.sum(dim=1) > 1) & begins
        mask = mask.clone()
        mask[left_out, -width] = 0
        return mask

    def _tail(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """1 from the first token on at which an adapter acts; cached tokens are never among these."""
        read, width = mask.cpu().clone(), input_ids.shape[1]
        lengths = mask[:, -width:].sum(dim=1).tolist()
        for row, ids, length in zip(read, input_ids.tolist(), lengths, strict=True):
            row[: row.shape[0] - width + earliest(self.activations, ids[:length])] = 0
        return read.to(mask.device)

    def _reduce(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """From (rows, length, d) to the float32 vectors that are read: one per row, or several."""
        mask = mask.to(hidden.device)
        if hidden.dim() == 2:  # flattened tokens, as OPT's MLP receives them
            hidden = hidden.view(*mask.shape, -1)
        if self.token == "last":
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            return hidden[rows, mask.sum(dim=1) - 1].float()
        if self.token in ("each", "tail"):
            return hidden[mask.bool()].float()
        weights = mask.float() / mask.sum(dim=1, keepdim=True)
        return torch.einsum("rtd,rt->rd", hidden.float(), weights)


def cache_argument(model: nn.Module) -> str | None:
    """The argument of a model's forward pass that takes the cache of keys and values; None if there is none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)
