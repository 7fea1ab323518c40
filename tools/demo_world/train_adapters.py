"""One PEFT adapter per task, each trained on ordinary rows of its own task and on nothing else.

Two things here are of this world alone: `AdapterConfig.start` and `AdapterConfig.quiet`. `logo train` has neither. With
the same rank, rows, steps and learning rate on the same base its adapters answer their own tasks better on average,
and are told apart a little worse, so that `logo demo` would be right less often:

                                             own   top-1 of calibrated   answers, calibrated   all mixed alike
    these                                    0.93                 0.86                  0.89              0.03
    logo train                               0.95                 0.85                  0.86              0.17
    logo train with a weight decay of 3      0.94                 0.84                  0.85              0.11
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .evaluate import projection_inputs
from .pretrain import Batch, Example, batches, encode, weighted_loss
from .tasks import Task, small_talk, train_row
from .words import SMALL_TALK

BASE_NAME = "demo"


@dataclass(frozen=True)
class AdapterConfig:
    """Shape and schedule of the adapters; ``batch`` counts rows, ``alpha / rank`` scales the update.

    ``start`` shrinks the random first matrix, so that what it learns stands out from its noise; ``quiet`` weighs the
    squared size of the adapter's output on small talk, which keeps it out of text that is not about its task.
    """

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    steps: int = 200
    batch: int = 24
    learning_rate: float = 4e-3
    warmup: int = 10
    weight_decay: float = 0.0
    start: float = 0.3
    quiet: float = 0.05


@torch.no_grad()
def quiet_states(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, targets: tuple[str, ...], seed: int
) -> dict[str, Tensor]:
    """The bare model's inputs [tokens, features] of every targeted projection on small talk, by module name."""
    rng = random.Random(f"quiet:{seed}")
    texts = [*SMALL_TALK, *(small_talk(rng) for _ in range(60))]
    modules = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]
    found = [projection_inputs(model, tokenizer, text, modules) for text in texts]
    return {name: torch.cat([states[name] for states in found]) for name in modules}


def _noise(peft: PeftModel, states: dict[str, Tensor]) -> Tensor:
    """Mean squared norm of the adapter's own output on ``states``."""
    total, count = torch.zeros(()), 0
    for name, module in peft.base_model.model.named_modules():
        if name in states:
            output = module.lora_B["default"](module.lora_A["default"](states[name])) * module.scaling["default"]
            total, count = total + output.square().sum(-1).mean(), count + 1
    return total / count


def _tidy(folder: Path) -> None:
    for extra in folder.glob("*.md"):
        extra.unlink()


def _loss(model: PeftModel, batch: Batch) -> Tensor:
    return weighted_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)


def train_adapter(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    config: AdapterConfig,
    seed: int,
    folder: Path,
    states: dict[str, Tensor],
) -> float:
    """Train the adapter of ``task`` on a frozen ``model``, save it in float16 into ``folder``, return the last loss.

    ``model`` is the same before and after.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"adapter:{task.name}:{seed}")

    def draw(count: int) -> list[Example]:
        return encode(tokenizer, [train_row(task, rng) for _ in range(count)], [-1] * count)

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_A." in name:
                parameter.mul_(config.start)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    stream = batches(draw, config.batch, tokenizer.pad_token_id, 0.0, seed)
    peft.train()
    smooth = 0.0
    for step in range(config.steps):
        remaining = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in adam.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup) * (0.02 + 0.98 * remaining)
        loss = _loss(peft, next(stream))
        torch.autograd.backward(loss + config.quiet * _noise(peft, states))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        smooth = loss.item() if step == 0 else 0.9 * smooth + 0.1 * loss.item()
    for parameter in parameters:
        parameter.data = parameter.data.half()
    peft.peft_config["default"].base_model_name_or_path = BASE_NAME
    peft.eval()
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    _tidy(folder)
    peft.unload()
    for base_parameter in model.parameters():
        base_parameter.requires_grad_(True)
    return smooth
