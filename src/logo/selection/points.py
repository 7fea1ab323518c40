"""`Point`: where a model is read; `plan`: the points that a signal reads, and the adapters that can be scored there."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from logo.adapters.adapter import Adapter
from logo.adapters.layout import linear_modules, linear_shape
from logo.adapters.pool import AdapterPool
from logo.errors import ModelError, PoolError, listed
from logo.models import text_config

if TYPE_CHECKING:
    from logo.selection.settings import SelectionSettings

# Last parts of the paths of query projections, and of projections that are fused with it.
_QUERIES = ("q_proj", "query_proj", "wq", "query")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
# Points that are read of every adapter, if it touches so many.
LEAST_POINTS = 4
# How far a probe runs, as a share of the layers, if the prompt is read again under its mixture.
_DEPTH = 0.5
# How many points a signal chooses at most: as many as an index of this size has room for, within these bounds. In deep
# models, twelve points miss what tells near relatives apart (docs/how-selection-works.md).
_INDEX_BYTES = 256e6
_FEWEST_POINTS, _MOST_POINTS = 12, 48


@dataclass(frozen=True)
class Point:
    """A place where a prompt is read and adapters are scored: a linear module of a decoder layer, with dotted paths of
    both, and the output rows that are the query if it is a fused projection (None: all rows)."""

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
    layer_path = f"{path}.{len(blocks) - 1}"
    linears = {name: shape for name, module in blocks[-1].named_modules() if (shape := linear_shape(module))}
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


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and modules of the decoder stack: the module list as long as the text model is deep.

    Raises:
        ModelError: there is none, or more than one could be meant.
    """
    depth = text_config(model).num_hidden_layers
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and 0 < len(module) == depth
        and any(linear_shape(inside) is not None for inside in module[0].modules())
    ]
    # A vision or audio tower may happen to be as deep as the text model.
    found = [f for f in found if not any(word in f[0] for word in ("vision", "visual", "audio", "encoder"))] or found
    if not found:
        raise ModelError(f"no stack of {depth} decoder layers found in {type(model).__name__}")
    return min(found, key=lambda f: f[0].count("."))


def _query_rows(name: str, config: Any, out_features: int) -> tuple[int, ...]:
    """The output rows of a fused projection that make up the query."""
    rows, heads = torch.arange(out_features), config.num_attention_heads
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


class Plan(NamedTuple):
    """The points that are read, or candidates for them, of which `most` are chosen at most (0: all points are read);
    and the adapters that are scored, in pool order."""

    points: tuple[Point, ...]
    most: int
    adapters: tuple[Adapter, ...]


def plan(model: nn.Module, pool: AdapterPool, settings: SelectionSettings, signal: str | None = None) -> Plan:
    """The plan of a signal (None: the settings' own) for a pool that is fitted to the model.

    Raises:
        ModelError: there is no such point in the model, or it cannot be read as the signal asks.
        PoolError: adapters that do not touch what is probed, unless `settings.unscorable` is `"skip"`.
    """
    reading, most = settings.reading(pool, signal), 0
    if reading.layers == "last":
        points: tuple[Point, ...] = (last_query(model),)
    else:
        layers = len(decoder_layers(model)[1])
        depth = max(1, math.floor((1.0 if reading.activations else _DEPTH) * layers))
        points = points_of(model, {module for adapter in pool for module in adapter.modules}, depth)
        if not points:
            where = f"the first {depth} of {layers} layers, where the probe stops"
            raise PoolError(f"no adapter touches a module in {where}; use the signal 'norm'")
        # If the whole model runs anyway, every point is read.
        if reading.chosen and not reading.activations:
            # Hidden vectors of the first layers say little more than which words a prompt has: these layers are read
            # only for adapters that touch few later points.
            late = {point.module for point in points if point.layer >= math.ceil(depth / 4)}
            owned = [{point.module for point in points} & set(adapter.modules) for adapter in pool]
            read = late.union(*(some for some in owned if len(some & late) < min(LEAST_POINTS, len(some))))
            points = tuple(point for point in points if point.module in read)
            touched = [a.modules[p.module] for a in pool for p in points if p.module in a.modules]
            each = sum(4 * module.rank * module.in_features for module in touched) / len(points)
            most = max(_FEWEST_POINTS, min(_MOST_POINTS, int(_INDEX_BYTES / each)))
    modules = {point.module for point in points}
    lacking = [adapter.name for adapter in pool if not modules & set(adapter.modules)]
    if lacking and (settings.unscorable == "error" or len(lacking) == len(pool)):
        few = f"the probed module {', '.join(sorted(modules))}"
        where = few if len(modules) <= 4 else f"any of {len(modules)} probed modules"
        way = "prompts are read up to the middle layers:"
        if reading.layers == "last":
            way = "use the signal 'calibrated', which reads the modules that adapters touch, or"
        raise PoolError(
            f"{len(lacking)} of {len(pool)} adapters do not touch {where} and cannot be scored: {listed(lacking, 5)}; "
            f"{way} leave them out (Python: unscorable='skip')"
        )
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    for point in points:
        shape = linear_shape(model.get_submodule(point.module))
        if reading.input == "residual" and shape is not None and shape.in_features != width:
            raise ModelError(
                f"{point.module} takes {shape.in_features} features, the residual stream that the signal reads has "
                f"{width}; use the signal 'calibrated'"
            )
    return Plan(points, most, tuple(adapter for adapter in pool if modules & set(adapter.modules)))
