"""A signal of a plugin inside vLLM: its processes find it through their environment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_server import KEY, environment, free_port, started

from logo import LoGo, plugins
from logo.selection.signals import SIGNALS
from tolerances import same_selection

pytest.importorskip("vllm.lora", reason="needs vLLM: make test-vllm")

pytestmark = pytest.mark.usefixtures("settings_of_vllm")

SIGNAL = """
from logo import register_signal

@register_signal("quiet", layers="early", input="projection", token="each", scale="zscore")
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


@pytest.mark.long
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


@pytest.mark.long
def test_the_server_selects_by_it(here: Path, local: LoGo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    port = free_port()
    asked = [
        "serve",
        "--engine",
        "vllm",
        "--base-model",
        "demo",
        "--port",
        str(port),
        "--kv-cache-gb",
        "0.5",
        "-k",
        "3",
    ]
    asked += ["--signals", "quiet", "--plugin", "plug_vllm:quiet", "--", "--enforce-eager"]
    env = {**environment(None), "LOGO_API_KEY": KEY}
    del env["VLLM_CPU_KVCACHE_SPACE"]  # --kv-cache-gb says it
    command = [sys.executable, "-c", "from logo.cli import main; main()", *asked]
    with started(command, port, env, tmp_path / "log") as server:
        body = {"model": "logo", "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}
        status, answer = server.ask("/v1/completions", {**body, "logo": {"signal": "quiet"}})
        expected = local.generate(PROMPTS[0], max_new_tokens=4)
        assert status == 200, answer
        assert answer["logo"]["adapters"] == list(expected.selection.adapters)
        assert answer["choices"][0]["text"].strip() == expected.text.strip()
        status, answer = server.ask("/v1/completions", {**body, "logo": {"signal": "plug_vllm:quiet"}})
        assert status == 400 and "expected one of calibrated, quiet" in answer["error"]["message"]
