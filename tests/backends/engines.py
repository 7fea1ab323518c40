"""Engines of vLLM in processes of their own, whose vLLM `pretend` changes; and mixtures for any engine.

usage: engines.py JOB RESULT

Of the job: `flags` of vLLM and options of `logo`; `prompts` and the `signals` by which they are scored; and `rows`, of
a prompt and its mixture each, which are answered by `max_tokens` tokens.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pretend  # before vLLM, which looks for Triton when it is imported
from vllm_server import environment

from logo import LoGo


def mixtures(names: Sequence[str], count: int) -> list[dict[str, float]]:
    """Of four adapters each; every eighth is the base model alone."""
    drawn = random.Random(0)
    made = [{name: drawn.uniform(0.1, 1.0) for name in drawn.sample(list(names), 4)} for _ in range(count)]
    return [mixture if i % 8 else {} for i, mixture in enumerate(made)]


def run(folder: Path, job: dict[str, Any], **variables: str) -> dict[str, Any]:
    """The `results` of a job. `variables`: of the environment, as `pretend` reads them, and vLLM's."""
    place, result = folder / "job.json", folder / "result.json"
    place.write_text(json.dumps(job))
    command = [sys.executable, __file__, str(place), str(result)]
    env = {**environment(None), **variables}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def results(job: Any) -> dict[str, Any]:
    """Scores by signal, tokens of the answers, and how many of each prompt came from the cache; of every compiled model
    the pieces that it was split into; and which of vLLM's model runners ran."""
    pretend.compilers()
    pretend.functions()
    flags = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, **job["flags"]}
    logo: Any = LoGo.from_pretrained("demo", engine="vllm", dtype="float32", model_kwargs=flags, k=4, **job["logo"])
    run, cached = logo.engine.run, list[int]()

    async def counted(rows: Any) -> Any:
        outputs = await run(rows)
        cached[:] = [output.num_cached_tokens for output in outputs]
        return outputs

    logo.engine.run = counted
    prompts, mixtures = map(list, zip(*job["rows"], strict=True))
    by_signal = {signal: logo.select(job["prompts"], signal=signal) for signal in job["signals"]}
    answers = logo.generate(prompts, adapters=mixtures, max_new_tokens=job["max_tokens"])
    worker = logo.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return {
        "scores": {signal: [list(one.scores.values()) for one in found] for signal, found in by_signal.items()},
        "tokens": [list(answer.token_ids) for answer in answers],
        "cached": cached,
        "pieces": pretend.PIECES,
        "runner": type(worker.model_runner).__module__,
    }


if __name__ == "__main__":
    job, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(results(json.loads(job.read_text()))))
