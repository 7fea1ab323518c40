"""Files of scoring indices in the cache folder, each with the calibration of its pool.

    <cache>/index/<digest of the adapters' files, the points and the reading>.safetensors

There is one memory-mapped file per pool, so that a pool opens again without reading its adapters or copying.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from logo.adapters.files import CONFIG
from logo.adapters.format import Adapter
from logo.adapters.weights import stamp
from logo.cache import read_cached, write_cached
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import Calibration
from logo.selection.index import ScoringIndex, Tell, Wanted, built_on, device_of, read_indices, sketched
from logo.selection.mapped import ALIGNMENT, mapped, read_mapped
from logo.selection.points import Point

# To be raised when the content of the files changes its meaning.
_FORMAT = 9
# Pools change, and the indices of those that are gone are of no use to anyone.
_MOST_FILES = 16
# Larger indices (in bytes) are built within their files, adapter by adapter, since they may not fit into memory.
MAPPED = 2**30


def index_name(
    adapters: Sequence[Adapter],
    candidates: Sequence[Point],
    most: int,
    cache: CalibrationCache | None,
    model: nn.Module,
) -> str | None:
    """The name of the file of a pool's index; None if an adapter has no files.

    Args:
        adapters: those that are scored.
        candidates: where the model may be read.
        most: how many of the candidates are chosen at most; 0: all are read.
        cache: of the calibration; None for signals without one.
        model: the base model; its device counts, since another kind of device gives other last digits.
    """
    # The stamps of when they were opened: an index belongs to what was read.
    files = [(a.name, stamp(a.file.path), stamp(a.folder / CONFIG)) for a in adapters]
    if any(None in file for file in files):
        return None
    base = "" if cache is None else cache.key
    read_at = [(p.name, p.rows, built_on(device_of(model, p)).type) for p in candidates]
    parts = [_FORMAT, base, read_at, most, files]
    digest = hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return f"index/{digest}.safetensors"


def keep_index(
    folder: Path,
    name: str,
    adapters: Sequence[Adapter],
    indices: Sequence[ScoringIndex],
    calibration: Calibration | None,
    cache: CalibrationCache | None,
) -> None:
    """Writes the index of these adapters to the cache folder."""
    tensors = {f"{i}.stacked": index.stacked for i, index in enumerate(indices)}
    # Tensors are written in the order of their names. So the large ones come first and stay aligned, and lengths of
    # updates, of which there may be any number, come last.
    tensors |= {f"offset.{i}": index.offset for i, index in enumerate(indices) if index.offset is not None}
    for i, index in enumerate(indices):
        tensors |= dict(zip(_sketch_names(i), index.sketch or (), strict=False))
        tensors[f"updates.{i}"] = index.updates
    kept, about = _about([(i.point, i.ranks) for i in indices], adapters, calibration, cache)
    tensors |= kept

    def write(part: str) -> None:
        save_file(tensors, part, {"about": json.dumps(about)})
        with open(part, "rb") as stream:
            beginning = 8 + int.from_bytes(stream.read(8), "little")
        if beginning % ALIGNMENT:
            save_file(tensors, part, {"about": json.dumps(about) + " " * (-beginning % ALIGNMENT)})

    write_cached(folder, name, write, _MOST_FILES)


def bytes_of(wanted: Sequence[Wanted]) -> int:
    """Bytes of the stacked factors of these indices in the memory of the host; 0 if they go to another device."""
    if any(one.device.type != "cpu" for one in wanted):
        return 0
    return sum(4 * math.prod(one.shape) for one in wanted)


def build_index(
    folder: Path,
    name: str,
    adapters: Sequence[Adapter],
    wanted: Sequence[Wanted],
    calibration: Calibration | None,
    cache: CalibrationCache | None,
    tell: Tell | None = None,
) -> bool:
    """Builds an index within its file, adapter by adapter, so that it need not fit into memory.

    Args:
        wanted: one per point, on the CPU.
        tell: see `read_indices`.

    Returns:
        Whether the file was written; if not, a warning has said why.
    """
    kept, about = _about([(one.point, one.ranks) for one in wanted], adapters, calibration, cache)
    shapes: dict[str, tuple[int, ...]] = {f"{i}.stacked": one.shape for i, one in enumerate(wanted)}
    shapes |= {f"offset.{i}": (one.shape[0],) for i, one in enumerate(wanted) if one.whitening is not None}
    for i, one in enumerate(wanted):
        if one.whitening is not None:
            made = sketched(one.whitening, one.device)
            kept |= dict(zip(_sketch_names(i), made, strict=True))
    shapes |= {key: tuple(tensor.shape) for key, tensor in kept.items()}
    shapes |= {f"updates.{i}": (len(one.adapters),) for i, one in enumerate(wanted)}

    def write(part: str) -> None:
        tensors = mapped(part, shapes, {"about": json.dumps(about)})
        roomy = [replace(one, room=tensors[f"{i}.stacked"]) for i, one in enumerate(wanted)]
        for i, index in enumerate(read_indices(roomy, tell)):
            tensors[f"updates.{i}"].copy_(index.updates)
            if index.offset is not None:
                tensors[f"offset.{i}"].copy_(index.offset)
        for key, tensor in kept.items():
            tensors[key].copy_(tensor)

    return write_cached(folder, name, write, _MOST_FILES) is not None


def _about(
    points: Sequence[tuple[Point, Sequence[int]]],
    adapters: Sequence[Adapter],
    calibration: Calibration | None,
    cache: CalibrationCache | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds beside the factors: the responses of a calibration, and metadata."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"points": [p.module for p, _ in points], "ranks": [list(ranks) for _, ranks in points]}
    if cache is not None:
        about["keys"] = cache.keys(adapters)
    if calibration is not None:
        tensors["neutral"] = calibration.neutral.contiguous()
        tensors["requests"] = calibration.requests.contiguous()
        about["weight_norms"] = calibration.weight_norms
        about["ranking"] = [(point.module, value) for point, value in calibration.ranking]
        about["file"] = None if calibration.file is None else str(calibration.file)
    return tensors, about


def _sketch_names(i: int) -> tuple[str, str]:
    return f"sketch.{i}", f"sketch_of_mean.{i}"


def load_index(
    file: Path,
    adapters: Sequence[Adapter],
    candidates: Sequence[Point],
    model: nn.Module,
    cache: CalibrationCache | None,
) -> tuple[tuple[ScoringIndex, ...], Calibration | None] | None:
    """The indices of a file, one per point that is read, and the calibration; None if the file cannot be used."""
    started = time.perf_counter()
    points = {point.module: point for point in candidates}

    def read(file: Path) -> tuple[tuple[ScoringIndex, ...], Calibration | None]:
        tensors, metadata = read_mapped(file) if file.stat().st_size > MAPPED else _read_small(file)
        about = json.loads(metadata["about"])
        indices = []
        for i, (module, ranks) in enumerate(zip(about["points"], about["ranks"], strict=True)):
            point = points[module]
            touching = [adapter for adapter in adapters if module in adapter.modules]
            device = device_of(model, point)
            offset = tensors[f"offset.{i}"].to(device) if f"offset.{i}" in tensors else None
            parts = [tensors[name].to(device) for name in _sketch_names(i) if name in tensors]
            sketch = (parts[0], parts[1]) if len(parts) == 2 else None
            stacked, updates = (tensors[name].to(device) for name in (f"{i}.stacked", f"updates.{i}"))
            indices.append(ScoringIndex(stacked, ranks, offset, touching, point, sketch, updates))
        if cache is not None:
            cache.know(adapters, about["keys"])
        calibration = None
        if "neutral" in tensors:
            ranking = tuple((points[module], value) for module, value in about["ranking"])
            written_down = None if about["file"] is None else Path(about["file"])
            read_at = tuple(index.point for index in indices)
            spent = time.perf_counter() - started
            norms = tuple(about["weight_norms"])
            if cache is not None and any(map(math.isnan, norms)):  # they may be at hand now
                norms = cache.weight_norms(model, read_at)
            kept = tensors["neutral"], tensors["requests"], norms
            calibration = Calibration(read_at, ranking, *kept, written_down, 0, spent)
        return tuple(indices), calibration

    return read_cached(file, read, used=True)


def _read_small(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as kept:
        return {name: kept.get_tensor(name) for name in kept.keys()}, kept.metadata()  # noqa: SIM118
