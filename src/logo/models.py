"""Base models: loads them and their tokenizers by name, and reads their tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from logo.errors import LoGoError, ModelError, UsageError, closest
from logo.hub import hub_error, is_hub_id, snapshot

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo" / "assets"  # of the bundled model and its pool
DEMO_K = 3  # adapters per prompt of the bundled pool, which has fewer than 20; its `pool.json` says so, too
_LOADING = ("dtype", "torch_dtype", "device_map", "attn_implementation", "quantization_config", "revision", "token")
OFFICIAL_MODELS = {
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Qwen2.5-7B": "Qwen/Qwen2.5-7B",
    "deepseek-llm-7b-base": "deepseek-ai/deepseek-llm-7b-base",
}
# In names of what makes a model random in training mode: probabilities of dropout, and noise of routers of experts.
_RANDOM = ("drop", "jitter", "noise")
# What is fetched of a base model: no pickles, other formats or adapters.
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_LEFT_OUT = ["*/*", "consolidated*", "adapter_*"]


class PassEnded(Exception):
    """Ends a forward pass of a model, of which nothing more is needed."""


def resolve_base(name: str, model_dir: str | Path | None = None) -> str:
    """The folder or Hub id of a base model: `"demo"` is the bundled model, `model_dir/name` is used if it exists, and
    the official short names stand for their Hub ids. Raises ModelError for anything else."""
    if name == DEMO:
        return str(DEMO_FOLDER / "model")
    if model_dir is not None and (Path(model_dir) / name / "config.json").is_file():
        return str(Path(model_dir) / name)
    if (Path(name) / "config.json").is_file():
        return name
    if name in OFFICIAL_MODELS or is_hub_id(name):
        return OFFICIAL_MODELS.get(name, name)
    if Path(name).is_dir():
        raise ModelError(f"base model {name}: the folder has no config.json; expected a Hugging Face model folder")
    short_names = (*OFFICIAL_MODELS, DEMO)
    problem = f"base model {name!r}: no such folder, and not a Hub id such as 'Qwen/Qwen2.5-7B'"
    raise ModelError(f"{problem}{closest(name, short_names)}; short names: {', '.join(short_names)}")


def pick_device(device: str = "auto") -> torch.device:
    """`"auto"`: the first CUDA device, else Apple's, else the CPU; or the device named (UsageError: it is not here)."""
    import torch

    if device == "auto":
        apple = torch.backends.mps.is_available()
        return torch.device("cuda:0" if torch.cuda.is_available() else "mps" if apple else "cpu")
    try:
        chosen = torch.device(device)
        count = getattr(torch, chosen.type).device_count()
    except (RuntimeError, TypeError, AttributeError):
        raise UsageError(f"device {device!r}: expected 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'") from None
    if (chosen.index or 0) >= count:
        found = f"{count} GPU(s)" if count else "no GPU"
        raise UsageError(f"device {device!r}: this machine has {found}; use device 'cpu' (--device cpu)")
    return torch.device("cuda:0") if device == "cuda" else chosen


