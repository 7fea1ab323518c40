"""Replicas of vLLM's server through Ray Serve: the real command, two engines, one address."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

import pytest

from logo.bench.figures import metric
from logo.bench.local_server import LocalServer

pytest.importorskip("vllm")
pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.long]

KEY = "a-key-of-ours"
START = 900.0


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=START)


def test_two_engines_answer_at_one_address() -> None:
    options = ["--replicas", "2", "--engine", "vllm", "--base-model", "demo", "--kv-cache-gb", "0.2"]
    environment = {
        "LOGO_API_KEY": KEY,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # is not passed on
    }
    server = LocalServer([*options, "--", "--enforce-eager"], environment, start=START, stop=START)
    with server:
        replicas: set[tuple[str, str]] = set()
        while len(replicas) < 2:
            with ask(f"{server.url}/health") as answer:
                replicas.add((answer.headers["X-LoGo-Replica"], answer.headers["X-LoGo-Pool"]))
        assert len({pool for _, pool in replicas}) == 1
        body = {"model": "logo", "prompt": "What is 7 plus 5?", "temperature": 0}
        for _ in range(12):
            with ask(f"{server.url}/v1/completions", body) as answer:
                found = json.load(answer)
            assert found["choices"][0]["text"] == " 12"
            assert found["logo"]["adapters"][0] == "add_numbers"
        with ask(f"{server.url}/v1/completions", {**body, "stream": True}) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line]
        assert len(lines) > 3 and lines[-1] == "data: [DONE]"
        with ask(f"{server.url}/metrics") as answer:
            text = answer.read().decode()
        for name, _ in replicas:
            own = "\n".join(line for line in text.splitlines() if f'replica="{name}"' in line)
            assert metric(own, "vllm:generation_tokens_total")
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(f"{server.url}/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "/nowhere"})
        with caught.value as refused:
            assert refused.code in (400, 403, 404)
    assert server.exit_code == 0, server.said
