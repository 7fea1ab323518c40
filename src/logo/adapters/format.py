"""A PEFT adapter folder as an `Adapter`: which modules it adapts, with which scale, and how to read them.

The tensor keys are the truth about what is adapted; the configuration only gives ranks and scales. Opening an adapter
reads the configuration and the header of the weight file. Tensors are read later, and checked when they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from logo.adapters.activation import EVERYWHERE, Activation
from logo.adapters.config import LoraConfig, Refusal, changed_base, parse_config, read_config, read_raw
from logo.adapters.files import CONFIG, PICKLE, SAFETENSORS
from logo.adapters.initial import initial_folder, with_initial
from logo.adapters.layout import BaseLayout
from logo.adapters.notes import noted_alone
from logo.adapters.weights import PickleFile, SafetensorsFile, WeightFile
from logo.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import nn

_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>.+))?\.weight$")
_EMBEDDING_KEY = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>.+))?$")
_MAGNITUDE_KEY = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(?:\..+)?$")
_PREFIX = re.compile(r"^(?:_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.|base_model\.)+")
_LFS_POINTER = b"version https://git-lfs"
_INFIX = re.compile(r"\.(?:_orig_mod|_fsdp_wrapped_module|base_layer)(?=\.|$)")


@dataclass(frozen=True)
class LoraModule:
    """Where one adapted module's `A (r, in)` and `B (out, r)` lie in the file, and the scale `s` of `s B A`.

    Of an `embedding`, `in` counts tokens, and the update is added to a token's vector: `s B A[:, token]`. With a
    `magnitude` (DoRA, arXiv 2402.09353), whose key it is, the module's weight becomes `m (W + s B A) / ‖W + s B A‖`,
    row by row.
    """

    key_a: str
    key_b: str
    rank: int
    in_features: int
    out_features: int
    scaling: float
    embedding: bool = False
    magnitude: str | None = None


@dataclass(frozen=True)
class LoraWeights:
    """The tensors of one adapted module, on the CPU, in the dtype they are stored in: `ΔW = scaling · B A`."""

    A: torch.Tensor  # (r, in)
    B: torch.Tensor  # (out, r)
    scaling: float
    magnitude: torch.Tensor | None = None  # (out,), of DoRA

    def scaled_b(self) -> torch.Tensor:
        """`s B` in float32, (out, r)."""
        return self.B.float() * self.scaling


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter on disk.

    Attributes:
        name: its name in the pool: free-form, dots and slashes included.
        folder: the PEFT folder it was read from.
        config: rank, alpha and patterns.
        modules: adapted module path -> where its tensors are. Paths are as in the file (known wrapper prefixes
            removed) until `fit` maps them to the base model's own.
        file: the weight file.
        activation: on which tokens it acts.
        copies: key in the file -> parameter of the base model, of whole weights in it. They were not compared with the
            base model's yet: `fit` does that, and nothing is read before.
    """

    name: str
    folder: Path
    config: LoraConfig
    modules: Mapping[str, LoraModule]
    file: WeightFile
    activation: Activation = EVERYWHERE
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(m.rank * (m.in_features + m.out_features) for m in self.modules.values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks in it, ascending."""
        return tuple(sorted({m.rank for m in self.modules.values()}))

    @property
    def alone(self) -> bool:
        """Whether it answers alone only, with weight 1 (DoRA)."""
        return self.config.dora

    @property
    def size(self) -> int:
        """Bytes of the weight file."""
        return self.file.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """Digest of the weight file, equal to what `sha256sum` prints. Reads the whole file, once.

        Raises:
            AdapterError: the file became unreadable.
        """
        try:
            return self.file.sha256()
        except OSError as error:
            raise AdapterError(self.name, _unreadable(error, self.file.path)) from error

    @property
    def scales(self) -> tuple[tuple[str, float], ...]:
        """Module path and the factor of its product, sorted: what `config` adds to the weights."""
        return tuple(sorted((path, module.scaling) for path, module in self.modules.items()))

    def fit(self, layout: BaseLayout, model: nn.Module | None = None) -> Adapter:
        """The same adapter with its modules under the base model's own paths.

        Args:
            model: the base model itself, for adapters that hold copies of its weights or adapt its embedding; without
                it, they do not fit.

        Raises:
            AdapterError: a tensor matches no module of the base, or one of another shape (up to five are named); or it
                holds whole weights that are not the base model's.
        """
        if self.alone and model is None:
            raise AdapterError(self.name, "it is a DoRA adapter (use_dora), which cannot be mixed")
        fitted: dict[str, LoraModule] = {}
        problems: list[str] = []
        for path, module in self.modules.items():
            if module.embedding and model is None:
                raise AdapterError(self.name, f"it adapts an embedding ({path}), which is not mixed here")
            targets = layout.embedding(path) if module.embedding else layout.matches(path)
            if len(targets) != 1:
                what = "embedding of tokens" if module.embedding else "linear module"
                among = f"may be any of {', '.join(sorted(targets)[:3])}" if targets else f"no such {what}"
                problems.append(f"{path} ({among})")
                continue
            target = targets[0]
            shape = (layout.embeddings if module.embedding else layout.shapes)[target]
            if (module.in_features, module.out_features) != (shape.in_features, shape.out_features):
                problems.append(
                    f"{path} (adapter {module.in_features} -> {module.out_features}, "
                    f"base {shape.in_features} -> {shape.out_features})"
                )
            elif target in fitted:
                problems.append(f"{path} (a second entry for {target})")
            else:
                fitted[target] = module
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise AdapterError(
                self.name,
                f"does not fit the base model: {len(problems)} of {len(self.modules)} modules do not match: "
                f"{'; '.join(problems[:5])}{more}. Was it trained on another base model?",
            )
        return replace(self, modules=fitted, copies=self._compared(model))

    def _compared(self, model: nn.Module | None) -> Mapping[str, str]:
        """Its copies of weights that are not known to be the base model's: none, or it is an error."""
        if not self.copies:
            return self.copies
        from logo.adapters.copies import different

        if model is None or any(parameter.is_meta for parameter in model.parameters()):
            raise AdapterError(self.name, self._holds_weights())
        try:
            other = different(self.file, self.copies, model)
        except Exception as error:  # safetensors raises its own Rust error type
            raise AdapterError(self.name, _unreadable(error, self.file.path)) from error
        if other is not None:
            raise AdapterError(
                self.name, f"it replaces a weight of the base model, {other} (modules_to_save), which cannot be mixed"
            )
        return {}

    def _holds_weights(self) -> str:
        return (
            f"it holds full weights ({next(iter(self.copies))}), as modules_to_save or resized embeddings do; they "
            "cannot be mixed unless they are the base model's own, which shows when it is loaded"
        )

    def read(self, modules: Iterable[str] | None = None) -> dict[str, LoraWeights]:
        """Reads the tensors of `modules` (default: all of them).

        Raises:
            AdapterError: the file became unreadable, or a tensor is not of a float type, or holds NaN or Inf; or there
                are whole weights in it that were not compared with the base model's.
        """
        if self.copies:
            raise AdapterError(self.name, self._holds_weights())
        return self._read(modules)

    def check_linear(self) -> None:
        """Raises AdapterError unless it is `s B A` on linear modules: what is made of it could not be written."""
        if self.alone:
            raise AdapterError(self.name, "it is a DoRA adapter (use_dora), which cannot be written anew yet")
        for path, module in self.modules.items():
            if module.embedding:
                raise AdapterError(self.name, f"it adapts an embedding ({path}), which cannot be written anew yet")

    def verify(self) -> None:
        """Reads all tensors of its modules.

        Raises:
            AdapterError: something is wrong with one.
        """
        self._read(None)

    def _read(self, modules: Iterable[str] | None) -> dict[str, LoraWeights]:
        wanted = {path: self.modules[path] for path in (self.modules if modules is None else modules)}
        keys = [key for m in wanted.values() for key in (m.key_a, m.key_b, m.magnitude) if key is not None]
        try:
            tensors = self.file.read(keys)
        except Exception as error:  # safetensors raises its own Rust error type
            raise AdapterError(self.name, _unreadable(error, self.file.path)) from error
        for key, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise AdapterError(
                    self.name,
                    f"tensor {key} is stored as {tensor.dtype}; expected float16, bfloat16, float32 or float64",
                )
            if not bool(tensor.isfinite().all()):
                found = "NaN" if bool(tensor.isnan().any()) else "Inf"
                raise AdapterError(self.name, f"tensor {key} holds {found}; the adapter is damaged")
        return {
            path: LoraWeights(
                tensors[m.key_a], tensors[m.key_b], m.scaling, None if m.magnitude is None else tensors[m.magnitude]
            )
            for path, m in wanted.items()
        }


def open_adapter(
    folder: str | Path, name: str | None = None, *, allow_pickle: bool = False, unconverted: bool = False
) -> Adapter:
    """Opens a PEFT adapter folder: configuration and header only.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        name: its name in the pool; default: the folder's own name.
        allow_pickle: also read `adapter_model.bin` (with `weights_only=True`) where there is no safetensors file.
        unconverted: as `parse_config`.

    Raises:
        AdapterError: anything in the folder that cannot be read or cannot be mixed; the reason says which.
        StorageError: as `logo.adapters.notes.noted`.
    """
    folder = Path(folder)
    name = name if name is not None else own_name(folder)
    try:
        raw = read_raw(folder)
        start = None if unconverted or changed_base(raw) is None else initial_folder(folder)
        config = parse_config(raw, unconverted=unconverted or start is not None)
        adapter = adapter_of(name, folder, config, _weight_file(folder, allow_pickle))
        if start is not None:
            first = read_config(start, unconverted=True)
            adapter = with_initial(adapter, adapter_of(name, start, first, _weight_file(start, allow_pickle)))
    except Refusal as refusal:
        raise AdapterError(name, " ".join(str(refusal).splitlines())) from refusal.__cause__
    return replace(adapter, activation=noted_alone(folder, adapter.activation))


def adapter_of(name: str, folder: Path, config: LoraConfig, file: WeightFile) -> Adapter:
    """The adapter that a configuration and a file of weights make; the file's header is read.

    Raises:
        Refusal: the header cannot be read, or what it says cannot be mixed.
    """
    try:
        shapes = file.shapes()
    except Exception as error:  # safetensors raises its own Rust error type
        raise Refusal(_unreadable(error, file.path)) from error
    # Patterns are looked up in their order, which does not count when configurations are compared.
    order = (*config.rank_pattern, "", *config.alpha_pattern)
    config, modules, copies = _recipe(tuple(shapes.items()), config, order)
    return Adapter(name, folder, config, modules, file, Activation(config.invocation), copies)


def own_name(folder: Path) -> str:
    """The last part of the path to a folder, also when it is written as `.`; of a link, the link's name."""
    return os.path.basename(os.path.abspath(folder))


def module_path(key_path: str) -> str:
    """A tensor key's module path without the wrappers that training tools leave in it."""
    return _INFIX.sub("", _PREFIX.sub("", key_path))


def _weight_file(folder: Path, allow_pickle: bool) -> WeightFile:
    if (folder / SAFETENSORS).is_file():
        return SafetensorsFile(folder / SAFETENSORS)
    if not (folder / PICKLE).is_file():
        raise Refusal(f"{SAFETENSORS} is missing from {folder}")
    if not allow_pickle:
        raise Refusal(
            f"its weights are pickled ({PICKLE}), and a pickle can run code; convert it to safetensors, "
            "or pass --allow-pickle to read tensors only"
        )
    return PickleFile(folder / PICKLE)


@lru_cache(maxsize=256)
def _recipe(
    shapes: tuple[tuple[str, tuple[int, ...]], ...], config: LoraConfig, order: tuple[str, ...]
) -> tuple[LoraConfig, dict[str, LoraModule], dict[str, str]]:
    """Configuration and modules, one object for all adapters of one training recipe: pools have thousands of them."""
    copies = {key: f"{module_path(key.removesuffix('.weight'))}.weight" for key, _ in shapes if _is_whole(key)}
    magnitudes = {module_path(m["module"]): m.string for key, _ in shapes if (m := _MAGNITUDE_KEY.match(key))}
    left_out = {*copies, *(magnitudes.values() if config.dora else ())}
    modules = _modules({key: shape for key, shape in shapes if key not in left_out}, config)
    if config.dora:
        modules = _decomposed(modules, magnitudes, dict(shapes))
    return config, modules, copies


def _decomposed(
    modules: Mapping[str, LoraModule], magnitudes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LoraModule]:
    """The modules of a DoRA adapter with their magnitudes."""
    for path, key in magnitudes.items():
        if path not in modules:
            raise Refusal(f"it holds a DoRA magnitude of a module that has no LoRA factors ({key})")
    for path, module in modules.items():
        if module.embedding:
            raise Refusal(f"it adapts an embedding with DoRA ({path}), which is not read yet")
        if path not in magnitudes or shapes[magnitudes[path]] != (module.out_features,):
            found = list(shapes[magnitudes[path]]) if path in magnitudes else "none"
            raise Refusal(f"DoRA (use_dora): expected a magnitude ({module.out_features},) of {path}, found {found}")
    return {path: replace(module, magnitude=magnitudes[path]) for path, module in modules.items()}


def _modules(shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> dict[str, LoraModule]:
    """Pairs the A and B tensors by module and checks each pair against the configuration."""
    matches = {key: _LORA_KEY.match(key) or _EMBEDDING_KEY.match(key) for key in shapes}
    names = {match["adapter"] or "unnamed" for match in matches.values() if match}
    if len(names) > 1:
        raise Refusal(f"the file holds several adapters ({', '.join(sorted(names))}); save each in a folder of its own")
    sides: dict[str, dict[str, str]] = {}
    for key, match in matches.items():
        if match is None:
            raise Refusal(_explain(key))
        pair = sides.setdefault(module_path(match["module"]), {})
        if match["side"] in pair:
            raise Refusal(f"two tensors for one module: {pair[match['side']]} and {key}")
        pair[match["side"]] = key
    if not sides:
        raise Refusal("the file holds no LoRA tensors: it would do nothing")
    return {path: _pair(path, pair, shapes, config) for path, pair in sides.items()}


def _pair(path: str, pair: dict[str, str], shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> LoraModule:
    if len(pair) != 2:
        missing = "B" if "A" in pair else "A"
        raise Refusal(f"module {path} has no lora_{missing} tensor")
    shape_a, shape_b = shapes[pair["A"]], shapes[pair["B"]]
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or 0 in shape_a + shape_b:
        raise Refusal(
            f"module {path} has lora_A {list(shape_a)} and lora_B {list(shape_b)}; expected (r, in) and (out, r)"
        )
    embedding = [_EMBEDDING_KEY.match(key) is not None for key in pair.values()]
    if any(embedding) and not all(embedding):
        raise Refusal(f"module {path} is adapted as an embedding and as a linear module: {', '.join(pair.values())}")
    rank = shape_a[0]
    if rank != config.rank(path):
        raise Refusal(
            f"{CONFIG} gives rank {config.rank(path)} to module {path}, but its tensors have rank {rank}; "
            "the scale depends on it, so correct r or rank_pattern"
        )
    scaling = config.scaling(path, rank)
    return LoraModule(pair["A"], pair["B"], rank, shape_a[1], shape_b[0], scaling, all(embedding))


def _is_whole(key: str) -> bool:
    """Whether a tensor is a weight of the base model itself."""
    return key.endswith(".weight") and not re.search(r"\.(?:lora_|trainable_tokens_)", key)


def _explain(key: str) -> str:
    """Why a tensor that is no plain lora_A or lora_B makes the adapter unmixable."""
    if "trainable_tokens_" in key:
        return f"it trains token embeddings ({key}), which cannot be mixed"
    if "lora_magnitude_vector" in key:
        return f"it holds a DoRA magnitude ({key}), which cannot be mixed"
    if re.search(r"\.lora_[AB](\..+)?\.bias$", key):
        return f"it has a bias on a LoRA factor ({key}); only bias-free adapters can be mixed"
    if key.endswith(".bias"):
        return f"it holds biases of the base model ({key}), which cannot be mixed"
    return f"tensor {key} is neither lora_A nor lora_B"


def _unreadable(error: Exception, file: Path) -> str:
    with suppress(OSError), file.open("rb") as start:
        if start.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return f"{file.name} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
    text = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
    doubt = " (truncated or damaged?)" if type(error).__name__ == "SafetensorError" else ""
    return f"{file.name} cannot be read: {text}{doubt}"
