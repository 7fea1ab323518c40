"""A server whose HTTP is answered by two processes: `vllm serve --api-server-count 2`."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_server import ASSETS, KEY, environment, free_port, serve_command, started

from logo import LoGo


def test_two_processes_answer_as_the_library_and_do_not_change_the_pool(
    tmp_path: Path, logo: LoGo, rows: list[str]
) -> None:
    port = free_port()
    asked = serve_command(
        *("--api-server-count", "2", "--port", str(port), "--host", "127.0.0.1", "--api-key", KEY),
        *("--max-loras", "18", "--max-lora-rank", "8", "--max-model-len", "256"),
        *("--middleware", "logo.backends.vllm.Router"),
    )
    # With a cache of its own, so that one of them has to calibrate while the other one waits.
    env = environment(k=4, adapter_changes=True, cache=str(tmp_path / "cache"))
    expected = logo.generate(rows[::8], k=4, max_new_tokens=8)
    with started(asked, port, env, tmp_path / "log") as server:

        def ask(row: str) -> tuple[list[str], str]:
            body = {"model": "logo", "prompt": row, "max_tokens": 8, "temperature": 0}
            status, answer = server.ask("/v1/completions", body)
            assert status == 200, answer
            return answer["logo"]["adapters"], answer["choices"][0]["text"].rstrip()

        with ThreadPoolExecutor(8) as pool:  # over several connections, which both accept
            found = list(pool.map(ask, rows[::8]))
        assert found == [(list(one.selection.adapters), one.text.rstrip()) for one in expected]
        adapter = {"lora_name": "new", "lora_path": str(ASSETS / "adapters" / "antonym")}
        status, said = server.ask("/v1/load_lora_adapter", adapter)
        assert status == 400 and "several processes answer HTTP" in json.dumps(said)
