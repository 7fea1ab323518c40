"""Sources of a pool: what `--adapters` takes, what each holds, and how its adapters are named.

    adapters/                      a folder, with adapters at any depth
    pool.yaml                      a manifest (`logo.adapters.manifest`)
    org/repo[/folder][@revision]   a Hub repository, or a folder in it

Several are separated by commas. The name of an adapter is its path below its source. If there are several sources,
those on the Hub are put in front of the names of their adapters, so that no name depends on what other sources hold.
An adapter that is a source itself is named after it.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from logo.adapters.activation import EVERYWHERE, noted, noted_k
from logo.adapters.adapter import Adapter, open_adapter, own_name
from logo.adapters.manifest import SUFFIXES, Entry, read_manifest
from logo.adapters.peft import CONFIG, EXAMPLES, NOTES, PICKLE, SAFETENSORS
from logo.errors import AdapterError, HubError, LeftOut, PoolError, StorageError, UsageError, check_type
from logo.hub import DownloadOptions, download_files, hub_error, is_hub_spec, is_lasting, split_hub_spec
from logo.models import DEMO, OFFICIAL_MODELS, demo_folder

if TYPE_CHECKING:
    from typing_extensions import Unpack

OnBadAdapter = Literal["error", "skip"]
ExamplesUse = Literal["use", "ignore"]
OFFICIAL_ADAPTERS = "archon159/LoGo-loras-collection"
# Pools up to this size are checked for NaN when they are opened, which takes well under a second. The tensors of larger
# pools are checked when they are first read.
_VERIFY_UP_TO = 256 * 2**20  # bytes
_COMMAS = 3  # the most in the name of a folder
# The owner's name has no `*`, since it is looked up.
_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_.*-]+")


class PoolOptions(DownloadOptions, total=False):
    """How a pool is downloaded and opened; see also `logo.hub.DownloadOptions`.

    Attributes:
        on_bad_adapter: `"error"` refuses the pool at the first sight of a bad adapter; `"skip"` leaves bad adapters out
            and keeps the reasons in `refused`.
        allow_pickle: also download and read pickled weights (`adapter_model.bin`), if there is no safetensors file.
        verify: read all tensors now and check them for NaN and Inf. Default: if the pool is small (256 MiB).
        examples: under `"ignore"`, the adapters have no example prompts.
    """

    on_bad_adapter: OnBadAdapter
    allow_pickle: bool
    verify: bool | None
    examples: ExamplesUse


# -- what is named --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One source of adapters.

    Attributes:
        kind: what it is.
        where: a path, or the id of a repository.
        below: a folder in a repository; empty: all of it.
        revision: of a repository; None: its main branch.
    """

    kind: Literal["folder", "manifest", "repo"]
    where: str
    below: str = ""
    revision: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether the source is on the Hub."""
        return self.kind == "repo"

    @property
    def spec(self) -> str:
        """The text that `parse_sources` reads as this source in any working directory."""
        where = self.where if self.on_hub else str(Path(self.where).absolute())
        return f"{_joined(where, self.below)}{f'@{self.revision}' if self.revision else ''}"


def parse_sources(texts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[Source, ...]:
    """Parses one text, which may name several sources, or several texts. Nothing is downloaded or opened.

    Raises:
        UsageError: a text names no source, or something else is given than texts.
    """
    expected = "a folder, a manifest or a Hub repository, or a list of these"
    check_type("pool", texts, (str, os.PathLike, Iterable), expected)
    if isinstance(texts, (str, os.PathLike)):
        parts = _split(texts) if isinstance(texts, str) else [os.fspath(texts)]
    else:
        parts = []
        for one in texts:
            check_type("pool", one, (str, os.PathLike), expected)
            parts.append(os.fspath(one))
    if not parts or not all(parts):
        raise UsageError("no source of adapters: expected a folder, a manifest or a Hub repository; see --adapters")
    return tuple(dict.fromkeys(map(_source, parts)))


def spec_of(sources: Sequence[Source]) -> str:
    """The text that `parse_sources` reads as these sources in any working directory."""
    return ",".join(source.spec for source in sources)


def pool_sources(
    adapters: str | Path | Sequence[str | Path] | None, base_model: str, model_dir: str | Path | None = None
) -> tuple[Source, ...]:
    """The sources of a pool by name, or of the pool of a base model: that of the demo, or the authors' published one.

    Args:
        adapters: None: the pool of the base model.
        model_dir: searched for the published adapters before the Hub.

    Raises:
        UsageError: a source that could not exist; or none is named, and the base model has no pool.
    """
    if adapters is not None:
        return parse_sources(adapters)
    if base_model == DEMO:
        return (Source("folder", str(demo_folder() / "adapters")),)
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


def list_repos(text: str) -> list[Source]:
    """The repositories that match `org/prefix-*[/folder]`, each at the commit of its main branch.

    Raises:
        UsageError: it is no such pattern.
        HubError: no repository matches, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    parts = text.split("/")
    pattern, below = "/".join(parts[:2]), "/".join(parts[2:])
    if not _PATTERN.fullmatch(pattern) or "*" in below or "@" in text:
        raise UsageError(f"{text!r}: `*` stands for a part of the names of an owner's repositories (org/prefix*)")
    owner, _, name = pattern.partition("/")
    longest = max(name.split("*"), key=len)
    try:
        models = HfApi(library_name="logo").list_models(author=owner, search=longest or None, expand=["sha"])
        found = {one.id: one.sha for one in models if fnmatchcase(one.id, pattern)}
    except Exception as error:  # the boundary, as in `download_files`
        raise hub_error(pattern, error) from error
    if not found:
        raise HubError(
            f"Hub repos {pattern}: no repository at {constants.ENDPOINT} matches; check the name, and HF_TOKEN if they "
            "are private"
        )
    return [Source("repo", repo, split_hub_spec(_joined(repo, below))[1] or "", found[repo]) for repo in sorted(found)]


