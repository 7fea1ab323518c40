"""Reads a PEFT folder strictly: its configuration, and which modules the tensors of its weight file adapt.

The tensor keys are the truth about what is adapted; the configuration gives ranks and scales only. A mixture is a
weighted sum of plain low-rank products. An adapter with more than that (further trained weights, biases, ...) is
refused with the name of the setting, since ignoring it would change answers.

    <pool>/pool.json                            what is known of the pool (`logo.adapters.activation`)
    <pool>/<adapter>/adapter_config.json        PEFT's configuration
                     adapter_model.safetensors  PEFT's weights, or adapter_model.bin
                     examples.jsonl             example prompts (`logo.adapters.examples`)
                     logo.yaml                  how it was trained (`logo.training`), and a description
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from logo.adapters.patterns import endless, expression, lookup
from logo.identity import content_stamp, file_sha256, of_content

if TYPE_CHECKING:
    import torch

CONFIG, SAFETENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
EXAMPLES, NOTES, RECORD = "examples.jsonl", "pool.json", "logo.yaml"
_CHANGED = "it has changed since it was opened; open the pool again"

# Settings that make more of an adapter than a plain `s B A`, unless they are off, each with the reason.
_NOT_PLAIN = {
    "target_parameters": "it adapts raw parameters (target_parameters: {value}); only linear modules are supported",
    "trainable_token_indices": "it trains token embeddings (trainable_token_indices), which cannot be mixed",
    "use_dora": "it is a DoRA adapter (use_dora), whose effect is not linear in its weight, so that it cannot be mixed",
    "use_qalora": "QALoRA (use_qalora) pools its input by groups and is not a plain LoRA",
    "bias": 'bias is {value}: it changes biases of the base model; only "none" can be mixed',
    "lora_bias": "it has a bias on lora_B (lora_bias); only bias-free adapters can be mixed",
    "layer_replication": "it replicates layers of the base model (layer_replication: {value})",
    "arrow_config": "it is an Arrow router (arrow_config), not a single adapter",
    "use_bdlora": "BD-LoRA (use_bdlora) is block-diagonal and is not read yet",
    "velora_config": "VeLoRA (velora_config) is not a plain LoRA",
    "monteclora_config": "MonteCLoRA (monteclora_config) is not a plain LoRA",
    "kasa_config": "KaSA (kasa_config) is not a plain LoRA",
    "megatron_config": "it was trained on Megatron layers (megatron_config), which are not read yet",
}
# Initialisations that also change the base weights, so that the adapter alone is not the trained update.
_CHANGED_BASE = re.compile(r"(pissa|olora|corda|lora_ga|astra)", re.IGNORECASE)
_KNOWN = {
    "alora_invocation_tokens", "alpha_pattern", "astra_config", "auto_mapping", "base_model_name_or_path",
    "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", *_NOT_PLAIN,
}  # fmt: skip

_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>.+))?\.weight$")
_EMBEDDING_KEY = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>.+))?$")
_PREFIX = re.compile(r"^(?:_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.|base_model\.)+")
_INFIX = re.compile(r"\.(?:_orig_mod|_fsdp_wrapped_module|base_layer)(?=\.|$)")
# Why an adapter with a tensor that is neither lora_A nor lora_B cannot be mixed.
_OTHER_TENSORS = {
    r"trainable_tokens_": "it trains token embeddings ({key}), which cannot be mixed",
    r"lora_magnitude_vector": "it holds a DoRA magnitude ({key}), which cannot be mixed",
    r"\.lora_[AB](\..+)?\.bias$": "it has a bias on a LoRA factor ({key}); only bias-free adapters can be mixed",
    r"\.bias$": "it holds biases of the base model ({key}), which cannot be mixed",
    r"": "tensor {key} is neither lora_A nor lora_B",
}
_LONGEST_NAME = 500  # characters; with all wrappers, usual ones have about 150
_TRAINED = re.compile(r"\.(?:lora_|trainable_tokens_)")  # no weight of the base model itself
_LFS_POINTER = b"version https://git-lfs"

Tensor = tuple[str, tuple[int, ...]]  # key and shape
Shapes = tuple[Tensor, ...]
_T = TypeVar("_T", int, float)


class Refusal(ValueError):
    """Why an adapter folder cannot be used; the caller adds the adapter's name."""


