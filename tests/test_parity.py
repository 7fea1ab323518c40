"""Parity with the official script's arithmetic on a random Qwen2 with biases and tied embeddings, and mixed adapters.

Selections must agree in names and order; only adapters whose official scores differ by less than 1e-4, relative, may
change places (`official.difference`).
"""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from torch import nn

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from make_adapters import write_peft
from official import OfficialScript, difference
from test_calibrated import change
from test_engine import tokenizer

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
