"""Base models: loads them and their tokenizers by name, and reads their tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from logo.errors import LoGoError, ModelError, UsageError, closest
from logo.hub import check_revision, hub_error, is_hub_id, snapshot

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO = "demo"
DEMO_K = 3  # adapters per prompt of the bundled pool, which has fewer than 20; its `pool.json` says so, too
_LOADING = ("dtype", "torch_dtype", "device_map", "attn_implementation", "quantization_config", "revision", "token")
OFFICIAL_MODELS = {
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Qwen2.5-7B": "Qwen/Qwen2.5-7B",
    "deepseek-llm-7b-base": "deepseek-ai/deepseek-llm-7b-base",
}
# Files of a base model: configuration, tokenizer and safetensors, but no pickles, other formats or adapters.
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_LEFT_OUT = ["*/*", "consolidated*", "adapter_*"]


def demo_folder() -> Path:
    """The folder of the embedded model and its pool, inside the package."""
    return Path(__file__).parent / "demo" / "assets"


def resolve_base(name: str, model_dir: str | Path | None = None) -> str:
    """The folder or Hub id of a base model's name.

    `"demo"` is the embedded model; `model_dir/name` is used if it exists; the official short names stand for their Hub
    ids; anything else is a folder or a Hub id.

    Raises:
        ModelError: it is none of these.
    """
    if name == DEMO:
        return str(demo_folder() / "model")
    if model_dir is not None and (Path(model_dir) / name / "config.json").is_file():
        return str(Path(model_dir) / name)
    if name in OFFICIAL_MODELS:
        return OFFICIAL_MODELS[name]
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(f"base model {name}: the folder has no config.json; expected a Hugging Face model folder")
        return name
    if is_hub_id(name):
        return name
    known = (*OFFICIAL_MODELS, DEMO)
    raise ModelError(
        f"base model {name!r}: no such folder, and not a Hub id such as 'Qwen/Qwen2.5-7B'{closest(name, known)}; "
        f"short names: {', '.join(known)}"
    )


def pick_device(device: str = "auto") -> torch.device:
    """`"auto"`: the first CUDA device, else Apple's, else the CPU; otherwise the device named. `--device` follows this
    rule, too.

    Raises:
        UsageError: the device does not exist here.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device {device!r}: expected 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'") from None
    if chosen.type == "cuda":
        chosen, count = torch.device("cuda", chosen.index or 0), torch.cuda.device_count()
        if chosen.index >= count:
            found = f"{count} GPU(s)" if count else "no GPU"
            raise UsageError(f"device {device!r}: this machine has {found}; use device 'cpu' (--device cpu)")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device {device!r}: this machine has no GPU of Apple's; use device 'cpu' (--device cpu)")
    return chosen


