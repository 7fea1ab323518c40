"""The slots that vLLM makes when it is started with the flags of `logo plan`, in bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from logo.models import skeleton
from test_plan import IN_VLLM, IN_VLLM_PER_TOKEN, SIZES, of
from tolerances import PATIENCE


@pytest.mark.long
@pytest.mark.parametrize("targets", IN_VLLM, ids=str)
def test_slots_are_those_that_are_planned(targets: Any, tmp_path: Path) -> None:
    tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path)
    found = of(skeleton(tf.LlamaConfig(**SIZES)), 5, 7, targets, mode="gate")
    asked = {"max_loras": found.max_loras, "max_lora_rank": found.max_lora_rank, "targets": list(found.targets)}
    program = Path(__file__).parent / "slots.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"slots": found.slots.bytes, "per_token": IN_VLLM_PER_TOKEN}
