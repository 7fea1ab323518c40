"""Scoring indices on disk, together with the calibration of the pool they belong to.

    <cache>/index/<digest of the adapters' files, the points and the reading>.safetensors

One file per pool, memory-mapped, so that opening a known pool costs neither a pass over the adapters nor a copy.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from logo.adapters.files import CONFIG
from logo.adapters.format import Adapter
from logo.adapters.pool_cache import stamp
from logo.cache import read_cached, write_cached
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import Calibration
from logo.selection.index import ScoringIndex, Tell, Wanted, built_on, device_of, read_indices, sketched
from logo.selection.mapped import ALIGNMENT, mapped, read_mapped
from logo.selection.points import Point

# Changes when what is kept means something else.
_FORMAT = 5
# Pools change, and the indices of those that are gone are of no use to anyone.
_MOST_FILES = 16
# Bytes from which on an index is made within its file, piece by piece: it may be larger than memory.
MAPPED = 2**30


def index_name(
    adapters: Sequence[Adapter],
    candidates: Sequence[Point],
    most: int,
    cache: CalibrationCache | None,
    model: nn.Module,
) -> str | None:
    """The file of a pool's index in the cache folder; None where it can have none.

    Args:
        adapters: those that are scored.
        candidates: where the model may be read.
        most: of the candidates, so many are chosen at most; 0: all are read.
        cache: of the calibration; None for signals without one.
        model: the base model. Indices made on another kind of device are other ones in their last digits.
    """
    try:
        files = [(a.name, stamp(a.file.path), stamp(a.folder / CONFIG)) for a in adapters]
    except OSError:  # changed under our hands: reading will say what is wrong
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
    """Keeps the index of these adapters, one part per point, in a cache folder."""
    tensors = {f"{i}.stacked": index.stacked for i, index in enumerate(indices)}
    # By their names they come after the large ones, which stay aligned.
    tensors |= {f"offset.{i}": index.offset for i, index in enumerate(indices) if index.offset is not None}
    for i, index in enumerate(indices):
        tensors |= dict(zip(_sketch_names(i), index.sketch or (), strict=False))
    kept, about = _about([(i.point, i.ranks) for i in indices], adapters, calibration, cache)
    tensors |= kept

    def write(part: str) -> None:
        try:
            save_file(tensors, part, {"about": json.dumps(about)})
            with open(part, "rb") as stream:
                beginning = 8 + int.from_bytes(stream.read(8), "little")
            if beginning % ALIGNMENT:
                save_file(tensors, part, {"about": json.dumps(about) + " " * (-beginning % ALIGNMENT)})
        except SafetensorError as error:  # also a full disk
            raise OSError(str(error)) from error

    _remove_old(write_cached(folder, name, write))


def bytes_of(wanted: Sequence[Wanted]) -> int:
    """What the stacked factors of these indices take; 0 where they are not to lie in memory of the host."""
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
    """Makes an index within its file, one adapter after the other, so that it never has to fit into memory.

    Args:
        wanted: one per point, on the CPU.
        tell: see `read_indices`.

    Returns:
        Whether it is there: `load_index` reads it then. If not, that was said.
    """
    kept, about = _about([(one.point, one.ranks) for one in wanted], adapters, calibration, cache)
    shapes: dict[str, tuple[int, ...]] = {f"{i}.stacked": one.shape for i, one in enumerate(wanted)}
    shapes |= {f"offset.{i}": (one.shape[0],) for i, one in enumerate(wanted) if one.whitening is not None}
    for i, one in enumerate(wanted):
        if one.whitening is not None:
            made = sketched(one.whitening, one.device)
            kept |= dict(zip(_sketch_names(i), made, strict=True))
    shapes |= {key: tuple(tensor.shape) for key, tensor in kept.items()}

    def write(part: str) -> None:
        tensors = mapped(part, shapes, {"about": json.dumps(about)})
        roomy = [replace(one, room=tensors[f"{i}.stacked"]) for i, one in enumerate(wanted)]
        for i, index in enumerate(read_indices(roomy, tell)):
            if index.offset is not None:
                tensors[f"offset.{i}"].copy_(index.offset)
        for key, tensor in kept.items():
            tensors[key].copy_(tensor)

    file = write_cached(folder, name, write)
    _remove_old(file)
    return file is not None


def _about(
    points: Sequence[tuple[Point, Sequence[int]]],
    adapters: Sequence[Adapter],
    calibration: Calibration | None,
    cache: CalibrationCache | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is kept beside the factors: the responses of a calibration, and what is no tensor."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"points": [p.module for p, _ in points], "ranks": [list(ranks) for _, ranks in points]}
    if cache is not None:
        about["keys"] = cache.keys(adapters)
    if calibration is not None:
        tensors["neutral"] = calibration.neutral.contiguous()
        tensors["requests"] = calibration.requests.contiguous()
        about["ranking"] = [(point.module, value) for point, value in calibration.ranking]
        about["file"] = None if calibration.file is None else str(calibration.file)
    return tensors, about


def _sketch_names(i: int) -> tuple[str, str]:
    return f"sketch.{i}", f"sketch_of_mean.{i}"


def _remove_old(file: Path | None) -> None:
    """Leaves the files beside this one that were used last."""
    if file is None:
        return
    with suppress(OSError):  # files that other processes removed or own are left alone
        known = sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        for old in known[:-_MOST_FILES]:
            old.unlink(missing_ok=True)


def load_index(
    file: Path,
    adapters: Sequence[Adapter],
    candidates: Sequence[Point],
    model: nn.Module,
    cache: CalibrationCache | None,
) -> tuple[tuple[ScoringIndex, ...], Calibration | None] | None:
    """What is kept there, one index per point that is read; None where there is nothing, or nothing usable."""
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
            indices.append(ScoringIndex(tensors[f"{i}.stacked"].to(device), ranks, offset, touching, point, sketch))
        if cache is not None:
            cache.know(adapters, about["keys"])
        calibration = None
        if "neutral" in tensors:
            ranking = tuple((points[module], value) for module, value in about["ranking"])
            written_down = None if about["file"] is None else Path(about["file"])
            read_at = tuple(index.point for index in indices)
            spent = time.perf_counter() - started
            kept = tensors["neutral"], tensors["requests"]
            calibration = Calibration(read_at, ranking, *kept, written_down, 0, spent)
        return tuple(indices), calibration

    found = read_cached(file, read)
    if found is not None:
        with suppress(OSError):  # the time of its last use decides which are removed; a folder may be read-only
            file.touch()
    return found


def _read_small(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as kept:
        return {name: kept.get_tensor(name) for name in kept.keys()}, kept.metadata()  # noqa: SIM118
