"""The generation config of a call: options of transformers, checked before the model runs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from numbers import Real
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
# What a config leaves open, for greedy decoding or plain sampling.
_PLAIN = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_PLAIN |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
# What a config leaves open, which the checkpoint says without a choice of how to decode.
_OF_CHECKPOINT = ("bos_token_id", "eos_token_id", "pad_token_id", "stop_strings", "cache_implementation")
# The least value of numbers; None: any number above 0.
_LEAST: Mapping[str, int | None] = {
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty", "num_beams", "max_time")),
    **{"top_k": 0, "min_new_tokens": 0},
}
_SAMPLING = ("temperature", "top_p", "top_k")
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


def greedy_config(**options: Any) -> GenerationConfig:
    """Greedy decoding, or plain sampling with `do_sample=True`, with further options of `GenerationConfig`."""
    return GenerationConfig(**_PLAIN | options)


def call_config(
    config: GenerationConfig | None, options: Mapping[str, Any], checkpoint: GenerationConfig | None = None
) -> GenerationConfig:
    """A copy of a config (None: an empty one) with the options of a call applied.

    What neither says is as in `greedy_config`; of the checkpoint's config, only end tokens and stop texts count.

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
    try:
        made = GenerationConfig() if config is None else copy.deepcopy(config)
        made.update(**options)
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"generation options: transformers refuses them: {' '.join(str(error).split())}") from error
    _fill(made, _PLAIN)
    if checkpoint is not None:
        _fill(made, {name: getattr(checkpoint, name) for name in _OF_CHECKPOINT})
    for name, least in _LEAST.items():
        value = getattr(made, name)
        if value is None or (name in _SAMPLING and not made.do_sample):
            continue
        if not isinstance(value, Real) or not (float(value) > 0 if least is None else float(value) >= least):
            expected = "a number above 0" if least is None else f"{least} or more"
            raise UsageError(f"{name}: expected {expected}, found {value!r:.60}")
    if made.do_sample and made.top_p is not None and made.top_p > 1:
        raise UsageError(f"top_p: expected a share above 0 and up to 1, found {made.top_p!r:.60}")
    mode = made.get_generation_mode()
    if mode not in _MODES or made.num_return_sequences not in (None, 1):
        raise UsageError(
            f"generation options: expected greedy decoding, sampling or beam search with one answer per prompt, found "
            f"{GenerationMode(mode).value} with {made.num_return_sequences or 1}"
        )
    return made


def check_stops(stop: Any, stop_at_newline: Any) -> tuple[str, ...]:
    """The texts that end an answer, without empty ones.

    Raises:
        UsageError: they are no texts, or `stop_at_newline` is neither True, False nor `"official"`.
    """
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, Collection) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"stop: expected a text or a list of texts, found {stop!r:.60}")
    if not isinstance(stop_at_newline, bool) and stop_at_newline != "official":
        raise UsageError(f"stop_at_newline: expected True, False or 'official', found {stop_at_newline!r:.60}")
    return tuple(text for text in texts if text)


def _fill(config: GenerationConfig, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if getattr(config, name) is None:
            setattr(config, name, copy.deepcopy(value))
