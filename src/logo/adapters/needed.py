"""How large a base model or a pool is, and how much of it is still to be fetched: asked before anything is.

Knows which files the downloads of `hub` would take, and asks the Hub for their sizes. Fetches nothing.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.adapters.failures import hub_error
from logo.adapters.hub import MODEL_FILES, MODEL_LEFT_OUT, PICKLE, WEIGHTS, adapter_patterns
from logo.adapters.manifest import entry_place, read_manifest
from logo.adapters.places import Place
from logo.adapters.repos import list_repos


@dataclass(frozen=True)
class Needed:
    """Files of a base model or a pool.

    Attributes:
        files: size in bytes by path.
        missing: how many of these bytes are still to be fetched.
    """

    files: Mapping[str, int]
    missing: int = 0

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @property
    def adapters(self) -> Sequence[int]:
        """Bytes of the weights of each adapter; of a folder that holds them in both formats, those that are read."""
        found: dict[str, int] = {}
        for name in (PICKLE, WEIGHTS):  # safetensors are preferred
            found |= {
                folder: size
                for path, size in self.files.items()
                for folder, _, last in [path.rpartition("/")]
                if last == name
            }
        return list(found.values())


def model_needed(source: str) -> Needed:
    """A base model, in a folder or on the Hub.

    Raises:
        HubError: the Hub cannot be asked, and not all of it is in the cache.
    """
    return _needed(source, None, MODEL_FILES, MODEL_LEFT_OUT)


def pool_needed(places: Sequence[Place], *, allow_pickle: bool = False) -> Needed:
    """A pool of adapters, in folders or on the Hub.

    Raises:
        HubError: as `model_needed`, or it is not known which repositories there are.
    """
    files: dict[str, int] = {}
    missing = 0
    for place in _named(places):
        wanted = adapter_patterns(place.below, allow_pickle, pattern=True)
        repos = list_repos(place.source).repos if place.kind == "repos" else {place.source: ""}
        for repo, commit in repos.items():
            one = _needed(repo, place.revision or commit or None, wanted, [])
            files |= {f"{repo}/{path}": size for path, size in one.files.items()}
            missing += one.missing
    return Needed(files, missing)


def _named(places: Sequence[Place]) -> Iterator[Place]:
    """The places, and instead of manifests those that they name."""
    for place in places:
        if place.kind == "manifest":
            file = Path(place.source)
            yield from (entry_place(entry, file) for entry in read_manifest(file).entries)
        else:
            yield place


def _needed(source: str, revision: str | None, wanted: list[str], left_out: list[str]) -> Needed:
    if Path(source).is_dir():
        return Needed(_sizes(Path(source), wanted, left_out))
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": left_out, "tqdm_class": Silent}
    try:
        files = snapshot_download(source, revision=revision, dry_run=True, **options)
    except Exception as error:  # the boundary, as in hub.download_adapters
        try:  # without a connection, what is in the cache may be all there is
            folder = snapshot_download(source, revision=revision, local_files_only=True, **options)
        except Exception:
            raise hub_error(source, error, revision=revision) from error
        return Needed(_sizes(Path(folder), wanted, left_out))
    return Needed(
        {file.filename: file.file_size or 0 for file in files},
        sum(file.file_size or 0 for file in files if file.will_download),
    )


def _sizes(folder: Path, wanted: list[str], left_out: list[str]) -> dict[str, int]:
    """As huggingface_hub chooses files: `*` also matches `/`."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    names = sorted(name for name in found if matches(name, wanted) and not matches(name, left_out))
    return {name: found[name].stat().st_size for name in names}
