"""Scoring indices on disk, together with the calibration of the pool they belong to.

    <cache>/index/<digest of the adapters' files, the points and the reading>.safetensors

One file per pool, memory-mapped, so that opening a known pool costs neither a pass over the adapters nor a copy.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from logo.adapters.config import CONFIG
from logo.adapters.format import Adapter
from logo.adapters.known import stamp
from logo.cache import read_cached, write_cached
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import Calibration
from logo.selection.index import ScoringIndex, built_on, device_of
from logo.selection.points import Point

# Changes when what is kept means something else.
_FORMAT = 4
# Bytes. In memory tensors begin at multiples of it, so in the file they do too: libraries sum in another order where
# they do not, and the last digit of a score would tell whether the index was new.
_ALIGNMENT = 64
# Pools change, and the indices of those that are gone are of no use to anyone.
_MOST_FILES = 16


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
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"points": [i.point.module for i in indices], "ranks": [i.ranks for i in indices]}
    for i, index in enumerate(indices):
        tensors[f"{i}.stacked"] = index.stacked
        if index.offset is not None:
            tensors[f"offset.{i}"] = index.offset  # by its name it comes after the large ones, which stay aligned
    if cache is not None:
        about["keys"] = cache.keys(adapters)
    if calibration is not None:
        tensors["neutral"] = calibration.neutral.contiguous()
        tensors["requests"] = calibration.requests.contiguous()
        about["ranking"] = [(point.module, value) for point, value in calibration.ranking]
        about["file"] = None if calibration.file is None else str(calibration.file)

    def write(part: str) -> None:
        try:
            save_file(tensors, part, {"about": json.dumps(about)})
            with open(part, "rb") as stream:
                beginning = 8 + int.from_bytes(stream.read(8), "little")
            if beginning % _ALIGNMENT:
                save_file(tensors, part, {"about": json.dumps(about) + " " * (-beginning % _ALIGNMENT)})
        except SafetensorError as error:  # also a full disk
            raise OSError(str(error)) from error

    file = write_cached(folder, name, write)
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
        with safe_open(file, framework="pt") as kept:
            about = json.loads(kept.metadata()["about"])
            names = set(kept.keys())
            indices = []
            for i, (module, ranks) in enumerate(zip(about["points"], about["ranks"], strict=True)):
                point = points[module]
                touching = [adapter for adapter in adapters if module in adapter.modules]
                device = device_of(model, point)
                offset = kept.get_tensor(f"offset.{i}").to(device) if f"offset.{i}" in names else None
                indices.append(ScoringIndex(kept.get_tensor(f"{i}.stacked").to(device), ranks, offset, touching, point))
            if cache is not None:
                cache.know(adapters, about["keys"])
            calibration = None
            if "neutral" in names:
                ranking = tuple((points[module], value) for module, value in about["ranking"])
                heard = kept.get_tensor("neutral"), kept.get_tensor("requests")
                written_down = None if about["file"] is None else Path(about["file"])
                read_at = tuple(index.point for index in indices)
                spent = time.perf_counter() - started
                calibration = Calibration(read_at, ranking, *heard, written_down, 0, spent)
        return tuple(indices), calibration

    found = read_cached(file, read)
    if found is not None:
        with suppress(OSError):  # the time of its last use decides which are removed; a folder may be read-only
            file.touch()
    return found
