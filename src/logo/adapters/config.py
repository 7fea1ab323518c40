"""Reads `adapter_config.json`, and refuses adapters that cannot be mixed.

A mixture is a weighted sum of plain low-rank products. An adapter with more than that (further trained weights, biases,
...) is refused with the name of the setting, since ignoring it would change answers.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from logo.adapters.files import CONFIG

# Settings of adapters that are not a plain `s B A`, each with the message for the user.
_NOT_PLAIN = {
    "target_parameters": "it adapts raw parameters (target_parameters: {value}); only linear modules are supported",
    "trainable_token_indices": "it trains token embeddings (trainable_token_indices), which cannot be mixed",
    "use_dora": "it is a DoRA adapter (use_dora), whose effect is not linear in its weight, so that it cannot be mixed",
    "use_qalora": "QALoRA (use_qalora) pools its input by groups and is not a plain LoRA",
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
_CHANGED_BASE = re.compile(r"(pissa|olora|corda|lora_ga)", re.IGNORECASE)

_INFORMATIONAL = {
    "alora_invocation_tokens", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


class Refusal(ValueError):
    """Why an adapter folder cannot be used; the caller adds the adapter's name."""


@dataclass(frozen=True)
class LoraConfig:
    """The part of an adapter's configuration that its computation depends on.

    Attributes:
        r: rank of modules that no `rank_pattern` key matches.
        alpha: alpha of modules that no `alpha_pattern` key matches.
        rslora: scale by `alpha / sqrt(r)` instead of `alpha / r`.
        base_model: the base model that it names (information only, never compared).
        invocation: its invocation tokens (activated LoRA); empty: it acts everywhere.
        unknown: keys that this version does not know; they are ignored with a warning.
    """

    r: int = 8
    alpha: float = 8.0
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model: str | None = None
    invocation: tuple[int, ...] = ()
    unknown: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash((self.r, self.alpha, self.rslora, *self.rank_pattern.items(), *self.alpha_pattern.items()))

    def rank(self, module: str) -> int:
        """The rank the configuration gives to `module` (path relative to the base model)."""
        return _lookup(self.rank_pattern, module, self.r)

    def scaling(self, module: str, rank: int) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA (PEFT, `tuners/lora/layer.py`)."""
        alpha = _lookup(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_config(folder: Path) -> LoraConfig:
    """Reads and checks `adapter_config.json` of a PEFT folder.

    Raises:
        Refusal: the file is missing or malformed, or asks for something that cannot be mixed.
    """
    return parse_config(read_raw(folder))


def read_raw(folder: Path) -> dict[str, Any]:
    """All settings in `adapter_config.json`, including those that this version does not know.

    Raises:
        Refusal: the file is missing or malformed.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
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
    """Checks a configuration that was read from JSON; see `read_config`.

    Args:
        unconverted: accept an adapter whose initialisation changed the base weights, in order to convert it.
    """
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise Refusal(f'peft_type is {_short(kind)}; only "LORA" adapters can be mixed')
    for key, message in _NOT_PLAIN.items():
        if raw.get(key):
            raise Refusal(message.format(value=_short(raw[key])))
    if raw.get("bias", "none") != "none":
        raise Refusal(f'bias is {_short(raw["bias"])}: it changes biases of the base model; only "none" can be mixed')
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() == "loftq":
        raise Refusal(
            f"init_lora_weights is {_short(init)}, which also replaced the base weights by quantised ones, so that "
            "the adapter alone is not the trained update; train it again with another initialisation"
        )
    if changed_base(raw) is not None and not unconverted:
        raise Refusal(
            f"init_lora_weights is {_short(init)}, which also changed the base weights; convert it to a plain LoRA "
            "first (`logo pool export --initial`, or PEFT's path_initial_model_for_weight_conversion)"
        )
    base_model = raw.get("base_model_name_or_path")
    known = _INFORMATIONAL | set(_NOT_PLAIN)
    return LoraConfig(
        r=_positive_int("r", raw.get("r", 8)),
        alpha=_number("lora_alpha", raw.get("lora_alpha", 8)),
        rslora=_flag("use_rslora", raw.get("use_rslora")),
        rank_pattern={key: _positive_int("rank_pattern", v) for key, v in _pattern(raw, "rank_pattern").items()},
        alpha_pattern={key: _number("alpha_pattern", v) for key, v in _pattern(raw, "alpha_pattern").items()},
        base_model=base_model if isinstance(base_model, str) else None,
        invocation=_invocation(raw.get("alora_invocation_tokens")),
        unknown=tuple(sorted(set(raw) - known)),
    )


_T = TypeVar("_T", int, float)


def _lookup(pattern: dict[str, _T], module: str, default: _T) -> _T:
    """PEFT's `get_pattern_key`: the first key in dict order that matches the end of the path wins."""
    return next((v for key, v in pattern.items() if re.match(_as_peft(key), module)), default)


def _as_peft(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _pattern(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise Refusal(f"{key} must be an object of pattern: number, found {_short(value)}")
    for expression in value:
        try:
            re.compile(_as_peft(expression))
        except (re.error, OverflowError, RecursionError) as error:
            raise Refusal(
                f"{key} has the key {_short(expression)}, which is not a regular expression: {error}"
            ) from error
    return value


def _positive_int(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise Refusal(f"{key} must be a positive whole number, found {_short(value)}")
    return value


def _invocation(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    right = isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
    if not right or not value:  # PEFT builds an aLoRA from an empty list, too, and then fails
        raise Refusal(f"alora_invocation_tokens must be a list of one token id or more, found {_short(value)}")
    return tuple(value)


def _number(key: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number that no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise Refusal(f"{key} must be a finite number, found {_short(value)}")
    return number


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool) and value is not None:
        raise Refusal(f"{key} must be true or false, found {_short(value)}")
    return bool(value)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
