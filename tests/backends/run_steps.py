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
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from logo.backends.vllm.core import Core, scores_of, texts_of, values
from logo.backends.vllm.marks import answering, probing
from logo.backends.vllm.recipe import Recipe
from logo.core import Selection


class Engine:
    def __init__(self, job: Any) -> None:
        flags = {"enable_lora": True, "enforce_eager": True, "dtype": "float32", "max_model_len": 256, **job["flags"]}
        pretend.compilers()
        pretend.functions()
        self.llm = LLM(job["model"], additional_config={"logo": job["logo"]}, **flags)
        self._put_back = 0
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        scheduler._preempt_request = self._counted(scheduler._preempt_request)
        self.core = Core(self.llm.llm_engine.vllm_config)
        pool = self.core.staged(None, self.call("logo_stage", None))
        scored = {}
        for signal in self.core.signals:
            opened = self.call("logo_signal", signal)
            while texts := texts_of(opened):
                keys = [f"text-{i}" for i in range(len(texts))]
                self.run([{"prompt_token_ids": text} for text in texts], keys, "")
                opened = self.call("logo_calibrate", signal, texts, keys)
            scored[signal] = opened[0]
        self.call("logo_commit")
        self.core.commit(pool, scored)

    def call(self, name: str, *args: Any) -> list[Any]:
        return values(self.llm.collective_rpc(name, args=args))

    def run(self, prompts: list[Any], keys: list[str], signal: str, window: Any = "whole") -> Any:
        """Runs prompts as probes under these keys, and returns what vLLM says of each."""
        engine, ended = self.llm.llm_engine, {}
        for key, prompt in zip(keys, prompts, strict=True):
            with probing(key, signal, window=window):
                engine.add_request(key, prompt, SamplingParams(max_tokens=1))
        while engine.has_unfinished_requests():
            ended |= {output.request_id: output for output in engine.step() if output.finished}
        return [ended[key] for key in keys]

    def probe(self, prompts: list[Any], signal: str) -> Any:
        """Scores, as the router asks for them."""
        keys = [f"prompt-{i}" for i in range(len(prompts))]
        self.run(prompts, keys, signal, self.core.window(signal))
        taken = self.call("logo_scores", keys)[0]
        return [scores_of(taken[key], self.core.pool.digest) for key in keys]

    def generate(self, rows: list[Any], max_tokens: int, min_tokens: int = 0) -> Any:
        """`rows`: prompt and mixture, `{}` for the base model, or a recipe as text."""
        requests = []
        for _, mixture in rows:
            recipe = mixture if isinstance(mixture, str) else self._recipe(mixture)
            requests.append(LoRARequest(recipe, Recipe.parse(recipe).number(), recipe) if recipe else None)
        parameters = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, temperature=0.0)
        keys = [f"answer-{i}" for i in range(len(rows))]
        engine, ended = self.llm.llm_engine, {}
        for key, (prompt, _), request in zip(keys, rows, requests, strict=True):
            with answering(key):
                engine.add_request(key, prompt, parameters, lora_request=request)
        while engine.has_unfinished_requests():
            ended |= {output.request_id: output for output in engine.step() if output.finished}
        made, failed = [ended[key] for key in keys], self.call("logo_failures", keys)[0]
        return {
            "tokens": [list(answer.outputs[0].token_ids) for answer in made],
            "cached": [answer.num_cached_tokens for answer in made],
            "failed": [failed[key] for key in keys],
        }

    def pieces(self) -> Any:
        """Of every compiled model: the operators of each piece that it was split into, and whether it is a split."""
        return pretend.PIECES

    def runner(self) -> str:
        """Which of vLLM's model runners runs."""
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        return type(worker.model_runner).__module__

    def put_back(self) -> int:
        """How often a request was put back, for others to have its blocks."""
        return self._put_back

    def _counted(self, preempt: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> None:
            self._put_back += 1
            preempt(*args, **kwargs)

        return counted

    def _recipe(self, mixture: dict[str, float]) -> str:
        recipe = self.core.pool.recipe(Selection.forced(mixture))
        return str(recipe) if recipe.parts else ""


def perform(job_file: str, result: str) -> None:
    job = json.loads(Path(job_file).read_text())
    engine = Engine(job)
    results = [getattr(engine, step.pop("do"))(**step) for step in job["steps"]]
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
