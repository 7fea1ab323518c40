"""Several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from vllm_server import ASSETS, Server, environment

from logo import LoGo
from logo.adapters.pool import open_pool
from logo.models import load_base

USUAL = ("--max-loras", "16", "--max-lora-rank", "8", "--max-model-len", "256")


def test_two_ranks_give_the_same_answers(serve: Callable[..., Server]) -> None:
    model, tokenizer = load_base("demo", device="cpu", dtype="float32")
    logo = LoGo(model, tokenizer, open_pool(None, "demo"))
    files = sorted((ASSETS / "heldout").glob("*.jsonl"))
    rows = [json.loads(line)["context"] for file in files for line in file.read_text().splitlines()[:2]]
    env = environment(k=4) | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    server = serve(*USUAL, "--tensor-parallel-size", "2", env=env)

    def ask(row: str) -> tuple[list[str], str]:
        status, answer = server.ask(
            "/v1/completions", {"model": "logo", "prompt": row, "max_tokens": 10, "temperature": 0}
        )
        assert status == 200, answer
        return answer["logo"]["adapters"], answer["choices"][0]["text"].rstrip()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, rows))
    expected = logo.generate(rows, k=4, max_new_tokens=10)
    assert answers == [(list(one.selection.adapters), one.text.rstrip()) for one in expected]
