"""Sizes of a base model and of a pool, from configurations and headers: no weights are read.

config -> model on the meta device -> ModelShape          adapters, or how many of which rank -> PoolShape
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from logo.adapters.layout import BaseLayout, LinearShape, text_config
from logo.adapters.pool import DEFAULT_K, AdapterPool
from logo.errors import UsageError, closest
from logo.models import cached_heads, context_length
from logo.selection.plan import first_layer, later, most_points
from logo.selection.plan import plan as reading_plan
from logo.selection.points import decoder_layers, points_of
from logo.selection.settings import DEPTH, SelectionSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"

# Layers that keep a state of fixed size instead of keys and values.
_WITHOUT_CACHE = ("linear_attention", "mamba", "conv", "recurrent")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a base model.

    Attributes:
        parameters: number of parameters.
        quantised: how many of them are stored in `bits` bits rather than in the model's dtype.
        bits: bits of a quantised parameter.
        linears: path -> sizes of the linear modules in its decoder layers.
        cached: number of values in the keys and values of one token, over all layers.
        heads: attention heads, which tensor parallelism divides.
        cached_heads: heads of keys and values; a GPU holds at least one.
        context: most tokens; None if the configuration has no limit.
        dtype: dtype of its checkpoint.
    """

    parameters: int
    quantised: int
    bits: float
    linears: Mapping[str, LinearShape]
    cached: int
    heads: int
    cached_heads: int
    context: int | None
    dtype: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """The sizes of a model, which may be on the meta device.

        Raises:
            ModelError: its decoder layers cannot be found.
        """
        path, _ = decoder_layers(model)
        linears = {name: one for name, one in BaseLayout.of(model).shapes.items() if name.startswith(f"{path}.")}
        config, text = model.config, text_config(model)
        bits = _bits(getattr(config, "quantization_config", None))
        inside = sum(one.in_features * one.out_features for one in linears.values())
        cached, heads = _cached(text)
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            quantised=0 if bits is None else inside,
            bits=bits or 0,
            linears=linears,
            cached=cached,
            heads=text.num_attention_heads,
            cached_heads=heads,
            context=context_length(model),
            dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        )

    def weights(self, dtype_bytes: int) -> int:
        """Bytes of the weights; parameters that are not quantised take `dtype_bytes` each."""
        return (self.parameters - self.quantised) * dtype_bytes + int(self.quantised * self.bits / 8)


