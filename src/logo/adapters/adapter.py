"""`Adapter`: a PEFT adapter folder, which modules of a base model it adapts, and its tensors.

Opening an adapter reads its configuration and the header of its weight file. Tensors are checked when they are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from logo.adapters.activation import EVERYWHERE, Activation, noted
from logo.adapters.examples import examples_text, folder_description, folder_examples
from logo.adapters.layout import BaseLayout, core_path
from logo.adapters.peft import (
    LoraConfig,
    LoraModule,
    Refusal,
    WeightFile,
    parse_config,
    read_header,
    read_raw,
    unreadable,
)
from logo.errors import AdapterError, is_out_of_memory
from logo.identity import adapter_digest, adapter_key
from logo.models import tensor_of

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class LoraWeights:
    """The tensors of one adapted module, on the CPU, in the dtype they are stored in: `ΔW = scaling · B A`."""

    A: torch.Tensor  # (r, in)
    B: torch.Tensor  # (out, r)
    scaling: float

    def scaled_b(self, device: torch.device | None = None) -> torch.Tensor:
        """`s B` in float32, (out, r), on a device, where it is computed; None: on the CPU."""
        b = self.B if self.B.element_size() <= 4 else self.B.float()  # not every accelerator has float64
        return (b if device is None else b.to(device)).float() * self.scaling


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter on disk.

    Attributes:
        name: its name in the pool: free-form, dots and slashes included.
        modules: adapted module path -> where its tensors are. Paths are as in the file (known wrapper prefixes
            removed) until `fit` maps them to the base model's own.
        activation: on which tokens it acts.
        copies: key in the file -> parameter of the base model that it copies. PEFT saves whole weights of
            `modules_to_save`, and of embeddings and heads that it takes for changed. Often they were not trained, which
            only `fit` shows, by a comparison with the base model.
        examples: its example prompts, as they were when it was opened; see `logo.adapters.examples`.
        listed: whether they are those of a manifest's entry, and not those beside it.
        description: what it does, in a sentence; None if nobody said it.
        source, revision: the folder of a Hub repository, and the commit, from which it was downloaded.
    """

    name: str
    folder: Path
    config: LoraConfig
    modules: Mapping[str, LoraModule]
    file: WeightFile
    activation: Activation = EVERYWHERE
    copies: Mapping[str, str] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    listed: bool = False
    description: str | None = None
    source: str | None = None
    revision: str | None = None

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return sum(module.rank * (module.in_features + module.out_features) for module in self.modules.values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks in it, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

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
        """The digest of the weight file, as `sha256sum` prints it. AdapterError if it changed or cannot be read."""
        with self._reading():
            return self.file.sha256()

    @cached_property
    def digest(self) -> str:
        """The digest of its weights, scales and activation, which decide its effect; errors as `sha256`."""
        scales = sorted((path, module.scaling) for path, module in self.modules.items())
        return adapter_digest(self.sha256, scales, self.activation.tokens, self.activation.last)

    @cached_property
    def key(self) -> str:
        """The digest by which engines, workers and replicas agree on it: example prompts and the description count, the
        name does not."""
        said = b""
        if self.examples:
            said += examples_text(self.examples)
        if self.description is not None:
            said += self.description.encode()
        return adapter_key(self.digest, said)

    def undescribed(self) -> Adapter:
        """The adapter without example prompts and description."""
        return replace(self, examples=(), description=None)

    def fit(self, layout: BaseLayout, model: nn.Module | None = None, *, skeleton: bool = False) -> Adapter:
        """The same adapter with its modules under the base model's own paths.

        Raises AdapterError if a tensor matches no module of the base, or one of another shape (up to five are named),
        or if a copy differs; of a `skeleton`, which has no weights, only in its shape. Without the `model`, adapters
        with copies or an adapted embedding do not fit.
        """
        fitted: dict[str, LoraModule] = {}
        problems: list[str] = []
        for path, module in self.modules.items():
            if module.embedding and model is None:
                raise AdapterError(self.name, f"it adapts an embedding ({path}), which is not mixed here")
            targets = layout.embedding(path) if module.embedding else layout.matches(path)
            problem = _mismatch(path, module, targets, layout)
            if problem is None and targets[0] in fitted:
                problem = f"a second entry for {targets[0]}"
            if problem is None:
                fitted[targets[0]] = module
            else:
                problems.append(f"{path} ({problem})")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            found = f"{len(problems)} of {len(self.modules)} modules do not match: {'; '.join(problems[:5])}{more}"
            raise AdapterError(self.name, f"does not fit the base model: {found}. Was it trained on another one?")
        vocabulary = max((shape.in_features for shape in layout.embeddings.values()), default=math.inf)
        if any(token >= vocabulary for token in self.activation.tokens):
            found = f"{list(self.activation.tokens)}; the base model knows {vocabulary} tokens"
            raise AdapterError(self.name, f"does not fit the base model: its invocation tokens are {found}")
        if self.copies and model is not None:
            self._compare(model, skeleton)
        else:
            self._check_no_copies()
        return replace(self, modules=fitted, copies={})

    def acting(self, forced: str | None) -> Adapter:
        """The fitted adapter, acting as a user wants all adapters of a pool to act.

        Args:
            forced: `"everywhere"`, `"last:N"`, or `"invocation"`: as it was trained to act, which has to be from its
                invocation tokens on; None: as it was trained to act.

        Raises:
            AdapterError: it lacks invocation tokens, or adapts a module on which this activation cannot be computed.
        """
        if forced == "invocation" and not self.activation.tokens:
            raise AdapterError(self.name, "it has no invocation tokens (alora_invocation_tokens) from which to act")
        adapter = self
        if forced is not None and forced != "invocation":
            adapter = replace(self, activation=Activation.parse(forced))
        # Models with latent attention (DeepSeek V2) apply this module to all cached tokens again in every step.
        repeated = next((path for path in adapter.modules if path.endswith(".kv_b_proj")), None)
        if repeated is not None and not adapter.activation.everywhere:
            found = f"acts on {repeated}, where it can only act everywhere, not {adapter.activation}"
            raise AdapterError(self.name, f"{found}; leave it out, or pass activation='everywhere' in Python")
        return adapter

    def _compare(self, model: nn.Module, skeleton: bool) -> None:
        """Raises AdapterError unless all copies of base weights equal the base model's own."""
        parameters: dict[str, list[str]] = {}
        for path, _ in model.named_parameters(remove_duplicate=False):
            parameters.setdefault(core_path(path), []).append(path)
        for key, path in self.copies.items():
            with self._reading():
                copy = self.file.read([key])[key]
            bases = [
                model.get_parameter(name) if skeleton else tensor_of(model, name)
                for name in parameters.get(core_path(path), [])
            ]
            difference = _difference(copy, bases)
            if difference is not None:
                why = f"it replaces a weight of the base model, {path}, {difference} (modules_to_save)"
                raise AdapterError(self.name, f"{why}, which cannot be mixed")

    def _check_no_copies(self) -> None:
        if self.copies:
            what = f"it holds full weights ({next(iter(self.copies))}; modules_to_save, or resized embeddings)"
            raise AdapterError(self.name, f"{what}, which cannot be mixed unless they equal the base model's")

    def read(self, modules: Iterable[str] | None = None) -> dict[str, LoraWeights]:
        """Reads the tensors of `modules` (default: all of them).

        Raises AdapterError if the file became unreadable, if a tensor is not of a float type or holds NaN or Inf, or if
        there are copies that were not compared with the base model.
        """
        self._check_no_copies()
        return self._read(self.modules if modules is None else modules)

    def verify(self) -> None:
        """Raises AdapterError as `read`, whether copies were compared or not; the same content is read only once."""
        with self._reading():
            self.file.once("is sound:", lambda: f"{len(self._read(self.modules))} modules")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Names the adapter and its file in errors of reading it."""
        try:
            yield
        except Exception as error:  # safetensors raises its own Rust error type
            if isinstance(error, AdapterError) or is_out_of_memory(error):
                raise
            raise AdapterError(self.name, unreadable(error, self.file.path)) from error

    def _read(self, modules: Iterable[str]) -> dict[str, LoraWeights]:
        read = {path: self.modules[path] for path in modules}
        with self._reading():
            tensors = self.file.read(key for module in read.values() for key in (module.key_a, module.key_b))
        for key, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise AdapterError(self.name, f"tensor {key} is stored as {tensor.dtype}; expected float16 to float64")
            if not finite(tensor):
                found = "NaN" if bool(tensor.isnan().any()) else "Inf"
                raise AdapterError(self.name, f"tensor {key} holds {found}; the adapter is damaged")
        return {
            path: LoraWeights(tensors[module.key_a], tensors[module.key_b], module.scaling)
            for path, module in read.items()
        }


def _mismatch(path: str, module: LoraModule, targets: Sequence[str], layout: BaseLayout) -> str | None:
    """Why an adapted module is none of the base model's, of which it may mean these; None: it is the only one."""
    if len(targets) > 1:
        return f"may be any of {', '.join(sorted(targets)[:3])}"
    if not targets and path.endswith(layout.uncalled):
        return "the model uses its weight without calling it"
    if not targets:
        return "no such embedding of tokens" if module.embedding else "no such linear module"
    base = (layout.embeddings if module.embedding else layout.shapes)[targets[0]]
    if (module.in_features, module.out_features) == (base.in_features, base.out_features):
        return None
    own = f"adapter {module.in_features} -> {module.out_features}"
    return f"{own}, base {base.in_features} -> {base.out_features}"


def _difference(copy: torch.Tensor, bases: Sequence[torch.Tensor]) -> str | None:
    """How a copy differs from the weight of the base model, which is the only one of `bases`; None: it does not."""
    if len(bases) != 1:
        return "which the base model does not have"
    [base] = bases
    if copy.shape != base.shape:
        return f"of shape {list(copy.shape)} instead of {list(base.shape)}"
    # Compared in the dtype of the base model, in which the copy would replace the weight.
    if not base.is_meta and not copy.to(base.device, base.dtype).equal(base.detach()):
        return "with other values"
    return None


def open_adapter(
    folder: str | Path,
    name: str | None = None,
    *,
    allow_pickle: bool = False,
    top: Path | None = None,
    unconverted: bool = False,
) -> Adapter:
    """Opens a PEFT adapter folder: configuration and header only.

    Args:
        name: its name in the pool; default: the folder's own name.
        allow_pickle: also read `adapter_model.bin` (with `weights_only=True`) if there is no safetensors file.
        top: the folder above which no `pool.json` applies, such as that of a repository; default: every one applies.
        unconverted: see `logo.adapters.peft.parse_config`.

    Raises:
        AdapterError: the folder cannot be read, or the adapter cannot be mixed; the reason says why.
        StorageError: its `pool.json` cannot be used.
    """
    folder = Path(folder)
    name = own_name(folder) if name is None else name
    try:
        config = parse_config(read_raw(folder), unconverted=unconverted)
        file = WeightFile(folder, allow_pickle)
        modules, copies = read_header(file.shapes, config)
    except Refusal as refusal:
        raise AdapterError(name, " ".join(str(refusal).splitlines())) from refusal.__cause__
    activation = noted(folder, Activation(config.invocation), top)
    return Adapter(
        name=name,
        folder=folder,
        config=config,
        modules=modules,
        file=file,
        activation=activation,
        copies=copies,
        examples=folder_examples(folder),
        description=folder_description(folder),
    )


def finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: its sum says so at once, unless it overflows."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def own_name(folder: Path) -> str:
    """The name of a folder, also of `.`; of a link, the link's own name."""
    return os.path.basename(os.path.abspath(folder))
