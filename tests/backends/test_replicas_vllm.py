"""Replicas of vLLM's server through Ray Serve: the real command, two engines, one address."""

from __future__ import annotations

import os
import signal
import urllib.error

import psutil
import pytest

from http_server import eventually
from local_server import LocalServer
from serving import Served

pytest.importorskip("vllm")
pytest.importorskip("ray")

pytestmark = pytest.mark.slow

KEY = "a-key-of-ours"
START = 900.0
BODY = {"model": "logo", "prompt": "What is 7 plus 5?", "temperature": 0}


def replicas(server: LocalServer) -> list[psutil.Process]:
    """Their processes."""
    found = psutil.Process(server.pid).children(recursive=True)
    return [one for one in found if any("ServeReplica:logo" in word for word in _title(one))]


def _title(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


def test_two_engines_answer_at_one_address_and_are_replaced() -> None:
    environment = {
        "LOGO_API_KEY": KEY,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    options = ["--replicas", "2", "--engine", "vllm", "--base-model", "demo", "--kv-cache-gb", "0.2"]
    options += ["--", "--enforce-eager", "--max-model-len", "256"]
    process = LocalServer(options, environment, start=START, stop=START)
    with process:
        server = Served(process.url, KEY)
        eventually(lambda: len(replicas(process)) == 2)
        for _ in range(8):
            found = server.post("/v1/completions", BODY)
            assert found["choices"][0]["text"] == " 12" and found["logo"]["adapters"][0] == "add_numbers"
        lines = [line for line in server.text("/v1/completions", {**BODY, "stream": True}).splitlines() if line]
        assert len(lines) > 3 and lines[-1] == "data: [DONE]"
        with pytest.raises(urllib.error.HTTPError, match="409") as caught:
            server.text("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "anywhere"})
        caught.value.close()

        first, other = replicas(process)
        engine = first.children(recursive=True)
        assert engine
        os.kill(first.pid, signal.SIGKILL)
        _, left = psutil.wait_procs(engine, 30)
        assert not left  # it holds the memory that the next one needs
        eventually(lambda: {one.pid for one in replicas(process)} - {first.pid, other.pid})
        assert server.post("/v1/completions", BODY)["choices"][0]["text"] == " 12"
        ours = psutil.Process(process.pid).children(recursive=True)
    assert process.exit_code == 0, process.said
    _, left = psutil.wait_procs(ours, 30)
    assert not left  # not even an engine