def number_dtype(shape: ModelShape, dtype: str) -> torch.dtype:
    """The dtype that vLLM computes in. `dtype`: its name; `"auto"`: the checkpoint's, but bfloat16 instead of float32.

    Raises:
        UsageError: there is none of that name.
    """
    import torch

    if dtype == "auto":
        dtype = "bfloat16" if shape.dtype == "float32" else shape.dtype
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UsageError(f"dtype {dtype!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return kind


@dataclass(frozen=True)
class PoolShape:
    """Sizes of a pool.

    Attributes:
        ranks: the largest rank of each adapter.
        targets: last parts of the names of the adapted modules, sorted.
        numbers: number of values in all adapters' tensors.
        k: adapters of a mixture.
        points: number of scored points.
        width: features of the widest point.
    """

    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    numbers: int
    k: int
    points: int
    width: int

    def __len__(self) -> int:
        return len(self.ranks)

    @classmethod
    def of(cls, model: PreTrainedModel, adapters: AdapterPool, settings: SelectionSettings) -> PoolShape:
        """The sizes of an opened pool.

        Args:
            model: may be on the meta device.
            adapters: fitted to it.
            settings: say what is read.

        Raises:
            UsageError, ModelError, PoolError: as `logo.selection.plan.plan`.
        """
        reading = reading_plan(model, adapters, settings)
        paths = [point.module for point in reading.points]
        return cls(
            ranks=tuple(max(adapter.ranks) for adapter in adapters),
            targets=_leaves(path for adapter in adapters for path in adapter.modules),
            numbers=sum(adapter.parameters for adapter in adapters),
            k=min(settings.k or adapters.default_k, len(adapters)),
            points=min(reading.most or len(paths), len(paths)),
            width=_widest(BaseLayout.of(model).shapes, paths),
        )

    @classmethod
    def even(
        cls, model: PreTrainedModel, count: int, rank: int, targets: str | Sequence[str], k: int = DEFAULT_K
    ) -> PoolShape:
        """The sizes of a pool of `count` adapters of equal shape, read at the points of the signal `calibrated`.

        Args:
            targets: names of modules or ends of their paths, or `"all-linear"`.

        Raises:
            UsageError: a number below 1, or a module that the model does not have.
        """
        for name, value in (("adapters", count), ("rank", rank), ("k", k)):
            if value < 1:
                raise UsageError(f"{name}: expected 1 or more, found {value}")
        linears = ModelShape.of(model).linears
        modules = _matching(linears, targets)
        layers, depth = decoder_layers(model)[1], DEPTH
        reach = max(1, math.floor(depth * len(layers)))
        points = [p.module for p in later(points_of(model, modules, reach), first_layer(reach), [set(modules)])]
        width = fmean(linears[path].in_features for path in points or modules)
        each = sum(rank * (linears[path].in_features + linears[path].out_features) for path in modules)
        return cls(
            ranks=(rank,) * count,
            targets=_leaves(modules),
            numbers=count * each,
            k=min(k, count),
            points=min(most_points(4 * count * rank * width), len(points)),
            width=_widest(linears, points or modules),
        )


def _matching(linears: Mapping[str, LinearShape], targets: str | Sequence[str]) -> list[str]:
    if targets == ALL_LINEAR:
        return list(linears)
    asked = [targets] if isinstance(targets, str) else list(targets)
    known = _leaves(linears)
    for name in asked:
        if not any(_means(name, path) for path in linears):
            raise UsageError(
                f"targets: no linear module of this model is called {name!r}{closest(name, known)}; there: "
                f"{', '.join(known)}, or {ALL_LINEAR}"
            )
    return [path for path in linears if any(_means(name, path) for name in asked)]


def _means(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _leaves(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({path.rpartition(".")[2] for path in paths}))


def _widest(linears: Mapping[str, LinearShape], paths: Collection[str]) -> int:
    return max(linears[path].in_features for path in paths)


def _cached(text: Any) -> tuple[int, int]:
    """The number of cached values per token over all layers, and the number of heads that they are divided among."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum(not any(word in kind for word in _WITHOUT_CACHE) for kind in kinds)
    if getattr(text, "kv_lora_rank", None):  # latent attention: one vector for all heads, as vLLM keeps it
        return int(layers * (text.kv_lora_rank + text.qk_rope_head_dim)), 1
    heads, width = cached_heads(text)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):  # Falcon 7B
        heads = 1
    elif getattr(text, "num_kv_heads", None):  # Falcon 40B, of which transformers caches repeated keys
        heads = text.num_kv_heads
    return 2 * layers * heads * width, heads


def _bits(quantisation: Any) -> float | None:
    """Bits of a quantised weight, from what a checkpoint's configuration says; None: it is not quantised.

    Raises:
        UsageError: the configuration does not give the bits in a form that is known here.
    """
    if quantisation is None:
        return None
    said = quantisation if isinstance(quantisation, Mapping) else quantisation.to_dict()
    if said.get("load_in_4bit") or said.get("quant_method") == "mxfp4":
        return 4
    if said.get("load_in_8bit") or "fp8" in str(said.get("quant_method")):
        return 8
    groups = [group.get("weights") or {} for group in (said.get("config_groups") or {}).values()]
    found = [group["num_bits"] for group in groups if "num_bits" in group] or [
        said[name] for name in ("bits", "w_bit", "weight_bits") if isinstance(said.get(name), int)
    ]
    if not found:
        raise UsageError(f"the model's quantisation {said.get('quant_method')!r} does not say how many bits it takes")
    return float(max(found))
