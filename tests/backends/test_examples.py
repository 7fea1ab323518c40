"""Example prompts inside vLLM: a pool in which half of the adapters have some selects as in the local engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from vllm_server import ASSETS

from logo import LoGo
from logo.adapters.peft import EXAMPLES
from logo.evaluation.answer import engine_identity
from tolerances import same_selection

pytest.importorskip("vllm.lora", reason="needs vLLM: make test-vllm")

VLLM = {"enforce_eager": True, "max_model_len": 256}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapters; every second one has lost its examples."""
    folder = tmp_path_factory.mktemp("pools") / "half"
    shutil.copytree(ASSETS / "adapters", folder)
    for file in sorted(folder.rglob(EXAMPLES))[::2]:
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def local(half: Path) -> LoGo:
    return LoGo.from_pretrained("demo", half, device="cpu", k=4)


@pytest.fixture
def opened(settings_of_vllm: None, half: Path) -> Iterator[Any]:
    """Opens engines inside vLLM; each ends before the next one begins."""

    class Opened:
        def __init__(self) -> None:
            self.last: Any = None

        def __call__(self, pool: Path = half, **options: Any) -> Any:
            self.close()
            self.last = LoGo.from_pretrained("demo", pool, engine="vllm", k=4, model_kwargs=VLLM, **options)
            return self.last

        def close(self) -> None:
            if self.last is not None:
                self.last.close()

    with closing(Opened()) as made:
        yield made


def test_selections_are_those_of_the_local_engine(opened: Any, local: LoGo, rows: list[str]) -> None:
    inside = opened()
    identity = engine_identity(inside, "base", {})
    assert {**identity, "engine_options": None} == {**engine_identity(local, "base", {}), "engine_options": None}
    asked = [*rows, " ".join(rows[:9])]  # the last one is longer than its window
    for found, expected in zip(inside.select(asked), local.select(asked), strict=True):
        same_selection(found, expected)
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)
    without = opened(examples="ignore")
    assert engine_identity(without, "base", {}) != identity
    responses = LoGo(local.model, local.tokenizer, local.pool, settings=without.settings)
    for found, expected in zip(without.select(rows[:16]), responses.select(rows[:16]), strict=True):
        same_selection(found, expected)
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)
