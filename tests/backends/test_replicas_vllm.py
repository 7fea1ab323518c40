"""A replica of vLLM's server through Ray Serve, and the one that replaces it; several: `tests/test_replicas.py`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from vllm_server import ASSETS, KEY, environment, free_port, started

from encoders import write_encoder
from http_server import eventually
from logo import LoGo
from tolerances import same_scores

pytest.importorskip("ray")

pytestmark = pytest.mark.slow

CODE = "import sys; from logo.cli.app import run; sys.exit(run(sys.argv[1:]))"


def test_an_engine_is_replaced_by_one_with_the_same_pool_at_the_same_address(tmp_path: Path) -> None:
    port = free_port()
    encoder = write_encoder(tmp_path / "encoder")
    options = ["--replicas", "1", "--engine", "vllm", "--base-model", "demo", "--kv-cache-gb", "0.2"]
    options += ["--encoder", os.path.relpath(encoder), "--dtype", "float32"]
    asked = [sys.executable, "-c", CODE, "serve", "--port", str(port), *options]
    asked += ["--", "--enforce-eager", "--max-model-len", "256"]
    variables = {**environment(None), "LOGO_API_KEY": KEY, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    del variables["VLLM_CPU_KVCACHE_SPACE"]  # --kv-cache-gb says it
    body = {"prompt": "What is 7 plus 5?", "temperature": 0, "max_tokens": 8}

    def answer(model: str) -> tuple[int, str | None]:
        status, found = server.ask("/v1/completions", {**body, "model": model})
        return status, found["choices"][0]["text"] if status == 200 else None

    with started(asked, port, variables, tmp_path / "log") as server:
        eventually(lambda: "replicas ready: 1 of 1" in server.log.read_text())
        assert answer("logo") == (200, " 12")
        status, selected = server.ask("/v1/logo/select", {"prompt": body["prompt"]})
        logo = LoGo.from_pretrained("demo", device="cpu", dtype="float32", encoder=encoder)
        assert status == 200 and selected["scores"] == same_scores(dict(logo.select(str(body["prompt"])).scores))
        change = {"lora_name": "sums", "lora_path": str(ASSETS / "adapters" / "add_numbers")}
        assert server.ask("/v1/load_lora_adapter", change, key=None)[0] == 401
        assert server.ask("/v1/load_lora_adapter", change)[0] == 200
        assert answer("sums") == (200, " 12")

        ours = psutil.Process(server.process.pid).children(recursive=True)
        titled = {one: " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]) if one in ours}
        [first] = [one for one, title in titled.items() if "ServeReplica:logo:LoGo" in title]
        engine = first.children(recursive=True)
        assert engine
        os.kill(first.pid, signal.SIGKILL)
        _, left = psutil.wait_procs(engine, 300)
        assert not left  # it holds the memory that the next one needs
        eventually(lambda: server.log.read_text().count("replicas ready: 1 of 1") == 2)
        assert "replicas ready: 0 of 1: A replica's health check failed" in server.log.read_text()
        assert answer("sums") == (200, " 12")  # the new one has it, too
        assert server.ask("/v1/unload_lora_adapter", {"lora_name": "sums"})[0] == 200
        assert answer("sums") == (404, None)

        ours = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(600) == 0, server.log.read_text()
    _, left = psutil.wait_procs(ours, 300)
    assert not left  # not even an engine
