"""Pools that `logo train` and `logo pool` write, in vLLM as it is without us: the same tokens as here, also with a rank
per module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from logo import LoGo
from logo.cli.run import run
from logo.models import demo_folder
from tolerances import PATIENCE

pytest.importorskip("vllm.lora", reason="needs vLLM: make test-vllm")

PLAIN = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    base, asked = sys.argv[1], json.load(sys.stdin)
    llm = LLM(base, enable_lora=True, max_lora_rank=8, dtype="float32", max_model_len=128, enforce_eager=True)
    answers = {}
    for number, (folder, rows) in enumerate(asked.items(), start=1):
        adapter = LoRARequest(folder, number, folder)
        found = llm.generate(rows, SamplingParams(temperature=0.0, max_tokens=12), lora_request=adapter)
        answers[folder] = [list(one.outputs[0].token_ids) for one in found]
    print("answers", json.dumps(answers))
"""


@pytest.mark.long
def test_plain_vllm_answers_with_pools_that_were_trained_or_pruned_and_converted(
    tmp_path: Path, rows: list[str]
) -> None:
    made = tmp_path / "made"
    tasks = ["--rows", str(demo_folder() / "heldout"), "--tasks", "antonym,plural"]
    assert run(["train", *tasks, "--out", str(made), "--lr", "4e-3", "--epochs", "2"]) == 0
    small, half = tmp_path / "small", tmp_path / "half"
    assert run(["pool", "prune", str(demo_folder() / "adapters"), "--out", str(small), "--energy", "0.9"]) == 0
    assert run(["pool", "convert", str(small), "--out", str(half), "--dtype", "fp32"]) == 0
    assert json.loads((half / "antonym" / "adapter_config.json").read_text())["rank_pattern"]
    (tmp_path / "plain.py").write_text(PLAIN)
    folders = [half / "antonym", half / "find_name", half / "reverse_word", made / "antonym", made / "plural"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "plain.py"), str(demo_folder() / "model")],
        input=json.dumps({str(folder): rows[:24] for folder in folders}),
        env={
            **os.environ,
            "VLLM_PLUGINS": "",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [answers] = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("answers ")]
    for pool in (half, made):
        logo = LoGo.from_pretrained("demo", pool, device="cpu", dtype="float32")
        for folder in (one for one in folders if one.parent == pool):
            ours = logo.generate(rows[:24], adapters={folder.name: 1.0}, max_new_tokens=12)
            assert answers[str(folder)] == [list(one.token_ids) for one in ours]
