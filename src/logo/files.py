"""Writes a file or a folder whole or not at all, and keeps what would otherwise be computed again.

What is written is made and synced beside its place, and then renamed. A process that dies leaves the old content, or
the new, and perhaps a hidden sibling (`.{name}.new-*`). Only if it dies between two renames, the old content of a
folder is in its sibling `.{name}.old-*`, from where it can be renamed back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from logo.errors import LoGoError, StorageError, UsageError

_T = TypeVar("_T")
_refusing: set[Path] = set()  # cache folders that cannot be written to and were named in a warning


def replace_file(file: Path, content: bytes, *, follow: bool = True) -> None:
    """Replaces the content of `file`; with `follow` that of a link's target, otherwise the link itself.

    Raises:
        StorageError: it cannot be written; the old file stays.
    """
    try:
        _replace(file.resolve() if follow else file.parent.resolve() / file.name, content)
    except OSError as error:
        raise StorageError(f"file {str(file)!r}: cannot be written ({error.strerror or error})") from error


def _replace(file: Path, content: bytes, *, sync: bool = True) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(file, "new")
    try:
        with open(new, "wb") as stream:
            stream.write(content)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)  # it was renamed if all went well
    if sync:
        sync_folder(file.parent)


@contextlib.contextmanager
def new_folder(folder: Path, *, replaced: Collection[str] | None = None) -> Iterator[Path]:
    """A folder to write files into. At the end of the block it takes the place of `folder`, or that of a link's target;
    if the block fails, it is removed and nothing has changed.

    Args:
        replaced: names of earlier entries that go even if no new one has their name; others stay. None: `folder` must
            not exist yet, or be empty.

    Raises:
        UsageError: `folder` holds something and must not, or is the current one.
        StorageError: it cannot be written.
    """
    from safetensors import SafetensorError

    try:
        if replaced is None and folder.exists():
            if folder.is_file() or any(folder.iterdir()):
                raise UsageError(f"{folder} exists already and is not an empty folder; name another one, or remove it")
            if folder.samefile(os.curdir):
                raise UsageError(f"{folder} is the current folder, which cannot be replaced; name another one")
        target = folder.resolve()
        make_folder(target.parent)
        new = _beside(target, "new")
        new.mkdir()
        try:
            yield new
            for file in new.iterdir():
                with open(file, "rb+") as stream:
                    os.fsync(stream.fileno())
            sync_folder(new)
            if replaced is None:
                os.replace(new, target)  # fails if another writer was quicker
            else:
                with locked(target.parent):  # two writers of one folder take turns
                    _swap(new, target, {*replaced, *(file.name for file in new.iterdir())})
        finally:
            shutil.rmtree(new, ignore_errors=True)  # it was renamed if all went well
        sync_folder(target.parent)
    except LoGoError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise _unwritable(folder, error) from error


def _swap(new: Path, folder: Path, replaced: Collection[str]) -> None:
    """Renames `new` to `folder`, and moves what is not replaced to it."""
    if not folder.exists():
        os.rename(new, folder)
        return
    if not folder.is_dir():
        raise NotADirectoryError
    old = _beside(folder, "old")
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


def _beside(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}-{secrets.token_hex(8)}")


def _unwritable(folder: Path, error: Exception) -> StorageError:
    in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
    reason = "a file is where a folder should be" if in_the_way else getattr(error, "strerror", None) or error
    return StorageError(f"folder {str(folder)!r}: cannot be written ({reason}); make room there, or name another one")


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


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Creates a folder if it is missing, and checks that files can be written there, before hours of work.

    Raises:
        StorageError: it cannot be made or written, or its disk is full.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 20))  # a disk with less room than this is full
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise _unwritable(Path(folder), error) from error


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


def cache_folder(cache: str | Path | None) -> Path | None:
    """The folder that a `cache` argument means: `""` is none; None is the user's, that is `$LOGO_CACHE`, else `logo` in
    `$XDG_CACHE_HOME` or `~/.cache`. Files in it are named after digests of what they were computed from."""
    if cache is not None:
        return Path(cache) if cache != "" else None
    own = os.environ.get("LOGO_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logo"


def read_cached(file: Path, read: Callable[[Path], _T]) -> _T | None:
    """What `read` makes of a file of the cache; None if there is no file, or, with a warning, if it cannot be used."""
    from safetensors import SafetensorError

    try:
        file.open("rb").close()  # safetensors calls a file that may not be read a missing one
        return read(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        state = "cannot be read and is" if isinstance(error, OSError) else "is damaged and"
        warnings.warn(f"{file} {state} computed anew: {getattr(error, 'strerror', None) or error}", stacklevel=3)
        return None


def write_cached(cache: Path, name: str, content: bytes) -> bool:
    """Writes `cache/name`. Returns whether that was possible; if not, a warning tells once per folder."""
    try:
        _replace(cache / name, content, sync=False)  # what a power cut damages is computed again
        return True
    except OSError as error:
        if cache not in _refusing:
            _refusing.add(cache)
            problem = f"nothing can be kept in {cache}: {error.strerror or error}; it is computed anew each time"
            warnings.warn(f"{problem} (LOGO_CACHE names another folder)", stacklevel=3)
        return False
