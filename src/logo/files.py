"""Writes a file or a folder whole or not at all, and keeps what would otherwise be computed again.

What is written is made beside its place and then renamed. A process that dies leaves the old content, or the new, and
perhaps a hidden sibling (`.{name}.new-*`). Only if it dies between two renames, the old content of a folder is in its
sibling `.{name}.old-*`, from where it can be renamed back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from logo.errors import LoGoError, StorageError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_refusing: set[Path] = set()  # cache folders that a warning has named


def walked(root: Path) -> Iterator[Path]:
    """The files at any depth below a folder, also in linked folders; each folder counts once, so that links in a circle
    end."""
    seen = set[tuple[int, int]]()
    for current, folders, files in os.walk(root, followlinks=True):
        stat = os.stat(current)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort(key=lambda name: (os.path.islink(os.path.join(current, name)), name))
        yield from (path for path in (Path(current, name) for name in files) if path.is_file())


def replace_file(file: Path, content: bytes, *, sync: bool = True) -> None:
    """Replaces the content of `file`, which with `sync` outlasts a power cut; a link, as in the Hub's cache, becomes a
    file of its own. Raises StorageError if it cannot be written; the old file stays."""
    new = _beside(file, "new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "wb") as stream:
            stream.write(content)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(new, file)
        if sync:
            sync_folder(file.parent)
    except OSError as error:
        raise StorageError(f"file {str(file)!r}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed if all went well
            new.unlink()


@contextlib.contextmanager
def new_folder(folder: Path, *, replaced: Collection[str] | None = None) -> Iterator[Path]:
    """A folder to write files into. At the end of the block it takes the place of `folder`, or that of a link's target;
    if the block fails, it is removed and nothing has changed.

    Args:
        replaced: earlier entries that go even if no new one has their name; others stay. None: there must be none.

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
        target.parent.mkdir(parents=True, exist_ok=True)
        new = _beside(target, "new")
        new.mkdir()
        try:
            yield new
            for file in walked(new):
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
        raise unwritable(folder, error) from error


def _swap(new: Path, folder: Path, replaced: Collection[str]) -> None:
    """Renames `new` to `folder`, and moves what is not replaced to it."""
    if not folder.is_dir():
        os.rename(new, folder)
        return
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


def unwritable(folder: Path, error: Exception) -> StorageError:
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"folder {str(folder)!r}: cannot be written ({reason}); make room there, or name another one")


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries to disk where the system can; Windows and some network drives cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
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
    cache = os.environ.get("LOGO_CACHE") if cache is None else cache
    if cache is not None:
        return Path(cache) if cache != "" else None
    with contextlib.suppress(RuntimeError):  # a user without a home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logo"
    return None


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
    """Writes `cache/name`, or warns once of each cache. Returns whether that was possible."""
    try:
        replace_file(cache / name, content, sync=False)  # what a power cut damages is computed again
        return True
    except StorageError as error:
        if cache not in _refusing:
            _refusing.add(cache)
            problem = f"nothing can be kept in {cache}: {getattr(error.__cause__, 'strerror', None) or error}"
            hint = "it is computed anew each time (LOGO_CACHE names another folder)"
            warnings.warn(f"{problem}; {hint}", stacklevel=3)
        return False


class Store:
    """Tensors by name, in the cache folder (None: none) and in memory.

    Small ones are held in memory while a pool uses them, so that adapters can be added after files of others are gone;
    large ones only where the folder does not take them. What is missing or damaged in the folder is computed again.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, dict[str, Tensor]] = {}
        self._used: set[str] = set()  # since the last release
        self._large: set[str] = set()

    def get(self, name: str, *, hold: bool | None = True) -> dict[str, Tensor]:
        """The tensors of this name, which are held in memory, too, if asked; empty if there are none."""
        from safetensors.torch import load_file

        self._used.add(name)
        if name in self._held or self._folder is None:
            return self._held.get(name, {})
        tensors: dict[str, Tensor] = read_cached(self._folder / f"{name}.safetensors", load_file) or {}
        if tensors and hold:  # copies, since what safetensors gives are views of the file
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
            self._held[name] = tensors
        return tensors

    def put(self, name: str, tensors: Mapping[str, Tensor], *, hold: bool | None = True) -> None:
        """Stores all tensors of a name; with `hold` None in the folder only, if there is one that takes them."""
        from safetensors.torch import save

        self._used.add(name)
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        written = self._folder is not None and write_cached(self._folder, f"{name}.safetensors", save(contiguous))
        if hold or not (written or hold is None):
            self._held[name] = contiguous
        if hold is False:
            self._large.add(name)

    def release(self, key: str) -> None:
        """Frees the memory of what is below a key and was not used since the last call, except for large ones."""
        below = {name for name in (*self._held, *self._used) if name.startswith(f"{key}/")}
        for name in (below & self._held.keys()) - self._used - self._large:
            del self._held[name]
        self._used -= below
