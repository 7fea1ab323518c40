"""Tiny random models of many architectures, made from their configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as tf
from torch import nn

COMMON: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES: dict[str, Any] = {**COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA_LIKE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
LONG = {"max_position_embeddings": 512}
GEMMA_LIKE = {**LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
GPT_LIKE = {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**LLAMA_LIKE),
    "qwen2": lambda: tf.Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**LLAMA_LIKE, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(**GEMMA_LIKE),
    "gemma3": lambda: tf.Gemma3TextConfig(**GEMMA_LIKE),
    "mistral": lambda: tf.MistralConfig(**LLAMA_LIKE, sliding_window=16),
    "phi3": lambda: tf.Phi3Config(**LLAMA_LIKE),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES, intermediate_size=48),
    "gpt2": lambda: tf.GPT2Config(**GPT_LIKE),
    "opt": lambda: tf.OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=32),
    "falcon": lambda: tf.FalconConfig(**SIZES),
    "falcon_heads": lambda: tf.FalconConfig(**SIZES, multi_query=False),
    "falcon_groups": lambda: tf.FalconConfig(**SIZES, num_kv_heads=2, new_decoder_architecture=True),
    "codegen": lambda: tf.CodeGenConfig(**GPT_LIKE, rotary_dim=4),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(**GPT_LIKE),
    "gpt_bigcode_heads": lambda: tf.GPTBigCodeConfig(**GPT_LIKE, multi_query=False),
}

# They keep a state besides keys and values, or instead of them.
STATEFUL: dict[str, Callable[[], Any]] = {
    "mamba": lambda: tf.MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=3, state_size=8),
    "lfm2": lambda: tf.Lfm2Config(**LLAMA_LIKE, layer_types=["conv", "full_attention", "conv"]),
    "rwkv": lambda: tf.RwkvConfig(**COMMON, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32),
    "minimax": lambda: tf.MiniMaxConfig(
        **LLAMA_LIKE,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_local_experts=2,
        block_size=16,
    ),
}


def model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random causal LM in float32, weights large enough for outputs to differ; `changes` to its configuration."""
    torch.manual_seed(seed)
    config = (CONFIGS | STATEFUL)[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    made = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return made.eval().requires_grad_(False)


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, COMMON["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, length) ids and mask, padded on the right."""
    width, pad = max(map(len, rows)), [COMMON["pad_token_id"]]
    ids = torch.tensor([row + pad * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def words(count: int, seed: int) -> str:
    """A text of so many words that tokenizers of tests know, one token each."""
    ids = torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


@contextmanager
def read_tokens(model: nn.Module) -> Iterator[list[int]]:
    """How many tokens each forward pass in the block is given, over all rows."""
    seen: list[int] = []
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    yield seen
    handle.remove()