def _split(text: str) -> list[str]:
    """The sources in a text, separated by commas, which names of folders and files may have, too."""
    pieces, parts = text.split(","), []
    while pieces:
        counts = range(min(_COMMAS + 1, len(pieces)), 1, -1)
        count = next((n for n in counts if os.path.exists(",".join(pieces[:n]).strip())), 1)
        parts.append(",".join(pieces[:count]).strip())
        pieces = pieces[count:]
    return parts


def _source(text: str) -> Source:
    if os.path.isfile(text):
        if not text.endswith(SUFFIXES):
            raise UsageError(f"{text}: expected a folder of adapters or a manifest (.yaml), found another file")
        return Source("manifest", text)
    if "*" in text and not os.path.isdir(text):
        raise UsageError(
            f"{text!r}: a pool is opened from repositories by name; `logo pool lock {text!r}` lists those of an owner "
            "in a manifest, which can be opened"
        )
    if is_hub_spec(text):
        repo, below, revision = split_hub_spec(text)
        return Source("repo", repo, below or "", revision)
    return Source("folder", text)


def _joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


# -- what is there --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """The adapters that were found.

    Attributes:
        adapters: those that can be used.
        refused: why others cannot.
        origins: name -> where the adapter is, with the commit of its repository.
        k: adapters per prompt, if the pool says so; None also for a pool of several sources.
    """

    adapters: Sequence[Adapter]
    refused: list[AdapterError]
    origins: Mapping[str, Source]
    k: int | None = None


@dataclass(frozen=True)
class _Wanted:
    """A source to look in, and the manifest's entry that names it."""

    source: Source
    full: bool  # names begin with the repository
    entry: Entry | None = None
    manifest: Path | None = None

    def name(self, path: str) -> str:
        """The name of an adapter in this folder of the source."""
        if self.entry is not None and self.entry.name is not None:
            return self.entry.name
        if self.source.on_hub and (self.full or not path):
            return _joined(self.source.where, path)
        return path.removeprefix(self.source.below).strip("/") or own_name(Path(self.source.where, path))


def default_k(sources: Sequence[Source], otherwise: int) -> int:
    """Adapters per prompt of the pool of these sources, which is not opened; of a repository, `pool.json` is fetched.

    Raises:
        StorageError, UsageError, HubError: as `gather`.
    """
    if len(sources) > 1:
        return otherwise
    [source] = sources
    root = Path(source.where)
    if source.on_hub:
        file = glob.escape(_joined(source.below, NOTES))
        root = download_files(source.where, [file], lambda files: None, revision=source.revision, progress=False)
    return _noted_k(source, root) or otherwise


def _noted_k(source: Source, root: Path) -> int | None:
    return read_manifest(root).k if source.kind == "manifest" else noted_k(root / source.below)


