"""An adapter that makes the model overflow, inside vLLM's server: an error, whole or in a stream, never silent."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

from vllm_server import ASSETS, KEY, Server, environment

from logo.models import load_base
from test_engine import write_adapter


def test_an_answer_that_overflows_is_an_error(serve: Callable[..., Server], tmp_path: Path) -> None:
    model, _ = load_base("demo", device="cpu", dtype="float32")
    shutil.copytree(ASSETS / "adapters" / "antonym", tmp_path / "pool" / "antonym")
    write_adapter(tmp_path / "pool" / "overflows", model, ("q_proj", "v_proj"), rank=2, seed=3, scale=1e20)
    flags = ("--max-loras", "2", "--max-lora-rank", "8", "--max-model-len", "128")
    server = serve(*flags, env=environment(tmp_path / "pool"))
    asked = {"model": "logo", "prompt": "the opposite of hot is", "max_tokens": 50, "temperature": 0}
    assert server.ask("/v1/completions", {**asked, "model": "antonym"})[0] == 200
    for mixture in ({"overflows": 1.0}, {"antonym": 0.5, "overflows": 0.5}):
        bad = {**asked, "n": 2, "temperature": 0.5, "logo": {"adapters": mixture}}
        status, said = server.ask("/v1/completions", bad)
        assert status == 500 and "logits are NaN" in said["error"]["message"]
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        data = json.dumps({**bad, "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", data, headers)) as answer:
            *_, last, end = [line for line in answer.read().decode().splitlines() if line]
        assert "logits are NaN" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert end == "data: [DONE]"
