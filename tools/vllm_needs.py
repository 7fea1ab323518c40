"""What LoGo relies on inside vLLM, as data: what it replaces (`logo.vllm.patches`), calls, reads and passes.
`vllm_versions.py` looks for everything here in the sources of each version, without running them.
"""

from __future__ import annotations

from dataclasses import dataclass

from logo.vllm.patches import PATCHES

KNOWN = ("0.32", "0.33", "0.34")
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
        before: the first version of vLLM with which LoGo does without them; empty: there is none.
    """

    modules: tuple[str, ...]
    owner: str
    names: tuple[str, ...]
    before: str = ""


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

HOOKS: tuple[Function, ...] = tuple(
    Function(patch.module, patch.owner, patch.name, tuple(patch.parameters.split())) for patch in PATCHES
)
"""What is replaced."""

_PUNICA = "vllm.lora.punica_wrapper.punica_base"
_MODELS = ("vllm.entrypoints.openai.models.serving", "vllm.entrypoints.openai.serving_models")
_FRONT = (
    "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)

RELIED: tuple[Function | Attributes | Call | Flags, ...] = (
    # The wrapper of LoRA products, in whose place ours is.
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
            *("add_adapter", "activate_adapter", "remove_adapter"),
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
    # The requests of a step.
    Attributes(("vllm.v1.worker.lora_model_runner_mixin",), "LoRAModelRunnerMixin", ("lora_manager",)),
    Function(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin",
        "_set_active_loras",
        ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests"),
    ),
    Attributes(
        ("vllm.v1.core.sched.output",),
        "NewRequestData",
        ("req_id", "prompt_token_ids", "lora_request", "prompt_embeds", "num_computed_tokens", "block_ids"),
    ),
    Attributes(
        ("vllm.v1.core.sched.output",),
        "CachedRequestData",
        ("req_ids", "num_computed_tokens", "new_block_ids"),
    ),
    Attributes(("vllm.v1.core.sched.output",), "CachedRequestData", ("resumed_req_ids",), before="0.34"),
    Attributes(
        ("vllm.v1.core.sched.output",),
        "SchedulerOutput",
        ("scheduled_new_reqs", "scheduled_cached_reqs", "finished_req_ids", "new_block_ids_to_zero"),
    ),
    # Blocks of keys and values that are cleared, and answers from NaN that are marked.
    Attributes(("vllm.v1.kv_cache_interface",), "KVCacheConfig", ("kv_cache_groups", "needs_kv_cache_zeroing")),
    Attributes(("vllm.v1.kv_cache_interface",), "KVCacheSpec", ("block_size", "dcp_sharded")),
    Attributes(
        ("vllm.v1.worker.gpu_model_runner",),
        "GPUModelRunner",
        ("_init_kv_zero_meta", "kv_cache_config"),
        before="0.34",
    ),
    Attributes(
        ("vllm.v1.worker.gpu.model_runner",),
        "GPUModelRunner",
        ("_init_kv_zero_meta", "kv_cache_config", "kv_block_zeroer"),
    ),
    Attributes(("vllm.v1.kv_cache_interface",), "KVCacheGroupSpec", ("layer_names", "kv_cache_spec")),
    Attributes(("vllm.v1.metrics.stats",), "RequestStateStats", ("is_corrupted",)),
    Attributes(("vllm.outputs",), "RequestOutput", ("metrics", "finished", "outputs")),
    Attributes(("vllm.v1.request",), "Request", ("lora_request", "prompt_token_ids", "num_prompt_tokens")),
    Attributes(("vllm.sampling_params",), "SamplingParams", ("skip_reading_prefix_cache",)),
    # Compiled layers and captured graphs.
    Attributes(
        ("vllm.config.compilation",),
        "CompilationConfig",
        ("mode", "cudagraph_mode", "splitting_ops", "static_forward_context"),
    ),
    Function("vllm.compilation.partition_rules", "", "should_split", ("node", "splitting_ops")),
    # The server.
    Attributes(
        ("vllm.plugins.endpoint_plugins.interface",),
        "EndpointPlugin",
        ("name", "required_tasks", "attach_router", "init_state"),
    ),
    *(
        Function(f"vllm.entrypoints.openai.{module}.serving", owner, name, ("self", "request", "raw_request"))
        for module, owner, name in (
            ("completion", "OpenAIServingCompletion", "create_completion"),
            ("chat_completion", "OpenAIServingChat", "create_chat_completion"),
            ("responses", "OpenAIServingResponses", "create_responses"),
        )
    ),
    *(
        Function("vllm.entrypoints.serve.utils.api_utils", "", name)
        for name in ("validate_json_request", "with_cancellation", "load_aware_call")
    ),
    Function("vllm.entrypoints.openai.models.serving", "OpenAIServingModels", "model_name", ("self", "lora_request")),
    # How it reads prompts.
    *(
        Function("vllm.renderers.online_renderer", "OnlineRenderer", name, ("self", "request"))
        for name in ("render_completion", "render_chat")
    ),
    Function(
        "vllm.renderers.online_renderer",
        "OnlineRenderer",
        "render_responses",
        ("self", "request", "previous_messages", "previous_response_outputs", "tool_server"),
        positional=False,
    ),
    Function(
        "vllm.entrypoints.openai.responses.utils",
        "",
        "construct_input_messages",
        ("request_instructions", "request_input", "prev_msg", "prev_response_output"),
        positional=False,
    ),
    Attributes(
        ("vllm.entrypoints.openai.responses.serving",),
        "OpenAIServingResponses",
        ("response_store", "response_store_lock", "msg_store"),
    ),
    Function("vllm.renderers.params", "TokenizeParams", "apply_pre_tokenization", ("self", "tokenizer", "prompt")),
    Attributes(
        ("vllm.config.parallel",),
        "ParallelConfig",
        (
            *("_api_process_count", "worker_extension_cls", "pipeline_parallel_size", "data_parallel_size"),
            "prefill_context_parallel_size",
        ),
    ),
    Attributes(_MODELS, "OpenAIServingModels", ("lora_requests", "base_model_paths", "registry")),
    Function("vllm.entrypoints.openai.models.serving", "OpenAIModelRegistry", "is_base_model", ("self", "model_name")),
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
            *("dtype", "kv_cache_memory_bytes", "served_model_name", "additional_config", "worker_extension_cls"),
        ),
    ),
    # A replica's app.
    Function("vllm.entrypoints.cli.serve", "", "make_arg_parser", ("parser",)),
    Function("vllm.entrypoints.cli.serve", "", "validate_parsed_serve_args", ("args",)),
    Flags(_FRONT, "FrontendArgs", ("host", "port", "allowed_origins", "chat_template")),
)
"""What is called, replaced or read besides."""
