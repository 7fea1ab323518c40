"""How large a pool is, and how much of it is still to be downloaded; asked before anything is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from logo.adapters.files import PICKLE, SAFETENSORS
from logo.adapters.hub import adapter_patterns
from logo.adapters.manifest import entry_place, read_manifest
from logo.adapters.places import Place
from logo.adapters.repos import list_repos
from logo.hub.sizes import FileSizes, file_sizes


def pool_sizes(places: Sequence[Place], *, allow_pickle: bool = False) -> FileSizes:
    """A pool of adapters, in folders or on the Hub.

    Raises:
        HubError: as `logo.hub.sizes.file_sizes`, or it is not known which repositories there are.
    """
    files: dict[str, int] = {}
    missing = 0
    for place in _named(places):
        wanted = adapter_patterns(place.below, allow_pickle, pattern=True)
        repos = list_repos(place).repos if place.kind == "repos" else {place.source: ""}
        for repo, commit in repos.items():
            one = file_sizes(repo, place.revision or commit or None, wanted, [])
            files |= {f"{repo}/{path}": size for path, size in one.files.items()}
            missing += one.missing
    return FileSizes(files, missing)


def weight_sizes(found: FileSizes) -> list[int]:
    """Bytes of the weights of each adapter; of a folder that holds them in both formats, those that are read."""
    sizes: dict[str, int] = {}
    for name in (PICKLE, SAFETENSORS):  # safetensors are preferred
        for path, size in found.files.items():
            folder, _, last = path.rpartition("/")
            if last == name:
                sizes[folder] = size
    return list(sizes.values())


def _named(places: Sequence[Place]) -> Iterator[Place]:
    """Yields the places; a manifest is replaced by the places of its entries."""
    for place in places:
        if place.kind == "manifest":
            file = Path(place.source)
            yield from (entry_place(entry, file) for entry in read_manifest(file).entries)
        else:
            yield place
