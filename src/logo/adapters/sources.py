"""Sources of a pool: what `--adapters` takes, what each holds, and how its adapters are named.

    adapters/                      a folder, with adapters at any depth
    pool.yaml                      a manifest (`logo.adapters.manifest`)
    org/repo[/folder][@revision]   a Hub repository, or a folder in it

Several are separated by commas. An adapter is named by its path below its source, or after it if it is the source. If
there are several, those on the Hub stand in front of the names, so that no name depends on what other sources hold.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from logo.adapters.activation import read_notes
from logo.adapters.adapter import Adapter, open_adapter, own_name
from logo.adapters.manifest import SUFFIXES, Entry, read_manifest
from logo.adapters.peft import CONFIG, EXAMPLES, NOTES, PICKLE, SAFETENSORS
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


class PoolOptions(DownloadOptions, total=False):
    """How a pool is downloaded and opened; see also `logo.hub.DownloadOptions`.

    Attributes:
        on_bad_adapter: `"error"` refuses a pool with a bad adapter; `"skip"` leaves it out, the reason is in `refused`.
        allow_pickle: also download and read pickled weights (`adapter_model.bin`), if there is no safetensors file.
        verify: read all tensors now and check them for NaN and Inf. Default: if the pool is small (256 MiB).
        examples: under `"ignore"`, the adapters have no example prompts.
    """

    on_bad_adapter: OnBadAdapter
    allow_pickle: bool
    verify: bool | None
    examples: ExamplesUse


@dataclass(frozen=True)
class Source:
    """One source of adapters: a path, or a repository, the folder in it (empty: all of it) and its revision."""

    kind: Literal["folder", "manifest", "repo"]
    where: str
    below: str = ""
    revision: str | None = None

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
        given = [texts] if isinstance(texts, os.PathLike) else list(texts)
        for one in given:
            check_type("pool", one, (str, os.PathLike), expected)
        parts = [os.fspath(one) for one in given]
    if not parts or not all(parts):
        raise UsageError("no source of adapters: expected a folder, a manifest or a Hub repository; see --adapters")
    return tuple(dict.fromkeys(map(_source, parts)))


def spec_of(sources: Sequence[Source]) -> str:
    """The text that `parse_sources` reads as these sources in any working directory."""
    texts = []
    for one in sources:
        where = one.where if one.on_hub else os.path.abspath(one.where)
        texts.append(_joined(where, one.below) + (f"@{one.revision}" if one.revision else ""))
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
    if os.path.isfile(text):
        if not text.endswith(SUFFIXES):
            raise UsageError(f"{text}: expected a folder of adapters or a manifest (.yaml), found another file")
        return Source("manifest", text)
    if not os.path.isdir(text):
        _check_no_pattern(text)
    return _on_hub(text) if is_hub_spec(text) else Source("folder", text)


def _check_no_pattern(text: str) -> None:
    if "*" in text:
        raise UsageError(f"{text!r}: `logo pool lock {text!r}` lists the repositories of an owner in a manifest")


def _on_hub(text: str) -> Source:
    repo, below, revision = split_hub_spec(text)
    return Source("repo", repo, below or "", revision)


def _joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


@dataclass(frozen=True)
class _Wanted:
    """A source to look in, and the manifest's entry that names it."""

    source: Source
    full: bool  # names begin with the repository
    entry: Entry | None = None

    def name(self, path: str) -> str:
        """The name of an adapter in this folder of the source."""
        if self.entry is not None and self.entry.name is not None:
            return self.entry.name
        if self.source.on_hub and (self.full or not path):
            return _joined(self.source.where, path)
        return path.removeprefix(self.source.below).strip("/") or own_name(Path(self.source.where, path))


def default_k(sources: Sequence[Source], otherwise: int) -> int:
    """Adapters per prompt of the pool of these sources, which is not opened; of a repository, `pool.json` is read."""
    source, root = sources[0], Path(sources[0].where)
    if source.on_hub and len(sources) == 1:
        file = glob.escape(_joined(source.below, NOTES))
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
    asked = [one for source in sources for one in _asked(source, full=len(sources) > 1)]
    skip = skip and len(asked) > 1
    roots = _fetch(asked, allow_pickle, skip, download) if any(one.source.on_hub for one in asked) else {}
    refused, adapters, size, top = list[AdapterError](), dict[str, Adapter](), 0, Path(sources[0].where)
    for one in asked:
        source, named = one.source, one.entry is not None and one.entry.name is not None
        root = roots[source.where, source.revision] if source.on_hub else Path(source.where)
        try:
            if isinstance(root, HubError):
                raise root
            top = root / source.below
            paths, bad = _walk(top, spec_of([source]), single=named)
        except (HubError, StorageError, PoolError) as error:
            if one.entry is None and not (skip and source.on_hub):
                raise
            refused.append(AdapterError(one.name(source.below), str(error)))
            continue
        refused += (type(error)(one.name(_joined(source.below, error.name)), error.reason) for error in bad)
        for path in paths:
            below = _joined(source.below, path)
            folder, name = top / path, one.name(below)
            plain = re.sub(r"(^|/)alora$", r"\1lora", path)  # in a library of `NAME/BASE/lora` and `NAME/BASE/alora`
            try:
                if path and not named and re.search(r"(^|/)checkpoint-\d+(/|$)", path):  # as the `Trainer` calls them
                    raise LeftOut(name, "it is a training checkpoint; to open it, name only its folder")
                if plain != path and plain in paths:
                    raise LeftOut(name, f"it is the activated form of {plain!r}; to open it, name only its folder")
                repo = root if source.on_hub else None
                adapter = open_adapter(folder, name, allow_pickle=allow_pickle, top=repo)
                if name in adapters:
                    raise AdapterError(name, f"{adapters[name].folder} has the same name; rename one of them")
                size += adapter.size
                if size <= _VERIFY_UP_TO if verify is None else verify:
                    adapter.verify()
                if source.on_hub:
                    adapter = replace(adapter, source=_joined(source.where, below), revision=root.name)
                adapters[name] = adapter if one.entry is None else one.entry.checked(adapter)
            except AdapterError as error:
                refused.append(error)
    return list(adapters.values()), refused, _noted_k(sources, top)


