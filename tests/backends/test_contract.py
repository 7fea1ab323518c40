"""The contract of servers (`server_contract.py`) on vLLM's, as far as it has what is asked.

vLLM has one key and no tenants, tells its metrics without it, reads bodies of any size and takes adapters from
anywhere. What is left of these tests is here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm_server import ASSETS, environment, free_port, started

from logo import LoGo
from logo.cli.app import run
from server_contract import *  # noqa: F403
from server_contract import COMPLETION, KEY, LOAD, UNLOAD, Server, completion, eventually, write_changes

# Of these, vLLM has nothing, or something else, which the tests below ask for.
del test_a_body_that_is_no_request_is_refused, test_a_tenant_uses_and_sees_its_own_adapters_only  # noqa: F821
del test_what_cannot_be_added_changes_nothing  # noqa: F821
del test_adapters_come_and_go_under_load  # noqa: F821  (`test_server.py` changes a pool under load)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("changes")
    changes, code = write_changes(folder), "import sys; from logo.cli.app import run; sys.exit(run(sys.argv[1:]))"

    def start(*options: str, key: str = "") -> AbstractContextManager[Any]:
        raise NotImplementedError

    asked = ["serve", "--engine", "vllm", "--base-model", "demo", "--port", str(port := free_port())]
    asked += ["--kv-cache-gb", "0.5", "--log", "json", "--", "--enforce-eager", "--enable-auto-tool-choice"]
    asked += ["--tool-call-parser", "hermes"]
    env = {**environment(None), "LOGO_API_KEY": KEY, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    del env["VLLM_CPU_KVCACHE_SPACE"]
    log = tmp_path_factory.mktemp("log") / "log"
    with started([sys.executable, "-c", code, *asked], port, env, log) as running:
        able, said = frozenset({"tools", "schema"}), log.read_text
        yield Server(running.url, "demo", "vllm", able, changes, said, start, KEY)
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.process.wait(60) == 0  # signals and exit codes are vLLM's


@pytest.fixture(scope="module")
def library() -> LoGo:
    return LoGo.from_pretrained("demo", device="cpu")


def test_a_key_is_asked_for(server: Server) -> None:
    for key in ("", "another", KEY + "x"):
        for path in ("/v1/models", "/v1/logo/adapters"):
            assert replace(server, key=key).ask(path).status_code == 401
        assert replace(server, key=key).ask("/v1/completions", COMPLETION).status_code == 401
    assert replace(server, key="").ask("/health").status_code == 200 and KEY not in server.said()


def test_a_page_of_another_origin_changes_nothing(server: Server) -> None:
    before = server.ask("/v1/models").json()
    for path, body in ((UNLOAD, {"lora_name": "antonym"}), (LOAD, {"lora_name": "new", "lora_path": "/good"})):
        for origin in ("https://elsewhere.test", "http://localhost:1", "null"):
            assert server.ask(path, body, Origin=origin).status_code == 403
        for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what browsers send without asking first
            answer = server.ask(path, b'{"lora_name": "antonym", "lora_path": "x"}', **{"Content-Type": kind})
            assert answer.status_code in (400, 415)
    assert server.ask("/v1/models", Host="elsewhere.test").status_code == 403
    assert [one["id"] for one in server.ask("/v1/models").json()["data"]] == [one["id"] for one in before["data"]]


def test_who_hangs_up_is_forgotten(server: Server) -> None:
    body = {"model": "antonym", "prompt": "The", "max_tokens": 400, "n": 4, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(20):  # a busy machine may look only when all of it has been answered
        before = server.generated()
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=300) as answer:
            next(answer.iter_lines())
        eventually(lambda: server.busy() == 0)
        if server.generated() < before + 4 * 400:
            break
    else:
        raise AssertionError("every answer was generated to its end")
    assert completion(server)["choices"]


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