def gather(
    sources: Sequence[Source],
    *,
    allow_pickle: bool = False,
    skip: bool = False,
    verify: bool | None = None,
    **download: Unpack[DownloadOptions],
) -> Gathered:
    """Downloads and opens every adapter of these sources.

    Args:
        allow_pickle, verify: see `PoolOptions`.
        skip: repositories that cannot be used are added to `refused`; otherwise the first one ends the search. A single
            one always does.

    Raises:
        HubError: the Hub cannot be reached, or a repository cannot be used.
        StorageError: a folder cannot be read.
        UsageError: a manifest cannot be used.
        PoolError: a source holds no adapter.
    """
    asked = [one for source in sources for one in _asked(source, full=len(sources) > 1)]
    roots = _fetch(asked, allow_pickle, skip, download)
    refused, adapters = list[AdapterError](), dict[str, Adapter]()
    origins, tops = dict[str, Source](), dict[str, Path]()
    for one in asked:
        source, entry = one.source, one.entry
        root = roots[source.where, source.revision] if source.on_hub else Path(source.where)
        if isinstance(root, HubError):
            refused.append(AdapterError(one.name(source.below), str(root)))
            continue
        top, before = root / source.below, len(adapters) + len(refused)
        if not source.on_hub and entry is None:
            _check_folder(top)
        for folder, path in _folders_of(one, top, refused):
            name = one.name(path)
            try:
                if path != source.below and (entry is None or entry.name is None) and _is_checkpoint(path):
                    raise LeftOut(name, "it is a training checkpoint; to open it, name only its folder")
                adapter = open_adapter(folder, name, allow_pickle=allow_pickle, top=None if folder == top else top)
                if name in adapters:
                    both = f"{adapters[name].folder} and {folder}"
                    raise AdapterError(name, f"{both} have the same name; rename one of them")
                adapters[name] = adapter if entry is None else entry.checked(adapter)
            except AdapterError as error:
                refused.append(error)
                continue
            origin = Source("repo", source.where, path, root.name) if source.on_hub else Source("folder", str(folder))
            origins[name], tops[name] = origin, top
            _warn_of_link(adapter, top)
        if len(adapters) + len(refused) == before:
            where = source.spec if entry is None else f"{entry.source}, of {one.manifest}"
            if entry is None:
                raise PoolError(no_adapters(where))
            refused.append(AdapterError(entry.source, no_adapters(where)))
    # Adapters that a user names one by one have a folder of their own as `top`, and none is left out.
    for name in [name for name in adapters if tops.get(_twin(name)) == tops[name]]:
        if adapters[name].config.invocation and not adapters[_twin(name)].config.invocation:
            why = f"it is the activated form of {_twin(name)!r}, which is used; to open it, name only its folder"
            refused.append(LeftOut(name, why))
            del adapters[name]
    if verify is None:
        verify = sum(adapter.size for adapter in adapters.values()) <= _VERIFY_UP_TO
    for adapter in [*adapters.values()] if verify else ():
        try:
            adapter.verify()
        except AdapterError as error:
            refused.append(error)
            del adapters[adapter.name]
    whole = Path(sources[0].where) if sources[0].kind == "manifest" else root
    k = _noted_k(sources[0], whole) if len(sources) == 1 and isinstance(whole, Path) else None
    return Gathered(list(adapters.values()), refused, origins, k)


def no_adapters(where: str | Path) -> str:
    """Says that nothing was found."""
    return f"no adapters in {where}: expected folders that hold {CONFIG} and {SAFETENSORS}, at any depth"


def _asked(source: Source, full: bool) -> Iterator[_Wanted]:
    if source.kind != "manifest":
        yield _Wanted(source, full)
        return
    file = Path(source.where)
    for entry in read_manifest(file).entries:
        yield _Wanted(_source_of(entry, file), True, entry, file)


def _source_of(entry: Entry, manifest: Path) -> Source:
    """Where the adapter of an entry is: a folder counts from the manifest's own. Raises UsageError if it is nowhere."""
    local = os.path.normpath(manifest.absolute().parent / os.path.expanduser(entry.source))
    if entry.source.startswith((".", "/", "~")) or os.path.isdir(local):
        if entry.revision is not None:
            raise UsageError(f"manifest {manifest}: {entry.source!r} is a folder, which has no revision")
        return Source("folder", local)
    [source] = parse_sources([f"{entry.source}{f'@{entry.revision}' if entry.revision else ''}"])
    if not source.on_hub:
        expected = "expected one folder (./folder) or one source on the Hub (org/repo[/folder])"
        raise UsageError(f"manifest {manifest}: {entry.source!r}: {expected}")
    return source


