"""The cache folder, for what would otherwise be computed again.

Nothing in it is needed: missing, damaged or outdated files are computed again, and a folder that cannot be written only
costs time.
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

# Folders that cannot be written to and were named in a warning.
_refusing: set[Path] = set()


def default_cache() -> Path:
    """`$LOGO_CACHE`, else `logo` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("LOGO_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logo"


def cache_folder(cache: str | Path | None) -> Path | None:
    """The folder that a `cache` argument means: None is the user's, `""` is none."""
    if cache is None:
        return default_cache()
    return Path(cache) if cache != "" else None


def read_cached(file: Path, read: Callable[[Path], _T]) -> _T | None:
    """What `read` makes of a file of the cache; None if there is no file, or, with a warning, if it cannot be used."""
    from safetensors import SafetensorError

    try:
        file.open("rb").close()  # safetensors calls a file that may not be read a missing one
        return read(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        warnings.warn(f"{file} cannot be read and is computed anew: {error.strerror or error}", stacklevel=3)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        warnings.warn(f"{file} is damaged and computed anew: {error}", stacklevel=3)
    return None


def write_cached(cache: Path, name: str, write: Callable[[str], object]) -> Path | None:
    """Writes `cache/name` under another name and renames it, so that readers see all of it or nothing.

    Args:
        write: is given the path to write to.

    Returns:
        The file; None if it cannot be written, of which a warning tells once per folder.
    """
    from safetensors import SafetensorError

    file = cache / name
    # In a folder of its own, since libraries write files under names of their own, too.
    room = file.with_name(f".{file.name}-{os.getpid()}-{threading.get_ident()}")
    part = room / file.name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        room.mkdir(exist_ok=True)
        write(str(part))
        os.replace(part, file)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        if cache not in _refusing:
            _refusing.add(cache)
            why = getattr(error, "strerror", None) or error
            warnings.warn(
                f"nothing can be kept in {cache}: {why}; it is computed anew each time "
                "(LOGO_CACHE names another folder)",
                UserWarning,
                stacklevel=3,
            )
        return None
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return file
