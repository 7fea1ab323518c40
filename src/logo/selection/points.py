"""`Point`: where a model is read. Finds the decoder layers of a causal LM, and the query projection of the last one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from logo.adapters.layout import linear_modules, linear_shape
from logo.errors import ModelError
from logo.models import text_config

# Last parts of the paths of query projections; fused projections come last.
QUERY_NAMES = ("q_proj", "query_proj", "wq", "query", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")


@dataclass(frozen=True)
class Point:
    """A place where a prompt is read and adapters are scored.

    Attributes:
        layer: index of the decoder layer.
        layer_path: dotted path of that layer.
        module: dotted path of the linear module whose adapters are scored.
        rows: the output rows that are the query, if the module is a fused projection; None: all rows.
    """

    layer: int
    layer_path: str
    module: str
    rows: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The layer's index and the module within it, such as `4.self_attn.v_proj`."""
        return f"{self.layer}.{self.module.removeprefix(f'{self.layer_path}.')}"


def last_query(model: nn.Module) -> Point:
    """The query projection of the last layer; of a fused projection, its query rows.

    Raises:
        ModelError: the layers or the projection cannot be found.
    """
    path, blocks = decoder_layers(model)
    last = len(blocks) - 1
    layer_path = f"{path}.{last}"
    linears = {name: module for name, module in blocks[last].named_modules() if linear_shape(module) is not None}
    for name in QUERY_NAMES:
        matches = [inside for inside in linears if inside.rsplit(".", 1)[-1] == name]
        if len(matches) == 1:
            rows = _query_rows(name, text_config(model), linears[matches[0]])
            return Point(last, layer_path, f"{layer_path}.{matches[0]}", rows)
    raise ModelError(
        f"no query projection among {', '.join(linears)} of {layer_path}; use the signal 'calibrated', which reads the "
        "modules that adapters touch"
    )


def points_of(model: nn.Module, modules: Collection[str], depth: int) -> tuple[Point, ...]:
    """The points of those modules in the first `depth` layers, in the model's order.

    Modules of single experts are left out, since they see some of the tokens only.
    """
    path, _ = decoder_layers(model)
    linears = [module for module, _ in linear_modules(model) if module in modules and ".experts." not in module]
    return tuple(
        Point(layer, f"{path}.{layer}", module)
        for layer in range(depth)
        for module in linears
        if module.startswith(f"{path}.{layer}.")
    )


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and modules of the decoder stack: the module list as long as the text model is deep.

    Raises:
        ModelError: there is none, or more than one could be meant.
    """
    depth = text_config(model).num_hidden_layers
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and _is_stack(module)
    ]
    # A vision or audio tower may happen to be as deep as the text model.
    found = [f for f in found if not any(word in f[0] for word in ("vision", "visual", "audio", "encoder"))] or found
    if not found:
        raise ModelError(f"no stack of {depth} decoder layers found in {type(model).__name__}")
    return min(found, key=lambda f: f[0].count("."))


def _is_stack(blocks: nn.ModuleList) -> bool:
    return len(blocks) > 0 and any(linear_shape(module) is not None for module in blocks[0].modules())


def _query_rows(name: str, config: Any, module: nn.Module) -> tuple[int, ...] | None:
    """The output rows of a fused projection that make up the query; None if all of them do."""
    if name in ("q_proj", "query_proj", "wq", "query"):
        return None
    shape = linear_shape(module)
    assert shape is not None  # callers pass linear modules only
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = torch.arange(shape.out_features)
    if config.model_type == "codegen":  # (blocks, q v k, heads of the block * size)
        return tuple(rows.view(4, 3, -1)[:, 0].flatten().tolist())
    if name != "query_key_value" and config.model_type != "gpt_bigcode":  # Phi-3, GPT-2, MPT: all query heads first
        return tuple(rows[: heads * size].tolist())
    if getattr(config, "new_decoder_architecture", False):  # Falcon 40B: (kv heads, queries of the group + k + v, size)
        groups = config.num_kv_heads
        return tuple(rows.view(groups, heads // groups + 2, size)[:, :-2].flatten().tolist())
    if getattr(config, "multi_query", False):  # Falcon 7B, StarCoder: all query heads, then one k and one v
        return tuple(rows[: heads * size].tolist())
    return tuple(
        rows.view(heads, 3, size)[:, 0].flatten().tolist()
    )  # GPT-NeoX, Bloom, GPTBigCode: (heads, q k v, size)