def load_base(
    base_model: str,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    model_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer: safetensors only, no remote code.

    Args:
        base_model: a name that `resolve_base` knows.
        device: see `pick_device`; ignored with `device_map`.
        dtype: `"auto"` (the checkpoint's own on an accelerator, float32 on the CPU), a torch dtype or its name.
        device_map: `"auto"` distributes a model over several devices (accelerate).
        attn_implementation, quantization_config, model_kwargs: for `AutoModelForCausalLM.from_pretrained`; the last
            has its other options by name.

    Raises:
        UsageError: an option that cannot be used, or that would run the model's own code.
        ModelError: the model cannot be found or loaded.
        HubError: the Hub refused or could not be reached.
    """
    import torch
    import transformers

    asked = {"attn_implementation": attn_implementation, "quantization_config": quantization_config}
    options = {
        **checked_options(model_kwargs or {}),
        **{name: value for name, value in asked.items() if value is not None},
    }
    on_cpu = False
    if device_map is None:
        target = pick_device(device)
        on_cpu = target.type == "cpu"
        # Loaded to the device at once, which takes half the host memory; quantised weights allow no other way.
        device_map = None if on_cpu else {"": target}
    source = fetch(resolve_base(base_model, model_dir), revision=revision, token=token)
    with loading(base_model, source):
        tokenizer = _padded(transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False), base_model)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=checked_dtype(dtype, torch.float32 if on_cpu else "auto"),
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    return model.eval().requires_grad_(False), tokenizer


def _padded(tokenizer: PreTrainedTokenizerBase, base_model: str) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"base model {base_model}: its tokenizer has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def checked_dtype(asked: str | torch.dtype, default: Any) -> Any:
    """The dtype of that name, or the default for `"auto"`; raises UsageError if there is no such dtype."""
    import torch

    if asked == "auto":
        return default
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype {asked!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return dtype


def checked_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Checks options for transformers; those of `load_base` itself and those that run the model's code are refused."""
    for name in options:
        if name in ("trust_remote_code", "use_safetensors", "weights_only"):
            raise UsageError(f"{name} cannot be set: a model's own code and its pickles are never run")
        if name in _LOADING:
            raise UsageError(f"model_kwargs: give {name!r} as an option of its own")
    return options


class ModelLock:
    """The lock under which a model runs; a mixture is active on the whole model, so its users take turns.

    A thread may take it again. Only the code that is called while a mixture is active, such as a streamer, cannot run
    the model for something else.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._mixed = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def check_free(self) -> None:
        """Raises UsageError if this thread holds it, so that waiting for another thread that takes it would not end."""
        if self._lock._is_owned():  # type: ignore[attr-defined]  # as `threading.Condition` asks
            raise UsageError(
                "the model is answering in this thread, and a stream, which answers in another one, would wait for "
                "that for ever: read it once the answer is complete"
            )

    @contextmanager
    def running(self, *, mixed: bool = False) -> Iterator[None]:
        """Holds the lock while the model runs; no mixture is active but the one that the block activates, if any.

        Raises:
            UsageError: this thread has activated a mixture, which would act in the block, too.
        """
        with self._lock:
            if self._mixed:
                raise UsageError(
                    "the model is answering with a mixture of adapters, and can compute nothing else in the middle of "
                    "that: call this once the answer is complete"
                )
            self._mixed = mixed
            try:
                yield
            finally:
                self._mixed = False


# One lock per model that is in memory. The keys are compared by identity, as modules are.
_LOCKS: WeakKeyDictionary[Any, ModelLock] = WeakKeyDictionary()
_MAKING = threading.Lock()


def lock_of(model: Any) -> ModelLock:
    """The lock of a model, which all its engines share."""
    with _MAKING:
        return _LOCKS.setdefault(model, ModelLock())


def check_usable(model: PreTrainedModel) -> None:
    """Checks a model that the caller has loaded.

    Raises:
        UsageError: the model contains layers of PEFT, or has dropout in training mode.
    """
    if any(type(module).__module__.split(".")[0] == "peft" for module in model.modules()):
        raise UsageError(
            "the model contains layers of PEFT, whose adapter would be mixed into every answer; give the base model: "
            "`model.unload()` removes the adapter, and `model.merge_and_unload()` makes it a part of the base model"
        )
    check_mode(model)


def check_mode(model: PreTrainedModel) -> None:
    """Raises UsageError if the model is in training mode and has dropout, which makes scores and answers random."""
    if any(module.training and _drops(module) for module in model.modules()):
        raise UsageError(
            "the model is in training mode, in which dropout changes scores and answers; call model.eval() first"
        )


def _drops(module: Any) -> bool:
    """Whether a module drops values in training mode: dropout itself, or a module that calls it as a function."""
    found = [value for name, value in vars(module).items() if "drop" in name]
    found += [module.p] if "Dropout" in type(module).__name__ else []
    return any(isinstance(value, float) and value > 0 for value in found)


def context_length(model: Any) -> int | None:
    """The longest sequence that the model can read, in tokens; None if its configuration does not say."""
    config = text_config(model)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def load_config(base_model: str, *, model_dir: str | Path | None = None) -> Any:
    """The configuration of a base model; from the Hub only this small file is downloaded. Errors as `load_base`."""
    import transformers

    source = resolve_base(base_model, model_dir)
    with loading(base_model, source):
        return transformers.AutoConfig.from_pretrained(fetch(source, config_only=True), trust_remote_code=False)


def load_tokenizer(base_model: str, *, model_dir: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model. Errors as `load_base`."""
    import transformers

    source = resolve_base(base_model, model_dir)
    with loading(base_model, source):
        found = transformers.AutoTokenizer.from_pretrained(fetch(source), trust_remote_code=False)
        return _padded(found, base_model)


def load_skeleton(base_model: str, *, model_dir: str | Path | None = None) -> PreTrainedModel:
    """A base model without weights, on the meta device, from its configuration alone. Errors as `load_base`."""
    config = load_config(base_model, model_dir=model_dir)
    with loading(base_model, resolve_base(base_model, model_dir)):
        return skeleton(config)


def skeleton(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal LM of this configuration on the meta device, where it takes no memory.

    Args:
        dtype: of its parameters; None: that of the configuration.
    """
    import torch
    import transformers

    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, **options)
    return model.eval().requires_grad_(False)


def cached_heads(config: Any) -> tuple[int, int]:
    """Number and width of the heads of keys that a layer caches for a token; values have as many."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, width


def check_access(base_model: str, *, model_dir: str | Path | None = None) -> None:
    """Checks that a base model exists and may be read, before anything large is downloaded. Errors as `load_base`."""
    fetch(resolve_base(base_model, model_dir), config_only=True)


def fetch(
    source: str, *, revision: str | None = None, token: str | bool | None = None, config_only: bool = False
) -> str:
    """The local folder of a base model: `source` itself, or the snapshot of its Hub repository.

    Unlike transformers' own download it says within seconds that the Hub cannot be reached, and takes no pickles.

    Args:
        config_only: download the configuration alone, which shows that the model may be read.

    Raises:
        UsageError: a revision that could not exist.
        HubError: the Hub refused or could not be reached.
    """
    if not is_hub_id(source):
        return source
    check_revision(source, revision)
    wanted: dict[str, Any] = {
        "allow_patterns": ["config.json"] if config_only else _FILES,
        "ignore_patterns": _LEFT_OUT,
    }
    try:
        return str(snapshot(source, revision=revision, token=token, progress=not config_only, **wanted))
    except Exception as error:  # the boundary, as in `logo.hub.download_files`
        raise hub_error(source, error, revision=revision) from error


@contextmanager
def loading(base_model: str, source: str) -> Iterator[None]:
    """Turns errors of transformers into one line about the base model."""
    try:
        yield
    except LoGoError:
        raise
    except Exception as error:
        if is_hub_id(source):
            raise hub_error(source, error) from error
        reason = " ".join(str(error).split())
        raise ModelError(f"base model {base_model}: cannot be loaded from {source}: {reason}") from error


def text_config(model: Any) -> Any:
    """The configuration of the text model, whose layers adapters change, also where it is part of a larger one."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def stored(model: Any, *, shared: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint by their names: the parameters, and the buffers in which quantised layers have their
    weights. Other buffers follow from the configuration.

    Args:
        shared: whether a parameter that has several names comes under each of them.
    """
    yield from model.named_parameters(remove_duplicate=not shared)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def devices(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """The devices that compute: those of the weights, and those to which accelerate moves offloaded ones."""
    import torch

    found = {parameter.device for parameter in model.parameters() if parameter.device.type != "meta"}
    targets = {getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks(module)}
    return tuple(sorted(found | {torch.device(target) for target in targets if target is not None}, key=str))


def _hooks(module: Any) -> Sequence[object]:
    """The hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def tensor_of(model: Any, name: str) -> torch.Tensor:
    """A parameter or buffer of a model by its name.

    If accelerate has offloaded it, it is read from the host or the disk. If another process holds it, it is read from
    the checkpoint, and empty if the checkpoint does not have it.

    Raises:
        ModelError: it is neither in memory nor where accelerate keeps what is offloaded.
    """
    parts = name.split(".")
    found: torch.Tensor = getattr(model.get_submodule(".".join(parts[:-1])), parts[-1])
    read = getattr(found, "read", None)
    if found.device.type != "meta" or read is not None:
        return found if read is None else read()
    for cut in range(len(parts) - 1, -1, -1):  # the hook of the module or of one that contains it
        for hook in _hooks(model.get_submodule(".".join(parts[:cut]))):
            kept = getattr(hook, "weights_map", None)
            if kept is not None:
                with suppress(KeyError):
                    found = kept[".".join(parts[cut:])]
                    return found
    raise ModelError(
        f"base model: weight {name} is not in memory, and accelerate does not keep it either; expected a model with "
        "all its weights"
    )
