"""Called by vLLM's linear layers instead of its own LoRA kernels: the tap of the layer, then the gated product."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from logo.backends.vllm import ops
from logo.backends.vllm.gates import Opened, StepGates, add_gated, gated
from logo.backends.vllm.options import Products
from logo.backends.vllm.taps import Gather, Taps
from logo.errors import ModelError

log = logging.getLogger("vllm.logo")

# The factors of one slice as vLLM stacks them, its first column and its width.
_Part = tuple[Tensor, Tensor, int, int]


class GatedWrapper(PunicaWrapperBase):  # type: ignore[misc]
    """Implements vLLM's interface for LoRA products by gated products.

    Args:
        max_num_batched_tokens, max_batches, device: as vLLM gives them.
        gates: the gates of the current step.
        write: sets the gates from vLLM's mapping of tokens to adapter ids, and the ids in its slots.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device,
        gates: StepGates,
        write: Callable[[Any, Sequence[int | None]], None],
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._embeddings_indices.zero_()  # the embedding layer always reads slot 0, which is zeros
        self.gates = gates
        self._write = write

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Called by vLLM before a step whose mapping of tokens to adapters differs from the last one."""
        self._write(mapping, lora_index_to_id)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        used: Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds each slice's product to its columns of `y` (tokens, d_out), in place.

        Args:
            used: the slices that some adapter acts on; None: all.
        """
        rows = slots = None
        if self._branches():
            if not self.gates.open:
                return
            rows, slots = self.gates.rows, self.gates.slots
        parts, start = [], 0
        for i, (a, b, width) in enumerate(zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True)):
            if used is None or used[i]:
                parts.append((a, b, start, width))
            start += width
        if self.gates.opened is not None:
            self._launch(y, x, parts, self.gates.tokens, self.gates.opened[0])
            return
        gate = self.gates.tokens[: x.shape[0]]
        if torch.compiler.is_compiling():
            # All columns are changed at once: if one part of a tensor is changed in place and another part leaves the
            # compiled graph, inductor loses the tensor's shape.
            every = [gated(x, a[:, 0], b[:, 0].transpose(1, 2), gate) for a, b, _, _ in parts]
            y.add_(torch.cat(every, dim=1).to(y.dtype))
            return
        if rows is not None:
            x, gate = x[rows], gate[rows]
        for a, b, start, width in parts:
            part = y[:, start : start + width]
            if rows is None:
                add_gated(part, x, a[:, 0], b[:, 0].transpose(1, 2), gate, slots)
            else:
                part.index_add_(0, rows, gated(x, a[:, 0], b[:, 0].transpose(1, 2), gate, slots).to(part.dtype))

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Adds the product of the output head to `y`, for the tokens whose logits are computed."""
        if self._branches() and not self.gates.open:
            return
        width = lora_b_stacked.shape[2]
        if self.gates.opened is not None:
            self._launch(y, x, [(lora_a_stacked, lora_b_stacked, 0, width)], self.gates.sampled, self.gates.opened[1])
            return
        gate = self.gates.sampled[: x.shape[0]]
        slots = self.gates.slots if self._branches() else None
        add_gated(y[:, :width], x, lora_a_stacked[:, 0], lora_b_stacked[:, 0].transpose(1, 2), gate, slots)

    def _branches(self) -> bool:
        """Whether Python may branch on the current step; compiled or captured code is traced once for all steps."""
        return self.gates.tokens.device.type == "cpu" and not torch.compiler.is_compiling()

    def _launch(self, y: Tensor, x: Tensor, parts: Sequence[_Part], gate: Tensor, opened: Opened) -> None:
        """Adds the products of all parts to `y` by the Triton kernels of `kernels`."""
        torch.ops.logo.add_gated(
            y,
            x,
            [a[:, 0] for a, _, _, _ in parts],
            [b[:, 0].transpose(1, 2) for _, b, _, _ in parts],
            [start for _, _, start, _ in parts],
            [width for _, _, _, width in parts],
            gate,
            opened.slot_of,
            opened.count_of,
        )

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, **kwargs: Any) -> None:
        """Does nothing, since pools with adapters of embeddings are refused when they are opened."""

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        """Part of vLLM's interface. No layer that `multiplied` lets through calls it.

        Raises:
            ModelError: always.
        """
        raise ModelError("LoGo multiplies both factors of an adapter in one call, and this layer asks for one of them")

    add_expand = apply_lora_full_linear = add_shrink


def with_kernels(products: Products, device: torch.device) -> bool:
    """Whether Triton's kernels multiply; registers them if so.

    Raises:
        ModelError: they are requested, and Triton is not installed.
    """
    if products == "plain" or (products == "auto" and device.type != "cuda"):
        return False
    if importlib.util.find_spec("triton") is None:
        if products == "auto":
            log.warning("LoGo: without Triton every adapter of the pool is multiplied for every token")
            return False
        raise ModelError("products: kernels need Triton, which is not installed: leave it out, or pip install triton")
    importlib.import_module("logo.backends.vllm.kernels")
    return True


def multiplied(layer: nn.Module) -> bool:
    """Whether a layer that vLLM has wrapped only calls products that `GatedWrapper` implements; experts do not."""
    from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return isinstance(layer, (BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA))


class Tapped:
    """The wrapper of one layer: calls the layer's tap, then the shared wrapper.

    Args:
        inner: the wrapper that all layers share.
        place: path of the layer in the model.
        taps: read the hidden vectors.
        gather: joins the parts of the layer's input that the ranks hold; None: each rank holds all of it.

    Attributes:
        used: the layer's slices that some adapter acts on; None: unknown, so all of them are multiplied.
        read: whether some signal reads the layer; a compiled model has taps only there, since each one splits it.
    """

    def __init__(self, inner: Any, place: str, taps: Taps, gather: Gather | None) -> None:
        self._inner, self._place, self._taps, self._gather = inner, place, taps, gather
        self.used: tuple[bool, ...] | None = None
        self.read = True
        self._number = ops.registered(taps, gather)
        self._seen = torch.zeros(1, device=inner.device)

    def add_lora_linear(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Calls the tap, then `GatedWrapper.add_lora_linear`."""
        if torch.compiler.is_compiling():
            if self.read:
                ops.tap(x, self._seen, self._number, self._place)
        elif self._taps.active(self._place):
            self._taps.tap(self._place, x, self._gather)
        if self.used is not None:
            kwargs["used"] = self.used
        return self._inner.add_lora_linear(y, x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Residual:
    """A hook before a decoder layer: the tap of the residual stream that enters it.

    Args:
        place: path of the layer in the model.
        taps: read the hidden vectors.
        device: where the model runs.
    """

    def __init__(self, place: str, taps: Taps, device: torch.device) -> None:
        self._place, self._taps = place, taps
        self._number = ops.registered(taps, None)
        self._seen = torch.zeros(1, device=device)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """vLLM gives its decoder layers `(positions, hidden_states, residual)`."""
        names = ("positions", "hidden_states", "residual")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden, residual = given["hidden_states"], given.get("residual")
        if torch.compiler.is_compiling():
            entering = hidden if residual is None else hidden + residual
            ops.tap(entering, self._seen, self._number, self._place)
        elif self._taps.active(self._place):
            self._taps.tap(self._place, hidden if residual is None else hidden + residual)
