"""Sources of a pool: what `--adapters` takes, what each holds, and how its adapters are named.

    adapters/                      a folder, with adapters at any depth
    pool.yaml                      a manifest (`logo.adapters.manifest`)
    org/repo[/folder][@revision]   a Hub repository, or a folder in it
    NAME=...                       one adapter in a folder or a repository, under this name

Several are separated by commas. An adapter is named by its path below its source, or after it if it is the source. If
there are several, those on the Hub stand in front of the names, so that no name depends on what other sources hold.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from logo.adapters.activation import read_notes
from logo.adapters.adapter import Adapter, open_adapter, own_name
from logo.adapters.manifest import SUFFIXES, Entry, read_manifest
from logo.adapters.peft import CONFIG, EXAMPLES, NOTES, PICKLE, RECORD, SAFETENSORS
from logo.errors import AdapterError, HubError, LeftOut, PoolError, StorageError, UsageError, check_type
from logo.hub import DownloadOptions, download_files, is_hub_spec, is_lasting, split_hub_spec
from logo.models import DEMO, DEMO_FOLDER, OFFICIAL_MODELS

if TYPE_CHECKING:
    from typing_extensions import Unpack

OnBadAdapter = Literal["error", "skip"]
ExamplesUse = Literal["use", "ignore"]
OFFICIAL_ADAPTERS = "archon159/LoGo-loras-collection"
# Pools up to this size are checked for NaN when they are opened, which takes well under a second. The tensors of larger
# pools are checked when they are first read.
_VERIFY_UP_TO = 256 * 2**20  # bytes

_Repository = tuple[str, str | None]  # its name and the revision


class PoolOptions(DownloadOptions, total=False):
    """How a pool is downloaded and opened; see also `logo.hub.DownloadOptions`.

    Attributes:
        on_bad_adapter: `"error"` refuses a pool with a bad adapter; `"skip"` leaves it out, the reason is in `refused`.
        allow_pickle: also download and read pickled weights (`adapter_model.bin`), if there is no safetensors file.
        verify: read all tensors now and check them for NaN and Inf. Default: if the pool is small (256 MiB).
        examples: under `"ignore"`, the adapters have no example prompts and no descriptions.
    """

    on_bad_adapter: OnBadAdapter
    allow_pickle: bool
    verify: bool | None
    examples: ExamplesUse


@dataclass(frozen=True)
class Source:
    """One source of adapters: a path, or a repository, the folder in it (empty: all of it) and its revision; and the
    name of its only adapter, if that is given one."""

    kind: Literal["folder", "manifest", "repo"]
    where: str
    below: str = ""
    revision: str | None = None
    name: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether the source is on the Hub."""
        return self.kind == "repo"


