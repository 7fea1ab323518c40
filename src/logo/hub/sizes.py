"""How large a download is, and how much of it is not in the cache yet."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.hub.failures import hub_error
from logo.hub.snapshots import silent_bars


@dataclass(frozen=True)
class FileSizes:
    """Files of a base model or a pool.

    Attributes:
        files: size in bytes by path.
        missing: how many of these bytes are still to be downloaded.
    """

    files: Mapping[str, int]
    missing: int = 0

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def file_sizes(source: str, revision: str | None, wanted: list[str], left_out: list[str]) -> FileSizes:
    """The files that a download of a repository would take, or those of a folder. Nothing is downloaded.

    Args:
        source: a folder, or `namespace/name` on the Hub.
        wanted: globs of the files, in which `*` also matches `/`.
        left_out: globs of files that are left out even if `wanted` matches them.

    Raises:
        HubError: the Hub cannot be asked, and not all of it is in the cache.
    """
    if Path(source).is_dir():
        return FileSizes(_sizes(Path(source), wanted, left_out))
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": left_out, "tqdm_class": silent_bars()}
    try:
        files = snapshot_download(source, revision=revision, dry_run=True, **options)
    except Exception as error:  # the boundary, as in `download_files`
        try:  # without a connection, the cached copy may be complete
            folder = snapshot_download(source, revision=revision, local_files_only=True, **options)
        except Exception:
            raise hub_error(source, error, revision=revision) from error
        return FileSizes(_sizes(Path(folder), wanted, left_out))
    return FileSizes(
        {file.filename: file.file_size or 0 for file in files},
        sum(file.file_size or 0 for file in files if file.will_download),
    )


def _sizes(folder: Path, wanted: list[str], left_out: list[str]) -> dict[str, int]:
    """Path -> bytes of the chosen files of a folder. Globs match as in huggingface_hub: `*` also matches `/`."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    names = sorted(name for name in found if matches(name, wanted) and not matches(name, left_out))
    return {name: found[name].stat().st_size for name in names}
