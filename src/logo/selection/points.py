"""`Point`: where a model is read, and how points are found in a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from logo.adapters.layout import linear_modules, linear_shape
from logo.errors import ModelError
from logo.models import text_config

# Last parts of the paths of query projections, and of projections that are fused with it.
_QUERIES = ("q_proj", "query_proj", "wq", "query")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
# Points that are read of every adapter, if it touches so many.
LEAST_POINTS = 4


@dataclass(frozen=True)
class Point:
    """A place where a prompt is read and adapters are scored: a linear module of a decoder layer, with dotted paths of
    both, and the output rows that are the query if it is a fused projection (None: all rows). If the module is the
    layer itself, the residual stream that enters it is read, and no adapter is scored there."""

    layer: int
    layer_path: str
    module: str
    rows: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The layer's index and the module within it, such as `4.self_attn.v_proj`, or the index alone."""
        within = self.module.removeprefix(self.layer_path)
        return f"{self.layer}.{within.removeprefix('.')}" if within else f"{self.layer}"

    @property
    def residual(self) -> bool:
        """Whether the residual stream is read that enters the layer."""
        return self.module == self.layer_path


def last_query(model: nn.Module) -> Point:
    """The query projection of the last layer; of a fused projection, its query rows.

    Raises:
        ModelError: the layers or the projection cannot be found.
    """
    path, blocks = decoder_layers(model)
    layer_path = f"{path}.{len(blocks) - 1}"
    shapes = {name: linear_shape(module) for name, module in blocks[-1].named_modules()}
    linears = {name: shape for name, shape in shapes.items() if shape is not None}
    for name in (*_QUERIES, *_FUSED):
        matches = [inside for inside in linears if inside.rsplit(".", 1)[-1] == name]
        if len(matches) == 1:
            size = linears[matches[0]].out_features
            rows = _query_rows(name, text_config(model), size) if name in _FUSED else None
            return Point(len(blocks) - 1, layer_path, f"{layer_path}.{matches[0]}", rows)
    raise ModelError(
        f"no query projection among {', '.join(linears)} of {layer_path}; use the signal 'calibrated', which reads the "
        "modules that adapters touch"
    )


def points_of(model: nn.Module, modules: Collection[str], depth: int) -> tuple[Point, ...]:
    """The points of those modules in the first `depth` layers, in the model's order, without those of single experts,
    which see some of the tokens only."""
    path, _ = decoder_layers(model)
    linears = [module for module, _ in linear_modules(model) if module in modules and ".experts." not in module]
    return tuple(
        Point(layer, f"{path}.{layer}", module)
        for layer in range(depth)
        for module in linears
        if module.startswith(f"{path}.{layer}.")
    )


def residual_points(model: nn.Module, depths: Sequence[float]) -> tuple[Point, ...]:
    """The points of the residual stream behind these shares of the layers, each once; at most before the last layer."""
    path, blocks = decoder_layers(model)
    layers = sorted({min(round(depth * len(blocks)), len(blocks) - 1) for depth in depths})
    return tuple(Point(layer, f"{path}.{layer}", f"{path}.{layer}") for layer in layers)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and modules of the decoder stack: the module list as long as the text model is deep.

    Raises:
        ModelError: there is none, or more than one could be meant.
    """
    depth = text_config(model).num_hidden_layers
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and 0 < len(module) == depth
        and any(linear_shape(inside) is not None for inside in module[0].modules())
    ]
    # A vision or audio tower may happen to be as deep as the text model.
    towers = ("vision", "visual", "audio", "encoder")
    stacks = [stack for stack in stacks if not any(word in stack[0] for word in towers)] or stacks
    if not stacks:
        raise ModelError(f"no stack of {depth} decoder layers found in {type(model).__name__}")
    return min(stacks, key=lambda stack: stack[0].count("."))


def _query_rows(name: str, config: Any, out_features: int) -> tuple[int, ...]:
    """The output rows of a fused projection that make up the query."""
    rows = torch.arange(out_features)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    by_head = name == "query_key_value" or config.model_type == "gpt_bigcode"
    if config.model_type == "codegen":  # (blocks, q v k, heads of the block * size)
        rows = rows.view(4, 3, -1)[:, 0]
    elif by_head and getattr(config, "new_decoder_architecture", False):
        groups = config.num_kv_heads  # Falcon 40B: (kv heads, queries + k + v, size)
        rows = rows.view(groups, heads // groups + 2, size)[:, :-2]
    elif by_head and not getattr(config, "multi_query", False):  # GPT-NeoX, Bloom, GPTBigCode: (heads, q k v, size)
        rows = rows.view(heads, 3, size)[:, 0]
    else:  # Phi-3, GPT-2, MPT, Falcon 7B, StarCoder: all query heads first
        rows = rows[: heads * size]
    return tuple(rows.flatten().tolist())
