"""A program: starts vLLM on a model and prints the bytes of its adapter slots and of one token's keys and values.

python slots.py FOLDER '{"max_loras": 5, "max_lora_rank": 8, "targets": ["q_proj"]}'
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def bytes_of(worker: Any) -> dict[str, int]:
    """In a worker: what its tensors take."""
    runner, slots = worker.model_runner, 0
    for module in runner.model.modules():
        for name in ("lora_a_stacked", "lora_b_stacked"):
            held = getattr(module, name, ())
            slots += sum(tensor.nbytes for tensor in (held if isinstance(held, (tuple, list)) else (held,)))
    tokens = runner.kv_cache_config.num_blocks * worker.vllm_config.cache_config.block_size
    return {"slots": slots, "per_token": sum(cache.nbytes for cache in runner.kv_caches) // tokens}


def main(folder: str, asked: dict[str, Any]) -> None:
    """Starts an engine and asks its worker."""
    from vllm import LLM

    engine = LLM(
        folder,
        enable_lora=True,
        max_loras=asked["max_loras"],
        max_lora_rank=asked["max_lora_rank"],
        lora_target_modules=asked["targets"],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        skip_tokenizer_init=True,
    )
    print("\n" + json.dumps(engine.collective_rpc(bytes_of)[0]))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
