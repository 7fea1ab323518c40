"""Replaces a folder of files, or one file, as a whole: it is either complete and new, or as it was.

Files are written and synced in a hidden sibling (`.{name}.new-*`), which is then renamed to the folder. The old folder
is renamed first (`.{name}.old-*`), since a folder cannot be renamed onto one that is not empty; if the process dies
between the two, the next writer restores the old one first. Writers below one parent hold a lock on the parent, so a
hidden sibling that a writer finds was left by a dead process and is removed. The writer of a single file locks only its
hidden sibling, and the next writer of that file removes siblings that nobody has locked. Without such locks (Windows,
some network drives) nothing is removed.
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
    replaced = {*owned, *files}
    try:
        target = folder.resolve()  # a link keeps its target's place, and its target's disk
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent) as alone:
            if alone:
                _clean(target, replaced)
            new = _beside(target, "new", secrets.token_hex(4))
            try:
                new.mkdir()
                for name, content in files.items():
                    _write(new / name, content)
                sync_folder(new)
                _swap(new, target, replaced)
            finally:
                shutil.rmtree(new, ignore_errors=True)  # it was renamed if all went well
            sync_folder(target.parent)
    except OSError as error:
        raise _unwritable(folder, error, option) from error


def replace_file(file: Path, content: bytes, *, follow: bool = True) -> None:
    """Replaces the content of `file`, which is written and synced beside it and then renamed.

    Args:
        follow: a link stays, and its target is replaced; otherwise the link itself is replaced.

    Raises:
        StorageError: it cannot be written; the old file stays.
    """
    # A link that is followed keeps its target's place, and its target's disk.
    target = file.resolve() if follow else file.parent.resolve() / file.name
    new = _beside(target, "new", secrets.token_hex(4))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, _beside(target, "new", "").name)
        try:
            with held(new):
                _write(new, content)
                os.replace(new, target)
        finally:
            new.unlink(missing_ok=True)  # it was renamed if all went well
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"file {str(file)!r}: cannot be written ({error.strerror or error})") from error


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


def _unwritable(folder: Path, error: OSError, option: str = "--result_dir") -> StorageError:
    in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
    reason = "a file is where a folder should be" if in_the_way else error.strerror or str(error)
    return StorageError(
        f"folder {str(folder)!r}: cannot be written ({reason}); "
        f"make room or change permissions there, or name another with {option}"
    )


def _beside(folder: Path, state: str, unique: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}-{unique}")


def _swap(new: Path, folder: Path, replaced: Collection[str]) -> None:
    """Renames `new` to `folder`."""
    if not folder.exists():
        os.rename(new, folder)
        return
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    old = _beside(folder, "old", new.name.rpartition("-")[2])
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    _retire(old, folder, replaced)


def _retire(old: Path, folder: Path, replaced: Collection[str]) -> None:
    """Deletes a replaced folder after moving other entries to its successor. It can be repeated after a crash."""
    for entry in old.iterdir():
        if entry.name not in replaced and not (folder / entry.name).exists():
            os.rename(entry, folder / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _clean(folder: Path, replaced: Collection[str]) -> None:
    """Finishes or undoes the work of a writer that died. The caller holds the parent's lock."""
    siblings = sorted(folder.parent.iterdir())
    for old in (path for path in siblings if path.name.startswith(_beside(folder, "old", "").name)):
        if folder.exists():
            _retire(old, folder, replaced)
        else:
            os.rename(old, folder)
    for new in (path for path in siblings if path.name.startswith(_beside(folder, "new", "").name)):
        shutil.rmtree(new, ignore_errors=True)


def recovered(parent: Path) -> list[Path]:
    """The folders in `parent`, hidden ones left out.

    Folders that a dead writer had renamed are restored first, and those that it had begun to write are removed.

    Raises:
        StorageError: they cannot be listed or put back.
    """
    if not parent.is_dir():
        return []
    try:
        with locked(parent) as alone:
            for path in sorted(parent.iterdir()):
                name, aside, _ = path.name[1:].rpartition(".old-")
                if path.name.startswith(".") and aside and not (parent / name).exists():
                    os.rename(path, parent / name)
                elif path.name.startswith(".") and ".new-" in path.name and alone:
                    shutil.rmtree(path, ignore_errors=True)
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise StorageError(f"folder {str(parent)!r}: cannot be read ({error.strerror or error})") from error


def _write(file: Path, content: str | bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())


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
def locked(folder: Path) -> Iterator[bool]:
    """Holds a folder's lock, and yields whether there is one. The system frees it if the process dies."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held
        if held:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(path: Path, *, folder: bool = False) -> Iterator[None]:
    """Creates a file, or a folder, that `remove_abandoned` leaves alone until the block ends or the process dies.

    It may be renamed meanwhile, but not replaced. Where there are no locks, it is only created.
    """
    descriptor = _create_locked(path, folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _create_locked(path: Path, folder: bool) -> int | None:
    if sys.platform == "win32":
        if folder:
            path.mkdir(exist_ok=True)
        return None
    import fcntl

    while True:
        if folder:
            path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_CREAT | os.O_RDWR, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # nobody removed it before it was locked
            return descriptor
        os.close(descriptor)


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Removes what has this prefix and was being written (`held`) by processes that have died."""
    if sys.platform == "win32":
        return
    import fcntl

    names: list[str] = []
    with contextlib.suppress(OSError):  # it may be written, but not read
        names = [name for name in os.listdir(folder) if name.startswith(prefix)]
    for name in names:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / name, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error if somebody holds it
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name, ignore_errors=True)
                else:
                    (folder / name).unlink()
            finally:
                os.close(descriptor)