def _folders_of(one: _Wanted, top: Path, refused: list[AdapterError]) -> list[tuple[Path, str]]:
    """The folders with adapters that are wanted below `top`, with their paths in the source."""
    below, entry = one.source.below, one.entry
    bad: list[AdapterError] = []
    found = [(folder, _joined(below, path)) for folder, path in _walk(top, bad)] if top.is_dir() else []
    refused += (type(error)(one.name(_joined(below, error.name)), error.reason) for error in bad)
    if entry is None or entry.name is None:
        return found
    whole = [(folder, path) for folder, path in found if path == below] or found  # it may have others below its folder
    if len(whole) == 1:
        return whole
    what = f"{len(whole)} of them" if whole else "none"
    refused.append(AdapterError(entry.name, f"{one.manifest}: expected one adapter in {top}, found {what}"))
    return []


def _walk(root: Path, refused: list[AdapterError]) -> Iterator[tuple[Path, str]]:
    """Yields folders below `root` that hold an adapter, and their relative paths; hidden folders are skipped.

    Links are followed. A folder to which several paths lead is found under the one without links, or under the first
    one; the others are added to `refused` as left out, except links back to a folder above them. Dead links are left
    out, too. A folder that cannot be listed may hold adapters, so it is added to `refused`.
    """
    top = str(root)

    def name(path: str) -> str:
        return path[len(top) :].strip(os.sep).replace(os.sep, "/")

    def unreadable(error: OSError) -> None:
        refused.append(AdapterError(name(str(error.filename)) or ".", f"the folder cannot be listed: {error.strerror}"))

    seen: dict[tuple[int, int], str] = {}
    found, again, starts = [], [], [top]
    while starts:
        links = []
        for start in starts:
            for current, folders, files in os.walk(start, onerror=unreadable, followlinks=True):
                try:
                    stat = os.stat(current)
                except OSError as error:  # removed meanwhile
                    unreadable(error)
                    continue
                first = seen.setdefault((stat.st_dev, stat.st_ino), current)
                if first is not current:
                    again.append((current, first))
                    folders.clear()
                    continue
                shown = [f for f in folders if not f.startswith(".")]
                folders[:] = [f for f in shown if not os.path.islink(os.path.join(current, f))]
                links += [os.path.join(current, f) for f in shown if f not in folders]
                if not {CONFIG, SAFETENSORS, PICKLE}.isdisjoint(files):
                    found.append(current)
                    continue
                for path in (os.path.join(current, file) for file in sorted(files) if not file.startswith(".")):
                    if os.path.islink(path) and not os.path.exists(path):
                        why = f"it is a link to {os.readlink(path)}, which cannot be reached; mend or remove the link"
                        refused.append(LeftOut(name(path), why))
        starts = sorted(links)  # visited after all real folders
    for path, first in again:  # a link back to a folder above it is within that one
        if any(Path(one).is_relative_to(first) for one in found) and not Path(path).is_relative_to(first):
            refused.append(LeftOut(name(path), f"it is the same folder as {name(first)!r}, which is used"))
    yield from ((Path(path), name(path)) for path in sorted(found, key=lambda path: path.split(os.sep)))


def _check_folder(root: Path) -> None:
    """Raises StorageError unless `root` is a readable folder."""
    try:
        os.scandir(root).close()
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"adapter folder {root}: expected a folder, found nothing; check the path") from None
    except (OSError, ValueError) as error:  # a name that cannot be is a ValueError
        why = getattr(error, "strerror", None) or error
        raise StorageError(f"adapter folder {root} cannot be read: {why}") from error


def _is_checkpoint(path: str) -> bool:
    """Whether a folder has the name of a checkpoint of the Hugging Face `Trainer`, such as `checkpoint-500`."""
    return re.fullmatch(r"checkpoint-\d+", os.path.basename(path)) is not None


def _twin(name: str) -> str:
    """The name of the plain adapter beside an activated one, in a library of `NAME/BASE/lora` and `NAME/BASE/alora`."""
    front, slash, last = name.rpartition("/")
    return f"{front}{slash}lora" if last == "alora" else ""