def load_base(
    base_model: str,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    model_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer: safetensors only, no remote code.

    Args:
        base_model: a name that `resolve_base` knows.
        device: see `pick_device`; ignored with `device_map`.
        dtype: `"auto"` (see `usual_dtype`), a torch dtype or its name.
        device_map: `"auto"` distributes a model over several devices (accelerate).
        model_kwargs, **options: for `from_pretrained`, such as `attn_implementation` and `quantization_config`.

    Raises:
        UsageError: an option that cannot be used, or that would run the model's own code.
        ModelError, HubError: the model cannot be found or loaded; the Hub refused or could not be reached.
    """
    import torch
    import transformers

    checked_options(model_kwargs or {})
    asked_dtype = checked_dtype(dtype, None)
    target = pick_device(device if device_map is None else "cpu" if device_map == "cpu" else "auto")
    if device_map is None and target.type != "cpu":
        # To the device at once, which takes half the host memory; quantised weights allow no other way.
        device_map = {"": target}
    source = fetch(resolve_base(base_model, model_dir), revision=revision, token=token)
    safely = {"use_safetensors": True, "trust_remote_code": False}
    with loading(base_model, source):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        loaded_dtype = asked_dtype or usual_dtype(config, target)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=loaded_dtype, device_map=device_map, **options, **(model_kwargs or {}), **safely
        )
    head = model.get_output_embeddings()
    if target.type == "cpu" and model.dtype != torch.float32 and head is not None:
        head.register_forward_pre_hook(_copy_for_head)
    return model.eval().requires_grad_(False), load_tokenizer(source)


def _copy_for_head(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A forward pre-hook: the output head reads a copy of its vectors. They are a slice of those of all tokens, for
    which torch multiplies by a matrix per row; in bfloat16, on the CPU, it copies the whole head for each of them
    first, which takes most of the time of a prefill."""
    import torch

    return tuple(vectors.clone(memory_format=torch.contiguous_format) for vectors in inputs)


def usual_dtype(config: Any, device: torch.device) -> Any:
    """The dtype in which a model of this configuration is loaded if none is asked for: the checkpoint's own on an
    accelerator (`"auto"`). CPUs multiply float16 slowly, and bfloat16 too if they have no instructions for it; then it
    is float32."""
    import torch

    if device.type != "cpu":
        return "auto"
    # Older releases of torch cannot say.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast and config.dtype == torch.bfloat16 else torch.float32


def checked_dtype(asked: str | torch.dtype, default: Any) -> Any:
    """The dtype of that name, or the default for `"auto"`; raises UsageError if there is no such dtype."""
    import torch

    if asked == "auto":
        return default
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype {asked!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return dtype


def checked_options(options: Mapping[str, Any]) -> None:
    """Raises UsageError for options that run the model's code, and for those that `load_base` has itself."""
    for name in options:
        if name in ("trust_remote_code", "allow_all_kernels", "use_safetensors", "weights_only"):
            raise UsageError(f"{name} cannot be set: a model's own code and its pickles are never run")
        if name in _LOADING:
            raise UsageError(f"model_kwargs: give {name!r} as an option of its own")


@dataclass(eq=False)
class ModelLock:
    """The lock under which a model runs; a mixture is active on the whole model, so its users take turns. A thread may
    take it again, but not run the model for something else while a mixture is active, as in a streamer.

    Attributes:
        mixed: whether a mixture is active.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    mixed: bool = False

    @property
    def held_here(self) -> bool:
        """Whether this thread holds the lock."""
        return bool(self.lock._is_owned())  # type: ignore[attr-defined]  # as `threading.Condition` asks

    @contextmanager
    def running(self, *, mixed: bool = False) -> Iterator[None]:
        """Holds the lock while the model runs, with the mixture that the block activates or (`mixed` false) without.
        Raises UsageError if this thread has activated a mixture, which would act in the block, too."""
        with self.lock:
            if self.mixed:
                raise UsageError("the model is answering with a mixture; call this once the answer is complete")
            self.mixed = mixed
            try:
                yield
            finally:
                self.mixed = False


_LOCKS: WeakKeyDictionary[Any, ModelLock] = WeakKeyDictionary()
_MAKING = threading.Lock()


def lock_of(model: Any) -> ModelLock:
    """The lock of a model, which all its engines share."""
    with _MAKING:
        return _LOCKS.setdefault(model, ModelLock())


class WeightWatch:
    """Notices that the weights of a base model were changed in place, as by `load_state_dict` or `model.half()`.

    PyTorch counts what is written to a tensor, and a parameter whose memory was replaced has another address. Neither
    shows writes through `parameter.data` or NumPy, to tensors that were made in inference mode, and to weights that are
    quantised or offloaded, nor modules that were put in the place of others.
    """

    def __init__(self, model: nn.Module) -> None:
        from torch import nn

        self._places = [
            (module._parameters, name)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if type(parameter) is nn.Parameter and not parameter.is_meta
        ]

    def stamp(self) -> Hashable:
        """Differs from an earlier one if the weights were changed meanwhile. No mixture may be active, since a merged
        one has weights of its own."""
        from torch import nn

        stamps: list[Hashable] = []
        for held, name in self._places:
            parameter = held.get(name)
            if type(parameter) is not nn.Parameter:  # it is not there any more, or quantised
                stamps.append(id(parameter))
            elif parameter.is_inference():  # writes to it are not counted
                stamps.append(parameter.data_ptr())
            else:
                stamps.append((parameter._version, parameter.data_ptr()))
        return tuple(stamps)


def droppers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that would make scores and answers random in training mode, which is an UsageError (`check_mode`), as
    is a model that contains layers of PEFT. Dropout is a module, or a probability that a module calls a function by."""
    if any(type(module).__module__.split(".")[0] == "peft" for module in model.modules()):
        problem = "the model contains layers of PEFT, whose adapter would act in every answer"
        raise UsageError(f"{problem}; give the base model, as from `model.unload()` or `model.merge_and_unload()`")
    dropping = []
    for module in model.modules():
        rates = [value for name, value in vars(module).items() if any(word in name for word in _RANDOM)]
        rates += [module.p] if "Dropout" in type(module).__name__ else []
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            dropping.append(module)
    check_mode(dropping)
    return dropping


def check_mode(dropping: Sequence[nn.Module]) -> None:
    """Raises UsageError if one of the `droppers` of a model is in training mode."""
    if any(module.training for module in dropping):
        raise UsageError("the model is in training mode, so dropout or noise changes answers; call model.eval() first")


def context_length(model: Any) -> int | None:
    """The longest sequence that the model can read, in tokens; None if its configuration does not say."""
    config = text_config(model)  # `max_seq_len`: of MPT
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def load_config(base_model: str, *, model_dir: str | Path | None = None) -> Any:
    """The configuration of a base model; from the Hub only this small file is downloaded, which shows that the model
    may be read. Errors as `load_base`."""
    import transformers

    source = resolve_base(base_model, model_dir)
    with loading(base_model, source):
        return transformers.AutoConfig.from_pretrained(fetch(source, config_only=True), trust_remote_code=False)


def load_tokenizer(base_model: str, *, model_dir: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, with a pad token. Errors as `load_base`."""
    import transformers

    source = resolve_base(base_model, model_dir)
    with loading(base_model, source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(fetch(source), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"base model {base_model}: its tokenizer has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def skeleton(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal LM of this configuration on the meta device, where it takes no memory, in its own or another dtype."""
    import torch
    import transformers

    options = {} if dtype is None else {"dtype": dtype}
    with loading(config.name_or_path, config.name_or_path), torch.device("meta"):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, **options)
    return model.eval().requires_grad_(False)


def fetch(
    source: str, *, revision: str | None = None, token: str | bool | None = None, config_only: bool = False
) -> str:
    """The local folder of a base model: `source` itself, or the snapshot of its Hub repository. Unlike transformers it
    says within seconds that the Hub cannot be reached, and takes no pickles. Errors as `logo.hub.snapshot`."""
    if not is_hub_id(source):
        return source
    files = ["config.json"] if config_only else _FILES
    return str(
        snapshot(
            source,
            progress=not config_only,
            revision=revision,
            token=token,
            allow_patterns=files,
            ignore_patterns=_LEFT_OUT,
        )
    )


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
    return model.config.get_text_config()


def stored(model: Any, *, shared: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint by their names (`shared`: under each of several): the parameters, and the buffers in
    which quantised layers have their weights. Other buffers follow from the configuration."""
    yield from model.named_parameters(remove_duplicate=not shared)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def devices(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """The devices that compute: those of the weights, and those to which accelerate moves offloaded ones."""
    import torch

    own = {parameter.device for parameter in model.parameters()}
    targets = {getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks(module)}
    computing = own | {torch.device(target) for target in targets if target is not None}
    return tuple(sorted(computing - {torch.device("meta")}, key=str))


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes; under accelerate's offloading its weights are elsewhere."""
    import torch

    targets = [getattr(hook, "execution_device", None) for hook in _hooks(module)]
    offloaded = [target for target in targets if target is not None]
    if offloaded:
        return torch.device(offloaded[0])
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, pad_id: int = 0, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, length) ids and attention mask. Probing and scoring pad on the right, generating on the left."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(len(row))
        ids[i, columns] = torch.tensor(row)
        mask[i, columns] = 1
    return ids.to(device), mask.to(device)


def _hooks(module: Any) -> tuple[Any, ...]:
    """The hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def without_autocast(model: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which a caller's `torch.autocast` is off. What is kept for later calls, such as calibrations
    and cached keys and values, and the scores that are compared with it, have to have the model's own precision."""
    import torch

    kind = device_of(model.get_input_embeddings()).type
    return partial(torch.autocast, kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext


def tensor_of(model: Any, name: str) -> torch.Tensor:
    """A parameter or buffer of a model by its name: in memory, or read from where accelerate has offloaded it, or, of
    vLLM's skeleton, from the checkpoint (empty if it is not there). Raises ModelError if it is nowhere."""
    path, _, own = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), own)
    if hasattr(tensor, "read"):
        return tensor.read()  # type: ignore[no-any-return]
    if tensor.device.type != "meta":
        return tensor
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):  # the hook of the module or of one that contains it
        for hook in _hooks(model.get_submodule(".".join(parts[:cut]))):
            with suppress(KeyError):
                offloaded: Mapping[str, torch.Tensor] = getattr(hook, "weights_map", None) or {}
                return offloaded[".".join(parts[cut:])]
    raise ModelError(f"base model: weight {name} is not in memory, nor offloaded; expected all weights of the model")
