"""`logo serve --engine vllm`: started for real, asked over HTTP and through its page, and ended by a signal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_server import ASSETS, KEY, Server, environment, free_port, started

from logo import LoGo
from logo.adapters.pool import open_pool
from logo.cli.app import run
from logo.models import load_base

PROMPT = "What is the opposite of hot?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    code = "import sys; from logo.cli.app import run; sys.exit(run(sys.argv[1:]))"
    asked = ["serve", "--engine", "vllm", "--base-model", "demo", "--port", str(port), "--kv-cache-gb", "0.5"]
    env = {**environment(None), "LOGO_API_KEY": KEY}
    del env["VLLM_CPU_KVCACHE_SPACE"]  # --kv-cache-gb says it
    log = tmp_path_factory.mktemp("server") / "log"
    with started([sys.executable, "-c", code, *asked, "--", "--enforce-eager"], port, env, log) as running:
        yield running


@pytest.fixture(scope="module")
def logo() -> LoGo:
    model, tokenizer = load_base("demo", device="cpu", dtype="float32")
    return LoGo(model, tokenizer, open_pool(None, "demo"))


def test_it_answers_as_the_library_does(server: Server, logo: LoGo) -> None:
    expected = logo.generate(PROMPT, max_new_tokens=16)
    body = {"model": "logo", "max_tokens": 16, "temperature": 0}
    for path, asked in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    ):
        status, answer = server.ask(path, {**body, **asked})
        assert status == 200, answer
        choice = answer["choices"][0]
        assert (choice.get("text") or choice["message"]["content"]).strip() == expected.text.strip()
        assert answer["logo"]["adapters"] == list(expected.selection.adapters)


def test_a_key_and_a_name_of_this_machine_are_needed(server: Server) -> None:
    for path in ("/v1/models", "/v1/logo/adapters"):
        assert server.ask(path, key=None)[0] == 401, path
    assert "16 adapters, 16 slots of rank 8" in server.log.read_text()
    request = urllib.request.Request(f"{server.url}/health", headers={"Host": "elsewhere.test"})
    with pytest.raises(urllib.error.HTTPError, match="403"):  # a name that was given this machine's address
        urllib.request.urlopen(request, timeout=60)


def test_a_pool_changes_only_where_vllm_allows_it(server: Server) -> None:
    status, _ = server.ask(
        "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": str(ASSETS / "adapters" / "antonym")}
    )
    assert status == 404


def test_verify_measures_log_probabilities(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def verified(*options: str) -> tuple[int, dict[str, Any]]:
        code = run(["verify", server.url, "--base-model", "demo", "--api-key", KEY, "--json", "--limit", "1", *options])
        return code, json.loads(capsys.readouterr().out)

    code, found = verified()
    assert code == 0 and found["ok"] and found["measure"] == "nats per token, by log-probabilities"
    assert all(row["error"] < 1e-3 and row["effect"] > 0.1 for row in found["rows"][1:])
    changed = shutil.copytree(ASSETS / "adapters", tmp_path / "changed")
    shutil.copy(ASSETS / "adapters" / "plural" / "adapter_model.safetensors", changed / "antonym")
    code, found = verified("--adapters", str(changed))
    assert code == 1 and [row["adapter"] for row in found["rows"] if row["verdict"] != "ok"] == ["antonym"]


def test_signals_and_exit_codes_are_vllms(server: Server) -> None:
    command: Any = Path(f"/proc/{server.process.pid}/cmdline")
    if command.exists():
        assert b"vllm.entrypoints.openai.api_server" in command.read_bytes()
        assert KEY.encode() not in command.read_bytes()
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(60) == 0
