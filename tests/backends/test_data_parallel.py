"""Two engines of data parallelism: each answers as the library does, whichever vLLM gives a request to."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from vllm_server import KEY, Server, environment

from logo import LoGo


def test_any_engine_answers_as_the_library(serve: Callable[..., Server], logo: LoGo, rows: list[str]) -> None:
    server = serve(
        *("--max-loras", "18", "--max-lora-rank", "8", "--max-model-len", "256", "--data-parallel-size", "2"),
        env=environment(k=4) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)
    asked = [f"{row} {'again' * (number // len(rows))}".strip() for number, row in enumerate(rows * 2)][:64]
    expected = logo.generate(asked, k=4, max_new_tokens=8)

    def ask(prompt: str) -> Any:
        return client.completions.create(model="logo", prompt=prompt, max_tokens=8, temperature=0).model_dump()

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, asked))
    for answer, want in zip(answers, expected, strict=True):
        assert answer["logo"]["adapters"] == list(want.selection.adapters)
        assert answer["choices"][0]["text"].rstrip() == want.text.rstrip()
    counts = re.findall(r'^vllm:prompt_tokens_total{.*engine="(\d)".*} (\S+)$', server.ask("/metrics")[1], re.M)
    assert {engine for engine, count in counts if float(count) > 100} == {"0", "1"}
