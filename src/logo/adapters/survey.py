"""What lies in a folder of adapters: which can be used, and why each other one cannot."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from logo.adapters.config import CONFIG
from logo.adapters.format import Adapter, open_adapter, own_name
from logo.adapters.known import KnownPool
from logo.adapters.notes import noted, noted_alone
from logo.adapters.weights import PICKLE, SAFETENSORS
from logo.errors import AdapterError, StorageError

# Reading every tensor once finds NaN before it can cost anyone a run. Up to this size that takes well under a second,
# so it is done at opening; a larger pool has its tensors checked when each is first read.
VERIFY_UP_TO_BYTES = 256 * 2**20


def survey(
    root: Path,
    *,
    allow_pickle: bool = False,
    verify: bool | None = None,
    cache: Path | None = None,
    unconverted: bool = False,
) -> tuple[list[Adapter], list[AdapterError]]:
    """Every adapter below `root` that can be used, and why each other one cannot; see `from_directory`.

    Args:
        cache: as `KnownPool.of`.
        unconverted: as `parse_config`; without a cache only.

    Raises:
        StorageError: `root` is not a readable folder.
    """
    check_folder(root)
    known = KnownPool.of(root, cache)
    adapters: dict[str, Adapter] = {}
    refused: list[AdapterError] = []
    unchanged = set()
    for folder, name in _adapter_folders(root, refused):
        try:
            adapter = known.get(folder, name)
            if adapter is None:
                adapter = open_adapter(folder, name, allow_pickle=allow_pickle, unconverted=unconverted)
            elif known.verified(name):
                unchanged.add(name)
            if name in adapters:
                raise AdapterError(name, f"{adapters[name].folder} and {folder} have one name; rename one of them")
            adapters[name] = adapter
        except AdapterError as error:
            refused.append(error)
    unverified = [adapter for name, adapter in adapters.items() if name not in unchanged]
    if verify is None:
        verify = sum(adapter.size for adapter in unverified) <= VERIFY_UP_TO_BYTES
    damaged = _damaged(unverified) if verify else {}
    good = [adapter for name, adapter in adapters.items() if name not in damaged]
    known.keep(good, {adapter.name for adapter in good} if verify else unchanged)
    return [_acting(one, root) for one in good], [*refused, *damaged.values()]


def _acting(adapter: Adapter, root: Path) -> Adapter:
    """The adapter with what the pool's notes say about where it acts."""
    if adapter.folder == root:  # nothing of the folder above is in the cache
        return replace(adapter, activation=noted_alone(root, adapter.activation))
    return replace(adapter, activation=noted(adapter.folder, root, adapter.activation))


def check_folder(root: Path) -> None:
    """Raises StorageError unless a pool can be looked for there."""
    try:
        found = "a folder" if root.is_dir() else "a file" if root.exists() else "nothing"
        if found == "a folder":
            os.scandir(root).close()
    except OSError as error:
        raise StorageError(f"adapter folder {root} cannot be read: {error.strerror or error}") from error
    if found != "a folder":
        raise StorageError(f"adapter folder {root}: expected a folder, found {found}; check the path")


def _adapter_folders(root: Path, refused: list[AdapterError]) -> Iterator[tuple[str, str]]:
    """Folders below `root` that hold an adapter, with their names; hidden folders are left alone.

    What lies in a folder that cannot be listed nobody knows, so it is `refused` instead of passed over.
    """

    def unreadable(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix()
        refused.append(AdapterError(name, f"the folder cannot be listed: {error.strerror}"))

    marks = {CONFIG, SAFETENSORS, PICKLE}
    seen = set()
    top = str(root)
    for current, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        try:
            stat = os.stat(current)
        except OSError as error:  # removed meanwhile
            unreadable(error)
            continue
        if (stat.st_dev, stat.st_ino) in seen:  # a link back into the tree
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if not marks.isdisjoint(files):
            name = own_name(root) if current == top else current[len(top) :].strip(os.sep).replace(os.sep, "/")
            yield current, name


def _damaged(adapters: Iterable[Adapter]) -> dict[str, AdapterError]:
    """Reads all tensors of these adapters; name -> what is wrong."""
    damaged = {}
    for adapter in adapters:
        try:
            adapter.read()
        except AdapterError as error:
            damaged[adapter.name] = error
    return damaged
