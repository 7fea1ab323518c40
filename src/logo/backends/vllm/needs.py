"""What LoGo relies on inside vLLM, as data: `hooks.install` wraps what is in `HOOKS`, and `make check-vllm-versions`
looks for everything here in the sources of each version, without running them.

Nothing of vLLM is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KNOWN = ("0.32", "0.33")
"""Versions of vLLM that were looked at."""


@dataclass(frozen=True)
class Function:
    """A function of vLLM's that is wrapped, called or replaced.

    Attributes:
        module: where it is.
        owner: its class; empty: the module itself.
        name: of the function.
        parameters: the names of parameters that it has to take; those of a wrapped function are its first ones.
        positional: whether they have to be its first parameters.
    """

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...] = ()
    positional: bool = True

    @property
    def path(self) -> str:
        """`Class.function`."""
        return f"{self.owner}.{self.name}" if self.owner else self.name


@dataclass(frozen=True)
class Attributes:
    """What objects of a class have: fields, methods, or what is assigned to `self`.

    Attributes:
        modules: where the class is: in the first of these modules that exists.
        owner: the class.
        names: of the attributes.
    """

    modules: tuple[str, ...]
    owner: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """How vLLM itself calls a function whose wrapper reads the arguments.

    Attributes:
        module: that calls it.
        name: of the function.
        positional: arguments before the first keyword, at least.
        keywords: that are given.
    """

    module: str
    name: str
    positional: int
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Flags:
    """Command line flags, which vLLM makes of the fields of classes.

    Attributes:
        modules, owner: of the class, as `Attributes`.
        names: of the flags.
    """

    modules: tuple[str, ...]
    owner: str
    names: tuple[str, ...]


_MANAGER = "vllm.lora.worker_manager"
_V2 = "vllm.v1.worker.gpu.model_runner"
_OUTPUTS = "vllm.v1.engine.output_processor"

HOOKS: Mapping[str, Function] = {
    "count": Function("vllm.v1.metrics.stats", "LoRARequestStates", "_request_update", ("self", "req_id", "lora_name")),
    "create": Function(_MANAGER, "LRUCacheWorkerLoRAManager", "create_lora_manager", ("self", "model", "vllm_config")),
    "wrapper": Function("vllm.lora.model_manager", "", "get_punica_wrapper"),
    "activate": Function(_MANAGER, "WorkerLoRAManager", "set_active_adapters", ("self", "requests", "mapping")),
    "seal": Function(_OUTPUTS, "OutputProcessor", "add_request", ("self", "request")),
    "notice": Function(_OUTPUTS, "OutputProcessor", "process_outputs", ("self", "engine_core_outputs")),
    "skip": Function("vllm.v1.request", "Request", "get_skip_reading_prefix_cache", ("self",)),
    "hash": Function(
        "vllm.v1.core.kv_cache_utils",
        "",
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx"),
    ),
    "schedule": Function("vllm.v1.core.sched.scheduler", "Scheduler", "__init__", ("self", "vllm_config")),
    "spans_v1": Function(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin",
        "set_active_loras",
        ("self", "input_batch", "num_scheduled_tokens"),
    ),
    "graphs_v1": Function("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher", "dispatch", ("self", "num_tokens")),
}
"""By what the wrapper in `hooks` does. Every version has them."""

HOOKS_V2: Mapping[str, Function] = {
    "remember": Function(_V2, "GPUModelRunner", "add_requests", ("self", "scheduler_output")),
    "spans_v2": Function(_V2, "GPUModelRunner", "prepare_inputs", ("self", "scheduler_output")),
    "forget": Function(_V2, "GPUModelRunner", "_remove_request", ("self", "req_id")),
    "graphs_v2": Function(
        "vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager", "dispatch", ("self", "num_reqs", "num_tokens")
    ),
}
"""Of model runner V2, which is there where Triton is."""

_PUNICA = "vllm.lora.punica_wrapper.punica_base"
_MODELS = ("vllm.entrypoints.openai.models.serving", "vllm.entrypoints.openai.serving_models")
_FRONT = (
    "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)

RELIED: tuple[Function | Attributes | Call | Flags, ...] = (
    # The wrapper of kernels: what layers call, and what the manager makes it of.
    Call("vllm.lora.model_manager", "get_punica_wrapper", 1, ("max_batches", "device")),
    Function(_PUNICA, "PunicaWrapperBase", "__init__", ("self", "max_num_batched_tokens", "max_batches", "device")),
    Function(
        _PUNICA,
        "PunicaWrapperBase",
        "update_metadata",
        ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size"),
    ),
    Function(
        _PUNICA,
        "PunicaWrapperBase",
        "add_lora_linear",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
    ),
    Function(
        _PUNICA,
        "PunicaWrapperBase",
        "add_lora_logits",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale"),
    ),
    Function(_PUNICA, "PunicaWrapperBase", "add_lora_embedding", ("self", "y", "x", "lora_b_stacked")),
    Attributes((_PUNICA,), "PunicaWrapperBase", ("_embeddings_indices",)),
    # The managers of adapters.
    Attributes(
        (_MANAGER,),
        "LRUCacheWorkerLoRAManager",
        ("_adapter_manager", "max_num_batched_tokens", "max_num_seqs", "device"),
    ),
    Attributes(
        ("vllm.lora.model_manager",),
        "LRUCacheLoRAModelManager",
        (
            *("modules", "packed_modules", "lora_index_to_id"),
            *("add_adapter", "activate_adapter", "remove_adapter", "pin_adapter"),
        ),
    ),
    Function(
        "vllm.lora.lora_weights",
        "LoRALayerWeights",
        "__init__",
        ("self", "module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"),
    ),
    Function("vllm.lora.lora_model", "LoRAModel", "__init__", ("self", "lora_model_id", "rank", "loras")),
    Attributes(("vllm.lora.lora_model",), "LoRAModel", ("loras",)),
    Attributes(
        ("vllm.lora.layers.base_linear",),
        "BaseLinearLayerWithLoRA",
        ("base_layer", "lora_a_stacked", "lora_b_stacked", "n_slices"),
    ),
    Attributes(("vllm.lora.layers.base",), "BaseLayerWithLoRA", ("set_mapping",)),
    Attributes(("vllm.lora.layers.utils",), "LoRAMapping", ("index_mapping", "prompt_mapping")),
    Attributes(("vllm.lora.request",), "LoRARequest", ("lora_name", "lora_int_id", "lora_path")),
    Attributes(
        ("vllm.config.lora",), "LoRAConfig", ("max_loras", "max_lora_rank", "lora_dtype", "fully_sharded_loras")
    ),
    Function("vllm.distributed.communication_op", "", "tensor_model_parallel_all_gather", ("input_",)),
    # The request of each row of a step.
    Attributes(("vllm.v1.worker.gpu_model_runner",), "GPUModelRunner", ("requests",)),
    Attributes(("vllm.v1.worker.lora_model_runner_mixin",), "LoRAModelRunnerMixin", ("lora_manager",)),
    Attributes(
        ("vllm.v1.worker.gpu_input_batch",), "InputBatch", ("req_ids", "num_computed_tokens_cpu", "num_prompt_tokens")
    ),
    Attributes(
        ("vllm.v1.worker.gpu_input_batch",),
        "CachedRequestState",
        ("sampling_params", "prompt_token_ids", "lora_request"),
    ),
    Attributes(
        ("vllm.v1.worker.gpu.input_batch",), "InputBatch", ("req_ids", "num_scheduled_tokens", "num_computed_tokens_np")
    ),
    Attributes(
        ("vllm.v1.core.sched.output",),
        "NewRequestData",
        ("req_id", "sampling_params", "prompt_token_ids", "lora_request", "prompt_embeds"),
    ),
    Attributes(("vllm.v1.core.sched.output",), "SchedulerOutput", ("scheduled_new_reqs",)),
    Attributes(
        ("vllm.v1.request",),
        "Request",
        ("sampling_params", "lora_request", "prompt_token_ids", "num_prompt_tokens"),
    ),
    Attributes(
        ("vllm.v1.engine",),
        "EngineCoreRequest",
        ("request_id", "sampling_params", "lora_request", "prompt_token_ids", "mm_features", "prompt_embeds"),
    ),
    # Answers whose logits are NaN.
    Attributes(("vllm.v1.engine",), "EngineCoreOutput", ("request_id", "num_nans_in_logits")),
    Attributes((_OUTPUTS,), "OutputProcessor", ("request_states",)),
    Function(_OUTPUTS, "OutputProcessor", "abort_requests", ("self", "request_ids", "internal")),
    Attributes((_OUTPUTS,), "OutputProcessorOutput", ("reqs_to_abort",)),
    Attributes((_OUTPUTS,), "RequestState", ("request_id", "parent_req", "queue")),
    Function(_OUTPUTS, "RequestOutputCollector", "put", ("self", "output")),
    Function("vllm.exceptions", "GracefulHTTPError", "__init__", ("self", "message", "http_status")),
    Attributes(("vllm.sampling_params",), "SamplingParams", ("extra_args",)),
    Attributes(("vllm.v1.core.sched.scheduler",), "Scheduler", ("lora_config", "scheduler_config")),
    # Compiled layers and captured graphs.
    Function(
        "vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher", "dispatch", ("self", "invalid_modes"), positional=False
    ),
    Attributes(("vllm.v1.worker.gpu_model_runner",), "GPUModelRunner", ("cudagraph_dispatcher",)),
    Attributes((_V2,), "GPUModelRunner", ("cudagraph_manager",)),
    Attributes(
        ("vllm.v1.worker.gpu.cudagraph_utils",),
        "BatchExecutionDescriptor",
        ("cg_mode", "num_tokens", "num_reqs", "uniform_token_count", "max_query_len"),
    ),
    Attributes(("vllm.config.compilation",), "CompilationConfig", ("mode", "cudagraph_mode", "splitting_ops")),
    Function("vllm.compilation.partition_rules", "", "should_split", ("node", "splitting_ops")),
    # The server.
    Attributes(("vllm.config.parallel",), "ParallelConfig", ("_api_process_count",)),
    Attributes(_MODELS, "OpenAIServingModels", ("lora_requests", "base_model_paths")),
    Attributes(("vllm.config.vllm", "vllm.config"), "VllmConfig", ("additional_config", "lora_config", "model_config")),
    Function("vllm.v1.engine.async_llm", "AsyncLLM", "collective_rpc", ("self", "method", "args"), positional=False),
    Function(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        "generate",
        ("self", "prompt", "sampling_params", "request_id"),
    ),
    # What `logo serve --engine vllm` and the offline engine pass.
    Flags(
        ("vllm.engine.arg_utils",),
        "EngineArgs",
        (
            *("enable_lora", "max_loras", "max_lora_rank", "lora_target_modules", "max_num_seqs", "max_model_len"),
            *("dtype", "kv_cache_memory_bytes", "served_model_name", "additional_config"),
        ),
    ),
    Flags(_FRONT, "FrontendArgs", ("host", "port", "middleware", "allowed_origins", "chat_template")),
)
"""What is called, replaced or read besides."""
