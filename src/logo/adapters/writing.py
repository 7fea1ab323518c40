"""Writes adapters and pools as plain PEFT folders; a folder appears complete or not at all.

Files are written to a hidden folder beside the target (`.{name}.part-*`), synced, and renamed at the end. The writer
holds a lock on the hidden folder. A hidden folder without a lock was left by a process that died, and is removed when
the same target is written next. Settings that this version does not know are copied unchanged.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.files import CONFIG, EXAMPLES, NOTES, RECORD, RESPONSES, SAFETENSORS
from logo.adapters.initial import WithInitial, initial_folder
from logo.adapters.notes import ACTIVATION, changed, checked, homes, read_notes, write_notes
from logo.errors import LoGoError, StorageError, UsageError
from logo.folders import locked, make_folder, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

    from logo.adapters.format import Adapter, LoraWeights

Write = Callable[["Adapter", Path], bool]  # makes the folder of one adapter; returns whether its update is unchanged
Tell = Callable[[], None]


def check_new(folder: Path) -> None:
    """Raises UsageError if a folder cannot be written because something is there."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and is not an empty folder; name another one, or remove it")
    if folder.exists() and folder.samefile(os.curdir):
        raise UsageError(f"{folder} is the current folder, which cannot be replaced; name another one")


@contextmanager
def new_folder(folder: Path, what: str) -> Iterator[Path]:
    """A folder to write into; it becomes `folder` at the end of the block, and is removed if the block fails.

    Args:
        what: for messages, such as `the mixture`.

    Raises:
        UsageError: `folder` holds something already, or is the current one.
        StorageError: it cannot be written.
    """
    from safetensors import SafetensorError

    try:
        check_new(folder)
        target = folder.resolve()  # the target of a link is replaced, on its own disk
        make_folder(target.parent)
        with _part(target) as part:
            yield part
            _sync(part)
            os.replace(part, target)
            sync_folder(target.parent)
    except LoGoError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{what} cannot be written to {folder}: {error}") from error


@contextmanager
def _part(target: Path) -> Iterator[Path]:
    """A hidden folder with a new name beside another one, which is locked, and exists while the block runs.

    The lock on the parent, which all writers share, is only held at first, since writing may take minutes.
    """
    front = f".{target.name}.part-"
    with ExitStack() as held:
        with locked(target.parent) as alone:
            if alone:
                for left in [path for path in target.parent.iterdir() if path.name.startswith(front)]:
                    if _deserted(left):
                        shutil.rmtree(left, ignore_errors=True)
            part = target.with_name(front + secrets.token_hex(8))
            part.mkdir()
            held.callback(shutil.rmtree, part, ignore_errors=True)  # it was renamed if all went well
            held.enter_context(locked(part))
        yield part


def _deserted(part: Path) -> bool:
    """Whether no process holds the lock on a folder; False where there are no such locks."""
    import fcntl

    try:
        descriptor = os.open(part, os.O_RDONLY)
    except FileNotFoundError:  # renamed or removed meanwhile
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Syncs everything in a folder to disk."""
    for current, _, files in os.walk(folder, topdown=False):
        for name in files:
            with open(Path(current, name), "rb+") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(current))


def write_pool(
    root: Path,
    adapters: Iterable[Adapter],
    out: Path,
    write: Write,
    change: Callable[[], Mapping[str, Any]],
    tell: Tell | None = None,
) -> None:
    """Makes a new pool from another one, which stays as it is; the new pool is complete or not written.

    Args:
        root: the folder of the old pool. Each `pool.json` in it that applies to one of the adapters is copied, and so
            are examples, and each `training.json` of an adapter that has not changed.
        adapters: the adapters of the new pool; each keeps its relative path.
        out: must not exist yet, or be empty.
        write: is given an adapter and the folder to make.
        change: makes the entry for `pool.json` that says what was done; called at the end.
        tell: called after each adapter.

    Raises:
        UsageError: `out` is in use, or is inside the old pool; or a file to copy is a link out of that pool, or no JSON
            object.
        StorageError: it cannot be written.
    """
    if out.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"{out} is inside the pool {root} itself; name a folder outside of it")
    adapters = list(adapters)
    notes = _notes(root, adapters)
    same: list[Adapter] = []
    other: list[Adapter] = []
    with new_folder(out, "the pool") as part:
        for adapter in adapters:
            place = part / adapter.folder.relative_to(root)
            as_before = write(adapter, place)
            # The record tells `logo train` that training made these weights, and a card that the losses are theirs.
            for name in (RECORD, EXAMPLES) if as_before else (EXAMPLES,):
                if (adapter.folder / name).is_file():
                    shutil.copyfile(checked(adapter.folder / name, root, adapter.folder), place / name)
            (same if as_before else other).append(adapter)
            if tell is not None:
                tell()
        done = change()
        for home, said in notes.items():
            place = home.relative_to(root)
            write_notes(part / place, changed(said, done, _names(place, same), _names(place, other)))


def _notes(root: Path, adapters: Sequence[Adapter]) -> dict[Path, dict[str, Any]]:
    """The notes that apply to these adapters, by folder, and those of the pool itself.

    Raises:
        UsageError: a `pool.json` is a link out of the pool.
    """
    places = {root: None} | {home: None for adapter in adapters for home in homes(adapter.folder, root)}
    for place in places:
        if (place / NOTES).is_symlink():
            checked(place / NOTES, root)
    found = {place: read_notes(place) for place in places}
    if not (root / NOTES).exists():
        # A `pool.json` above a pool of one adapter may apply to it.
        for adapter in adapters:
            if adapter.folder == root and adapter.activation.last is not None:
                found[root] = {ACTIVATION: str(adapter.activation)}
    return found


def _names(place: Path, adapters: Iterable[Adapter]) -> set[str]:
    """The names of these adapters in the notes of a folder of the pool.

    Args:
        place: relative to the pool.
    """
    if place == Path():
        return {adapter.name for adapter in adapters}
    front = f"{place.as_posix()}/"
    return {adapter.name.removeprefix(front) for adapter in adapters if f"{adapter.name}/".startswith(front)}


def copy_adapter(adapter: Adapter, folder: Path) -> bool:
    """Copies configuration, weights and calibration of an adapter; for use inside `new_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    start = initial_folder(adapter.folder) if isinstance(adapter.file, WithInitial) else None
    for file in (adapter.folder / CONFIG, adapter.file.path):
        shutil.copyfile(file, folder / file.name)
    if start is not None:
        (folder / start.name).mkdir()
        for file in (start / CONFIG, start / SAFETENSORS):
            shutil.copyfile(checked(file, adapter.folder), folder / start.name / file.name)
    if (adapter.folder / RESPONSES).is_dir():
        for file in (adapter.folder / RESPONSES).rglob("*"):
            checked(file, adapter.folder)
        shutil.copytree(adapter.folder / RESPONSES, folder / RESPONSES)
    return True


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Writes one PEFT folder in place, which may exist; for use inside `new_folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SAFETENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def plain_tensors(weights: Mapping[str, LoraWeights]) -> dict[str, Tensor]:
    """Factors under PEFT's keys; scales are left to the configuration."""
    return {
        f"base_model.model.{path}.lora_{side}.weight": tensor
        for path, one in weights.items()
        for side, tensor in (("A", one.A), ("B", one.B))
    }


def unscaled(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Settings that give every module the scale 1, for ranks by module path."""
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    others = {re.escape(path): found for path, found in ranks.items() if found != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }
