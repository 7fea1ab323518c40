"""The generation config of a call: options of transformers, checked before the model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerationMode

from logo.errors import UsageError, check_type, closest

# Refused options -> those to use: names of other libraries, and lengths that would include the padding of a prompt.
_INSTEAD = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_length"), "max_new_tokens"),
    **dict.fromkeys(("min_tokens", "min_length"), "min_new_tokens"),
}
_KNOWN = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_")) - _INSTEAD.keys()


def greedy_config(**options: Any) -> GenerationConfig:
    """Plain greedy decoding, or plain sampling (`do_sample=True`), without what the checkpoint's own config says.

    Any `GenerationConfig` option may be overridden. What is left open would be filled from the checkpoint.
    """
    plain: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    plain |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if options.get("do_sample"):
        plain |= {"min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    return GenerationConfig(**plain | options)


def call_config(config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
    """A copy of a config with the options of a call applied; None: of `greedy_config`.

    Raises:
        UsageError: an option that does not exist or cannot be used here, or a config that transformers refuses.
    """
    for name in options:
        if name in _INSTEAD:
            raise UsageError(f"generation option {name!r} cannot be used here: give {_INSTEAD[name]!r} instead")
        if name not in _KNOWN:
            raise UsageError(
                f"unknown generation option {name!r}{closest(name, _KNOWN)}: expected an option "
                "of transformers.GenerationConfig"
            )
    if config is not None:
        check_type("generation_config", config, GenerationConfig, "a transformers.GenerationConfig")
    _check(options)  # transformers would refuse some of these in other words
    try:
        if config is None:
            return greedy_config(**options)
        config = copy.deepcopy(config)
        config.update(**options)
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"generation options: transformers refuses them: {' '.join(str(error).split())}") from error
    return config


def check_config(config: GenerationConfig) -> None:
    """Raises UsageError for a value that transformers would refuse in the middle of generating."""
    _check(vars(config))


def check_stops(stop: Any, stop_at_newline: Any) -> tuple[str, ...]:
    """The texts that end an answer, without empty ones.

    Raises:
        UsageError: they are no texts, or `stop_at_newline` is neither True, False nor `"official"`.
    """
    if not _are_texts(stop):
        raise UsageError(f"stop: expected a text or a list of texts, found {stop!r:.60}")
    if not isinstance(stop_at_newline, bool) and stop_at_newline != "official":
        raise UsageError(f"stop_at_newline: expected True, False or 'official', found {stop_at_newline!r:.60}")
    return tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text)


def is_assisted(config: GenerationConfig) -> bool:
    """Whether drafts are checked, as with prompt lookup. Transformers does that for one row, which it reads itself."""
    return bool(config.get_generation_mode() == GenerationMode.ASSISTED_GENERATION)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Collection) and all(isinstance(text, str) for text in value))


def _are_ids(value: Any) -> bool:
    ids = value.tolist() if hasattr(value, "tolist") else value
    return all(map(_is_whole, ids if isinstance(ids, (list, tuple)) else [ids]))


def _are_sequences(value: Any) -> bool:
    rows = value if isinstance(value, (list, tuple)) else ()
    return len(rows) > 0 and all(isinstance(row, (list, tuple)) and row and all(map(_is_whole, row)) for row in rows)


Check = tuple[Callable[[Any], bool], str]

# Option -> whether a value can be used, and what was expected.
_VALUES: dict[str, Check] = {
    "bad_words_ids": (_are_sequences, "a list of lists of token ids"),
    "eos_token_id": (_are_ids, "a token id or a list of token ids"),
    "guidance_scale": (_is_number, "a number"),
    "length_penalty": (_is_number, "a number"),
    "max_time": (lambda value: _is_number(value) and value > 0, "a number of seconds above 0"),
    "min_new_tokens": (lambda value: _is_whole(value) and value >= 0, "a whole number of 0 or more"),
    "no_repeat_ngram_size": (lambda value: _is_whole(value) and value >= 0, "a whole number of 0 or more"),
    "num_beams": (lambda value: _is_whole(value) and value > 0, "a whole number above 0"),
    "num_return_sequences": (lambda value: value == 1, "1 (repeat the prompt to get several answers)"),
    "prompt_lookup_num_tokens": (lambda value: _is_whole(value) and value > 0, "a whole number above 0"),
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "stop_strings": (_are_texts, "a text or a list of texts"),
    "token_healing": (lambda value: not value, "False, since prompts are read as they are"),
}
_DRAWING: dict[str, Check] = {
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "temperature": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "top_k": (lambda value: _is_whole(value) and value >= 0, "a whole number above 0, or 0 for all tokens"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
}


def _check(values: Mapping[str, Any]) -> None:
    for name, (fits, expected) in (_VALUES | (_DRAWING if values.get("do_sample") else {})).items():
        value = values.get(name)
        if value is not None and not fits(value):
            raise UsageError(f"{name}: expected {expected}, found {value!r:.60}")