def _asked(source: Source, full: bool) -> list[_Wanted]:
    """What to look in for a source: of a manifest, every entry. Its folders count from the manifest's own; an entry
    that is none of them is on the Hub, whatever the working directory holds."""
    if source.kind != "manifest":
        return [_Wanted(source, full)]
    asked, file = [], Path(source.where)
    for entry in read_manifest(file).entries:
        local = os.path.normpath(file.absolute().parent / os.path.expanduser(entry.source))
        if entry.source.startswith((".", "/", "~")) or os.path.isdir(local):
            found = Source("folder", local)
        elif is_hub_spec(entry.source, here=False):
            found = _on_hub(f"{entry.source}{f'@{entry.revision}' if entry.revision else ''}")
        else:
            _check_no_pattern(entry.source)
            found = Source("folder", local)
        if entry.revision is not None and not found.on_hub:
            expected = "a folder, which has no revision, or a source on the Hub (org/repo[/folder])"
            raise UsageError(f"manifest {file}: {entry.source!r}: expected {expected}")
        asked.append(_Wanted(found, True, entry))
    return asked


def _walk(root: Path, where: str, single: bool) -> tuple[list[str], list[AdapterError]]:
    """The paths below `root`, in messages `where`, of folders with an adapter, sorted, and what cannot be looked into.

    Hidden folders are skipped. Links are followed, after all real folders; a folder is found once, so that links in a
    circle end. A dead link, another link to adapters, and a folder that cannot be listed are told. A `single` adapter
    may have others below its folder.
    """
    expected = f"expected folders that hold {CONFIG} and {SAFETENSORS}, at any depth"
    found, bad, seen, starts = list[str](), list[AdapterError](), dict[tuple[int, int], str](), [str(root)]

    def unreadable(error: OSError) -> None:
        if error.filename == str(root):
            raise StorageError(f"no adapters in {where}: {error.strerror}; {expected}") from error
        name = Path(error.filename).relative_to(root).as_posix()
        bad.append(AdapterError(name, f"the folder cannot be listed: {error.strerror}"))

    for start in starts:  # which grows
        for current, folders, files in os.walk(start, onerror=unreadable):
            stat = os.stat(current)
            name = "" if current == str(root) else Path(current).relative_to(root).as_posix()
            first = seen.setdefault((stat.st_dev, stat.st_ino), name)
            if first != name:
                folders.clear()
                back = not first or name.startswith(f"{first}/")  # the link leads to a folder above it
                if not (single or back) and any(f"{one}/".startswith(f"{first}/") for one in found):
                    bad.append(LeftOut(name, f"it is a link to {first!r}, which is in the pool already"))
                continue
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            starts += [path for folder in folders if os.path.islink(path := os.path.join(current, folder))]
            if not {CONFIG, SAFETENSORS, PICKLE}.isdisjoint(files):
                found.append(name)
                continue
            for link in (Path(current, file) for file in sorted(files) if not file.startswith(".")):
                if os.path.islink(link) and not os.path.exists(link):
                    dead = link.relative_to(root).as_posix()
                    bad.append(LeftOut(dead, f"it is a link to {os.readlink(link)}, which cannot be reached"))
    found.sort(key=lambda path: path.split("/"))
    found = [""] if single and "" in found else found
    if single and len(found) != 1:
        raise PoolError(f"expected one adapter in {where}, found {len(found)}")
    if not found and not bad:
        raise PoolError(f"no adapters in {where}: {expected}")
    return found, bad


def _fetch(
    asked: Sequence[_Wanted], allow_pickle: bool, skip: bool, download: DownloadOptions
) -> dict[tuple[str, str | None], Path | HubError]:
    """The snapshot of every repository, or why it cannot be used. Each is downloaded once, several at a time."""
    wanted: dict[tuple[str, str | None], set[str]] = {}
    for source in (one.source for one in asked if one.source.on_hub):
        wanted.setdefault((source.where, source.revision), set()).add(source.below)
    options: dict[str, Any] = {**download, **({"max_workers": 2, "progress": False} if len(wanted) > 1 else {})}

    def fetch(repo: tuple[str, str | None]) -> Path | HubError:
        try:
            return download_adapters(repo[0], wanted[repo], allow_pickle, repo[1], **options)
        except HubError as error:
            if skip and is_lasting(error):  # a pool must not be smaller because a connection broke
                return error
            raise

    pool = ThreadPoolExecutor(max(1, download.get("max_workers", 8)), thread_name_prefix="hub")
    try:
        return dict(zip(wanted, pool.map(fetch, wanted), strict=True))
    finally:  # also after an error or Ctrl-C: no other download begins
        pool.shutdown(wait=True, cancel_futures=True)


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
    names = [CONFIG, SAFETENSORS, NOTES, EXAMPLES, *([PICKLE] if allow_pickle else [])]
    escaped = glob.escape(folder)
    root = f"{escaped}/" if folder else ""
    parts = escaped.split("/") if folder else []
    above = [_joined(*parts[:count], NOTES) for count in range(len(parts))]
    return [pattern for name in names for pattern in (f"{root}{name}", f"{root}*/{name}")] + above
