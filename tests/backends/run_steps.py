"""Runs engines of vLLM, step by step as files describe, and writes the results.

A process of its own for each engine: vLLM keeps state that a second engine in the same process would meet. All are
forks of this one, since importing vLLM takes longer than starting an engine.

usage: run_steps.py DESCRIPTOR

Reads lines, each of three names of files: of the job, and for the results and for what the engine says. Answers each
with the exit code of its process, through a file descriptor of its own, since vLLM writes on the usual ones.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

import pretend  # before vLLM, which looks for Triton when it is imported
import vllm  # noqa: F401  (once, for all forks)

from logo import LoGo


class Steps:
    """An engine, and what it does."""

    def __init__(self, job: Any) -> None:
        flags = {"enforce_eager": True, "max_model_len": 512, **job["flags"]}
        pretend.compilers()
        pretend.functions()
        settings = dict(job["logo"])
        base, pool = job["model"], settings.pop("pool")
        settings |= {"dtype": flags.pop("dtype", "float32"), "engine": "vllm"}
        made: Any = LoGo.from_pretrained(base, pool, model_kwargs=flags, **settings)
        self.logo, self._cached = made, list[int]()
        run = made.engine.run

        async def counted(rows: Any) -> Any:
            outputs = await run(rows)
            self._cached = [output.num_cached_tokens for output in outputs]
            return outputs

        made.engine.run = counted

    def probe(self, prompts: list[Any], signal: str) -> Any:
        """Scores of the adapters, in pool order."""
        return [list(one.scores.values()) for one in self.logo.select(prompts, signal=signal)]

    def generate(self, rows: list[Any], max_tokens: int, min_tokens: int = 0) -> Any:
        """`rows`: prompt and mixture, `{}` for the base model."""
        prompts, mixtures = ([row[i] for row in rows] for i in (0, 1))
        length = {"max_new_tokens": max_tokens, "min_new_tokens": min_tokens}
        answers = self.logo.generate(prompts, adapters=mixtures, **length)
        return {"tokens": [list(answer.token_ids) for answer in answers], "cached": self._cached}

    def memory(self) -> int:
        """Bytes that this process has in memory."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def pieces(self) -> Any:
        """Of every compiled model: the operators of each piece that it was split into, and whether it is a split."""
        return pretend.PIECES

    def runner(self) -> str:
        """Which of vLLM's model runners runs."""
        worker = self.logo.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        return type(worker.model_runner).__module__


def perform(job_file: str, result: str) -> None:
    job = json.loads(Path(job_file).read_text())
    steps = Steps(job)
    results = [getattr(steps, step.pop("do"))(**step) for step in job["steps"]]
    Path(result).write_text(json.dumps(results))


def forked(job: str, result: str, said: str) -> int:
    """The exit code of the process that did it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(said, "wb") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            perform(job, result)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            print(forked(*json.loads(line)), file=answers, flush=True)
