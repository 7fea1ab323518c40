"""Finds the adapters in a folder: those that can be used, and why the others cannot."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from logo.adapters.activation import EVERYWHERE
from logo.adapters.files import CONFIG, NOTES, PICKLE, SAFETENSORS
from logo.adapters.format import Adapter, open_adapter
from logo.adapters.notes import noted, noted_alone
from logo.errors import AdapterError, LeftOut, StorageError

# Pools up to this size are checked for NaN when they are opened, which takes well under a second. The tensors of larger
# pools are checked when they are first read.
VERIFY_UP_TO_BYTES = 256 * 2**20
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def is_checkpoint(path: str) -> bool:
    """Whether a folder has the name of a checkpoint of the Hugging Face `Trainer`, such as `checkpoint-500`."""
    return _CHECKPOINT.fullmatch(os.path.basename(path)) is not None


def left_out_checkpoint(name: str) -> LeftOut:
    """Says that a checkpoint is left out, which only a place that names its folder opens."""
    return LeftOut(name, "it is a training checkpoint; to open it, name only its folder")


@dataclass(frozen=True)
class Spot:
    """A folder with an adapter in it.

    Attributes:
        folder: its path.
        name: of the adapter.
        top: the folder of its pool; a `pool.json` above it does not apply.
    """

    folder: str
    name: str
    top: Path


def opened(
    spots: Iterable[Spot],
    refused: list[AdapterError],
    *,
    allow_pickle: bool = False,
    verify: bool | None = None,
) -> list[Adapter]:
    """Opens the adapters in these folders; those that cannot be used are added to `refused`.

    Args:
        allow_pickle, verify: as `AdapterPool.from_directory`.
    """
    adapters: dict[str, Adapter] = {}
    tops: dict[str, Path] = {}
    for spot in spots:
        name = spot.name
        try:
            adapter = open_adapter(spot.folder, name, allow_pickle=allow_pickle)
            if name in adapters:
                raise AdapterError(
                    name, f"{adapters[name].folder} and {spot.folder} have the same name; rename one of them"
                )
            adapters[name], tops[name] = adapter, spot.top
        except AdapterError as error:
            refused.append(error)
    # Adapters that a user names one by one have a folder of their own as `top`, and none is left out.
    for name in [name for name in adapters if tops.get(_twin(name)) == tops[name]]:
        if adapters[name].config.invocation and not adapters[_twin(name)].config.invocation:
            del adapters[name]
            reason = f"it is the activated form of {_twin(name)!r}, which is used; to open it, name only its folder"
            refused.append(LeftOut(name, reason))
    if verify is None:
        verify = sum(adapter.size for adapter in adapters.values()) <= VERIFY_UP_TO_BYTES
    damaged = _damaged(adapters.values()) if verify else {}
    refused += damaged.values()
    return [_acting(one, tops[name]) for name, one in adapters.items() if name not in damaged]


def _acting(adapter: Adapter, top: Path) -> Adapter:
    """The adapter with the activation that the pool's notes give it."""
    if adapter.folder == top:
        return adapter
    activation = noted(adapter.folder, top, adapter.activation)
    if activation.everywhere and adapter.folder.is_symlink():
        _tell_of_other_notes(adapter.name, adapter.folder.resolve())
    return replace(adapter, activation=activation)


def _tell_of_other_notes(name: str, real: Path) -> None:
    """Warns if a linked adapter, which acts on every token here, would not in the pool that it lies in."""
    there = noted_alone(real, EVERYWHERE)
    if there != EVERYWHERE:
        warnings.warn(
            f"adapter {name!r} is a link to {real}. It acts on every token here, but {real.parent / NOTES} says "
            f"activation {there}: if it was trained for that, copy this {NOTES} into the folder of the link",
            UserWarning,
            stacklevel=2,
        )


def _twin(name: str) -> str:
    """The name of the plain adapter beside an activated one, in a library of `NAME/BASE/lora` and `NAME/BASE/alora`."""
    front, slash, last = name.rpartition("/")
    return f"{front}{slash}lora" if last == "alora" else ""


def check_folder(root: Path) -> None:
    """Raises StorageError unless `root` is a readable folder."""
    try:
        found = "a folder" if root.is_dir() else "a file" if root.exists() else "nothing"
        if found == "a folder":
            os.scandir(root).close()
    except OSError as error:
        raise StorageError(f"adapter folder {root} cannot be read: {error.strerror or error}") from error
    if found != "a folder":
        raise StorageError(f"adapter folder {root}: expected a folder, found {found}; check the path")


def adapter_folders(root: Path, refused: list[AdapterError]) -> Iterator[tuple[str, str]]:
    """Yields folders below `root` that hold an adapter, and their relative paths; hidden folders are skipped.

    Links are followed. A folder to which several paths lead is found under the one without links, or under the first
    one; the others are added to `refused` as left out, except links back to a folder above them. Dead links are left
    out, too. A folder that cannot be listed may hold adapters, so it is added to `refused`.
    """
    top = str(root)

    def name(path: str) -> str:
        return path[len(top) :].strip(os.sep).replace(os.sep, "/")

    def unreadable(error: OSError) -> None:
        refused.append(AdapterError(name(str(error.filename)) or ".", f"the folder cannot be listed: {error.strerror}"))

    marks = {CONFIG, SAFETENSORS, PICKLE}
    seen: dict[tuple[int, int], str] = {}
    found, again, starts = [], [], [top]
    while starts:
        links = []
        for start in starts:
            for current, folders, files in os.walk(start, onerror=unreadable, followlinks=True):
                try:
                    stat = os.stat(current)
                except OSError as error:  # removed meanwhile
                    unreadable(error)
                    continue
                first = seen.setdefault((stat.st_dev, stat.st_ino), current)
                if first is not current:
                    again.append((current, first))
                    folders.clear()
                    continue
                shown = {f: os.path.islink(os.path.join(current, f)) for f in folders if not f.startswith(".")}
                folders[:] = [f for f, link in shown.items() if not link]
                links += [os.path.join(current, f) for f, link in shown.items() if link]
                if not marks.isdisjoint(files):
                    found.append(current)
                else:
                    refused += (LeftOut(name(path), reason) for path, reason in _dead_links(current, files))
        starts = sorted(links)  # visited after all real folders
    for path, first in again:  # a link back to a folder above it is within that one
        if any(_within(one, first) for one in found) and not _within(path, first):
            refused.append(LeftOut(name(path), f"it is the same folder as {name(first)!r}, which is used"))
    yield from ((path, name(path)) for path in sorted(found, key=lambda path: path.split(os.sep)))


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _dead_links(folder: str, files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The links among these files of a folder whose targets cannot be reached, and what to do; hidden ones are
    skipped."""
    for path in (os.path.join(folder, file) for file in sorted(files) if not file.startswith(".")):
        if os.path.islink(path) and not os.path.exists(path):
            yield path, f"it is a link to {os.readlink(path)}, which cannot be reached; mend or remove the link"


def _damaged(adapters: Iterable[Adapter]) -> dict[str, AdapterError]:
    """Reads all tensors of these adapters; returns name -> error."""
    damaged = {}
    for adapter in adapters:
        try:
            adapter.verify()
        except AdapterError as error:
            damaged[adapter.name] = error
    return damaged
