"""Converts adapters: to another dtype, from pickles to safetensors, from PiSSA and the like to plain LoRA.

PiSSA, OLoRA, CorDA and LoRA-GA subtract initial factors `A_0, B_0` from the base weights and train
`W - s B_0 A_0 + s B A`. On the untouched base the update is therefore

    s B A - s B_0 A_0 = s [B, -B_0] [A; A_0]

a plain LoRA of twice the rank and the same scale. PEFT does the same when it saves an adapter with
`path_initial_model_for_weight_conversion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from logo.adapters.config import changed_base, read_raw
from logo.adapters.format import Adapter, LoraWeights, open_adapter
from logo.adapters.initial import WithInitial, doubled, initial_folder
from logo.adapters.layout import core_path
from logo.adapters.survey import survey
from logo.adapters.upkeep.spectra import norm, relative_error
from logo.adapters.writing import plain_tensors, save_adapter
from logo.errors import AdapterError, StorageError

# The largest relative error of another dtype; bfloat16 has 0.3 %.
_TOLERATED = 0.01
# A relative difference up to which two updates are equal but for rounding.
_NOTHING = 1e-6

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Initial:
    """The initial states of adapters: either one for all adapters, or one per adapter, by name."""

    folder: Path
    alone: Adapter | None
    adapters: Mapping[str, Adapter]

    @classmethod
    def open(cls, folder: Path, *, allow_pickle: bool = False) -> Initial:
        """Opens one initial adapter, or a pool of them under the names of the trained ones.

        Raises:
            StorageError: the folder cannot be read, or holds no adapter.
        """
        found, refused = survey(folder, allow_pickle=allow_pickle, verify=False, unconverted=True)
        if not found:
            reason = f"; the first of those refused: {refused[0]}" if refused else ""
            raise StorageError(f"initial adapters {folder}: expected PEFT folders, found none{reason}")
        alone = found[0] if len(found) == 1 and found[0].folder == folder else None
        return cls(folder, alone, {adapter.name: adapter for adapter in found})

    def of(self, adapter: Adapter) -> Adapter:
        """The initial state of an adapter.

        Raises:
            AdapterError: there is none of its name.
        """
        found = self.alone or self.adapters.get(adapter.name)
        if found is None:
            raise AdapterError(adapter.name, f"its initial adapter is missing from {self.folder}")
        return found


@dataclass(frozen=True)
class Converted:
    """A converted adapter.

    Attributes:
        adapter: the original.
        weights: by module path, in the new dtype; scales as before.
        config: its settings.
        before: the dtypes of the original.
        init: the initialisation that was removed; None for a plain adapter.
        error: `‖ΔW - ΔW'‖ / ‖ΔW‖` of rounding to the new dtype.
    """

    adapter: Adapter
    weights: dict[str, LoraWeights]
    config: dict[str, Any]
    before: tuple[torch.dtype, ...]
    init: str | None
    error: float


def converted(adapter: Adapter, dtype: torch.dtype | None = None, initial: Initial | None = None) -> Converted:
    """The same update as a plain adapter.

    Args:
        adapter: may be opened `unconverted`.
        dtype: of the result; None: unchanged.
        initial: required for adapters whose initialisation changed the base weights, and only for these.

    Raises:
        AdapterError: it cannot be read; `initial` is given but the configuration names no such initialisation; the
            initial state is missing, of another adapter, or equal to the trained one; or the dtype overflows or loses
            too much.
    """
    config = read_raw(adapter.folder)
    init = changed_base(config)
    if init is not None and initial is None and initial_folder(adapter.folder) is not None:
        adapter = open_adapter(adapter.folder, adapter.name)
    adapter.check_linear()
    weights = adapter.read()
    before = tuple(sorted({factor.dtype for one in weights.values() for factor in (one.A, one.B)}, key=str))
    if isinstance(adapter.file, WithInitial):
        config = config | doubled(config)
    elif init is not None:
        if initial is None:
            raise AdapterError(
                adapter.name,
                f"init_lora_weights is {init!r}, which also changed the base weights; give the adapter as it was "
                "before training with --initial, or train it again",
            )
        weights = _freed(adapter, weights, initial.of(adapter))
        config = config | doubled(config)
    elif initial is not None:
        raise AdapterError(
            adapter.name,
            f"init_lora_weights is {config.get('init_lora_weights', True)!r}, which names no initialisation that "
            "changed the base weights, so --initial does not apply (PEFT writes true after a conversion); convert it "
            "without --initial, or, if it was never converted, set init_lora_weights to its initialisation, such as "
            "'pissa'",
        )
    exact = weights
    if dtype is not None:
        weights = {path: _stored(adapter, path, one, dtype) for path, one in exact.items()}
    error = relative_error(exact, weights)
    if error > _TOLERATED:
        better = "bf16 or fp32" if dtype is torch.float16 else "fp32"
        raise AdapterError(
            adapter.name, f"rounding to {dtype} costs {error:.1%} of its update (relative error); use {better}"
        )
    return Converted(adapter, weights, config, before, init, error)


def write_converted(result: Converted, folder: Path) -> None:
    """Writes a converted adapter as a PEFT folder."""
    save_adapter(folder, plain_tensors(result.weights), result.config)


def _freed(adapter: Adapter, weights: Mapping[str, LoraWeights], initial: Adapter) -> dict[str, LoraWeights]:
    """`s [B, -B_0] [A; A_0]` for every module."""
    first = {core_path(path): one for path, one in initial.read().items()}
    if first.keys() != {core_path(path) for path in weights}:
        raise AdapterError(adapter.name, f"its initial adapter {initial.folder} adapts other modules")
    doubled = {}
    for path, one in weights.items():
        start = first[core_path(path)]
        if start.A.shape != one.A.shape or start.B.shape != one.B.shape:
            raise AdapterError(
                adapter.name,
                f"its initial adapter {initial.folder} has other shapes at {path}: A {list(start.A.shape)}, "
                f"B {list(start.B.shape)}; expected {list(one.A.shape)}, {list(one.B.shape)}",
            )
        if not math.isclose(start.scaling, one.scaling, rel_tol=1e-9):
            raise AdapterError(
                adapter.name,
                f"its initial adapter {initial.folder} has another scale at {path}: {start.scaling:g}, expected "
                f"{one.scaling:g}",
            )
        # Different dtypes are promoted to the wider one.
        doubled[path] = LoraWeights(torch.cat([one.A, start.A]), torch.cat([one.B, -start.B], dim=1), one.scaling)
    if _size(doubled) <= _NOTHING * _size(weights):
        raise AdapterError(
            adapter.name,
            f"its initial adapter {initial.folder} has the same update, so their difference is zero: give the adapter "
            "as it was before training",
        )
    return doubled


def _size(weights: Mapping[str, LoraWeights]) -> float:
    return math.hypot(*(norm(one) for one in weights.values()))


def _stored(adapter: Adapter, path: str, one: LoraWeights, dtype: torch.dtype) -> LoraWeights:
    stored = LoraWeights(one.A.to(dtype), one.B.to(dtype), one.scaling)
    for factor in (stored.A, stored.B):
        if not bool(factor.isfinite().all()):
            raise AdapterError(adapter.name, f"a value of {path} does not fit in {dtype}; use bf16 or fp32")
    return stored
