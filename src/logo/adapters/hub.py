"""Adapters from the Hugging Face Hub.

Knows: which files of a repository are adapters, and whether all of them are on the disk. Does not know: what a failure
means (`failures.py`), or how an adapter is read (`format.py`). Parallel downloads, retries, the cache, tokens and the
`HF_*` variables are `huggingface_hub`'s, which is imported inside functions so that `logo --help` stays fast.
"""

from __future__ import annotations

import difflib
import glob
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from logo.adapters.examples import EXAMPLES
from logo.adapters.failures import hub_error
from logo.adapters.notes import NOTES, RESPONSES
from logo.errors import HubError, UsageError

__all__ = ["download_adapters", "download_model", "is_hub_id", "split_hub_spec"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_NAME = r"(?![^/@]*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}(?<!\.git)")
_COMMIT = re.compile("[0-9a-f]{40}")
_NOT_IN_GIT_NAMES = re.compile(r"^/|\.\.|[\\\s\x00-\x1f\x7f~^:?*\[]")
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
MODEL_LEFT_OUT = ["*/*", "consolidated*", "adapter_*"]


def download_adapters(
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    max_workers: int = 8,
    progress: bool = True,
    allow_pickle: bool = False,
) -> Path:
    """Fetch every adapter below a folder of a Hub repository and return the local folder that holds them.

    Files that are already in the cache are not fetched again. Without a connection the cached copy is used, but
    only if it is known to be complete: a half-finished download is an error, never a smaller pool.

    Args:
        repo_id: `namespace/name` of a model repository.
        subfolder: a folder inside it; everything below counts. Default: the whole repository.
        revision: branch, tag or commit. Default: the main branch.
        token: a Hub token; True for the stored one, False for none, None for `huggingface_hub`'s default.
        cache_dir: where snapshots are kept. Default: `HF_HUB_CACHE`.
        local_files_only: do not connect (`HF_HUB_OFFLINE=1` does the same for the whole process).
        max_workers: files fetched at the same time.
        progress: show `huggingface_hub`'s progress bars.
        allow_pickle: also fetch pickled weights (`adapter_model.bin`), which may run code when they are read.

    Raises:
        UsageError: the repo id, the subfolder or the revision is not one that could exist.
        HubError: everything else, in one line that names the repository and what to do.
    """
    folder = clean_subfolder(repo_id, subfolder)
    snapshot = download_files(
        repo_id,
        adapter_patterns(folder, allow_pickle),
        lambda files: require_adapters(repo_id, folder, files, allow_pickle=allow_pickle),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        max_workers=max_workers,
        progress=progress,
    )
    return snapshot / folder


def download_files(
    repo_id: str,
    patterns: list[str],
    check: Callable[[list[str]], object],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    max_workers: int,
    progress: bool,
) -> Path:
    """Fetch the files of a repository that match, and return the folder of its snapshot; otherwise as
    `download_adapters`.

    Args:
        patterns: as in `adapter_patterns`.
        check: given every path of the repository at that commit; raises HubError if that is not what was looked for.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise UsageError(f"{repo_id!r} is not a Hub repo id; expected namespace/name of letters, digits, '-', '_', '.'")
    _check_revision(repo_id, revision)
    try:
        known = _known_listing(repo_id, revision, cache_dir)
        if known is not None:
            check(known)
        with _quiet_when_nothing_matches():
            snapshot = _snapshot(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                max_workers=max_workers,
                progress=progress,
                allow_patterns=patterns,
            )
        if known is None:
            check(_listing(repo_id, snapshot, token=token, cache_dir=cache_dir, local_files_only=local_files_only))
    except HubError:
        raise
    except Exception as error:  # the boundary: httpx, xet and the file system each raise their own kinds
        raise hub_error(repo_id, error, revision=revision) from error
    return snapshot


def download_model(
    repo_id: str, *, revision: str | None = None, token: str | bool | None = None, config_only: bool = False
) -> Path:
    """Fetch a base model (configuration, tokenizer, safetensors) and return its local folder.

    Unlike transformers' own download it tells within seconds that the Hub cannot be reached, and fetches no pickles.
    With `config_only`, it only makes sure of the access to the model.

    Raises:
        UsageError, HubError: as `download_adapters`.
    """
    _check_revision(repo_id, revision)
    try:
        return _snapshot(
            repo_id,
            revision=revision,
            token=token,
            progress=not config_only,
            allow_patterns=["config.json"] if config_only else MODEL_FILES,
            ignore_patterns=MODEL_LEFT_OUT,
        )
    except Exception as error:  # the boundary, as in download_adapters
        raise hub_error(repo_id, error, revision=revision) from error


def is_repo_id(text: str) -> bool:
    """Whether `text` looks like `namespace/name`."""
    return _REPO_ID.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether `text` looks like `namespace/name` and is not a folder that exists here."""
    return is_repo_id(text) and not Path(text).is_dir()


