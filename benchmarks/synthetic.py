"""A base model and adapters of any size from a seed.

Weights are random, because cost depends on shapes and not on what a model knows.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Standard deviation of A and B: responses are of the order of a trained adapter's, small beside the base weights.
_SPREAD = 0.02
# Length of the random vector that adapters are cut from, and the alignment of tensors in it, as in a file.
_NOISE, _ALIGNED = 2**24, 16
# The first token that is a number; those before it are special tokens and signs.
_FIRST_NUMBER = 98

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama and its adapters. Feed-forward and key-value widths are in Llama 3.1's proportions.

    Attributes:
        hidden, layers, heads, vocabulary: of the model.
        rank, targets: of the adapters.
    """

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    vocabulary: int = 16000
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

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """The adapted modules: module path -> inputs and outputs."""
        hidden = self.hidden
        keys = self.config.head_dim * self.config.num_key_value_heads
        wide = self.config.intermediate_size
        attention = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
        mlp = [(hidden, wide), (hidden, wide), (wide, hidden)]
        shapes = dict(zip(TARGETS, [*attention, *mlp], strict=True))
        return {
            f"model.layers.{layer}.{'self_attn' if target in TARGETS[:4] else 'mlp'}.{target}": shapes[target]
            for layer in range(self.layers)
            for target in self.targets
        }


def base_model(
    sizes: Sizes, seed: int = 0, device: str = "cpu", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama, made on the device where it computes, and a tokenizer whose tokens are numbers."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(sizes.config, dtype=getattr(torch, dtype))
    model = model.eval().requires_grad_(False)
    # The model never ends an answer by itself, so that every arm decodes the same number of tokens.
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


def write_adapters(folder: Path, sizes: Sizes, count: int, seed: int = 0) -> None:
    """`count` PEFT folders, `00000`, `00001`, ...; every tensor is a piece of one random vector at an own offset."""
    from safetensors.torch import save_file

    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(seed)) * _SPREAD
    shapes: dict[str, tuple[int, int]] = {}
    for path, (inputs, outputs) in sizes.adapted.items():
        shapes[f"base_model.model.{path}.lora_A.weight"] = sizes.rank, inputs
        shapes[f"base_model.model.{path}.lora_B.weight"] = outputs, sizes.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": sizes.rank,
        "lora_alpha": 2 * sizes.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(sizes.targets),
    }
    for number in range(count):
        adapter = folder / f"{number:05d}"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for key, shape in shapes.items():
            size = math.prod(shape)
            start = zlib.crc32(f"{adapter.name} {key}".encode()) % ((_NOISE - size) // _ALIGNED) * _ALIGNED
            tensors[key] = noise[start : start + size].view(shape).clone()
        save_file(tensors, adapter / "adapter_model.safetensors")


def prompts(sizes: Sizes, count: int, tokens: int, seed: int = 0) -> list[str]:
    """Random prompts of this number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(_FIRST_NUMBER, sizes.vocabulary, (count, tokens), generator=generator)
    return [" ".join(map(str, row)) for row in ids.tolist()]


def random_mixtures(names: tuple[str, ...], rows: int, k: int, seed: int = 0) -> list[dict[str, float]]:
    """Independent draws of k adapters for every row, with equal weights; rows share adapters only by chance."""
    generator = torch.Generator().manual_seed(seed)
    return [{names[i]: 1 / k for i in _draw(len(names), k, generator)} for _ in range(rows)]


def related_mixtures(
    names: tuple[str, ...], rows: int, k: int, tasks: int = 4, seed: int = 0
) -> list[dict[str, float]]:
    """Rows of a few tasks, in turn. Of k adapters, 85 % are those of the task; the rest is drawn from a further 35 %.

    In a pool of 43 trained adapters and rows of its tasks, two rows of one task share 17.8 of their best 20, and four
    rows have 24.1 different ones. With k = 20 this function gives 18.3 and 23.3.
    """
    generator = torch.Generator().manual_seed(seed)
    k = min(k, len(names))
    always = max(1, round(0.85 * k))  # adapters of a task that all its rows share
    related = max(k, round(1.2 * k))  # adapters of a task
    tasks_adapters = [_draw(len(names), min(related, len(names)), generator) for _ in range(tasks)]
    mixtures = []
    for row in range(rows):
        task_adapters = tasks_adapters[row % tasks]
        optional = task_adapters[always:]
        drawn = [optional[i] for i in _draw(len(optional), k - always, generator)]
        numbers = torch.rand(k, generator=generator)
        weights = (numbers / numbers.sum()).tolist()
        adapters = [*task_adapters[:always], *drawn]
        mixtures.append({names[i]: weight for i, weight in zip(adapters, weights, strict=True)})
    return mixtures


def _draw(count: int, k: int, generator: torch.Generator) -> list[int]:
    drawn: list[int] = torch.randperm(count, generator=generator)[:k].tolist()
    return drawn
