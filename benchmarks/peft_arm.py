"""The method written with PEFT's public API, as someone without LoGo would write it.

It loads every adapter into one `PeftModel`. For each prompt it runs one forward pass with adapters disabled, computes
the norm of every adapter's response at the last layer's query projection, makes a weighted adapter of the best k, and
calls `generate`. PEFT mixes in the model itself, so prompts are answered one after the other. Its batches of several
adapters need each mixture as an adapter of its own, which is the second way to answer a batch. The authors' script
activates all selected adapters at once instead, which is the second way to answer one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PeftArm:
    """A `PeftModel` with every adapter of a folder.

    Args:
        model: changed in place, as PEFT does.
        tokenizer: the model's.
        folder: a folder of adapter folders.
        k: adapters per prompt.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, k: int) -> None:
        from peft import PeftModel

        self.tokenizer = tokenizer
        self.k = k
        self.names = sorted(path.name for path in folder.iterdir())
        first, *further = self.names
        self.model: Any = PeftModel.from_pretrained(model, str(folder / first), adapter_name=first)
        for name in further:
            self.model.load_adapter(str(folder / name), adapter_name=name)
        self.model.eval()

    @torch.no_grad()
    def select(self, prompt: str) -> dict[str, float]:
        """The k adapters with the largest responses, with weights proportional to them."""
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        with self.model.disable_adapter():
            states = self.model(**inputs, output_hidden_states=True).hidden_states
        hidden = states[-2][0, -1].float()  # PEFT keeps adapters in float32
        projection = self.model.get_base_model().model.layers[-1].self_attn.q_proj
        scores = {}
        for name in self.names:
            response = projection.lora_B[name].weight @ (projection.lora_A[name].weight @ hidden)
            scores[name] = float(projection.scaling[name] * response.norm())
        best = sorted(scores, key=lambda name: -scores[name])[: self.k]
        total = sum(scores[name] for name in best)
        return {name: scores[name] / total for name in best}

    @torch.no_grad()
    def answer(self, prompt: str, config: Any) -> list[int]:
        """Selects, mixes and generates; returns the new tokens."""
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        self._add("mixture", self.select(prompt))
        self.model.set_adapter("mixture")
        output = self.model.generate(**inputs, generation_config=config)
        self.model.set_adapter(self.names[0])
        self.model.delete_adapter("mixture")
        tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    @torch.no_grad()
    def answer_active(self, prompt: str, config: Any) -> list[int]:
        """`answer` without making a new adapter: the selected ones are all active, each scaled by its weight.

        That is how the authors' script mixes.
        """
        from peft.tuners.lora import LoraLayer

        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        weights = self.select(prompt)
        self.model.base_model.set_adapter(list(weights))
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            for name, weight in weights.items():
                layer.set_scale(name, weight)
        output = self.model.generate(**inputs, generation_config=config)
        for layer in layers:
            for name in weights:
                layer.set_scale(name, 1.0)
        self.model.set_adapter(self.names[0])
        tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    @torch.no_grad()
    def answer_batch(self, prompts: Sequence[str], config: Any) -> list[list[int]]:
        """`answer` for prompts of one length, generated as one batch in which every row names its mixture."""
        inputs = self.tokenizer(list(prompts), return_tensors="pt").to(self.model.device)
        names = [f"mixture{i}" for i in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self._add(name, self.select(prompt))
        output = self.model.generate(**inputs, generation_config=config, adapter_names=names)
        for name in names:
            self.model.delete_adapter(name)
        tokens: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    def _add(self, name: str, weights: Mapping[str, float]) -> None:
        self.model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")
