"""A signal of a plugin inside vLLM: its processes find it through their environment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logo import LoGo, plugins
from logo.selection.signals import SIGNALS
from tolerances import same_selection

pytest.importorskip("vllm.lora", reason="needs vLLM: make test-vllm")

pytestmark = pytest.mark.usefixtures("settings_of_vllm")

SIGNAL = """
from logo import register_signal

@register_signal("quiet", layers="early", input="projection", token="each", scale="zscore", weighting="linear")
def quiet(index, hidden):
    return index.norms(hidden).sqrt()
"""
PROMPTS = ["What is the opposite of hot?", "Spell the word: tree"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a signal in it, which this process knows."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "plug_vllm.py").write_text(SIGNAL)
    plugins.load("plug_vllm:quiet", str(folder))
    yield folder
    sys.path.remove(str(folder))
    for held in (SIGNALS, SIGNALS.sources, SIGNALS._places):
        del held["quiet"]


@pytest.fixture(scope="module")
def local(here: Path) -> LoGo:
    return LoGo.from_pretrained("demo", device="cpu", signal="quiet", k=3)


def test_the_offline_engine_selects_by_it(here: Path, local: LoGo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a process that knows nothing of this one
    monkeypatch.setenv(plugins.VARIABLE, "")
    inside: Any = LoGo.from_pretrained(
        "demo", engine="vllm", signal="quiet", k=3, model_kwargs={"enforce_eager": True, "max_model_len": 128}
    )
    try:
        for found, expected in zip(inside.select(PROMPTS), local.select(PROMPTS), strict=True):
            same_selection(found, expected)
        assert [one.text for one in inside.generate(PROMPTS, max_new_tokens=8)] == [
            one.text for one in local.generate(PROMPTS, max_new_tokens=8)
        ]
    finally:
        inside.close()
