"""Gathers the adapters of several places, and names them.

The name of an adapter is its path below its place. If the place has a `*`, the name is what the `*` stands for:
`Lots-of-LoRAs/...-task*` has adapters `1`, `2`, ... If there are several places, those on the Hub are put in front of
the names of their adapters, so that no name depends on what other places hold. An adapter that is a place itself is
named after it, even if it is in a subfolder `default`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from logo.adapters.files import CONFIG, MODEL_CARD, SAFETENSORS
from logo.adapters.format import Adapter, own_name
from logo.adapters.hub import adapter_patterns, require_adapters
from logo.adapters.locking import as_locked, to_lock_anew
from logo.adapters.manifest import Entry, entry_place, read_manifest
from logo.adapters.options import ExamplesUse, Fetching
from logo.adapters.places import Place, places_text
from logo.adapters.pool_cache import DigestCache, PoolCache
from logo.adapters.repos import Listing, fetch_each, keep_listing, list_repos
from logo.adapters.survey import Spot, adapter_folders, check_folder, is_checkpoint, left_out_checkpoint, opened
from logo.errors import AdapterError, HubError, PoolError
from logo.hub.snapshots import download_files

_DEFAULT = "default"


@dataclass(frozen=True)
class Origin:
    """The place where an adapter was found.

    Attributes:
        source: a repository, or the folder of a pool.
        below: the adapter's folder in it; empty: all of it.
        commit: of the repository; None for a folder.
    """

    source: str
    below: str
    commit: str | None = None


@dataclass(frozen=True)
class Gathered:
    """The adapters that were found.

    Attributes:
        adapters: those that can be used.
        refused: why others cannot.
        origins: name -> where the adapter is.
        entries: name -> its entry in a manifest.
    """

    adapters: Sequence[Adapter]
    refused: list[AdapterError] = field(default_factory=list)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wanted:
    """A place to look in, or an entry of a manifest.

    Attributes:
        entry, manifest: the entry of a manifest, and the manifest's file.
        listing: the repositories of a place of kind `"repos"`.
    """

    place: Place
    entry: Entry | None = None
    manifest: Path | None = None
    listing: Listing | None = None

    @property
    def repos(self) -> Mapping[str, str | None]:
        """Repository to download -> revision."""
        if self.listing is not None:
            return {repo: self.place.revision or commit or None for repo, commit in self.listing.repos.items()}
        return {self.place.source: self.place.revision} if self.place.on_hub else {}


@dataclass(frozen=True)
class _Source:
    """A local folder: that of a place, or the snapshot of a repository."""

    asked: _Wanted
    root: Path
    repo: str | None = None

    @property
    def top(self) -> Path:
        """The folder to look in."""
        return self.root / self.asked.place.fixed


@dataclass(frozen=True)
class _Found:
    """The folder of an adapter, with its origin and its entry in a manifest."""

    spot: Spot
    origin: Origin
    entry: Entry | None


def gather(
    places: Sequence[Place],
    fetching: Fetching | None = None,
    *,
    skip: bool = False,
    full_names: bool | None = None,
    verify: bool | None = None,
    cache: Path | None = None,
    anew: bool = False,
    examples: ExamplesUse = "use",
) -> Gathered:
    """Downloads and opens every adapter of these places.

    Args:
        skip: repositories that cannot be used are added to `refused`; otherwise the first one ends the search.
        full_names: whether places are put in front of the names; None: if there are several.
        verify: as `AdapterPool.from_directory`.
        cache: the cache folder; None: none.
        anew: manifests are going to be written again, so files may have changed.
        examples: under `"ignore"`, example prompts may be others than a manifest says.

    Raises:
        HubError: the Hub cannot be reached, or a repository that is named in full cannot be used.
        StorageError: a folder cannot be read.
        PoolError: a place holds no adapter.
    """
    how = fetching or Fetching()
    full = len(places) > 1 if full_names is None else full_names
    refused: list[AdapterError] = []
    asked = [one for place in places for one in _asked(place, how, cache)]
    sources = _fetched(asked, how, refused, full, skip=skip, cache=cache)
    if refused and not skip:
        return Gathered((), refused)
    found: list[_Found] = []
    for source in sources:
        here = list(_adapters_in(source, full, refused))
        asks = source.asked
        found += here
        if here:
            continue
        if asks.listing is not None:
            name = _name(asks, source.repo or "", asks.place.fixed, full) or source.repo or ""
            refused.append(AdapterError(name, _empty(source)))
        elif asks.entry is None:
            raise PoolError(_empty(source))
        elif asks.entry.name is None:  # otherwise it is refused already
            refused.append(AdapterError(asks.entry.source, _empty(source)))
    identity = f"{places_text(places)} {full}"
    known = PoolCache.of(identity, cache)
    adapters = opened((one.spot for one in found), refused, known, allow_pickle=how.allow_pickle, verify=verify)
    # Of several folders with one name, the others may have been refused.
    folders = {adapter.name: adapter.folder for adapter in adapters}
    used = {one.spot.name: one for one in reversed(found) if folders.get(one.spot.name) == Path(one.spot.folder)}
    entries = {name: one.entry for name, one in used.items() if one.entry is not None}
    if entries:
        expected = {name: to_lock_anew(entry) for name, entry in entries.items()} if anew else entries
        if examples == "ignore":
            expected = {name: replace(entry, examples_sha256=None) for name, entry in expected.items()}
        adapters = as_locked(adapters, expected, refused, DigestCache.of(identity, cache))
    names = {adapter.name for adapter in adapters}
    return Gathered(
        adapters,
        refused,
        {name: one.origin for name, one in used.items() if name in names},
        {name: entry for name, entry in entries.items() if name in names},
    )


def _asked(place: Place, how: Fetching, cache: Path | None) -> Iterator[_Wanted]:
    if place.kind == "repos":
        listing = list_repos(place, token=how.token, local_files_only=how.local_files_only, cache=cache)
        yield _Wanted(place, listing=listing)
    elif place.kind == "manifest":
        file = Path(place.source)
        for entry in read_manifest(file).entries:
            yield _Wanted(entry_place(entry, file), entry, file)
    else:
        yield _Wanted(place)


def _fetched(
    asked: Sequence[_Wanted],
    how: Fetching,
    refused: list[AdapterError],
    full: bool,
    *,
    skip: bool,
    cache: Path | None,
) -> list[_Source]:
    """The folders of the places, in their order. A repository is downloaded once, even if several places name it."""
    wanted: dict[tuple[str, str | None], list[_Wanted]] = {}
    for one in asked:
        for repo in one.repos.items():
            wanted.setdefault(repo, []).append(one)
    jobs = {repo: partial(_fetch, *repo, ones, how, alone=len(wanted) == 1) for repo, ones in wanted.items()}
    results = fetch_each(jobs, skip=skip, workers=how.max_workers, progress=how.progress) if jobs else {}
    sources = []
    for one in asked:
        if not one.place.on_hub:
            if one.entry is None:
                check_folder(Path(one.place.source))
            sources.append(_Source(one, Path(one.place.source)))
        why: dict[str, str] = {}
        for repo, result in ((repo, results[repo]) for repo in one.repos.items() if repo in results):
            if isinstance(result, Path):
                sources.append(_Source(one, result, repo[0]))
            elif one.entry is None and one.listing is None:
                raise result
            else:
                why[repo[0]] = str(result)
                refused.append(AdapterError(_name(one, repo[0], one.place.below, full) or repo[0], str(result)))
        if skip and one.listing is not None:
            keep_listing(one.place, replace(one.listing, refused=why), cache)
    return sources


def _fetch(repo: str, revision: str | None, asked: Sequence[_Wanted], how: Fetching, *, alone: bool) -> Path:
    """Downloads the snapshot of a repository with the files that all its places want."""
    for one in asked:
        if one.listing is not None and repo in one.listing.refused:  # offline: refused when it was last opened
            raise HubError(one.listing.refused[repo])
    below = dict.fromkeys(one.place.below for one in asked)
    patterns = [pattern for one in below for pattern in adapter_patterns(one, how.allow_pickle, pattern=True)]

    def check(files: list[str]) -> None:
        for one in asked:
            if one.entry is None:
                require_adapters(repo, one.place.fixed, files, allow_pickle=how.allow_pickle)

    return download_files(
        repo,
        patterns,
        check,
        optional=MODEL_CARD,
        revision=revision,
        token=how.token,
        cache_dir=how.cache_dir,
        local_files_only=how.local_files_only,
        max_workers=how.max_workers if alone else 2,  # many repositories are downloaded at the same time
        progress=how.progress and alone,
    )


def _adapters_in(source: _Source, full: bool, refused: list[AdapterError]) -> Iterator[_Found]:
    """Yields the adapters in a folder that its place names."""
    asked, top = source.asked, source.top
    entry, repo = asked.entry, source.repo or asked.place.source
    bad: list[AdapterError] = []
    paths = []
    if top.is_dir():
        found = adapter_folders(top, bad)
        paths = [(folder, "/".join(filter(None, (asked.place.fixed, path)))) for folder, path in found]
    for error in bad:
        path = "/".join(filter(None, (asked.place.fixed, error.name)))
        refused.append(type(error)(_name(asked, repo, path, full) or path, error.reason))
    if entry is not None and entry.name is not None:
        whole = [(folder, path) for folder, path in paths if path == asked.place.below] or paths
        if len(whole) != 1:  # an adapter may have others below its folder
            what = f"{len(whole)} of them" if whole else "none"
            refused.append(AdapterError(entry.name, f"{asked.manifest}: expected one adapter in {top}, found {what}"))
            return
        [(folder, path)] = whole
        yield _Found(Spot(folder, entry.name, top), _origin(source, path), entry)
        return
    named = [(name, *one) for one in paths if (name := _name(asked, repo, one[1], full)) is not None]
    names = {name for name, _, _ in named}
    for name, folder, path in named:
        if path != asked.place.below and is_checkpoint(path):
            refused.append(left_out_checkpoint(name))
            continue
        short = name
        if os.path.basename(path) == _DEFAULT and (full or not asked.place.plain):
            short = _name(asked, repo, os.path.dirname(path), full) or name
        yield _Found(Spot(folder, name if short in names else short, top), _origin(source, path), entry)


def _origin(source: _Source, path: str) -> Origin:
    return Origin(source.repo or str(source.root), path, source.root.name if source.repo else None)


def _name(asked: _Wanted, repo: str, path: str, full: bool) -> str | None:
    """The name of an adapter in this folder of a place; None if the place does not name it."""
    place, entry = asked.place, asked.entry
    if entry is not None and entry.name is not None:
        return entry.name
    name = place.name(repo, path)
    if name is None or ((full or entry is not None) and place.on_hub):
        return name if name is None else "/".join(filter(None, (repo, path)))
    if not name:
        return own_name(Path(place.source, path)) if not place.on_hub or path else repo
    return name


def _empty(source: _Source) -> str:
    place, entry = source.asked.place, source.asked.entry
    where = place.spec if entry is None else f"{entry.source}, of {source.asked.manifest}"
    expected = f"expected folders that hold {CONFIG} and {SAFETENSORS}"
    if place.plain:
        return f"no adapters in {where}: {expected}, at any depth"
    holders = sorted(path for _, path in adapter_folders(source.root, []))[:5]
    hint = f"there are {', '.join(holders)}" if holders else "there are none"
    return f"no adapters match {where}: {expected}; {hint}"