@dataclass(frozen=True)
class LoraConfig:
    """The part of an adapter's configuration that its computation depends on.

    Attributes:
        r, alpha: of modules that no key of the patterns matches.
        rslora: scale by `alpha / sqrt(r)` instead of `alpha / r`.
        rank_pattern, alpha_pattern: keys and values, in the order of the file.
        base_model: the base model that it names (information only, never compared).
        invocation: its invocation tokens (activated LoRA); empty: it acts everywhere.
        unknown: keys that this version does not know and that are not off; they are ignored with a warning.
    """

    r: int = 8
    alpha: float = 8.0
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    base_model: str | None = None
    invocation: tuple[int, ...] = ()
    unknown: tuple[str, ...] = ()

    def rank(self, module: str) -> int:
        """The rank the configuration gives to `module` (path relative to the base model)."""
        return lookup(self.rank_pattern, module, self.r)

    def scaling(self, module: str, rank: int) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA (PEFT, `tuners/lora/layer.py`)."""
        alpha = lookup(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_raw(folder: Path) -> dict[str, Any]:
    """All settings in `adapter_config.json`, known or not. Raises Refusal if it is missing or malformed."""
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"{CONFIG} is missing from {folder}") from None
    except OSError as error:
        raise Refusal(f"{CONFIG} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, endless numbers, endless nesting
        raise Refusal(f"{CONFIG} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise Refusal(f"{CONFIG} must hold an object, found {type(raw).__name__}")
    return raw


def changed_base(raw: dict[str, Any]) -> str | None:
    """The initialisation that also changed the base weights (PiSSA and the like), or None for a plain adapter."""
    init = raw.get("init_lora_weights")
    return init if isinstance(init, str) and _CHANGED_BASE.match(init) else None


def parse_config(raw: dict[str, Any], *, unconverted: bool = False) -> LoraConfig:
    """Checks a configuration; raises Refusal if it is malformed, or asks for something that cannot be mixed.

    `unconverted` adapters, whose initialisation changed the base weights, are only accepted in order to convert them.
    """
    if raw.get("peft_type") != "LORA":
        raise Refusal(f'peft_type is {_short(raw.get("peft_type"))}; only "LORA" adapters can be mixed')
    for key, reason in _NOT_PLAIN.items():
        if raw.get(key) and (key, raw[key]) != ("bias", "none"):
            raise Refusal(reason.format(value=_short(raw[key])))
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() == "loftq":
        raise Refusal(f"init_lora_weights is {_short(init)}, which also replaced the base weights by quantised ones")
    if changed_base(raw) is not None and not unconverted:
        way = "`logo pool export --initial`, or PEFT's path_initial_model_for_weight_conversion"
        raise Refusal(f"init_lora_weights is {_short(init)}, which also changed the base weights; convert it: {way}")
    base_model = raw.get("base_model_name_or_path")
    rslora = raw.get("use_rslora")
    if rslora is not None and not isinstance(rslora, bool):
        raise _wrong("use_rslora", rslora, "true or false")
    return LoraConfig(
        r=_rank("r", raw.get("r", 8)),
        alpha=_alpha("lora_alpha", raw.get("lora_alpha", 8)),
        rslora=bool(rslora),
        rank_pattern=_pattern(raw, "rank_pattern", _rank),
        alpha_pattern=_pattern(raw, "alpha_pattern", _alpha),
        base_model=base_model if isinstance(base_model, str) else None,
        invocation=_invocation(raw),
        unknown=tuple(sorted(key for key in set(raw) - _KNOWN if not _off(raw[key]))),
    )


def _off(value: Any) -> bool:
    """Whether a setting says nothing. A newer PEFT writes its new settings so into adapters that do not use them."""
    return value is None or value is False or value == [] or value == {}


def _invocation(raw: dict[str, Any]) -> tuple[int, ...]:
    tokens = raw.get("alora_invocation_tokens")
    if tokens is None:
        return ()
    # PEFT builds an aLoRA from an empty list, too, and then fails.
    if not isinstance(tokens, list) or not tokens or any(type(token) is not int or token < 0 for token in tokens):
        raise _wrong("alora_invocation_tokens", tokens, "a list of one token id or more")
    return tuple(tokens)


def _pattern(raw: dict[str, Any], key: str, number: Callable[[str, Any], _T]) -> tuple[tuple[str, _T], ...]:
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise _wrong(key, patterns, "an object of pattern: number")
    for pattern in patterns:
        try:
            expression(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise Refusal(f"{key} has the key {_short(pattern)}, which is no regular expression: {error}") from error
    return tuple((pattern, number(key, value)) for pattern, value in patterns.items())


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _wrong(key, value, "a positive whole number")
    return value


def _alpha(key: str, value: Any) -> float:
    with suppress(OverflowError):  # a whole number that no float can hold
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    raise _wrong(key, value, "a finite number")


def _wrong(key: str, value: Any, expected: str) -> Refusal:
    return Refusal(f"{key} must be {expected}, found {_short(value)}")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


class WeightFile:
    """The file of the tensors in a PEFT folder as it was when it was opened; a pickle is read with `weights_only=True`.

    Its `shapes` are known at once, and its tensors are read on demand. Raises Refusal if there is none that can and may
    be read.
    """

    def __init__(self, folder: Path, allow_pickle: bool) -> None:
        path = folder / (SAFETENSORS if os.path.isfile(folder / SAFETENSORS) else PICKLE)
        self.path = path
        if not os.path.isfile(path):
            raise Refusal(f"{SAFETENSORS} is missing from {folder} ({PICKLE} is fetched with allow_pickle only)")
        if path.name == PICKLE and not allow_pickle:
            what = f"its weights are pickled ({PICKLE}), and a pickle can run code"
            raise Refusal(f"{what}; `logo pool export --allow-pickle` reads tensors only and writes safetensors")
        self._digest: str | None = None  # of the content that it had when it was opened, where it is known
        self._findings: dict[str, str] = {}  # of the same content
        try:
            self._stamp = content_stamp(path)
            if path.name == PICKLE:
                self.shapes: Shapes = tuple((key, tuple(tensor.shape)) for key, tensor in self._unpickled.items())
                return
            with self._open("numpy") as file:
                self.shapes = tuple((key, tuple(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
        except Exception as error:  # safetensors raises its own Rust error type
            raise Refusal(unreadable(error, path)) from error

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these keys, on the CPU, in the dtype they are stored in.

        Raises ValueError if the file changed: scales and scores that were read with it would be another adapter's.
        """
        if self.path.name == PICKLE:
            return {key: self._unpickled[key] for key in keys}
        with self._open("pt") as file:
            self._check_content()
            # A copy: the tensors of safetensors are views of the file, which change, or end the process, with it.
            tensors = {key: file.get_tensor(key).clone() for key in keys}
        self._check_content()
        return tensors

    def _check_content(self) -> None:
        # A new owner, mode or link changes the stamp, but not the content.
        if content_stamp(self.path) != self._stamp and file_sha256(self.path) != self._digest:
            raise ValueError(_CHANGED)

    def sha256(self) -> str:
        """The digest of its content, as `sha256sum` prints it. Raises ValueError if the file changed before."""
        if self._digest is None:
            self._digest = self._unchanged(file_sha256(self.path))
        return self._digest

    def once(self, what: str, find: Callable[[], str]) -> str:
        """`of_content` of what it held when it was opened; ValueError if the file changed before this was asked. A
        pickle's is in memory."""
        if what not in self._findings:
            in_memory = self.path.name == PICKLE
            self._findings[what] = find() if in_memory else self._unchanged(of_content(self.path, what, find))
        return self._findings[what]

    def _unchanged(self, finding: str) -> str:
        if content_stamp(self.path) != self._stamp:
            raise ValueError(_CHANGED)
        return finding

    def _open(self, framework: str) -> Any:
        from safetensors import safe_open

        self.path.open("rb").close()  # safetensors calls a file that may not be read a missing one
        return safe_open(self.path, framework=framework)

    @cached_property
    def _unpickled(self) -> dict[str, torch.Tensor]:
        import torch

        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's own text suggests weights_only=False, which runs the code
            raise ValueError("it holds objects other than tensors, or is damaged; no code in it was run") from error
        items: dict[Any, Any] = loaded if isinstance(loaded, dict) else {None: loaded}
        if not all(isinstance(k, str) and getattr(v, "layout", None) == torch.strided for k, v in items.items()):
            raise ValueError("not a dictionary of dense tensors by name")
        # The tensors stay in memory, so the digest has to be theirs, whatever is written to the file later.
        self._digest = self._unchanged(file_sha256(self.path))
        return {key: value.detach() for key, value in items.items()}  # parameters would carry gradients


