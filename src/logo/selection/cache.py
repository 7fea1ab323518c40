"""The calibration cache: responses and whitenings on disk, each under a digest of what it depends on.

    <cache>/calibration/<base model, texts and reading>/<adapter>.safetensors     `a` per point, neutral texts first
    <cache>/calibration/<base model, texts and reading>/whitening/<module>.safetensors
    <cache>/calibration/<base model, texts and reading>/weights.json     `‖W‖_F` of the base model per point
    <cache>/calibration/<base model, texts and reading>/described/<texts>.safetensors     descriptions, or their mean

What is missing or damaged is computed again. Files are written under another name and renamed. The entries of an open
pool are held in memory, too, so that adapters can be added after files of others are gone, and so that nothing is
computed twice if the folder cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from logo.adapters.activation import ERROR, OFF, Activation
from logo.adapters.adapter import Adapter
from logo.adapters.peft import WeightFile
from logo.files import read_cached, write_cached
from logo.identity import base_digest
from logo.selection.emphasis import FADING
from logo.selection.points import Point
from logo.selection.signals import Signal
from logo.selection.size import weight_norm
from logo.selection.texts import Texts
from logo.selection.whitening import SHRINKAGE, SKETCHED, Whitening

# To be raised when the content of the files changes its meaning.
_FORMAT = 4
_SAMPLED = 64
_WEIGHTS = "weights.json"


class CalibrationCache:
    """The calibrations of one base model and one way of reading.

    Args:
        model: the base model.
        texts: those that it reads.
        signal: how they are read.
        folder: the cache folder; None keeps nothing.

    Attributes:
        texts: the same.
    """

    def __init__(self, model: nn.Module, texts: Texts, signal: Signal, folder: Path | None) -> None:
        self.texts = texts
        self._shape = (signal.readings, len(texts.rows))
        self._folder, self._name = folder, f"calibration/{_key_of(model, texts, signal)}"
        # Keyed by the file object, which stays the same when a pool is fitted again.
        self._adapter_keys: WeakKeyDictionary[WeightFile, str] = WeakKeyDictionary()
        self._responses: WeakKeyDictionary[WeightFile, dict[str, Tensor]] = WeakKeyDictionary()
        self._whitenings: dict[str, Whitening] = {}  # only those that could not be written, since they are large
        self._described: dict[str, dict[int, Tensor]] = {}
        self._weight_norms: dict[str, float] = {}

    def responses(self, adapter: Adapter) -> dict[str, Tensor]:
        """Module of a point -> `a` (readings, texts) of this adapter, for the points that have been measured.

        Raises:
            AdapterError: nothing is known yet, and its file is gone.
        """
        if adapter.file not in self._responses:
            self._responses[adapter.file] = self._load(f"{self._key(adapter)}.safetensors", self._read_responses)
        return dict(self._responses[adapter.file])

    def keep_responses(self, adapter: Adapter, responses: Mapping[str, Tensor]) -> None:
        """Stores all responses of an adapter."""
        self._responses[adapter.file] = dict(responses)
        self._save(f"{self._key(adapter)}.safetensors", save({k: v.contiguous() for k, v in responses.items()}))

    def whitening(self, module: str) -> Whitening | None:
        """The whitening of a module's input; None if there is none yet."""
        if module in self._whitenings:
            return self._whitenings[module]
        tensors = self._load(f"whitening/{module}.safetensors")
        return Whitening(**tensors) if set(tensors) == {"mean", "basis", "gain"} else None

    def keep_whitening(self, module: str, whitening: Whitening) -> None:
        """Stores the whitening of a module's input."""
        tensors = {name: tensor.contiguous() for name, tensor in vars(whitening).items()}
        if not self._save(f"whitening/{module}.safetensors", save(tensors)):
            self._whitenings[module] = whitening

    def weight_norms(self, model: nn.Module, points: Sequence[Point]) -> tuple[float, ...]:
        """`‖W‖_F` of the base model at each point, cached or measured now; NaN where it is not known."""
        missing = [point for point in points if point.module not in self._weight_norms]
        if missing and self._folder is not None:
            self._weight_norms |= read_cached(self._folder / self._name / _WEIGHTS, _numbers) or {}
            missing = [point for point in missing if point.module not in self._weight_norms]
        if missing:
            self._weight_norms |= {point.module: weight_norm(model, point) for point in missing}
            known = {key: norm for key, norm in self._weight_norms.items() if math.isfinite(norm)}
            self._save(_WEIGHTS, json.dumps(known).encode())
        return tuple(self._weight_norms[point.module] for point in points)

    def described(self, name: str) -> Mapping[int, Tensor] | None:
        """Descriptions of texts by the first point of each place, as stored under this name; None if there are none."""
        if name not in self._described:
            tensors = self._load(f"described/{name}.safetensors")
            if not tensors:
                return None
            self._described[name] = {point: tensors[str(point)] for point in sorted(map(int, tensors))}
        return self._described[name]

    def keep_described(self, name: str, descriptions: Mapping[int, Tensor]) -> None:
        """Stores descriptions of texts, or their mean; the texts themselves are never stored."""
        self._described[name] = dict(descriptions)
        tensors = {str(point): tensor.contiguous() for point, tensor in descriptions.items()}
        self._save(f"described/{name}.safetensors", save(tensors))

    def release_described(self, needed: Collection[str]) -> None:
        """Releases the memory of all other descriptions; they stay on disk."""
        self._described = {name: self._described[name] for name in self._described if name in needed}

    def _load(self, name: str, read: Callable[[Path], dict[str, Tensor]] = load_file) -> dict[str, Tensor]:
        if self._folder is None:
            return {}
        return read_cached(self._folder / self._name / name, read) or {}

    def _read_responses(self, file: Path) -> dict[str, Tensor]:
        responses: dict[str, Tensor] = load_file(file)
        for point, response in responses.items():
            if response.shape != self._shape or response.dtype != torch.float32:
                found = f"{response.dtype} of shape {tuple(response.shape)}"
                raise ValueError(f"{point!r}: expected float32 of shape {self._shape}, found {found}")
        return responses

    def _key(self, adapter: Adapter) -> str:
        if adapter.file not in self._adapter_keys:
            self._adapter_keys[adapter.file] = adapter.digest
        return self._adapter_keys[adapter.file]

    def _save(self, name: str, data: bytes) -> bool:
        if self._folder is None:
            return False
        return write_cached(self._folder, f"{self._name}/{name}", data)


def _numbers(file: Path) -> dict[str, float]:
    return {str(name): float(value) for name, value in dict(json.loads(file.read_text(encoding="utf-8"))).items()}


def _key_of(model: nn.Module, texts: Texts, signal: Signal) -> str:
    """Digest of the base model, the texts and the reading."""
    reading: list[Any] = [
        signal.input,
        signal.token,
        signal.scale,
        getattr(signal.score, "__name__", ""),
        signal.readings,
    ]
    if signal.plugin is not None:  # of a fused projection, one layer's query or all rows are read
        reading += [signal.plugin, signal.layers]
    if signal.token == "tail":
        reading.append([_place_of(one) for one in signal.activations])
    rows = [[list(row) for row in part] for part in (texts.neutral, texts.requests)]
    parts = [_FORMAT, SHRINKAGE, SKETCHED, FADING, reading, rows, base_digest(model)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _place_of(activation: Activation) -> list[Any]:
    """What decides where an adapter acts in the texts of a calibration; see `logo.adapters.activation.earliest`."""
    instead = [] if activation.without in (OFF, ERROR) else [activation.without]
    return [list(activation.tokens), activation.last, *instead]