def _warn_of_link(adapter: Adapter, top: Path) -> None:
    """Warns if a linked adapter, which acts on every token here, would not in the pool that it lies in."""
    if adapter.folder == top or not adapter.activation.everywhere or not adapter.folder.is_symlink():
        return
    real = adapter.folder.resolve()
    there = noted(real, EVERYWHERE)
    if there != EVERYWHERE:
        warnings.warn(
            f"adapter {adapter.name!r} is a link to {real}. It acts on every token here, but {real.parent / NOTES} "
            f"says activation {there}: if it was trained for that, copy this {NOTES} into the folder of the link",
            UserWarning,
            stacklevel=2,
        )


# -- from the Hub ---------------------------------------------------------------------------------------------------


def _fetch(
    asked: Sequence[_Wanted], allow_pickle: bool, skip: bool, download: DownloadOptions
) -> dict[tuple[str, str | None], Path | HubError]:
    """The snapshot of every repository, or why it cannot be used. Each is downloaded once, several at a time."""
    wanted: dict[tuple[str, str | None], list[_Wanted]] = {}
    for one in asked:
        if one.source.on_hub:
            wanted.setdefault((one.source.where, one.source.revision), []).append(one)
    workers, options = max(1, download.get("max_workers", 8)), dict[str, Any](download)
    if len(wanted) > 1:  # several repositories are downloaded at the same time
        options |= {"max_workers": 2, "progress": False}

    def fetch(repo: tuple[str, str | None]) -> Path | HubError:
        folders = dict.fromkeys(one.source.below for one in wanted[repo])
        required = dict.fromkeys(one.source.below for one in wanted[repo] if one.entry is None)
        try:
            return download_adapters(repo[0], folders, allow_pickle, repo[1], required, **options)
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


def download_adapters(
    repo_id: str,
    folders: Collection[str],
    allow_pickle: bool = False,
    revision: str | None = None,
    required: Collection[str] | None = None,
    **download: Any,
) -> Path:
    """Downloads every adapter below some folders of a Hub repository, and returns the folder of its snapshot.

    Args:
        folders: of the repository; everything below counts. An empty text is the whole repository.
        required: those of the folders that have to hold an adapter; None: all.

    Raises:
        UsageError, HubError: as `logo.hub.download_files`.
    """

    def check(files: list[str]) -> None:
        for folder in folders if required is None else required:
            _require_adapters(repo_id, folder, files, allow_pickle)

    patterns = [pattern for folder in folders for pattern in adapter_patterns(folder, allow_pickle)]
    return download_files(repo_id, patterns, check, revision=revision, **download)


def adapter_patterns(folder: str, allow_pickle: bool) -> list[str]:
    """Globs of adapter files at or below a folder, and of the `pool.json` above it, which may say where these act."""
    names = [CONFIG, SAFETENSORS, NOTES, EXAMPLES, *([PICKLE] if allow_pickle else [])]
    escaped = glob.escape(folder)
    root = f"{escaped}/" if folder else ""
    above = [_joined(escaped.rpartition("/")[0], NOTES)] if folder else []
    return [pattern for name in names for pattern in (f"{root}{name}", f"{root}*/{name}")] + above


def _require_adapters(repo_id: str, folder: str, files: list[str], allow_pickle: bool) -> None:
    """Raises HubError unless a folder at or below this one has a configuration and weights."""
    homes = [path.parent for path in map(PurePosixPath, files) if path.name == CONFIG]
    inside = [home for home in homes if not folder or home.is_relative_to(folder)]
    safe, pickled = ({str(home / name) for home in inside} & {*files} for name in (SAFETENSORS, PICKLE))
    if safe or (allow_pickle and pickled):
        return
    where = f"its folder {folder!r}" if folder else "it"
    if pickled:
        problem = (
            f"{where} has pickled adapters only ({PICKLE}), which may run code when they are read; convert them to "
            "safetensors, or allow pickles if you trust the repo"
        )
    elif inside:
        problem = f"{where} has an {CONFIG} but no {SAFETENSORS}; check the repo, folder and revision"
    else:
        there = not folder or any(file.startswith(f"{folder}/") for file in files)
        known = sorted({str(one) for home in homes for one in (home, *home.parents)} - {"."})
        close = difflib.get_close_matches(folder, known, n=5, cutoff=0.6)
        problem = f"{where} holds no adapter (no {CONFIG}); " if there else f"it has no folder {folder!r}; "
        if known:
            shown = ", ".join(map(repr, close or known[:5]))
            problem += f"did you mean {shown}?" if close else f"folders with adapters: {shown}"
        else:
            top = "its one adapter is at the top: leave the folder out"
            problem += top if homes else "is it a base model, or another revision?"
    raise HubError(f"Hub repo {repo_id}: {problem}")