def unreadable(error: Exception, file: Path) -> str:
    """Why a weight file cannot be read, in one line."""
    with suppress(OSError), file.open("rb") as start:
        if start.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return f"{file.name} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
    text = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
    doubt = " (truncated or damaged?)" if type(error).__name__ == "SafetensorError" else ""
    return f"{file.name} cannot be read: {text}{doubt}"


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
    """The path of a tensor key, without the wrappers of training tools."""
    return _INFIX.sub("", _PREFIX.sub("", key_path))


@lru_cache(maxsize=256)
def read_header(shapes: Shapes, config: LoraConfig) -> tuple[dict[str, LoraModule], dict[str, str]]:
    """The modules (path -> where its tensors are) and copies (key -> parameter of the base model) in a weight file.

    Copies are whole weights, and the biases beside them. Equal arguments give the same objects: a pool may have
    thousands of adapters of one training. Raises Refusal for tensors that cannot be mixed, or of other ranks.
    """
    longest = max((key for key, _ in shapes), key=len, default="")
    if len(longest) > _LONGEST_NAME:  # expressions take long on longer ones
        raise Refusal(f"tensor {_short(longest)} has a name of {len(longest)} characters, more than {_LONGEST_NAME}")
    paths = {key: module_path(key) for key, _ in shapes}
    copies = {key: path for key, path in paths.items() if path.endswith(".weight") and not _TRAINED.search(key)}
    biases = {path.removesuffix("weight") + "bias" for path in copies.values()}
    copies |= {key: path for key, path in paths.items() if path in biases}
    pairs = _pairs([(key, shape) for key, shape in shapes if key not in copies])
    _check_patterns(config, pairs)
    return {path: _module(path, pair, config) for path, pair in pairs.items()}, copies


