"""Writes a folder of files, or one file, as a whole: it is written and synced beside its place, and then renamed.

A process that dies leaves the old content, or the new, and perhaps a hidden sibling (`.{name}.new-*`). Only if it dies
between two renames, the old content of a folder is in its sibling `.{name}.old-*`, from where it can be renamed back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from logo.errors import StorageError

_PROBE_BYTES = 1 << 20  # a disk with less room than this is full


def replace_folder(
    folder: Path, files: Mapping[str, str | bytes], *, owned: Collection[str] = (), option: str = "--result_dir"
) -> None:
    """Writes `files` (content by name) to `folder`. Earlier entries in `owned` or `files` are replaced, others stay.

    Args:
        option: the option by which the user names another folder.

    Raises:
        StorageError: it cannot be written; the folder and its files are as before.
    """
    try:
        target = folder.resolve()  # a link keeps its target's place, and its target's disk
        make_folder(target.parent)
        new, old = _beside(target, "new"), _beside(target, "old")
        try:
            new.mkdir()
            for name, content in files.items():
                _write(new / name, content.encode("utf-8") if isinstance(content, str) else content)
            sync_folder(new)
            with locked(target.parent):  # two writers of one folder take turns
                _swap(new, target, old, {*owned, *files})
        finally:
            shutil.rmtree(new, ignore_errors=True)  # it was renamed if all went well
        sync_folder(target.parent)
    except OSError as error:
        raise _unwritable(folder, error, option) from error


def replace_file(file: Path, content: bytes, *, follow: bool = True) -> None:
    """Replaces the content of `file`.

    Args:
        follow: a link stays, and its target is replaced; otherwise the link itself is replaced.

    Raises:
        StorageError: it cannot be written; the old file stays.
    """
    # A link that is followed keeps its target's place, and its target's disk.
    target = file.resolve() if follow else file.parent.resolve() / file.name
    new = _beside(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(new, content)
            os.replace(new, target)
        finally:
            new.unlink(missing_ok=True)  # it was renamed if all went well
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"file {str(file)!r}: cannot be written ({error.strerror or error})") from error


def remove_unfinished(root: Path) -> None:
    """Removes what writers that died left below `root`. Only for whoever holds a lock against other writers there."""
    for path in list(root.rglob(".*.new-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, and syncs them to disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def check_writable(folder: str | os.PathLike[str], option: str = "--result_dir") -> None:
    """Creates a folder if it is missing, and checks that files can be written there, before hours of work.

    Args:
        option: the option by which the user names another folder.

    Raises:
        StorageError: it cannot be made or written, or its disk is full.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            rest = memoryview(bytes(_PROBE_BYTES))
            while rest:  # a disk may accept a part before it fails
                rest = rest[probe.write(rest) :]
            os.fsync(probe.fileno())
    except OSError as error:
        raise _unwritable(Path(folder), error, option) from error


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries to disk, if the system can (Windows cannot open a folder)."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives do not support it
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder's lock, where the system has such locks; it frees the lock if the process dies."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network drives do not support it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _unwritable(folder: Path, error: OSError, option: str) -> StorageError:
    in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
    reason = "a file is where a folder should be" if in_the_way else error.strerror or str(error)
    return StorageError(
        f"folder {str(folder)!r}: cannot be written ({reason}); "
        f"make room or change permissions there, or name another with {option}"
    )


def _beside(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}-{secrets.token_hex(4)}")


def _swap(new: Path, folder: Path, old: Path, replaced: Collection[str]) -> None:
    """Renames `new` to `folder`, and moves what is not replaced to it."""
    if not folder.exists():
        os.rename(new, folder)
        return
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    for entry in old.iterdir():
        if entry.name not in replaced:
            os.rename(entry, folder / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _write(file: Path, content: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
