"""Snapshots of Hub repositories: downloading the files that are wanted, and knowing that none is missing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from logo.errors import HubError, UsageError
from logo.hub.failures import hub_error
from logo.hub.names import check_revision, is_repo_id

_COMMIT = re.compile("[0-9a-f]{40}")


class DownloadOptions(TypedDict, total=False):
    """How files are downloaded from the Hub.

    Attributes:
        token: a Hub token; True for the stored one, False for none, None for `huggingface_hub`'s default.
        cache_dir: where snapshots are kept. Default: `HF_HUB_CACHE`.
        local_files_only: do not connect (`HF_HUB_OFFLINE=1` does the same for the whole process).
        max_workers: files downloaded at the same time. Default: 8.
        progress: show `huggingface_hub`'s progress bars. Default: True.
    """

    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    max_workers: int
    progress: bool


def download_files(
    repo_id: str,
    patterns: list[str],
    check: Callable[[list[str]], object],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    max_workers: int = 8,
    progress: bool = True,
) -> Path:
    """Downloads the files of a repository that match, and returns the folder of its snapshot.

    Files that are in the cache already are not downloaded again. Without a connection the cached copy is used, but only
    if it is known to be complete: a download that was interrupted is an error, never a smaller snapshot.

    Args:
        repo_id: `namespace/name` of a model repository.
        patterns: globs of the files, in which `*` also matches `/`.
        check: is given every path of the repository at that commit; raises HubError if that is not what was expected.
        revision: branch, tag or commit. None: the main branch.
        **others: see `DownloadOptions`.

    Raises:
        UsageError: the repo id or the revision has a form that cannot exist.
        HubError: everything else, in one line that names the repository and what to do.
    """
    if not is_repo_id(repo_id):
        raise UsageError(f"{repo_id!r} is not a Hub repo id; expected namespace/name of letters, digits, '-', '_', '.'")
    check_revision(repo_id, revision)
    try:
        known = _known_listing(repo_id, revision, cache_dir)
        if known is not None:
            check(known)
        with quiet_when_nothing_matches():
            folder = snapshot(
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
            check(_listing(repo_id, folder, token=token, cache_dir=cache_dir, local_files_only=local_files_only))
    except HubError:
        raise
    except Exception as error:  # the boundary: httpx, xet and the file system each raise their own kinds
        raise hub_error(repo_id, error, revision=revision) from error
    return folder


def snapshot(repo_id: str, *, progress: bool, **options: Any) -> Path:
    """`huggingface_hub.snapshot_download` with these options, with or without progress bars."""
    from huggingface_hub import snapshot_download

    tqdm_class = None if progress else silent_bars()
    return Path(snapshot_download(repo_id, library_name="logo", tqdm_class=tqdm_class, **options))


def silent_bars() -> Any:
    """A class of progress bars that are not shown; `disable_progress_bars()` would silence the whole process."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent


@contextmanager
def quiet_when_nothing_matches() -> Iterator[None]:
    """Drops huggingface_hub's warning that no file matches, because the caller raises a clearer error."""
    logger = logging.getLogger("huggingface_hub._snapshot_download")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


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
                f"Hub repo {repo_id}: offline, and LoGo cannot tell whether its cached copy is complete; run the same "
                f"command once with a connection, or, if you know that it is, pass its folder: {snapshot}"
            ) from error
        return list(HfApi(token=token).list_repo_files(repo_id, revision=snapshot.name))  # a read-only cache