def _pairs(shapes: Iterable[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module path -> side, A or B, -> its tensor."""
    pairs: dict[str, dict[str, Tensor]] = {}
    names: set[str] = set()  # of adapters
    for key, shape in shapes:
        match = _LORA_KEY.match(key) or _EMBEDDING_KEY.match(key)
        if match is None:
            raise Refusal(next(why for has, why in _OTHER_TENSORS.items() if re.search(has, key)).format(key=key))
        names.add(match["adapter"] or "unnamed")
        pair = pairs.setdefault(module_path(match["module"]), {})
        if match["side"] in pair and len(names) == 1:
            raise Refusal(f"two tensors for one module: {pair[match['side']][0]} and {key}")
        pair[match["side"]] = key, shape
    if len(names) > 1:
        raise Refusal(f"the file holds several adapters ({', '.join(sorted(names))}); save each in a folder of its own")
    if not pairs:
        raise Refusal("the file holds no LoRA tensors: it would do nothing")
    return pairs


def _check_patterns(config: LoraConfig, modules: Collection[str]) -> None:
    """Raises Refusal if it might take for ever to look up these modules."""
    for setting, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        key = endless([key for key, _ in pattern], modules)
        if key is not None:
            expected = "expected names of modules, with few wildcards and no repeated groups"
            raise Refusal(f"{setting} has the key {_short(key)}, which may take for ever to match: {expected}")


def _module(path: str, pair: dict[str, Tensor], config: LoraConfig) -> LoraModule:
    if len(pair) != 2:
        raise Refusal(f"module {path} has no lora_{'B' if 'A' in pair else 'A'} tensor")
    key_a, a = pair["A"]
    key_b, b = pair["B"]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
        raise Refusal(f"module {path} has lora_A {list(a)} and lora_B {list(b)}; expected (r, in) and (out, r)")
    embedding = _EMBEDDING_KEY.match(key_a) is not None
    if embedding != (_EMBEDDING_KEY.match(key_b) is not None):
        raise Refusal(f"module {path} is adapted as an embedding and as a linear module: {key_a}, {key_b}")
    if a[0] != config.rank(path):  # on which the scale depends
        raise Refusal(f"{CONFIG} gives rank {config.rank(path)} to module {path}, but its tensors have rank {a[0]}")
    return LoraModule(key_a, key_b, a[0], a[1], b[0], config.scaling(path, a[0]), embedding)
