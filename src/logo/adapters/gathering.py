"""Gathers the adapters of several places, and names them.

The name of an adapter is its path below its place. If there are several places, those on the Hub are put in front of
the names of their adapters, so that no name depends on what other places hold. An adapter that is a place itself is
named after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from logo.adapters.files import CONFIG, SAFETENSORS
from logo.adapters.format import Adapter, own_name
from logo.adapters.hub import download_adapters
from logo.adapters.manifest import Entry, read_manifest
from logo.adapters.notes import noted_k
from logo.adapters.options import Fetching
from logo.adapters.places import Place
from logo.adapters.survey import Spot, adapter_folders, check_folder, is_checkpoint, left_out_checkpoint, opened
from logo.errors import AdapterError, HubError, PoolError
from logo.hub import is_lasting


@dataclass(frozen=True)
class Gathered:
    """The adapters that were found.

    Attributes:
        adapters: those that can be used.
        refused: why others cannot.
        origins: name -> where the adapter is, with the commit of its repository.
        k: adapters per prompt, if the pool says so; None also for a pool of several places.
    """

    adapters: Sequence[Adapter]
    refused: list[AdapterError]
    origins: Mapping[str, Place]
    k: int | None = None


@dataclass(frozen=True)
class _Wanted:
    """A place to look in, and the manifest's entry that names it."""

    place: Place
    entry: Entry | None = None
    manifest: Path | None = None


def gather(places: Sequence[Place], how: Fetching, *, skip: bool = False, verify: bool | None = None) -> Gathered:
    """Downloads and opens every adapter of these places.

    Args:
        skip: repositories that cannot be used are added to `refused`; otherwise the first one ends the search. A single
            one always does.
        verify: as `AdapterPool.from_directory`.

    Raises:
        HubError: the Hub cannot be reached, or a repository cannot be used.
        StorageError: a folder cannot be read.
        PoolError: a place holds no adapter.
    """
    asked = [one for place in places for one in _asked(place)]
    refused: list[AdapterError] = []
    fetched, full = _fetched(asked, how, skip=skip), len(places) > 1
    spots: list[Spot] = []
    wanted: dict[tuple[str, str], tuple[_Wanted, Place]] = {}  # name, folder -> who asked for it, and its origin
    for one in asked:
        source: Path | HubError = Path(one.place.source)
        if one.place.on_hub:
            source = fetched[one.place.source, one.place.revision]
        elif one.entry is None:
            check_folder(Path(one.place.source))
        if isinstance(source, HubError):
            refused.append(AdapterError(_name(one, one.place.below, full), str(source)))
            continue
        before = len(spots) + len(refused)
        for spot, path in _adapters_in(one, source, refused, full=full):
            spots.append(spot)
            origin = Place("folder", str(source / path))
            if one.place.on_hub:
                origin = Place("repo", one.place.source, path, source.name)
            wanted.setdefault((spot.name, str(Path(spot.folder))), (one, origin))
        if len(spots) + len(refused) == before:
            where = one.place.spec if one.entry is None else f"{one.entry.source}, of {one.manifest}"
            problem = f"no adapters in {where}: expected folders that hold {CONFIG} and {SAFETENSORS}, at any depth"
            if one.entry is None:
                raise PoolError(problem)
            refused.append(AdapterError(one.entry.source, problem))
    adapters = []
    for adapter in opened(spots, refused, allow_pickle=how.allow_pickle, verify=verify):
        entry = wanted[adapter.name, str(adapter.folder)][0].entry
        try:
            adapters.append(adapter if entry is None else entry.checked(adapter))
        except AdapterError as error:
            refused.append(error)
    k = _k(places[0], fetched) if not full else None
    return Gathered(adapters, refused, {one.name: wanted[one.name, str(one.folder)][1] for one in adapters}, k)


def _k(place: Place, fetched: Mapping[tuple[str, str | None], Path | HubError]) -> int | None:
    if place.kind == "manifest":
        return read_manifest(Path(place.source)).k
    source = fetched[place.source, place.revision] if place.on_hub else Path(place.source)
    return noted_k(source / place.below) if isinstance(source, Path) else None


def _asked(place: Place) -> Iterator[_Wanted]:
    if place.kind != "manifest":
        yield _Wanted(place)
        return
    file = Path(place.source)
    for entry in read_manifest(file).entries:
        yield _Wanted(entry.place(file), entry, file)


def _fetched(asked: Sequence[_Wanted], how: Fetching, *, skip: bool) -> dict[tuple[str, str | None], Path | HubError]:
    """The snapshot of every repository, or why it cannot be used. Each is downloaded once, several at a time."""
    wanted: dict[tuple[str, str | None], list[_Wanted]] = {}
    for one in asked:
        if one.place.on_hub:
            wanted.setdefault((one.place.source, one.place.revision), []).append(one)

    workers = max(1, how.max_workers)
    if len(wanted) > 1:  # several repositories are downloaded at the same time
        how = replace(how, max_workers=2, progress=False)

    def fetch(repo: tuple[str, str | None]) -> Path | HubError:
        folders = dict.fromkeys(one.place.below for one in wanted[repo])
        required = dict.fromkeys(one.place.below for one in wanted[repo] if one.entry is None)
        try:
            return download_adapters(repo[0], folders, how, revision=repo[1], required=required)
        except HubError as error:
            # A pool must not be smaller because a connection broke.
            if skip and len(asked) > 1 and is_lasting(error):
                return error
            raise

    pool = ThreadPoolExecutor(workers, thread_name_prefix="hub")
    try:
        return dict(zip(wanted, pool.map(fetch, wanted), strict=True))
    finally:  # also after an error or Ctrl-C: no other download begins
        pool.shutdown(wait=True, cancel_futures=True)


def _adapters_in(
    asked: _Wanted, source: Path, refused: list[AdapterError], *, full: bool
) -> Iterator[tuple[Spot, str]]:
    """Yields the adapters in a folder that a place names, with their paths in the source."""
    place, entry = asked.place, asked.entry
    top = source / place.below
    bad: list[AdapterError] = []
    found = list(adapter_folders(top, bad)) if top.is_dir() else []
    inside = [(folder, "/".join(filter(None, (place.below, path)))) for folder, path in found]
    refused += (
        type(error)(_name(asked, "/".join(filter(None, (place.below, error.name))), full), error.reason)
        for error in bad
    )
    if entry is not None and entry.name is not None:
        # An adapter may have others below its folder.
        whole = [(folder, path) for folder, path in inside if path == place.below] or inside
        if len(whole) != 1:
            what = f"{len(whole)} of them" if whole else "none"
            refused.append(AdapterError(entry.name, f"{asked.manifest}: expected one adapter in {top}, found {what}"))
            return
        inside = whole
    for folder, path in inside:
        name = _name(asked, path, full)
        if path != place.below and (entry is None or entry.name is None) and is_checkpoint(path):
            refused.append(left_out_checkpoint(name))
        else:
            yield Spot(folder, name, top), path


def _name(asked: _Wanted, path: str, full: bool) -> str:
    """The name of an adapter in this folder of a place's source."""
    place, entry = asked.place, asked.entry
    if entry is not None and entry.name is not None:
        return entry.name
    if place.on_hub and (full or entry is not None or not path):
        return "/".join(filter(None, (place.source, path)))
    inside = path.removeprefix(place.below).strip("/")
    return inside or own_name(Path(place.source, path))
