"""A base model and adapters of any size from a seed: in memory, or as folders in the usual formats.

Weights are random, because cost depends on shapes and not on what a model knows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from logo.adapters.config import parse_config
from logo.adapters.files import CONFIG, SAFETENSORS
from logo.adapters.format import adapter_of
from logo.adapters.pool import AdapterPool
from logo.errors import UsageError, closest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Standard deviation of A and B: responses are of the order of a trained adapter's, small beside the base weights.
_SPREAD = 0.02
# Length of the random vector that adapters are cut from, and the alignment of tensors in it, as in a file.
_NOISE, _ALIGNED = 2**24, 16
# The first token that is a number; those before it are special tokens and signs.
_FIRST_NUMBER = 98

ALL_LINEAR = "all-linear"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama and its adapters. Feed-forward and key-value widths are in Llama 3.1's proportions.

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

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """The adapted modules: module path -> inputs and outputs."""
        config, hidden = self.config, self.hidden
        keys, wide = config.head_dim * config.num_key_value_heads, config.intermediate_size
        attention = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
        shapes = dict(zip(TARGETS, [*attention, (hidden, wide), (hidden, wide), (wide, hidden)], strict=True))
        return {
            f"model.layers.{layer}.{'self_attn' if target in TARGETS[:4] else 'mlp'}.{target}": shapes[target]
            for layer in range(self.layers)
            for target in self.targets
        }

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def parse_targets(text: str) -> tuple[str, ...]:
    """The projections that a text names, separated by commas; all of them for `all-linear`.

    Raises:
        UsageError: the model has no projection of a name.
    """
    if text == ALL_LINEAR:
        return TARGETS
    targets = tuple(dict.fromkeys(target.strip() for target in text.split(",")))
    for target in targets:
        if target not in TARGETS:
            known = (*TARGETS, ALL_LINEAR)
            raise UsageError(f"unknown target {target!r}{closest(target, known)}; known: {', '.join(known)}")
    return targets


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


class DrawnFile:
    """Stands for an adapter's weight file: every tensor is a piece of one random vector, each at its own offset.

    A pool of any size is therefore available at once without memory, and reading it costs as much as reading a file in
    memory.

    Args:
        name: the adapter's name; other names have other weights.
        shapes: tensor shapes by key.
        seed: seed of the random vector.
    """

    def __init__(self, name: str, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self.path = Path(os.devnull) / name / SAFETENSORS  # no such file
        self._name, self._shapes, self._seed = name, shapes, seed

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        return {key: self._piece(key) for key in keys}

    def sha256(self) -> str:
        return hashlib.sha256(repr([self._name, dict(self._shapes), self._seed]).encode()).hexdigest()

    def _piece(self, key: str) -> torch.Tensor:
        shape = self._shapes[key]
        size = math.prod(shape)
        places = (_NOISE - size) // _ALIGNED
        start = zlib.crc32(f"{self._name} {key}".encode()) % places * _ALIGNED
        return _noise(self._seed)[start : start + size].view(shape)


@lru_cache(maxsize=1)
def _noise(seed: int) -> torch.Tensor:
    return torch.randn(_NOISE, generator=torch.Generator().manual_seed(seed)) * _SPREAD


def memory_pool(sizes: Sizes, count: int, seed: int = 0) -> AdapterPool:
    """The pool that `write_adapters` writes, without files."""
    config, files = parse_config(_config(sizes)), _files(sizes, count, seed)
    return AdapterPool(adapter_of(name, file.path.parent, config, file) for name, file in files.items())


def write_adapters(
    folder: Path, sizes: Sizes, count: int, seed: int = 0, on_each: Callable[[], None] | None = None
) -> None:
    """`count` PEFT folders `00000`, `00001`, ... for the base model of these sizes."""
    from safetensors.torch import save_file

    for name, file in _files(sizes, count, seed).items():
        one = folder / name
        one.mkdir(parents=True)
        (one / CONFIG).write_text(json.dumps(_config(sizes)))
        save_file({key: tensor.clone() for key, tensor in file.read(file.shapes()).items()}, one / SAFETENSORS)
        if on_each is not None:
            on_each()


def _files(sizes: Sizes, count: int, seed: int) -> dict[str, DrawnFile]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (inputs, outputs) in sizes.adapted.items():
        shapes[f"base_model.model.{path}.lora_A.weight"] = sizes.rank, inputs
        shapes[f"base_model.model.{path}.lora_B.weight"] = outputs, sizes.rank
    return {f"{number:05d}": DrawnFile(f"{number:05d}", shapes, seed) for number in range(count)}


def _config(sizes: Sizes) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": sizes.rank,
        "lora_alpha": 2 * sizes.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(sizes.targets),
    }


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