def is_hub_spec(text: str) -> bool:
    """Whether `text` looks like `namespace/name[/folder...][@revision]` and is not a folder that exists here."""
    return not Path(text).is_dir() and is_hub_id("/".join(text.partition("@")[0].split("/")[:2]))


def split_hub_spec(text: str) -> tuple[str, str | None, str | None]:
    """Split `namespace/name[/folder...][@revision]` into repo id, subfolder and revision.

    The revision comes last and may contain slashes (`org/pool/tasks@refs/pr/4`).

    Raises:
        UsageError: `text` is not of that form.
    """
    place, at, revision = text.partition("@")
    parts = place.split("/")
    repo_id, rest = "/".join(parts[:2]), "/".join(parts[2:])
    if not _REPO_ID.fullmatch(repo_id) or (at and not revision):
        raise UsageError(f"{text!r} is neither a folder that exists nor a Hub repo (org/name[/folder][@revision])")
    _check_revision(repo_id, revision or None)
    return repo_id, clean_subfolder(repo_id, rest) or None, revision or None


# What to fetch


def clean_subfolder(repo_id: str, subfolder: str | None) -> str:
    """Normalise `./a//b/` to `a/b`; empty for the whole repository."""
    text = subfolder or ""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if text.startswith("/") or "\\" in text or ".." in parts or not text.isprintable():
        raise UsageError(f"Hub repo {repo_id}: {text!r} is not a folder inside it; use a relative path such as tasks/a")
    return "/".join(parts)


def _check_revision(repo_id: str, revision: str | None) -> None:
    """Refuse what git refuses: huggingface_hub turns a revision into a path below the cache."""
    if revision is not None and (not revision or _NOT_IN_GIT_NAMES.search(revision)):
        raise UsageError(f"Hub repo {repo_id}: {revision!r} is not a branch, a tag or a commit")


def adapter_patterns(folder: str, allow_pickle: bool, *, pattern: bool = False) -> list[str]:
    """The globs of adapter files at any depth below `folder` (in huggingface_hub `*` also matches `/`), and of what
    says where an adapter acts that is asked for by its own folder.

    Args:
        pattern: a `*` in `folder` is one.
    """
    names = [CONFIG, WEIGHTS, NOTES, EXAMPLES, f"{RESPONSES}/*.safetensors"]
    names += [PICKLE] if allow_pickle else []
    escaped = "*".join(map(glob.escape, folder.split("*"))) if pattern else glob.escape(folder)
    root = f"{escaped}/" if folder else ""
    above = [f"{escaped.rpartition('/')[0]}/{NOTES}".lstrip("/")] if folder else []
    return [pattern for name in names for pattern in (f"{root}{name}", f"{root}*/{name}")] + above


