"""The page on moving from vLLM's own LoRA: its start line, with the demo's model and adapters instead of its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_server import ASSETS, Server, environment

from logo import LoGo

PAGE = Path(__file__).parent.parent.parent / "docs" / "from-vllm.md"
# The adapters that stand for those of the page.
STAND_INS = {"sql": "antonym", "summary": "capital"}


def lines_of_the_page() -> list[list[str]]:
    """The flags of its lines that start `vllm serve` itself, without the model."""
    text = PAGE.read_text().replace("\\\n", " ")
    found = re.findall(r"^(?:VLLM_PLUGINS=logo )?vllm serve \S+ (.*--lora-modules.*)$", text, re.M)
    return [shlex.split(flags) for flags in found]


def with_stand_ins(flags: list[str]) -> list[str]:
    """The flags with folders that are there."""
    named = {f"{name}=adapters/{name}": f"{name}={ASSETS / 'adapters' / own}" for name, own in STAND_INS.items()}
    assert named.keys() <= set(flags)
    return [named.get(flag, flag) for flag in flags]


def answered(server: Server, model: str, prompt: str) -> dict[str, Any]:
    status, answer = server.ask(
        "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    )
    assert status == 200, answer
    return dict(answer)


def test_its_start_line_serves_the_modules_of_the_line_before(
    serve: Callable[..., Server], logo: LoGo, rows: list[str]
) -> None:
    before, after = lines_of_the_page()
    assert set(before) < set(after)
    env = environment(None) | {"VLLM_PLUGINS": "logo", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    server = serve(*with_stand_ins(after), "--max-model-len", "256", "--max-loras", "1", env=env)
    listed = {model["id"] for model in server.ask("/v1/models")[1]["data"]}
    assert {"logo", "base", *STAND_INS} <= listed
    prompt = rows[0]
    for name, own in STAND_INS.items():
        expected = logo.generate(prompt, adapters={own: 1.0}, max_new_tokens=8)
        [choice] = answered(server, name, prompt)["choices"]
        assert choice["text"].rstrip() == expected.text.rstrip()
    assert set(answered(server, "logo", prompt)["logo"]["adapters"]) <= STAND_INS.keys()
    for name in ("logo", "base", *STAND_INS):
        assert server.ask("/tokenize", {"model": name, "prompt": prompt})[0] == 200, name
    assert server.ask("/tokenize", {"model": "nobody", "prompt": prompt})[0] == 404
    # A pool grows beyond the slots, of which each prompt then has its one.
    more = {"lora_name": "more", "lora_path": str(ASSETS / "adapters" / "french")}
    assert server.ask("/v1/load_lora_adapter", more)[0] == 200
    expected = logo.generate(prompt, adapters={"french": 1.0}, max_new_tokens=8)
    assert answered(server, "more", prompt)["choices"][0]["text"].rstrip() == expected.text.rstrip()
    assert len(answered(server, "logo", prompt)["logo"]["adapters"]) == 1
