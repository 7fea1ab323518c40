"""Measuring the demo world: exact match of base, own adapter and mixtures, and how well adapters can be told apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .tasks import Row

NEUTRAL: tuple[str, ...] = (
    "The weather was fine, so we sat outside for a while.",
    "My neighbour keeps two old bicycles behind the house.",
    "A train to the coast leaves every hour.",
    "Nobody knew why the clock had stopped.",
    "She told me a long story about her journey.",
    "There is bread on the table and soup on the stove.",
    "In the evening the shops close early.",
    "He likes to sleep with the window open.",
    "The meeting began late and ended later.",
    "Some people prefer tea, others like coffee.",
    "It is easier to start than to finish.",
    "The river is wide here and the water is cold.",
    "I do not know what they think of it.",
    "You can leave your bag with me.",
    "What a pleasant surprise it was!",
    "Is there anything else to see here?",
)
Deltas = dict[str, Tensor]


def normalise(text: str) -> str:
    """The first line of ``text`` in lower case, stripped and without full stops: what exact match compares."""
    lines = text.strip().splitlines()
    return lines[0].strip().lower().replace(".", "") if lines else ""


@torch.no_grad()
def greedy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, contexts: Sequence[str], max_new: int = 16
) -> list[str]:
    """Greedy continuations of ``contexts``, all rows at once on a right-padded buffer [rows, tokens]."""
    prompts = tokenizer(list(contexts))["input_ids"]
    sizes = torch.tensor([len(prompt) for prompt in prompts])
    buffer = torch.full((len(prompts), int(sizes.max()) + max_new), int(tokenizer.pad_token_id))
    for i, prompt in enumerate(prompts):
        buffer[i, : len(prompt)] = torch.tensor(prompt)
    rows = torch.arange(len(prompts))
    ends = sizes.clone()
    running = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(max_new):
        live = rows[running]
        width = int(ends[live].max())
        hidden = model.model(input_ids=buffer[live, :width], use_cache=False).last_hidden_state
        best = model.lm_head(hidden[torch.arange(len(live)), ends[live] - 1]).argmax(-1)
        buffer[live, ends[live]] = best
        ends[live] += 1
        running[live[best == tokenizer.eos_token_id]] = False
        if not running.any():
            break
    return [
        tokenizer.decode(buffer[i, sizes[i] : ends[i]].tolist(), skip_special_tokens=True) for i in range(len(prompts))
    ]


def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> float:
    """Share of ``rows`` that ``model`` answers exactly."""
    answers = greedy(model, tokenizer, [row.context for row in rows])
    return sum(normalise(a) == normalise(row.completion) for a, row in zip(answers, rows, strict=True)) / len(rows)


def load_deltas(folder: Path) -> Deltas:
    """The weight updates of a PEFT adapter by module name, each [outputs, inputs] in float32."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    weights = {name: value.float() for name, value in load_file(str(folder / "adapter_model.safetensors")).items()}
    deltas: Deltas = {}
    for name, down in weights.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            deltas[module] = scale * weights[name.replace(".lora_A.", ".lora_B.")] @ down
    return deltas


@contextmanager
def mixed(model: LlamaForCausalLM, parts: Sequence[tuple[Deltas, float]]) -> Iterator[None]:
    """Add the weighted ``parts`` to the weights of ``model`` for the duration of the block."""
    modules = dict(model.named_modules())
    saved: dict[str, Tensor] = {}
    with torch.no_grad():
        for deltas, share in parts:
            for name, delta in deltas.items():
                layer = modules[name]
                assert isinstance(layer, nn.Linear)
                saved.setdefault(name, layer.weight.clone())
                layer.weight.add_(delta, alpha=share)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in saved.items():
                layer = modules[name]
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(weight)


@torch.no_grad()
def projection_inputs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, modules: Sequence[str]
) -> dict[str, Tensor]:
    """The inputs [tokens, features] of ``modules`` of the bare base model on ``text``."""
    inputs_of: dict[str, Tensor] = {}
    by_name = dict(model.named_modules())

    def keep(name: str) -> object:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            inputs_of[name] = inputs[0][0]

        return by_name[name].register_forward_pre_hook(hook)

    handles = [keep(name) for name in modules]
    model.model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False)
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    return inputs_of


def signals(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pool: Mapping[str, Deltas],
    rows: Sequence[Row],
    early: int = 2,
) -> dict[str, float]:
    """Top-1 accuracy of two adapter-choosing signals on ``rows``.

    ``official``: the norm of the last layer's query update at the last prompt token. ``calibrated``: the log of the
    mean over tokens of the norm of each query and value update of the first ``early`` layers, averaged, minus the
    same quantity on neutral text.
    """
    last = f"model.layers.{model.config.num_hidden_layers - 1}.self_attn.q_proj"
    modules = [f"model.layers.{i}.self_attn.{p}" for i in range(early) for p in ("q_proj", "v_proj")]
    names = list(pool)
    stacks = {module: torch.stack([pool[name][module] for name in names]) for module in [*modules, last]}

    def logs(inputs: dict[str, Tensor]) -> Tensor:
        parts = [(inputs[m] @ stacks[m].mT).norm(dim=-1).mean(-1).log() for m in modules]
        return torch.stack(parts).mean(0)

    def read(text: str) -> dict[str, Tensor]:
        return projection_inputs(model, tokenizer, text, [*modules, last])

    neutral = torch.stack([logs(read(text)) for text in NEUTRAL]).mean(0)
    hits = {"official": 0, "calibrated": 0}
    for row in rows:
        inputs = read(row.context)
        target = names.index(row.task)
        official = (inputs[last][-1:] @ stacks[last].mT).norm(dim=-1)[:, 0]
        hits["official"] += int(official.argmax() == target)
        hits["calibrated"] += int((logs(inputs) - neutral).argmax() == target)
    return {name: count / len(rows) for name, count in hits.items()}
