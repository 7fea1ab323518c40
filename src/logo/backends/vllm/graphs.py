"""Compiled layers and captured CUDA graphs of vLLM: what they need to know of LoGo, and when none may be replayed.

A graph replays what the device did when it was captured, and runs no Python. Products follow their buffers there, but
a tap is Python. So the model is split at the taps as it is at attention, and what is captured is what is between.
Graphs of the whole model, which vLLM takes where every request has one token in the step, have no splits: a step with a
token of a probed prompt, such as the last one of a prompt that was cut into chunks, must not take one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

from logo.backends.vllm import ops
from logo.errors import ModelError

# Set, models are captured as they are and broken at attention alone, without a compiler that knows of splits.
BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"


def compiled(vllm_config: Any) -> bool:
    """Whether a layer's Python runs once for all steps: traced by a compiler, or captured."""
    compilation = vllm_config.compilation_config
    return bool(_value(compilation, "mode")) or bool(_value(compilation, "cudagraph_mode"))


def split(vllm_config: Any) -> bool:
    """Splits the model at the taps. Returns whether it is split: whether graphs of parts leave the taps out.

    Has to be called before the model runs for the first time, and after vLLM has settled its configuration.
    """
    compilation = vllm_config.compilation_config
    operators = getattr(compilation, "splitting_ops", None)
    if not operators or os.environ.get(BREAKABLE, "0") not in ("", "0"):
        return False
    if ops.NAME not in operators:
        operators.append(ops.NAME)
    return True


def stamp(vllm_config: Any, said: Iterable[str]) -> None:
    """Tells vLLM's cache of compiled models what is inside them besides what vLLM knows.

    Without it, a model that was compiled without LoGo, or for a pool that reads at other places, is found in the cache
    and run: without products and without taps.
    """
    additional = getattr(vllm_config, "additional_config", None) or {}
    if not isinstance(additional, dict):
        raise ModelError(f"expected additional_config to be an object, found {type(additional).__name__}")
    vllm_config.additional_config = {**additional, "logo_compiled": list(said)}


def dispatch_v1(original: Callable[..., Any], worker: Any, dispatcher: Any, *args: Any, **kwargs: Any) -> Any:
    """`CudagraphDispatcher.dispatch` of runner V1, without the graphs that leave taps out where some prompt is read."""
    if worker.reading:
        from vllm.config import CUDAGraphMode

        unfit = {CUDAGraphMode.FULL} | (set() if worker.split else {CUDAGraphMode.PIECEWISE})
        kwargs["invalid_modes"] = unfit | set(kwargs.get("invalid_modes") or ())
    return original(dispatcher, *args, **kwargs)


def dispatch_v2(original: Callable[..., Any], worker: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """`CudaGraphManager.dispatch` of runner V2, likewise: such a step runs without a graph."""
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
