"""Parity with the official script on a random Qwen2 with biases and tied embeddings, and mixed adapters: with its
arithmetic, written from its formulas, with PEFT for the adapters. And the answers of the bundled model beside PEFT's.

Per prompt, alone: the model runs with some adapters active at full scale, `h` is the residual stream that enters the
last layer, and every adapter's response to every token is `(h A^T) B^T s`. The last token's response gives the score,
`‖p‖` or `1 / (H(softmax p) + 1e-6)` with `log(q + 1e-8)`, and `topk` chooses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from logo import AdapterPool, LoGo, Selection, SelectionSettings, demo
from make_adapters import write_peft
from test_calibrated import change
from test_engine import tokenizer

# Scores are equal within this, relative; so neighbours that are closer to each other than this may change places.
SAME = 1e-4
TOKENS = 12  # of an answer of the bundled model, at most


@dataclass(frozen=True)
class Official:
    """What the script says about one prompt: the score of every adapter in pool order, and the k best, best first."""

    scores: tuple[float, ...]
    selected: tuple[str, ...]


class OfficialScript:
    """The script on one base model and one pool.

    Args:
        base: stays as it is; PEFT wraps a copy.
        folders: of the adapters, by name, in pool order.
        module: path of the probed projection, in `layer`.
    """

    def __init__(self, base: nn.Module, folders: Mapping[str, Path], layer: int, module: str) -> None:
        self.names = tuple(folders)
        self.layer = layer
        self.active: tuple[str, ...] | None = None
        copied = type(base)(base.config).eval()  # type: ignore[operator, arg-type]
        copied.load_state_dict(base.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice about tiny and nameless models
            for i, folder in enumerate(folders.values()):
                if i == 0:
                    self.model: Any = peft.PeftMixedModel.from_pretrained(copied, folder, adapter_name="a0")
                else:
                    self.model.load_adapter(folder, adapter_name=f"a{i}")
        self.model.eval()
        probed = dict(self.model.base_model.model.named_modules())[module]
        self.factors = [
            (probed.lora_A[f"a{i}"].weight, probed.lora_B[f"a{i}"].weight, probed.scaling[f"a{i}"])
            for i in range(len(folders))
        ]

    def run(self, rows: Sequence[Sequence[int]], signal: str, k: int, context: str) -> Iterator[Official]:
        """One result per prompt, in order; `context` as `probe_context`."""
        active = () if context == "base" else self.names
        for row in rows:
            scores = self.scores(row, signal, active)
            top = torch.topk(scores, k).indices.tolist()
            selected = tuple(self.names[i] for i in top)
            yield Official(tuple(scores.tolist()), selected)
            if context == "carry":
                active = selected

    @torch.no_grad()
    def scores(self, row: Sequence[int], signal: str, active: Sequence[str]) -> Tensor:
        """(adapters,) in pool order."""
        ids = torch.tensor([list(row)])
        if tuple(active) != self.active:
            if active:
                self.model.base_model.enable_adapter_layers()
                self.model.set_adapter([f"a{self.names.index(name)}" for name in active])
            else:
                self.model.base_model.disable_adapter_layers()
            self.active = tuple(active)
        h = self.model(input_ids=ids, output_hidden_states=True).hidden_states[self.layer]
        p = torch.stack([(h @ a.T) @ b.T * s for a, b, s in self.factors], dim=1)[0, :, -1]  # (adapters, out)
        if signal == "norm":
            return torch.norm(p, dim=-1)
        q = torch.softmax(p, dim=-1)
        return 1 / (-(q * torch.log(q + 1e-8)).sum(dim=-1) + 1e-6)


def difference(selection: Selection, official: Official, names: Sequence[str]) -> str | None:
    """What is not equal, or None: scores within 1e-4 relative, and the same adapters in the same order.

    Only adapters whose official scores differ by less than that may stand in each other's place.
    """
    scores = dict(zip(names, official.scores, strict=True))
    for name, score in scores.items():
        if not abs(selection.scores[name] - score) <= SAME * abs(score):
            return f"score of {name}: {selection.scores[name]} instead of {score}"
    if len(selection.adapters) != len(official.selected):
        return f"{len(selection.adapters)} adapters instead of {len(official.selected)}"
    for place, (ours, theirs) in enumerate(zip(selection.adapters, official.selected, strict=True), start=1):
        if ours != theirs and not abs(scores[ours] - scores[theirs]) < SAME * abs(scores[theirs]):
            return f"place {place}: {ours} ({scores[ours]}) instead of {theirs} ({scores[theirs]})"
    return None


LAYER, MODULE = 2, "model.layers.2.self_attn.q_proj"
ROWS = tiny.prompts([4, 17, 9, 30, 2, 23, 12, 7, 15, 21], seed=3)


@pytest.fixture(scope="module")
def qwen2() -> nn.Module:
    base = tiny.model("qwen2", seed=4)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return base


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> AdapterPool:
    """Twelve adapters of other ranks, scales and targets, as PEFT writes them."""
    root = tmp_path_factory.mktemp("qwen2")
    for i in range(12):
        config = peft.LoraConfig(
            r=(2, 4, 7)[i % 3],
            lora_alpha=8,
            use_rslora=i % 2 == 1,
            target_modules=["q_proj", "v_proj"] if i % 4 else ["q_proj", "k_proj", "o_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )
        write_peft(root / f"t{i:02d}", tiny.model("qwen2", seed=4), config, seed=i)
        change(root / f"t{i:02d}", partial(torch.mul, other=0.02 + 0.015 * i))
    return AdapterPool.open(root)


@pytest.fixture(scope="module")
def script(qwen2: nn.Module, pool: AdapterPool) -> OfficialScript:
    return OfficialScript(qwen2, {adapter.name: adapter.folder for adapter in pool}, LAYER, MODULE)


@pytest.mark.parametrize("context", ["base", "pool", "carry"])
@pytest.mark.parametrize("signal", ["norm", "entropy"])
def test_selections_are_the_official_ones(
    qwen2: nn.Module, pool: AdapterPool, script: OfficialScript, signal: str, context: str
) -> None:
    settings = SelectionSettings.of(signal=signal, k=5, cache="")
    expected = list(script.run(ROWS, signal, 5, context))
    for batch_size in (1, 4):
        logo = LoGo(qwen2, tokenizer(), pool, settings=settings, probe_context=context)
        found = logo.select(ROWS, batch_size=batch_size)
        assert [difference(*pair, pool.names) for pair in zip(found, expected, strict=True)] == [None] * len(ROWS)
    assert len({one.selected for one in expected}) > 1  # prompts really differ


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's advice
def test_the_demo_answers_as_peft_does() -> None:
    """Each prompt of the showcase under a mixture that it selects, which PEFT adds up to one adapter, and some under
    their own adapter, and under none."""
    prompts = [row["context"] for row in demo.showcase()]
    tasks = [row["task"] for row in demo.showcase()]
    logo = LoGo.from_pretrained("demo", device="cpu")
    base = transformers.AutoModelForCausalLM.from_pretrained(demo.model_dir(), dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, demo.adapters_dir() / tasks[0], adapter_name=tasks[0])
    for name in logo.names:
        if name != tasks[0]:
            wrapped.load_adapter(demo.adapters_dir() / name, adapter_name=name)
    wrapped.eval()

    def answered(prompt: str) -> list[int]:
        encoded = logo.tokenizer(prompt, return_tensors="pt")
        ids = wrapped.generate(**encoded, max_new_tokens=TOKENS, do_sample=False)[0]
        return ids[encoded["input_ids"].shape[1] :].tolist()

    selections = logo.select(prompts, weighting="linear")  # others are too sure to mix
    assert len({selection.adapters for selection in selections}) > 8 and max(len(s.adapters) for s in selections) > 1
    mixed = logo.generate(prompts, adapters=selections, max_new_tokens=TOKENS, batch_size=8)
    for number, (prompt, selection, generation) in enumerate(zip(prompts, selections, mixed, strict=True)):
        mixture = f"mixture {number}"
        wrapped.add_weighted_adapter(list(selection.adapters), list(selection.weights), mixture, combination_type="cat")
        wrapped.set_adapter(mixture)
        assert answered(prompt) == list(generation.token_ids), prompt
        wrapped.delete_adapter(mixture)
    few = prompts[::4]
    alone = logo.generate(few, adapters=[{task: 1.0} for task in tasks[::4]], max_new_tokens=TOKENS, batch_size=8)
    plain = logo.generate(few, adapters={}, max_new_tokens=TOKENS, batch_size=8)
    for prompt, task, by_adapter, by_base in zip(few, tasks[::4], alone, plain, strict=True):
        wrapped.set_adapter(task)
        assert answered(prompt) == list(by_adapter.token_ids), prompt
        with wrapped.disable_adapter():
            assert answered(prompt) == list(by_base.token_ids), prompt