def _snapshot(repo_id: str, *, progress: bool, **options: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        """Hides only these bars: `disable_progress_bars()` would silence the whole process."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Path(snapshot_download(repo_id, library_name="logo", tqdm_class=None if progress else Silent, **options))


@contextmanager
def _quiet_when_nothing_matches() -> Iterator[None]:
    """Drop one warning of huggingface_hub: a folder without adapters is our error, and a better one."""
    logger = logging.getLogger("huggingface_hub._snapshot_download")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


# Whether everything is there


def _known_listing(repo_id: str, commit: str | None, cache_dir: str | Path | None) -> list[str] | None:
    """Every path of the repository at a commit whose listing is in the cache; None where there is none."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if commit is None or not _COMMIT.fullmatch(commit):
        return None
    try:
        return [file.path for file in get_cached_repo_tree(repo_id, revision=commit, cache_dir=cache_dir)]
    except CachedRepoTreeNotFoundError:
        return None


def _listing(
    repo_id: str, snapshot: Path, *, token: str | bool | None, cache_dir: str | Path | None, local_files_only: bool
) -> list[str]:
    """Every path of the repository at the snapshot's commit.

    huggingface_hub keeps this listing next to the snapshot and refuses, without a connection, a snapshot that
    lacks some of it. But it lets pass a snapshot that has no listing, such as one that single-file downloads
    (PEFT's, for one) left behind: nobody can tell whether that is the whole pool, so it is refused here.
    """
    from huggingface_hub import HfApi, constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(repo_id, revision=snapshot.name, cache_dir=cache_dir)]
    except CachedRepoTreeNotFoundError as error:
        if local_files_only or constants.HF_HUB_OFFLINE:
            raise HubError(
                f"Hub repo {repo_id}: offline, and nothing tells whether its cached copy is complete; run the same "
                f"command once with a connection, or pass the folder itself if you know that it is: {snapshot}"
            ) from error
        return list(HfApi(token=token).list_repo_files(repo_id, revision=snapshot.name))  # a cache that is read-only


def require_adapters(repo_id: str, folder: str, files: list[str], *, allow_pickle: bool) -> None:
    """Raise HubError unless at least one folder at or below `folder` has a config and weights."""
    names = _names_by_folder(files)
    below = [held for place, held in names.items() if not folder or f"{place}/".startswith(f"{folder}/")]
    adapters = [held for held in below if CONFIG in held]
    readable = {WEIGHTS, PICKLE} if allow_pickle else {WEIGHTS}
    if any(held & readable for held in adapters):
        return
    where = f"its folder {folder!r}" if folder else "it"
    if not adapters:
        exists = not folder or below
        what = f"{where} holds no adapter (no {CONFIG})" if exists else f"it has no folder {folder!r}"
        raise HubError(f"Hub repo {repo_id}: {what}; {_suggest(folder, names)}")
    if any(PICKLE in held for held in adapters):
        raise HubError(
            f"Hub repo {repo_id}: {where} has pickled adapters only ({PICKLE}), which may run code when they are read; "
            "convert them to safetensors, or allow pickles if you trust the repo"
        )
    raise HubError(f"Hub repo {repo_id}: {where} has an {CONFIG} but no {WEIGHTS}; check the repo, folder and revision")


def _names_by_folder(files: list[str]) -> dict[str, set[str]]:
    """`{"tasks/a": {"adapter_config.json", ...}}`, with "" for the top of the repository."""
    names: dict[str, set[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        names.setdefault(folder, set()).add(name)
    return names


def _suggest(folder: str, names: dict[str, set[str]]) -> str:
    """Up to five folders that do hold adapters, the most similar first."""
    holders = {
        str(place)
        for path, held in names.items()
        if CONFIG in held
        for place in (PurePosixPath(path), *PurePosixPath(path).parents)
        if str(place) != "."
    }
    close = difflib.get_close_matches(folder, sorted(holders), n=5, cutoff=0.6)
    if close:
        return f"did you mean {', '.join(map(repr, close))}?"
    if holders:
        return f"folders with adapters: {', '.join(map(repr, sorted(holders)[:5]))}"
    if any(CONFIG in held for held in names.values()):
        return "its one adapter is at the top: leave the folder out"
    return "is it a base model, or another revision?"
