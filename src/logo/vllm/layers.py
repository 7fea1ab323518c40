"""What vLLM's linear layers call instead of its own LoRA kernels: the tap of the layer, then the gated product.

A compiled or captured model runs no Python between its operators. Products work there, because they read fixed buffers;
a tap is Python and does not. It is therefore an operator of PyTorch, at which vLLM splits the model as it does at
attention, so that only the parts between are compiled and captured. Graphs of the whole model, which vLLM uses where
every request has one token in a step, have no splits; a prompt that was probed in one fails (`Taps`), and is probed
again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from logo.errors import ModelError
from logo.vllm.gates import StepGates, gated
from logo.vllm.taps import Gather, Taps

# If set, vLLM captures models without the compiler that knows splitting operators, and breaks them at attention alone.
_BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"

_OPERATOR = "logo::tap"

# Operators take only tensors, numbers and strings, so they find taps by their index in this list.
_TAPS: list[Tap] = []


@torch.library.custom_op(_OPERATOR, mutates_args=("seen",))
def tap(entering: Tensor, seen: Tensor, number: int) -> None:
    """Calls `Tap.read` of the tap with this number. `seen`, (1,), is declared to be changed, since a compiler removes
    code without a visible effect."""
    _TAPS[number].read(lambda: entering)


@tap.register_fake
def _(entering: Tensor, seen: Tensor, number: int) -> None:
    return None


def is_compiled(vllm_config: Any) -> bool:
    """Whether the Python code of layers runs once for all steps, because it is compiled or captured."""
    modes = [getattr(vllm_config.compilation_config, name, None) for name in ("mode", "cudagraph_mode")]
    return any(getattr(mode, "value", mode) for mode in modes)


def split(vllm_config: Any, depends_on: Iterable[str]) -> None:
    """Splits the model at the taps, after vLLM has completed its configuration and before the model runs first;
    `depends_on`: what the compiled model depends on, since vLLM finds it in its cache by the configuration."""
    operators = getattr(vllm_config.compilation_config, "splitting_ops", None)
    if operators and os.environ.get(_BREAKABLE, "0") in ("", "0") and _OPERATOR not in operators:
        operators.append(_OPERATOR)
    additional = getattr(vllm_config, "additional_config", None) or {}
    if not isinstance(additional, dict):
        raise ModelError(f"expected additional_config to be an object, found {type(additional).__name__}")
    vllm_config.additional_config = {**additional, "logo_compiled": list(depends_on)}


class GatedWrapper(PunicaWrapperBase):  # type: ignore[misc]
    """Implements vLLM's interface for LoRA products by gated products, after the tap of the layer; `gates`: of the
    current step."""

    tap: Tap | None = None  # of what enters the layer
    # Of each slice of the layer, the ranks of the adapters in the slots, 0 where one does not act; None: unknown.
    ranks: tuple[tuple[int, ...], ...] | None = None

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device, gates: StepGates) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._embeddings_indices.zero_()  # the embedding layer always reads slot 0, which is zeros
        self.gates = gates

    def of_layer(self, tap: Tap) -> GatedWrapper:
        """The wrapper of one layer, which shares all tensors with this one."""
        wrapper = copy.copy(self)
        wrapper.tap = tap
        return wrapper

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM for another mapping of tokens to adapters; the worker has written the gates."""

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Adds each slice's product to its columns of `y` (tokens, d_out), in place."""
        if self.tap is not None:
            self.tap(lambda: x)
        factors = [(a[:, 0], b[:, 0].transpose(1, 2)) for a, b in zip(lora_a_stacked, lora_b_stacked, strict=True)]
        if not self.gates.eager:
            # All columns are changed at once: if one part of a tensor is changed in place and another part leaves the
            # compiled graph, inductor loses the tensor's shape.
            gate = self.gates.tokens[: x.shape[0]]
            y.add_(torch.cat([gated(x, a, b, gate) for a, b in factors], dim=1).to(y.dtype))
            return
        start = 0
        for i, ((a, b), width) in enumerate(zip(factors, output_slices, strict=True)):
            ranks = None if self.ranks is None else self.ranks[i]
            for group in self.gates.groups:
                group.add(y[:, start : start + width], x, a, b, ranks)
            start += width

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """Adds the product of the output head to `y`, for the tokens whose logits are computed."""
        a = lora_a_stacked[:, 0]
        b = lora_b_stacked[:, 0].transpose(1, 2)
        part = y[:, : b.shape[2]]
        if self.gates.eager:
            for group in self.gates.sampled_groups:
                group.add(part, x, a, b)
        else:
            part.add_(gated(x, a, b, self.gates.sampled[: x.shape[0]]).to(y.dtype))
        part.masked_fill_(part.isinf(), torch.nan)  # only NaN marks an answer as not finite

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, **kwargs: Any) -> None:
        """Does nothing, since pools with adapters of embeddings are refused when they are opened."""

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        """Raises ModelError; no layer that `multiplied` lets through calls it."""
        raise ModelError("LoGo multiplies both factors of an adapter in one call, and this layer asks for one of them")

    add_expand = apply_lora_full_linear = add_shrink


def multiplied(layer: nn.Module) -> bool:
    """Whether a layer that vLLM has wrapped only calls products that `GatedWrapper` implements; experts do not."""
    from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return isinstance(layer, (BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA))


class Tap:
    """The tap of one place, called eagerly or as an operator.

    Args:
        place: path in the model.
        taps: read the hidden vectors.
        device: where the model runs.
        gather: joins the parts of the input that the ranks hold; None: each rank holds all of it.
        read: whether some signal reads it; a compiled model has taps only there, since each one splits it.
    """

    def __init__(
        self, place: str, taps: Taps, device: torch.device, gather: Gather | None = None, read: bool = True
    ) -> None:
        self._place = place
        self._taps = taps
        self._gather = gather
        self._read = read
        self._number = len(_TAPS)
        self._seen = torch.zeros(1, device=device)
        _TAPS.append(self)

    def __call__(self, entering: Callable[[], Tensor]) -> None:
        if not torch.compiler.is_compiling():
            self.read(entering)
        elif self._read:
            tap(entering(), self._seen, self._number)

    def read(self, entering: Callable[[], Tensor]) -> None:
        """Reads what enters the place, if something is read there in the current step."""
        if self._taps.active(self._place):
            self._taps.tap(self._place, entering(), self._gather)


def tap_residual(layer: nn.Module, place: str, taps: Taps, device: torch.device) -> None:
    """Puts a tap before a decoder layer, of the residual stream that enters it; arguments as `Tap`."""
    tapped = Tap(place, taps, device)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # vLLM gives its decoder layers these three.
        arguments = {**dict(zip(("positions", "hidden_states", "residual"), args, strict=False)), **kwargs}
        hidden = arguments["hidden_states"]
        residual = arguments.get("residual")
        tapped(lambda: hidden if residual is None else hidden + residual)

    layer.register_forward_pre_hook(before, with_kwargs=True)
