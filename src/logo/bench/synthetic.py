"""A base model and adapters of any size from a seed, as folders in the formats that everybody reads.

Weights are random: what a benchmark measures depends on shapes, not on what a model knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from logo.adapters.config import CONFIG
from logo.adapters.weights import SAFETENSORS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How A and B are drawn: responses of the order of a trained adapter's, small beside the base weights.
_SPREAD = 0.02
# Tokens before it are special ones and signs.
_FIRST_NUMBER = 98


@dataclass(frozen=True)
class Sizes:
    """Of a Llama and its adapters. Feed-forward and key-value widths are in Llama 3.1's proportions by default.

    Attributes:
        hidden, layers, heads, vocabulary: of the model.
        rank, targets: of the adapters.
    """

    hidden: int = 1024
    layers: int = 12
    heads: int = 16
    vocabulary: int = 32000
    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def config(self) -> Any:
        """The model's configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 7 // 2,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 4),
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def base_model(sizes: Sizes, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama in float32 and a tokenizer whose tokens are numbers."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    model = LlamaForCausalLM(sizes.config).eval().requires_grad_(False)
    # It never ends by itself, so that every arm decodes the same number of tokens.
    model.generation_config.eos_token_id = None
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    signs = [chr(code) for code in range(33, 127)]
    words = {word: i for i, word in enumerate([*special, *signs])}
    words |= {str(i): i for i in range(len(words), sizes.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    # A number is one token, so that prompts of any length can be written; other text is read sign by sign.
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[0-9]+|[^0-9]"), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    return model, PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_adapters(
    folder: Path, sizes: Sizes, count: int, seed: int = 0, on_each: Callable[[], None] | None = None
) -> None:
    """`count` PEFT folders `0000`, `0001`, ... for the base model of these sizes."""
    from safetensors.torch import save_file

    config = sizes.config
    outputs = {
        "q_proj": sizes.hidden,
        "k_proj": config.head_dim * config.num_key_value_heads,
        "v_proj": config.head_dim * config.num_key_value_heads,
        "o_proj": sizes.hidden,
    }
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": sizes.rank,
        "lora_alpha": 2 * sizes.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(sizes.targets),
    }
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        tensors = {}
        for layer in range(sizes.layers):
            for target in sizes.targets:
                key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                a = torch.randn(sizes.rank, sizes.hidden, generator=generator)
                b = torch.randn(outputs[target], sizes.rank, generator=generator)
                tensors[f"{key}.lora_A.weight"] = a * _SPREAD
                tensors[f"{key}.lora_B.weight"] = b * _SPREAD
        one = folder / f"{number:05d}"
        one.mkdir(parents=True)
        (one / CONFIG).write_text(json.dumps(about))
        save_file(tensors, one / SAFETENSORS)
        if on_each is not None:
            on_each()


def prompts(sizes: Sizes, count: int, tokens: int, seed: int = 0) -> list[str]:
    """Random prompts of so many tokens each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(_FIRST_NUMBER, sizes.vocabulary, (count, tokens), generator=generator)
    return [" ".join(map(str, row)) for row in ids.tolist()]


def random_mixtures(names: tuple[str, ...], rows: int, k: int, seed: int = 0) -> list[dict[str, float]]:
    """Independent draws of k adapters for every row, equal weights: what shares nothing."""
    generator = torch.Generator().manual_seed(seed)
    return [{names[i]: 1 / k for i in _draw(len(names), k, generator)} for _ in range(rows)]


def related_mixtures(
    names: tuple[str, ...], rows: int, k: int, tasks: int = 4, seed: int = 0
) -> list[dict[str, float]]:
    """Rows of a few tasks, in turn. Of k adapters, 85 % are those of the task, the rest is drawn from 35 % more.

    Measured on a pool of 43 trained adapters and rows of its tasks, two rows of one task share 17.8 of their best 20,
    and four rows have 24.1 different ones among them. With k = 20 this gives 18.3 and 23.3.
    """
    generator = torch.Generator().manual_seed(seed)
    k = min(k, len(names))
    always, among = max(1, round(0.85 * k)), max(k, round(1.2 * k))
    cores = [_draw(len(names), min(among, len(names)), generator) for _ in range(tasks)]
    mixtures = []
    for row in range(rows):
        core = cores[row % tasks]
        own = core[always:]
        rest = [own[i] for i in _draw(len(own), k - always, generator)]
        weights = torch.rand(k, generator=generator)
        chosen = [*core[:always], *rest]
        shares = (weights / weights.sum()).tolist()
        mixtures.append({names[i]: share for i, share in zip(chosen, shares, strict=True)})
    return mixtures


def _draw(count: int, k: int, generator: torch.Generator) -> list[int]:
    drawn: list[int] = torch.randperm(count, generator=generator)[:k].tolist()
    return drawn
