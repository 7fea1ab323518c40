"""What a pool is scored with: points, scoring indices and baseline; from disk where this very pool was opened before.

    <cache>/index/<digest of the adapters' files, the points and the reading>.safetensors

One file per pool, memory-mapped, so that opening a known pool costs neither a pass over the adapters nor a copy.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from logo.adapters.config import CONFIG
from logo.adapters.format import Adapter
from logo.adapters.known import stamp
from logo.cache import cache_folder, read_cached, write_cached
from logo.selection.calibrator import Calibrated, Plan, calibrate
from logo.selection.index import ScoringIndex
from logo.selection.listening import Texts
from logo.selection.points import Point
from logo.selection.settings import SelectionSettings
from logo.selection.store import CalibrationStore, key_of

# Changes when what is kept means something else.
_FORMAT = 4
# Bytes. In memory tensors begin at multiples of it, so in the file they do too: libraries sum in another order where
# they do not, and the last digit of a score would tell whether the index was new.
_ALIGNMENT = 64
# Pools change, and the indices of those that are gone are of no use to anyone.
_MOST_FILES = 16


@dataclass(frozen=True)
class IndexedPool:
    """The scored adapters of a pool, as scoring needs them.

    Attributes:
        adapters: in pool order.
        points: where prompts are read.
        indices: one per point, of the adapters that touch it.
        calibrated: baseline and how the points were chosen; None for signals without calibration.
        store: of the calibration, for a later state of the pool.
    """

    adapters: tuple[Adapter, ...]
    points: tuple[Point, ...]
    indices: tuple[ScoringIndex, ...]
    calibrated: Calibrated | None
    store: CalibrationStore | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        adapters: Sequence[Adapter],
        planned: Plan,
        texts: Texts | None,
        settings: SelectionSettings,
        before: IndexedPool | None = None,
    ) -> IndexedPool:
        """Indexes these adapters.

        Args:
            model: the base model, with no adapter active.
            adapters: those that are scored.
            planned: where to read.
            texts: of a calibration; None for signals without one.
            settings: for signal and cache folder.
            before: the same for an earlier state of the pool; what it has is not read again, and nothing is kept on
                disk, since a pool that changes once will change again.
        """
        started = time.perf_counter()
        cache = None if before is not None else cache_folder(settings.cache)
        store = None if before is None else before.store
        if store is None and texts is not None:
            store = CalibrationStore(cache_folder(settings.cache), key_of(model, texts, settings.reading))
        name = None if cache is None else _name(adapters, planned, store)
        if cache is not None and name is not None:
            kept = _load(cache / name, adapters, planned, model, store, started)
            if kept is not None:
                return kept
        calibrated = None
        if texts is not None and store is not None:
            calibrated = calibrate(model, adapters, planned, texts, settings, store)
        points = planned.points if calibrated is None else calibrated.points
        earlier = {} if before is None else {index.point: index for index in before.indices}
        indices = []
        for point in points:
            touching = [adapter for adapter in adapters if point.module in adapter.modules]
            whitening = None if calibrated is None else calibrated.whitenings.get(point.module)
            indices.append(ScoringIndex.read(touching, point, _device(model, point), whitening, earlier.get(point)))
        result = cls(tuple(adapters), tuple(points), tuple(indices), calibrated, store)
        if cache is not None and name is not None:
            _keep(cache, name, result)
        return result

    @property
    def columns(self) -> list[list[int]]:
        """Per point, the numbers of the adapters in its index."""
        return [[i for i, a in enumerate(self.adapters) if point.module in a.modules] for point in self.points]

    @property
    def bytes(self) -> int:
        """Memory of the indices."""
        return sum(index.bytes for index in self.indices)


def _name(adapters: Sequence[Adapter], planned: Plan, store: CalibrationStore | None) -> str | None:
    """The file of this pool's index in the cache folder; None where it can have none."""
    try:
        files = [(a.name, stamp(a.file.path), stamp(a.folder / CONFIG)) for a in adapters]
    except OSError:  # changed under our hands: reading will say what is wrong
        return None
    base = "" if store is None else store.key
    parts = [_FORMAT, base, [(p.name, p.rows) for p in planned.points], planned.count, files]
    digest = hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return f"index/{digest}.safetensors"


def _keep(cache: Path, name: str, pool: IndexedPool) -> None:
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"points": [p.module for p in pool.points], "ranks": [i.ranks for i in pool.indices]}
    for i, index in enumerate(pool.indices):
        tensors[f"{i}.stacked"] = index.stacked
        if index.offset is not None:
            tensors[f"offset.{i}"] = index.offset  # by its name it comes after the large ones, which stay aligned
    if pool.store is not None:
        about["keys"] = pool.store.keys(pool.adapters)
    if pool.calibrated is not None:
        tensors["neutral"] = pool.calibrated.neutral.contiguous()
        tensors["requests"] = pool.calibrated.requests.contiguous()
        about["ranking"] = [(point.module, value) for point, value in pool.calibrated.ranking]
        about["file"] = None if pool.calibrated.file is None else str(pool.calibrated.file)

    def write(part: str) -> None:
        try:
            save_file(tensors, part, {"about": json.dumps(about)})
            with open(part, "rb") as stream:
                beginning = 8 + int.from_bytes(stream.read(8), "little")
            if beginning % _ALIGNMENT:
                save_file(tensors, part, {"about": json.dumps(about) + " " * (-beginning % _ALIGNMENT)})
        except SafetensorError as error:  # also a full disk
            raise OSError(str(error)) from error

    file = write_cached(cache, name, write)
    if file is None:
        return
    with suppress(OSError):  # files that other processes removed or own are left alone
        known = sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        for old in known[:-_MOST_FILES]:
            old.unlink(missing_ok=True)


def _load(
    file: Path,
    adapters: Sequence[Adapter],
    planned: Plan,
    model: nn.Module,
    store: CalibrationStore | None,
    started: float,
) -> IndexedPool | None:
    """What is kept there; None where there is nothing, or nothing usable."""
    candidates = {point.module: point for point in planned.points}

    def read(file: Path) -> IndexedPool:
        with safe_open(file, framework="pt") as kept:
            about = json.loads(kept.metadata()["about"])
            points = [candidates[module] for module in about["points"]]
            names = set(kept.keys())
            indices = []
            for i, (point, ranks) in enumerate(zip(points, about["ranks"], strict=True)):
                touching = [adapter for adapter in adapters if point.module in adapter.modules]
                device = _device(model, point)
                offset = kept.get_tensor(f"offset.{i}").to(device) if f"offset.{i}" in names else None
                indices.append(ScoringIndex(kept.get_tensor(f"{i}.stacked").to(device), ranks, offset, touching, point))
            if store is not None:
                store.know(adapters, about["keys"])
            calibrated = None
            if "neutral" in names:
                ranking = tuple((candidates[module], value) for module, value in about["ranking"])
                written_down = None if about["file"] is None else Path(about["file"])
                heard = kept.get_tensor("neutral"), kept.get_tensor("requests")
                spent = time.perf_counter() - started
                calibrated = Calibrated(tuple(points), ranking, *heard, {}, written_down, 0, spent)
        return IndexedPool(tuple(adapters), tuple(points), tuple(indices), calibrated, store)

    found = read_cached(file, read)
    if found is not None:
        with suppress(OSError):  # the time of its last use decides which are removed; a folder may be read-only
            file.touch()
    return found


def _device(model: nn.Module, point: Point) -> torch.device:
    device = next(model.get_submodule(point.layer_path).parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
