"""The notes of a pool: `pool.json`, with its recipe, activation and losses.

All entries are optional. Only `activation` (`logo.adapters.activation`) and `k`, the adapters per prompt, have an
effect on answers. A file that cannot be read gives a warning and counts as empty.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from logo.adapters.activation import Activation, of_notes
from logo.adapters.files import NOTES
from logo.errors import StorageError, UsageError

ACTIVATION = "activation"  # of adapters without invocation tokens
ADAPTERS = "adapters"  # notes about each adapter, by name


def read_notes(root: Path) -> dict[str, Any]:
    """The notes of a pool; empty if there are none."""
    file = root / NOTES
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{file} is ignored, since it cannot be read: {error}", UserWarning, stacklevel=2)
        return {}
    if not isinstance(notes, dict):
        warnings.warn(f"{file} is ignored: it must hold an object", UserWarning, stacklevel=2)
        return {}
    return notes


def noted_k(root: Path) -> int | None:
    """Adapters per prompt, if the notes of a pool say so.

    Raises:
        StorageError: they say something else than a number.
    """
    try:
        return checked_k(read_notes(root), str(root / NOTES))
    except UsageError as error:
        raise StorageError(str(error)) from None


def checked_k(said: Mapping[Any, Any], where: str) -> int | None:
    """The entry `k`; None if there is none. Raises UsageError for anything but a number of adapters."""
    k = said.get("k")
    if k is not None and (type(k) is not int or k < 1):
        raise UsageError(f"{where}: k: expected a number of adapters, found {k!r}")
    return k


def noted(folder: Path, top: Path, own: Activation) -> Activation:
    """The activation of an adapter: its own, or that of the nearest `pool.json` between its folder and the pool's.

    Args:
        top: the pool's folder.
        own: the activation that its configuration gives.

    Raises:
        StorageError: a `pool.json` names an activation that does not exist.
    """
    if not own.everywhere:
        return own
    for place in (folder, *folder.parents):
        try:
            stat = os.stat(place / NOTES)
        except OSError:
            if place == top:
                break
        else:
            return _activation(place, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
    return own


def noted_alone(folder: Path, own: Activation) -> Activation:
    """The activation of an adapter that is opened by its own folder; a `pool.json` in the folder above counts.

    Raises:
        StorageError: as `noted`.
    """
    place = folder.absolute()
    return noted(place, place.parent, own)


def homes(folder: Path, top: Path) -> list[Path]:
    """The folders from an adapter's up to the pool's that have a `pool.json`, the nearest first.

    Args:
        top: the pool's folder.
    """
    places = (folder, *folder.parents)
    inside = places[: places.index(top) + 1] if top in places else places[:1]
    return [place for place in inside if (place / NOTES).exists()]


@lru_cache(maxsize=64)  # one file holds for all adapters of a pool
def _activation(root: Path, *stamp: int) -> Activation:
    try:
        return of_notes(read_notes(root).get(ACTIVATION))
    except UsageError as error:
        raise StorageError(f"{root / NOTES}: {error}") from error


def checked(file: Path, *homes: Path) -> Path:
    """Checks that a file beside adapters may be published or copied with them, and returns it.

    Args:
        homes: folders in which it may be. Links of the Hub's cache may lead to the cache's `blobs`.

    Raises:
        UsageError: it is a link that leads out of these folders, or a `.json` without an object.
        StorageError: it cannot be read.
    """
    real = file.resolve()
    places = [home.resolve() for home in homes]
    places += [above.parent / "blobs" for place in places for above in place.parents if above.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in places):
        raise UsageError(f"{file} is a link out of the pool, to {real}; put the file itself there, or remove the link")
    if file.suffix == ".json":
        try:
            holds = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"{file}: cannot be read ({error.strerror or error})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file} is not valid JSON: {error}; fix or remove it") from error
        if not isinstance(holds, dict):
            raise UsageError(f"{file} must hold an object, found {type(holds).__name__}; fix or remove it")
    return file


def write_notes(root: Path, notes: Mapping[str, Any]) -> None:
    """Writes `pool.json` in place; for use inside `new_folder`."""
    (root / NOTES).write_text(json.dumps(notes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
