"""`LoGo` on a model and a tokenizer that the caller has loaded: what is refused, and engines that share one model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import peft
import pytest
from torch import nn

import tiny
from logo import LoGo, UsageError
from logo.models import check_mode, droppers
from test_engine import engine, write_adapter
from tolerances import PATIENCE, same_scores

PROMPT = "w3 w4 w5"


@pytest.fixture
def llama() -> nn.Module:
    return tiny.model("llama")


@pytest.fixture
def adapters(llama: nn.Module, tmp_path: Path) -> Path:
    for i in range(3):
        write_adapter(tmp_path / "pool" / f"t{i}", llama, ("q_proj", "v_proj"), rank=2, seed=i)
    return tmp_path / "pool"


def test_a_model_in_training_mode_is_refused(adapters: Path) -> None:
    """Dropout would make scores random, and they would be kept as the pool's calibration."""
    model = tiny.model("llama", attention_dropout=0.5).train()
    with pytest.raises(UsageError, match=r"training mode.*model\.eval\(\)"):
        engine(model, adapters)
    logo = engine(model.eval(), adapters)
    logo.select(PROMPT)
    model.train()  # between two calls
    for call in (logo.select, logo.generate, logo.stream):
        with pytest.raises(UsageError, match="training mode"):
            call(PROMPT)


def test_layers_of_peft_are_refused(llama: nn.Module, adapters: Path) -> None:
    """Otherwise the adapter of the PeftModel is mixed into every answer."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(cast(Any, llama), config).eval()
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(UsageError, match=r"layers of PEFT.*model\.unload\(\)"):
            engine(model, adapters)
    engine(wrapped.unload(), adapters).select(PROMPT)


@pytest.mark.parametrize("part", ["", "model"])
def test_dropout_is_found_wherever_it_is(part: str) -> None:
    """OPT keeps its probability in its layers, and only a part of the model may be in training mode."""
    opt = tiny.model("opt", dropout=0.1)
    opt.get_submodule(part).train()
    with pytest.raises(UsageError, match="training mode"):
        droppers(cast(Any, opt))
    found = droppers(cast(Any, opt.eval()))
    opt.get_submodule(part).train()
    with pytest.raises(UsageError, match="training mode"):
        check_mode(found)


def test_noise_of_routers_is_found(llama: nn.Module) -> None:
    """It makes mixtures of experts as random in training mode as dropout does."""
    model = cast(Any, llama)
    layer = model.get_submodule("model.layers.0.mlp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "router_jitter_noise", 0.01, raising=False)
        layer.train()
        try:
            with pytest.raises(UsageError, match="training mode"):
                droppers(model)
        finally:
            layer.eval()
    assert not droppers(model)


def test_a_loaded_model_is_no_name(llama: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"base_model: .*LoGo\(model, tokenizer, pool\)"):
        LoGo.from_pretrained(cast(Any, llama))


def test_engines_on_one_model_take_turns(llama: nn.Module, adapters: Path) -> None:
    """A call of another engine waits until the mixture of a running answer is off the model."""
    first, second = engine(llama, adapters), engine(llama, adapters)
    expected, found = second.select(PROMPT), []
    threads: list[threading.Thread] = []

    class Intruder:
        """Selects with the other engine while the first one answers."""

        def put(self, value: Any) -> None:
            if len(threads) < 2:  # at the prompt and at the first token
                threads.append(threading.Thread(target=lambda: found.append(second.select(PROMPT))))
                threads[-1].start()
                threads[-1].join(0.5)

        def end(self) -> None:
            pass

    mixture = {"t0": 3.0, "t1": 3.0}
    alone = first.generate(PROMPT, adapters=mixture, max_new_tokens=4)
    answer = first.generate(PROMPT, adapters=mixture, max_new_tokens=4, streamer=cast(Any, Intruder()))
    for thread in threads:
        thread.join(PATIENCE)
    assert answer.token_ids == alone.token_ids
    assert [one.scores for one in found] == [same_scores(expected.scores)] * 2
