"""From the tensor keys of a weight file to the modules that an adapter adapts.

The keys are the truth about what is adapted; the configuration gives ranks and scales only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from logo.adapters.config import LoraConfig, Refusal
from logo.adapters.files import CONFIG

_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>.+))?\.weight$")
_EMBEDDING_KEY = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>.+))?$")
_PREFIX = re.compile(r"^(?:_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.|base_model\.)+")
_INFIX = re.compile(r"\.(?:_orig_mod|_fsdp_wrapped_module|base_layer)(?=\.|$)")


@dataclass(frozen=True)
class LoraModule:
    """The keys and shapes of one module's `A (r, in)` and `B (out, r)`, and the scale `s` of `s B A`.

    For an `embedding`, `in` counts tokens, and `s B A[:, token]` is added to a token's vector.
    """

    key_a: str
    key_b: str
    rank: int
    in_features: int
    out_features: int
    scaling: float
    embedding: bool = False


def module_path(key_path: str) -> str:
    """The module path of a tensor key, without the wrappers of training tools."""
    return _INFIX.sub("", _PREFIX.sub("", key_path))


@lru_cache(maxsize=256)
def read_header(
    shapes: tuple[tuple[str, tuple[int, ...]], ...], config: LoraConfig, order: tuple[str, ...]
) -> tuple[LoraConfig, dict[str, LoraModule], dict[str, str]]:
    """Configuration, modules and copies of base weights that the keys of a weight file name.

    Equal arguments give the same objects: a pool may have thousands of adapters of one training recipe.

    Args:
        shapes: key and shape of every tensor.
        order: the keys of the patterns in their order, which does not count when configurations are compared.

    Returns:
        the configuration; module path -> where its tensors are; key -> parameter of the base model that it is a copy
        of, for tensors that are whole weights.

    Raises:
        Refusal: the tensors are no LoRA that can be mixed, or not of the ranks that the configuration gives.
    """
    whole = {key: module_path(key.removesuffix(".weight")) for key, _ in shapes if _is_whole(key)}
    copies = {key: f"{path}.weight" for key, path in whole.items()}
    for key in (key for key, _ in shapes if key.endswith(".bias")):  # saved beside such a weight
        path = module_path(key.removesuffix(".bias"))
        if path in whole.values():
            copies[key] = f"{path}.bias"
    return config, _modules({key: shape for key, shape in shapes if key not in copies}, config), copies


def _modules(shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> dict[str, LoraModule]:
    """Pairs the A and B tensors by module and checks each pair against the configuration."""
    matches = {key: _LORA_KEY.match(key) or _EMBEDDING_KEY.match(key) for key in shapes}
    names = {match["adapter"] or "unnamed" for match in matches.values() if match}
    if len(names) > 1:
        raise Refusal(f"the file holds several adapters ({', '.join(sorted(names))}); save each in a folder of its own")
    sides: dict[str, dict[str, str]] = {}
    for key, match in matches.items():
        if match is None:
            raise Refusal(_explain(key))
        pair = sides.setdefault(module_path(match["module"]), {})
        if match["side"] in pair:
            raise Refusal(f"two tensors for one module: {pair[match['side']]} and {key}")
        pair[match["side"]] = key
    if not sides:
        raise Refusal("the file holds no LoRA tensors: it would do nothing")
    return {path: _pair(path, pair, shapes, config) for path, pair in sides.items()}


def _pair(path: str, pair: dict[str, str], shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> LoraModule:
    if len(pair) != 2:
        missing = "B" if "A" in pair else "A"
        raise Refusal(f"module {path} has no lora_{missing} tensor")
    shape_a, shape_b = shapes[pair["A"]], shapes[pair["B"]]
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or 0 in shape_a + shape_b:
        raise Refusal(
            f"module {path} has lora_A {list(shape_a)} and lora_B {list(shape_b)}; expected (r, in) and (out, r)"
        )
    embedding = [_EMBEDDING_KEY.match(key) is not None for key in pair.values()]
    if any(embedding) and not all(embedding):
        raise Refusal(f"module {path} is adapted as an embedding and as a linear module: {', '.join(pair.values())}")
    rank = shape_a[0]
    if rank != config.rank(path):
        raise Refusal(
            f"{CONFIG} gives rank {config.rank(path)} to module {path}, but its tensors have rank {rank}; "
            "the scale depends on it, so correct r or rank_pattern"
        )
    scaling = config.scaling(path, rank)
    return LoraModule(pair["A"], pair["B"], rank, shape_a[1], shape_b[0], scaling, all(embedding))


def _is_whole(key: str) -> bool:
    """Whether a tensor is a weight of the base model itself."""
    return key.endswith(".weight") and not re.search(r"\.(?:lora_|trainable_tokens_)", key)


def _explain(key: str) -> str:
    """Why an adapter with this tensor, which is neither lora_A nor lora_B, cannot be mixed."""
    if "trainable_tokens_" in key:
        return f"it trains token embeddings ({key}), which cannot be mixed"
    if "lora_magnitude_vector" in key:
        return f"it holds a DoRA magnitude ({key}), which cannot be mixed"
    if re.search(r"\.lora_[AB](\..+)?\.bias$", key):
        return f"it has a bias on a LoRA factor ({key}); only bias-free adapters can be mixed"
    if key.endswith(".bias"):
        return f"it holds biases of the base model ({key}), which cannot be mixed"
    return f"tensor {key} is neither lora_A nor lora_B"