def parse_sources(texts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[Source, ...]:
    """Parses one text, which may name several sources, or several texts; UsageError for a text that names none.

    Nothing is downloaded or opened.
    """
    expected = "a folder, a manifest or a Hub repository, or a list of these"
    check_type("pool", texts, (str, os.PathLike, Iterable), expected)
    if isinstance(texts, str):  # a path with commas is one source
        parts = [texts] if os.path.exists(texts) else [part.strip() for part in texts.split(",")]
    else:
        paths = [texts] if isinstance(texts, os.PathLike) else list(texts)
        for path in paths:
            check_type("pool", path, (str, os.PathLike), expected)
        parts = [os.fspath(path) for path in paths]
    if not parts or not all(parts):
        raise UsageError("no source of adapters: expected a folder, a manifest or a Hub repository; see --adapters")
    return tuple(dict.fromkeys(map(_source, parts)))


def spec_of(sources: Sequence[Source]) -> str:
    """The text that `parse_sources` reads as these sources in any working directory."""
    texts = []
    for source in sources:
        where = source.where if source.on_hub else os.path.abspath(source.where)
        revision = f"@{source.revision}" if source.revision else ""
        name = "" if source.name is None else f"{source.name}="
        texts.append(name + _path(where, source.below) + revision)
    return ",".join(texts)


def pool_sources(
    adapters: str | Path | Sequence[str | Path] | None, base_model: str, model_dir: str | Path | None = None
) -> tuple[Source, ...]:
    """The sources of a pool by name, or of the pool of a base model: that of the demo, or the authors' published one.

    The published one is looked for in `model_dir` before the Hub. Raises UsageError for a source that could not exist,
    and if none is named and the base model has no pool.
    """
    if adapters is not None:
        return parse_sources(adapters)
    if base_model == DEMO:
        return (Source("folder", str(DEMO_FOLDER / "adapters")),)
    folder = official_folder(base_model)
    if folder is None:
        raise UsageError(f"base model {base_model!r} has no adapters of its own: name a pool (--adapters)")
    if model_dir is not None and (Path(model_dir) / folder).is_dir():
        return (Source("folder", str(Path(model_dir) / folder)),)
    return (Source("repo", OFFICIAL_ADAPTERS, folder),)


def official_folder(base_model: str) -> str | None:
    """The folder of a base model's published adapters, on the Hub and in `--model_dir`; None if it is not official."""
    short = {full: name for name, full in OFFICIAL_MODELS.items()}.get(base_model, base_model)
    return f"{short}-loras-flanv2" if short in OFFICIAL_MODELS else None


def _source(text: str) -> Source:
    name, equals, unnamed = text.partition("=")
    if equals and not os.path.exists(text):
        return _named_source(name, unnamed)
    if os.path.isfile(text):
        if not text.endswith(SUFFIXES):
            raise UsageError(f"{text}: expected a folder of adapters or a manifest (.yaml), found another file")
        return Source("manifest", text)
    if not os.path.isdir(text):
        _check_no_pattern(text)
    return _on_hub(text) if is_hub_spec(text) else Source("folder", text)


def _named_source(name: str, text: str) -> Source:
    """The source of an adapter that is given a name."""
    if not name or not text:
        raise UsageError(f"{name}={text}: expected NAME=FOLDER or NAME=org/repo[/folder][@revision]")
    source = _source(text)
    if source.kind == "manifest":
        raise UsageError(f"{name}={text}: a manifest holds several adapters, and its own names: leave out {name!r}")
    return replace(source, name=name)


def _check_no_pattern(text: str) -> None:
    if "*" in text:
        raise UsageError(f"{text!r}: `logo pool lock {text!r}` lists the repositories of an owner in a manifest")


def _on_hub(text: str) -> Source:
    repo, below, revision = split_hub_spec(text)
    return Source("repo", repo, below or "", revision)


def _path(*parts: str) -> str:
    return "/".join(filter(None, parts))


@dataclass(frozen=True)
class _Search:
    """A source to look in, and the manifest's entry that names it."""

    source: Source
    full: bool  # names begin with the repository
    entry: Entry | None = None

    @property
    def given_name(self) -> str | None:
        """The name that the entry or the source gives the adapter, which is a single one then."""
        return self.source.name if self.entry is None else self.entry.name

    def root(self, snapshots: Mapping[_Repository, Path | HubError]) -> Path:
        """The folder of the source, or of the snapshot of its repository; raises HubError if that cannot be used."""
        if not self.source.on_hub:
            return Path(self.source.where)
        snapshot = snapshots[self.source.where, self.source.revision]
        if isinstance(snapshot, HubError):
            raise snapshot
        return snapshot

    def name(self, path: str) -> str:
        """The name of an adapter in this folder of the source."""
        if self.given_name is not None:
            return self.given_name
        if self.source.on_hub and (self.full or not path):
            return _path(self.source.where, path)
        return path.removeprefix(self.source.below).strip("/") or own_name(Path(self.source.where, path))

    def open(self, root: Path, path: str, siblings: Collection[str], allow_pickle: bool) -> Adapter:
        """The adapter in a folder of the source, whose own folder is `root`, beside which there are others."""
        below = _path(self.source.below, path)
        name = self.name(below)
        if self.given_name is None:
            _check_not_left_out(name, path, siblings)
        if not self.source.on_hub:
            return open_adapter(root / below, name, allow_pickle=allow_pickle)
        adapter = open_adapter(root / below, name, allow_pickle=allow_pickle, top=root)
        return replace(adapter, source=_path(self.source.where, below), revision=root.name)


def default_k(sources: Sequence[Source], otherwise: int) -> int:
    """Adapters per prompt of the pool of these sources, which is not opened; of a repository, `pool.json` is read."""
    source = sources[0]
    root = Path(source.where)
    if source.on_hub and len(sources) == 1:
        file = glob.escape(_path(source.below, NOTES))
        root = download_files(source.where, [file], revision=source.revision, progress=False)
    return _noted_k(sources, root / source.below) or otherwise


def _noted_k(sources: Sequence[Source], top: Path) -> int | None:
    """Adapters per prompt; several sources are another pool than the one that notes or a manifest are about."""
    if len(sources) > 1:
        return None
    return read_manifest(Path(sources[0].where)).k if sources[0].kind == "manifest" else read_notes(top).get("k")


def gather(
    sources: Sequence[Source],
    *,
    allow_pickle: bool = False,
    skip: bool = False,
    verify: bool | None = None,
    **download: Unpack[DownloadOptions],
) -> tuple[list[Adapter], list[AdapterError], int | None]:
    """Downloads and opens every adapter of these sources; for the options see `PoolOptions`.

    With `skip`, and several sources, repositories that cannot be used are refused, and do not end the search.

    Returns:
        The adapters that can be used; why others cannot; and the adapters per prompt, if one source says so.

    Raises:
        HubError, StorageError, UsageError: a repository, a folder or a manifest cannot be used.
        PoolError: a source holds no adapter.
    """
    searches = [search for source in sources for search in _searches(source, full=len(sources) > 1)]
    skip = skip and len(searches) > 1
    snapshots = _fetch(searches, allow_pickle, skip, download)
    adapters: dict[str, Adapter] = {}
    refused: list[AdapterError] = []
    total_size = 0
    top = Path(sources[0].where)
    for search in searches:
        source = search.source
        try:
            root = search.root(snapshots)
            top = root / source.below
            walk = _Walk(top, spec_of([source]))
            paths = walk.all() if search.given_name is None else walk.single()
        except (HubError, StorageError, PoolError) as error:
            if search.entry is None and not (skip and source.on_hub):
                raise
            refused.append(AdapterError(search.name(source.below), str(error)))
            continue
        for bad in walk.bad:
            refused.append(type(bad)(search.name(_path(source.below, bad.name)), bad.reason))
        for path in paths:
            try:
                adapter = search.open(root, path, paths, allow_pickle)
                if adapter.name in adapters:
                    where = adapters[adapter.name].folder
                    raise AdapterError(adapter.name, f"{where} has the same name; rename one of them")
                total_size += adapter.size
                if total_size <= _VERIFY_UP_TO if verify is None else verify:
                    adapter.verify()
                adapters[adapter.name] = adapter if search.entry is None else search.entry.checked(adapter)
            except AdapterError as error:
                refused.append(error)
    return list(adapters.values()), refused, _noted_k(sources, top)


def _check_not_left_out(name: str, path: str, siblings: Collection[str]) -> None:
    """Raises LeftOut for what belongs to another adapter of its source."""
    if re.search(r"(^|/)checkpoint-\d+(/|$)", path):  # as the `Trainer` calls them
        raise LeftOut(name, "it is a training checkpoint; to open it, name only its folder")
    plain = re.sub(r"(^|/)alora$", r"\1lora", path)  # in a library of `NAME/BASE/lora` and `NAME/BASE/alora`
    if plain != path and plain in siblings:
        raise LeftOut(name, f"it is the activated form of {plain!r}; to open it, name only its folder")


def _searches(source: Source, full: bool) -> list[_Search]:
    """What to look in for a source: of a manifest, every entry."""
    if source.kind != "manifest":
        return [_Search(source, full)]
    file = Path(source.where)
    return [_Search(_entry_source(file, entry), True, entry) for entry in read_manifest(file).entries]


def _entry_source(file: Path, entry: Entry) -> Source:
    """The source of a manifest's entry. Folders count from the manifest's own; an entry that is none of them is on the
    Hub, whatever the working directory holds."""
    local = os.path.normpath(file.absolute().parent / os.path.expanduser(entry.source))
    is_local = entry.source.startswith((".", "/", "~")) or os.path.isdir(local)
    if not is_local and is_hub_spec(entry.source, here=False):
        return _on_hub(entry.source if entry.revision is None else f"{entry.source}@{entry.revision}")
    if not is_local:
        _check_no_pattern(entry.source)
    if entry.revision is not None:
        expected = "a folder, which has no revision, or a source on the Hub (org/repo[/folder])"
        raise UsageError(f"manifest {file}: {entry.source!r}: expected {expected}")
    return Source("folder", local)


class _Walk:
    """Looks for folders with an adapter below a folder, which is called `where` in messages.

    Hidden folders are skipped. Links are followed, after all real folders; a folder is found once, so that links in a
    circle end. Told as `bad` are a dead link, another link to adapters, and a folder that cannot be listed.
    """

    def __init__(self, root: Path, where: str) -> None:
        self.root = root
        self.where = where
        self.bad: list[AdapterError] = []
        self._names: dict[tuple[int, int], str] = {}  # of folders, by device and inode
        self._expected = f"expected folders that hold {CONFIG} and {SAFETENSORS}, at any depth"

    def all(self) -> list[str]:
        """The paths of all of them, sorted. Raises StorageError or PoolError: nothing can be looked into, or found."""
        paths = self._paths(tell_of_links=True)
        if not paths and not self.bad:
            raise PoolError(f"no adapters in {self.where}: {self._expected}")
        return paths

    def single(self) -> list[str]:
        """The path of the only one, which may have others below its folder. Errors as `all`."""
        paths = self._paths(tell_of_links=False)
        if "" in paths:
            return [""]
        if len(paths) != 1:
            raise PoolError(f"expected one adapter in {self.where}, found {len(paths)}")
        return paths

    def _paths(self, tell_of_links: bool) -> list[str]:
        paths: list[str] = []
        starts = [str(self.root)]
        for start in starts:  # which grows
            for current, folders, files in os.walk(start, onerror=self._note_unreadable):
                path = self._below(current)
                stat = os.stat(current)
                first = self._names.setdefault((stat.st_dev, stat.st_ino), path)
                if first != path:
                    folders.clear()
                    back = not first or path.startswith(f"{first}/")  # the link leads to a folder above it
                    if tell_of_links and not back and any(f"{name}/".startswith(f"{first}/") for name in paths):
                        self.bad.append(LeftOut(path, f"it is a link to {first!r}, which is in the pool already"))
                    continue
                folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
                inside = [os.path.join(current, folder) for folder in folders]
                starts += [folder for folder in inside if os.path.islink(folder)]
                if {CONFIG, SAFETENSORS, PICKLE}.isdisjoint(files):
                    self._note_dead_links(current, files)
                else:
                    paths.append(path)
        return sorted(paths, key=lambda path: path.split("/"))

    def _below(self, folder: str) -> str:
        return "" if folder == str(self.root) else Path(folder).relative_to(self.root).as_posix()

    def _note_unreadable(self, error: OSError) -> None:
        if error.filename == str(self.root):
            raise StorageError(f"no adapters in {self.where}: {error.strerror}; {self._expected}") from error
        self.bad.append(AdapterError(self._below(error.filename), f"the folder cannot be listed: {error.strerror}"))

    def _note_dead_links(self, folder: str, files: Iterable[str]) -> None:
        for file in sorted(files):
            link = os.path.join(folder, file)
            if not file.startswith(".") and os.path.islink(link) and not os.path.exists(link):
                reason = f"it is a link to {os.readlink(link)}, which cannot be reached"
                self.bad.append(LeftOut(self._below(link), reason))


def _fetch(
    searches: Sequence[_Search], allow_pickle: bool, skip: bool, download: DownloadOptions
) -> dict[_Repository, Path | HubError]:
    """The snapshot of every repository, or why it cannot be used. Each is downloaded once, several at a time."""
    folders: dict[_Repository, set[str]] = {}
    for source in (search.source for search in searches if search.source.on_hub):
        folders.setdefault((source.where, source.revision), set()).add(source.below)
    if not folders:
        return {}
    options: dict[str, Any] = dict(download)
    if len(folders) > 1:
        options |= {"max_workers": 2, "progress": False}

    def fetch(repository: _Repository) -> Path | HubError:
        repo_id, revision = repository
        try:
            return download_adapters(repo_id, folders[repository], allow_pickle, revision, **options)
        except HubError as error:
            if skip and is_lasting(error):  # a pool must not be smaller because a connection broke
                return error
            raise

    threads = ThreadPoolExecutor(max(1, download.get("max_workers", 8)), thread_name_prefix="hub")
    try:
        return dict(zip(folders, threads.map(fetch, folders), strict=True))
    finally:  # also after an error or Ctrl-C: no other download begins
        threads.shutdown(wait=True, cancel_futures=True)


def download_adapters(
    repo_id: str, folders: Collection[str], allow_pickle: bool = False, revision: str | None = None, **download: Any
) -> Path:
    """Downloads every adapter below some folders of a Hub repository, and returns the folder of its snapshot.

    An empty text is the whole repository. Errors as `logo.hub.download_files`.
    """
    patterns = [pattern for folder in folders for pattern in adapter_patterns(folder, allow_pickle)]
    return download_files(repo_id, patterns, revision=revision, **download)


def adapter_patterns(folder: str, allow_pickle: bool) -> list[str]:
    """Globs of adapter files at or below a folder, and of every `pool.json` above, which may say where these act."""
    names = [CONFIG, SAFETENSORS, NOTES, EXAMPLES, RECORD, *([PICKLE] if allow_pickle else [])]
    escaped = glob.escape(folder)
    root = f"{escaped}/" if folder else ""
    parts = escaped.split("/") if folder else []
    above = [_path(*parts[:count], NOTES) for count in range(len(parts))]
    return [pattern for name in names for pattern in (f"{root}{name}", f"{root}*/{name}")] + above
