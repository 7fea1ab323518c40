"""`Adapter`: a PEFT adapter folder, which modules of a base model it adapts, and its tensors.

Opening an adapter reads its configuration and the header of its weight file. Tensors are read later, and are checked
when they are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from logo.adapters.activation import EVERYWHERE, Activation
from logo.adapters.config import LoraConfig, Refusal, read_config
from logo.adapters.examples import FolderExamples
from logo.adapters.files import PICKLE, SAFETENSORS
from logo.adapters.header import LoraModule, read_header
from logo.adapters.layout import BaseLayout
from logo.adapters.notes import noted_alone
from logo.adapters.weights import PickleFile, SafetensorsFile, WeightFile, unreadable
from logo.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class LoraWeights:
    """The tensors of one adapted module, on the CPU, in the dtype they are stored in: `ΔW = scaling · B A`."""

    A: torch.Tensor  # (r, in)
    B: torch.Tensor  # (out, r)
    scaling: float

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
        own_examples: the example prompts in its folder, which are shared by all that is derived from this object.
        activation: on which tokens it acts.
        copies: key in the file -> parameter of the base model that it copies. `fit` compares copies with the base
            model; before that no tensor is read.
        given_examples: example prompts in place of those in its folder; None: those in its folder.
    """

    name: str
    folder: Path
    config: LoraConfig
    modules: Mapping[str, LoraModule]
    file: WeightFile
    own_examples: FolderExamples = field(compare=False, repr=False)
    activation: Activation = EVERYWHERE
    copies: Mapping[str, str] = field(default_factory=dict)
    given_examples: tuple[str, ...] | None = None

    @property
    def examples(self) -> tuple[str, ...]:
        """Its example prompts; see `logo.adapters.examples`."""
        return self.own_examples.prompts if self.given_examples is None else self.given_examples

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return sum(m.rank * (m.in_features + m.out_features) for m in self.modules.values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks in it, ascending."""
        return tuple(sorted({m.rank for m in self.modules.values()}))

    @property
    def targets(self) -> list[str]:
        """The names of the modules in it, without their layers."""
        return sorted({path.rsplit(".", 1)[-1] for path in self.modules})

    @property
    def size(self) -> int:
        """Bytes of the weight file."""
        return self.file.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The digest of the weight file, as `sha256sum` prints it. Reads the whole file, once.

        Raises:
            AdapterError: the file became unreadable.
        """
        try:
            return self.file.sha256()
        except OSError as error:
            raise AdapterError(self.name, unreadable(error, self.file.path)) from error

    @property
    def scales(self) -> tuple[tuple[str, float], ...]:
        """Module path and scale of every module, sorted."""
        return tuple(sorted((path, module.scaling) for path, module in self.modules.items()))

    def fit(self, layout: BaseLayout, model: nn.Module | None = None) -> Adapter:
        """The same adapter with its modules under the base model's own paths.

        Args:
            model: the base model. Adapters that hold copies of its weights or adapt its embedding do not fit without.

        Raises:
            AdapterError: a tensor matches no module of the base, or one of another shape (up to five are named); or a
                copy differs from the base model's weight.
        """
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
        """Compares the copies with the base model, and returns none; raises AdapterError if one differs."""
        if not self.copies:
            return self.copies
        from logo.adapters.copies import different

        if model is None or any(parameter.is_meta for parameter in model.parameters()):
            raise AdapterError(self.name, self._holds_weights())
        try:
            other = different(self.file, self.copies, model)
        except Exception as error:  # safetensors raises its own Rust error type
            raise AdapterError(self.name, unreadable(error, self.file.path)) from error
        if other is not None:
            raise AdapterError(
                self.name, f"it replaces a weight of the base model, {other} (modules_to_save), which cannot be mixed"
            )
        return {}

    def _holds_weights(self) -> str:
        return (
            f"it holds full weights ({next(iter(self.copies))}), as modules_to_save or resized embeddings do; they "
            "cannot be mixed unless they equal the base model's, which is checked when it is loaded"
        )

    def read(self, modules: Iterable[str] | None = None) -> dict[str, LoraWeights]:
        """Reads the tensors of `modules` (default: all of them).

        Raises:
            AdapterError: the file became unreadable; a tensor is not of a float type, or holds NaN or Inf; or there are
                copies that were not compared with the base model.
        """
        self.check_compared()
        return self._read(modules)

    def check_compared(self) -> None:
        """Raises AdapterError if it holds copies of base weights that were not compared with the base model."""
        if self.copies:
            raise AdapterError(self.name, self._holds_weights())

    def check_linear(self) -> None:
        """Raises AdapterError unless it is `s B A` on linear modules, since no other kind can be written."""
        for path, module in self.modules.items():
            if module.embedding:
                raise AdapterError(self.name, f"it adapts an embedding ({path}), which cannot be rewritten yet")
        self.check_compared()

    def verify(self) -> None:
        """Reads all tensors of its modules.

        Raises:
            AdapterError: a tensor cannot be used.
        """
        self._read(None)

    def _read(self, modules: Iterable[str] | None) -> dict[str, LoraWeights]:
        wanted = {path: self.modules[path] for path in (self.modules if modules is None else modules)}
        keys = [key for m in wanted.values() for key in (m.key_a, m.key_b)]
        try:
            tensors = self.file.read(keys)
        except Exception as error:  # safetensors raises its own Rust error type
            raise AdapterError(self.name, unreadable(error, self.file.path)) from error
        for key, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise AdapterError(
                    self.name,
                    f"tensor {key} is stored as {tensor.dtype}; expected float16, bfloat16, float32 or float64",
                )
            if not bool(tensor.isfinite().all()):
                found = "NaN" if bool(tensor.isnan().any()) else "Inf"
                raise AdapterError(self.name, f"tensor {key} holds {found}; the adapter is damaged")
        return {path: LoraWeights(tensors[m.key_a], tensors[m.key_b], m.scaling) for path, m in wanted.items()}


def open_adapter(folder: str | Path, name: str | None = None, *, allow_pickle: bool = False) -> Adapter:
    """Opens a PEFT adapter folder: configuration and header only.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        name: its name in the pool; default: the folder's own name.
        allow_pickle: also read `adapter_model.bin` (with `weights_only=True`) if there is no safetensors file.

    Raises:
        AdapterError: the folder cannot be read, or the adapter cannot be mixed; the reason says why.
        StorageError: as `logo.adapters.notes.noted`.
    """
    folder = Path(folder)
    name = name if name is not None else own_name(folder)
    try:
        adapter = adapter_of(name, folder, read_config(folder), weight_file(folder, allow_pickle))
    except Refusal as refusal:
        raise AdapterError(name, " ".join(str(refusal).splitlines())) from refusal.__cause__
    return replace(adapter, activation=noted_alone(folder, adapter.activation))


def adapter_of(name: str, folder: Path, config: LoraConfig, file: WeightFile) -> Adapter:
    """Makes an adapter from its configuration and the header of its weight file.

    Raises:
        Refusal: the header cannot be read, or the adapter cannot be mixed.
    """
    try:
        shapes = file.shapes()
    except Exception as error:  # safetensors raises its own Rust error type
        raise Refusal(unreadable(error, file.path)) from error
    # The order of patterns matters, but equality of configurations ignores it.
    order = (*config.rank_pattern, "", *config.alpha_pattern)
    config, modules, copies = read_header(tuple(shapes.items()), config, order)
    acts = Activation(config.invocation)
    return Adapter(name, folder, config, modules, file, FolderExamples(folder), acts, copies)


def own_name(folder: Path) -> str:
    """The name of a folder, also of `.`; of a link, the link's own name."""
    return os.path.basename(os.path.abspath(folder))


def weight_file(folder: Path, allow_pickle: bool) -> SafetensorsFile | PickleFile:
    """The weight file in a PEFT folder.

    Raises:
        Refusal: there is none, or only a pickle that may not be read.
    """
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
