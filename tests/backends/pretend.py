"""What vLLM does on GPUs alone, on a CPU: its model runner V2, models that its own backend compiles and splits, and
processes of a server that are forks.

    PRETEND_V2=1        runner V2, whose kernels Triton's interpreter runs; has to be imported before vLLM
    PRETEND_COMPILE=1   vLLM compiles as on a GPU, also where there are adapters

Both change what vLLM finds out about the machine, and nothing of what it does then. As a script this is vLLM's API
server, whose engine and ranks are forks: started anew, as on CPUs, each of them imports vLLM for ten seconds or more.
"""

from __future__ import annotations

import os
import runpy
import types
from typing import Any

PIECES: list[list[dict[str, Any]]] = []

if os.environ.get("PRETEND_V2"):
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import backends

    backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True), compiler=None)


def functions() -> None:
    """Replaces the one kernel of V2 that takes a function of the device, which Triton's interpreter does not have."""
    if not os.environ.get("PRETEND_V2"):
        return
    from vllm.v1.worker.gpu.metrics import logits
    from vllm.v1.worker.gpu.sample import sampler

    logits.get_num_nans = sampler.get_num_nans = lambda found: found.isnan().sum(dim=-1).int()


def compilers() -> None:
    """Has vLLM compile on this CPU as on a GPU, and keeps what it splits models into."""
    if not os.environ.get("PRETEND_COMPILE"):
        return
    from vllm.compilation import backends
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    settled, split = CpuPlatform.check_and_update_config.__func__, backends.split_graph

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        backend = vllm_config.compilation_config.backend
        settled(cls, vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        vllm_config.compilation_config.backend = backend
        vllm_config.compilation_config.compile_sizes = []

    def split_graph(graph: Any, operators: Any) -> Any:
        whole, items = split(graph, operators)
        PIECES.append(
            [
                {
                    "split": item.is_splitting_graph,
                    "operators": [str(node.target) for node in item.graph.graph.nodes if node.op == "call_function"],
                }
                for item in items
            ]
        )
        return whole, items

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    backends.split_graph = split_graph
    backends.VllmBackend.configure_post_pass = lambda self: None  # passes over kernels that only GPUs have


def forks() -> None:
    """Has vLLM fork its processes, as it does where nothing asks for another way."""
    from vllm.platforms.cpu import CpuPlatform

    settled = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        settled(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def nodes() -> None:
    """Has the engines of data parallelism share a machine's memory, of which each needs a part since 0.33."""
    from vllm.v1.worker import cpu_worker

    visible = cpu_worker.get_visible_memory_node
    cpu_worker.get_visible_memory_node = lambda *assigned: visible()


if __name__ == "__main__":
    forks()
    nodes()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
