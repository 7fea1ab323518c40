"""Compiled layers and captured CUDA graphs of vLLM: splits models at the taps, and keeps graphs from skipping taps.

A graph replays the device operations that were captured, and runs no Python. Gated products work in a replay, because
they read fixed buffers; a tap is Python and does not. The model is therefore split at the taps, as it is at attention,
and only the parts between are captured. Graphs of the whole model, which vLLM uses if every request has one token in
the step, have no splits. A step with a token of a probed prompt, such as the last chunk of one, must not use them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

from logo.backends.vllm import ops
from logo.errors import ModelError

# If set, vLLM captures models without the compiler that knows splitting operators, and breaks them at attention alone.
BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"


def compiled(vllm_config: Any) -> bool:
    """Whether the Python code of layers runs once for all steps, because it is compiled or captured."""
    compilation = vllm_config.compilation_config
    return bool(_value(compilation, "mode")) or bool(_value(compilation, "cudagraph_mode"))


def split(vllm_config: Any) -> bool:
    """Splits the model at the taps if vLLM can, and returns whether it is split: piecewise graphs then contain no tap.

    Has to be called after vLLM has completed its configuration, and before the model runs for the first time.
    """
    compilation = vllm_config.compilation_config
    operators = getattr(compilation, "splitting_ops", None)
    if not operators or os.environ.get(BREAKABLE, "0") not in ("", "0"):
        return False
    if ops.NAME not in operators:
        operators.append(ops.NAME)
    return True


def stamp(vllm_config: Any, said: Iterable[str]) -> None:
    """Adds `said` to the configuration by which vLLM finds compiled models in its cache.

    Otherwise vLLM would find and run a model that was compiled without LoGo, or for a pool that reads other places, and
    that therefore lacks the gated products or the taps.
    """
    additional = getattr(vllm_config, "additional_config", None) or {}
    if not isinstance(additional, dict):
        raise ModelError(f"expected additional_config to be an object, found {type(additional).__name__}")
    vllm_config.additional_config = {**additional, "logo_compiled": list(said)}


def dispatch_v1(original: Callable[..., Any], worker: Any, dispatcher: Any, *args: Any, **kwargs: Any) -> Any:
    """`CudagraphDispatcher.dispatch` of runner V1; excludes graphs without taps in steps that read a probed prompt."""
    if worker.reading:
        from vllm.config import CUDAGraphMode

        unfit = {CUDAGraphMode.FULL} | (set() if worker.split else {CUDAGraphMode.PIECEWISE})
        kwargs["invalid_modes"] = unfit | set(kwargs.get("invalid_modes") or ())
    return original(dispatcher, *args, **kwargs)


def dispatch_v2(original: Callable[..., Any], worker: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """`CudaGraphManager.dispatch` of runner V2; uses no graph without taps in steps that read a probed prompt."""
    found = original(manager, *args, **kwargs)
    if not worker.reading:
        return found
    from vllm.config import CUDAGraphMode

    if found.cg_mode == CUDAGraphMode.NONE or (worker.split and found.cg_mode == CUDAGraphMode.PIECEWISE):
        return found
    requests, tokens = args[0], args[1]
    return dataclasses.replace(
        found,
        cg_mode=CUDAGraphMode.NONE,
        num_tokens=tokens,
        num_reqs=requests,
        uniform_token_count=None,
        max_query_len=None,
    )


def _value(compilation: Any, name: str) -> Any:
    found = getattr(compilation, name, None)
    return getattr(found, "value", found)
