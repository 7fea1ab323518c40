"""`Probe`: one short forward pass, which runs the base model on prompts up to the last point and stops there.

A probe knows where to read, and nothing about adapters. To probe with adapters active, call it inside `Mixer.active`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from logo.errors import ModelError
from logo.models import PassEnded, device_of, padded
from logo.selection.packing import packed, packs
from logo.selection.points import Point
from logo.selection.signals import ProbeInput


class Probe:
    """Reads the hidden vectors at fixed points of one model, a Hugging Face causal LM.

    Args:
        read: `"residual"`, the residual stream that enters the layer, before its input norm (the official choice:
            `hidden_states[layer]`), or `"projection"`, what the point's own module receives.
        run: runs the model instead of its own forward pass, and does not stop at the last point:
            `PrefixCache.forward`, which fills a cache of keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        points: Sequence[Point],
        read: ProbeInput = "residual",
        run: Callable[[Tensor, Tensor, DynamicCache, dict[str, Any]], None] | None = None,
    ) -> None:
        self.model = model
        self.points = tuple(points)
        self._read: ProbeInput = read
        self._run = run
        self._places = [point.layer_path if read == "residual" else point.module for point in self.points]
        self._modules = {place: model.get_submodule(place) for place in dict.fromkeys(self._places)}

    def at(self, points: Sequence[Point]) -> Probe:
        """The same probe at other points."""
        return Probe(self.model, points, self._read, self._run)

    def read(
        self, rows: Sequence[Sequence[int]], begins: Sequence[int], *, may_pack: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """Hidden vectors of texts at each point, as of a call, and the text that each is of: (vectors,) int64 on the
        CPU.

        Args:
            rows: the token ids of each text.
            begins: the first token of each that is read, up to its end.
            may_pack: False where adapters are active, whose gates are by rows.
        """
        lengths = list(map(len, rows))
        device = device_of(self.model.get_input_embeddings())
        has_padding = sum(lengths) < len(rows) * max(lengths)
        if may_pack and has_padding and packs(self.model, sum(lengths)):
            ids, positions = packed(rows)
            picked, owners = pick(begins, lengths, [0, *accumulate(lengths[:-1])])
            options = {"position_ids": positions.to(device)}
            return self(ids.to(device), None, picked.to(device), options=options), owners
        ids, mask = padded(rows, device)
        picked, owners = pick(begins, lengths, range(0, ids.numel(), ids.shape[1]))
        return self(ids, mask, picked.to(device)), owners

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        picked: Tensor,
        cache: DynamicCache | None = None,
        options: dict[str, Any] | None = None,
    ) -> list[Tensor]:
        """Hidden vectors of some tokens of a batch: one float32 tensor (vectors, d) per point, on the device of its
        layer. Points that read the same vectors share one tensor.

        Args:
            input_ids: (rows, length), padded on the right, so that positions count from each row's first token.
            attention_mask: (rows, length), 1 on prompt tokens; with a cache, (rows, its length + length). None: all.
            picked: (vectors,) int64, the tokens that are read, as positions in the flattened `input_ids`; see `pick`.
            cache: of `run`.
            options: more arguments of the forward pass, or of `run`.
        """
        hidden: dict[str, Tensor] = {}
        latest: list[Tensor] = []  # the last tensor and its vectors, since q, k and v receive the same one

        def reader(place: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            if not latest or latest[0] is not entering:
                flat = entering.reshape(-1, entering.shape[-1])  # OPT's MLP receives flattened tokens
                latest[:] = entering, flat.index_select(0, picked.to(flat.device)).float()
            hidden[place] = latest[1]
            if self._run is None and len(hidden) == len(self._modules):
                raise PassEnded

        with ExitStack() as stack:
            for place, module in self._modules.items():
                hook = module.register_forward_pre_hook(partial(reader, place), with_kwargs=True)
                stack.callback(hook.remove)
            if self._run is not None and cache is not None:
                assert attention_mask is not None  # of what is cached, too
                self._run(input_ids, attention_mask, cache, options or {})
            else:
                with suppress(PassEnded):
                    self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **(options or {}))
        missing = ", ".join(place for place in self._modules if place not in hidden)
        if missing:
            raise ModelError(f"the forward pass of {type(self.model).__name__} never reached {missing}")
        return [hidden[place] for place in self._places]


def pick(begins: Sequence[int], ends: Sequence[int], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The tokens from `begins` up to `ends` of each text of a batch: their positions in the flattened ids, where each
    text has its first token at `starts`, and their texts; (vectors,) int64 each, on the CPU."""
    spans = list(enumerate(map(range, begins, ends)))
    positions = torch.tensor([starts[row] + position for row, span in spans for position in span], dtype=torch.int64)
    owners = torch.tensor([row for row, span in spans for _ in span], dtype=torch.int64)
    return positions, owners
