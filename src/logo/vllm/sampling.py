"""Decoding options for vLLM: transformers' `GenerationConfig` as `SamplingParams`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from logo.decoding import Decoding
from logo.endings import end_tokens, stop_strings
from logo.errors import UsageError

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Options that are translated into vLLM's, or handled by LoGo; and those without an effect on answers here: ids of other
# tokens, caches, what `generate` returns, and details of beam search and of assistant models, which are refused by
# options of their own.
_KNOWN = frozenset(
    {
        *("do_sample", "eos_token_id", "max_new_tokens", "min_new_tokens", "min_p", "repetition_penalty"),
        *("stop_strings", "temperature", "top_k", "top_p"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "bos_token_id", "cache_config"),
        *("cache_implementation", "compile_config", "continuous_batching_config", "decoder_start_token_id"),
        *("disable_compile", "early_stopping", "length_penalty", "low_memory", "max_cache_len", "max_length"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "num_return_sequences", "output_attentions"),
        *("output_hidden_states", "output_logits", "output_scores", "pad_token_id", "prefill_chunk_size"),
        *("remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "target_lookbehind"),
        *("transformers_version", "use_cache"),
    }
)
# The defaults of transformers, for options that neither the call nor the checkpoint sets.
_DEFAULTS = {
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff"), 0.0),
    **dict.fromkeys(("encoder_repetition_penalty", "repetition_penalty", "temperature", "top_p", "typical_p"), 1.0),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("num_beam_groups", "num_beams"), 1),
    "top_k": 50,
}


def check_config(config: GenerationConfig) -> None:
    """Raises UsageError if a config asks for something that vLLM cannot do."""
    for name, value in vars(config).items():
        fine = name.startswith("_") or name in _KNOWN or value is None or value is False
        if not fine and value != _DEFAULTS.get(name):
            option = f"generation option {name!r} ({value!r:.40})"
            raise UsageError(f"{option}: the engine 'vllm' cannot do that; leave it out, or use the engine 'local'")


def parameters(decoding: Decoding, begun: int, seed: int | None) -> Any:
    """vLLM's `SamplingParams` for a decoding, of whose answer so many tokens have begun, behind the prompt; `seed`: of
    one answer, where tokens are drawn, which come from other noise than those before."""
    from vllm import SamplingParams

    config = decoding.config

    def option(name: str) -> Any:
        value = getattr(config, name, None)
        return _DEFAULTS[name] if value is None else value

    drawing: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        drawing = {
            "temperature": option("temperature"),
            "top_k": min(option("top_k"), 2**31 - 1),
            "top_p": option("top_p"),
            "min_p": config.min_p or 0.0,
            "seed": None if seed is None else seed + begun,
        }
    # Where one of these texts ends, an answer may have ended; the rules of the decoding say whether it has.
    texts = [*stop_strings(config), *decoding.stop, *(["\n"] if decoding.stop_at_newline else [])]
    with refused("these options"):
        return SamplingParams(
            **drawing,
            max_tokens=config.max_new_tokens - begun,
            min_tokens=max(0, (config.min_new_tokens or 0) - begun),
            repetition_penalty=option("repetition_penalty"),
            ignore_eos=True,  # instead, `stop_token_ids` holds all end tokens
            stop_token_ids=sorted(end_tokens(decoding.config)),
            logprobs=0,  # that of the drawn token, which is NaN if a mixture overflows
            stop=texts or None,
            include_stop_str_in_output=True,
            skip_special_tokens=False,  # a stop text may be a special token
            detokenize=bool(texts),
        )


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Converts vLLM's refusal of a request into a UsageError."""
    import vllm.exceptions

    try:
        yield
    except (ValueError, vllm.exceptions.VLLMClientError) as error:
        raise UsageError(f"vLLM refuses {what}: {' '.join(str(error).split())}") from error
