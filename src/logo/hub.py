"""The Hugging Face Hub: how repositories are written, downloading their files, and what a failure means.

`huggingface_hub` is imported inside functions so that `logo --help` stays fast.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from logo.errors import HubError, UsageError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_NAME = r"(?![^/@]*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}(?<!\.git)")
_NOT_IN_GIT_NAMES = re.compile(r"^/|\.\.|[\\\s\x00-\x1f\x7f~^:?*\[]")
_SECRET = re.compile(r"(?i)(?:bearer\s+|hf_)[^\s'\"]+|\?[^\s'\"]+")  # a token, the signature in a URL
_AGAIN = "run the same command again: finished files are kept and only the rest is fetched"
_LOG_IN = "set HF_TOKEN, or run `hf auth login`"


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


def is_repo_id(text: str) -> bool:
    """Whether `text` looks like `namespace/name`."""
    return _REPO_ID.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether `text` looks like `namespace/name` and is not a folder that exists here."""
    return is_repo_id(text) and not os.path.isdir(text)


def is_hub_spec(text: str) -> bool:
    """Whether `text` looks like `namespace/name[/folder...][@revision]` and is not a folder that exists here."""
    return not os.path.isdir(text) and is_hub_id("/".join(text.partition("@")[0].split("/")[:2]))


def split_hub_spec(text: str) -> tuple[str, str | None, str | None]:
    """Split `namespace/name[/folder...][@revision]` into repo id, subfolder and revision.

    The revision comes last and may contain slashes (`org/pool/tasks@refs/pr/4`).

    Raises:
        UsageError: `text` is not of that form.
    """
    source, at, revision = text.partition("@")
    parts = source.split("/")
    repo_id, rest = "/".join(parts[:2]), "/".join(parts[2:])
    if not is_repo_id(repo_id) or (at and not revision):
        raise UsageError(f"{text!r} is neither a folder that exists nor a Hub repo (org/name[/folder][@revision])")
    check_revision(repo_id, revision or None)
    return repo_id, clean_subfolder(repo_id, rest) or None, revision or None


def clean_subfolder(repo_id: str, subfolder: str | None) -> str:
    """Normalise `./a//b/` to `a/b`; empty for the whole repository. Raises UsageError if it is not inside of it."""
    text = subfolder or ""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if text.startswith("/") or "\\" in text or ".." in parts or not text.isprintable():
        raise UsageError(f"Hub repo {repo_id}: {text!r} is not a folder inside it; use a relative path such as tasks/a")
    return "/".join(parts)


def check_revision(repo_id: str, revision: str | None) -> None:
    """Refuses what git refuses, since huggingface_hub turns a revision into a path below the cache.

    Raises:
        UsageError: no branch, tag or commit can have this name.
    """
    if revision is not None and (not revision or _NOT_IN_GIT_NAMES.search(revision)):
        raise UsageError(f"Hub repo {repo_id}: {revision!r} is not a branch, a tag or a commit")


def snapshot(repo_id: str, *, progress: bool = True, **options: Any) -> Path:
    """The folder that `huggingface_hub.snapshot_download` makes with these options.

    Its warning that no file matches is dropped, because callers raise a clearer error.

    Args:
        progress: show progress bars.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):  # `disable_progress_bars()` would silence the whole process
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")

    logger = logging.getLogger("huggingface_hub._snapshot_download")
    logger.addFilter(keep)
    try:
        bars = None if progress else Silent
        return Path(snapshot_download(repo_id, library_name="logo", tqdm_class=bars, **options))
    finally:
        logger.removeFilter(keep)


def download_files(repo_id: str, patterns: list[str], *, revision: str | None = None, **options: Any) -> Path:
    """Downloads the files of a repository that match, and returns the folder of its snapshot.

    Files that are in the cache already are not downloaded again. Without a connection the cached copy is used, but only
    if it is known to be complete: a download that was interrupted is an error, never a smaller snapshot.

    Args:
        repo_id: `namespace/name` of a model repository.
        patterns: globs of the files, in which `*` also matches `/`.
        revision: branch, tag or commit. None: the main branch.
        **options: see `DownloadOptions`.

    Raises:
        UsageError: the repo id or the revision has a form that cannot exist.
        HubError: everything else, in one line that names the repository and what to do.
    """
    if not is_repo_id(repo_id):
        raise UsageError(f"{repo_id!r} is not a Hub repo id; expected namespace/name of letters, digits, '-', '_', '.'")
    check_revision(repo_id, revision)
    try:
        folder = snapshot(repo_id, revision=revision, allow_patterns=patterns, **options)
        _check_complete(repo_id, folder, options)
    except HubError:
        raise
    except Exception as error:  # the boundary: httpx, xet and the file system each raise their own kinds
        raise hub_error(repo_id, error, revision=revision) from error
    return folder


def _check_complete(repo_id: str, folder: Path, options: dict[str, Any]) -> None:
    """Raises HubError if nobody can tell, without a connection, whether a snapshot is complete.

    huggingface_hub keeps the listing of a repository next to its snapshot and refuses, without a connection, a snapshot
    that lacks some of it. But it lets pass a snapshot that has no listing, such as one that single-file downloads
    (PEFT's, for one) left behind.
    """
    from huggingface_hub import constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if not (options.get("local_files_only") or constants.HF_HUB_OFFLINE):
        return
    try:
        get_cached_repo_tree(repo_id, revision=folder.name, cache_dir=options.get("cache_dir"))
    except CachedRepoTreeNotFoundError as error:
        raise HubError(
            f"Hub repo {repo_id}: offline, and LoGo cannot tell whether its cached copy is complete; run the same "
            f"command once with a connection, or, if you know that it is, pass its folder: {folder}"
        ) from error


def hub_error(repo_id: str, error: BaseException, *, revision: str | None = None) -> HubError:
    """Say in one line what a failed download of `repo_id` means and what to do about it.

    Takes what `huggingface_hub` raises and what transformers makes of it (an `OSError` with the cause inside).
    Nothing of a server's answer or of a request's headers is repeated, so a token cannot end up in the message.
    """
    from huggingface_hub import constants, errors

    chain = list(causes(error))
    reasons = (_reason(repo_id, link, revision) for link in chain)
    reason = next((found for found in reasons if found), None)
    if reason is None and any(isinstance(link, errors.LocalEntryNotFoundError) for link in chain):
        switch = "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else "local_files_only"
        reason = f"not in the cache, and {switch} forbids fetching it; unset that, or download it beforehand"
    if reason is None:
        text = _SECRET.sub("...", (str(error).strip().splitlines() or ["no message"])[0][:300])
        reason = text if type(error) is OSError else f"{type(error).__name__}: {text}"
    return HubError(" ".join(f"Hub repo {repo_id}: {reason}".split()))


def is_lasting(error: HubError) -> bool:
    """Whether the repository itself is the reason: it is gated, gone, or holds no adapters. Anything else, such as a
    connection that broke or a full disk, says nothing about it."""
    from huggingface_hub import errors

    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
    chain = list(causes(error))
    return len(chain) == 1 or any(
        isinstance(link, (*absent, errors.GatedRepoError, errors.DisabledRepoError)) for link in chain
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what caused it, the way a traceback shows them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reason(repo_id: str, error: BaseException, revision: str | None) -> str | None:
    """Explain one link of the chain; None if it only wraps another or is not known."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    match error:
        case errors.HfHubHTTPError():
            return _http_reason(repo_id, error, revision)
        case errors.IncompleteSnapshotError():
            cause = error.__cause__
            if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
                return f"offline, and its cached copy is incomplete; with a connection, {_AGAIN}"
            return f"its cached copy is incomplete, and {_reason(repo_id, cause, revision) or type(cause).__name__}"
        case errors.OfflineModeIsEnabled():
            return "not in the cache, and HF_HUB_OFFLINE=1 forbids fetching it; unset that, or download it beforehand"
        case errors.FileMetadataError():
            return f"{endpoint} does not answer like a Hub; check HF_ENDPOINT and the proxy settings"
        case errors.LocalTokenNotFoundError():
            return f"a token is asked for but none is stored; {_LOG_IN}"
        case errors.HFValidationError():
            return "not a valid repo id; expected namespace/name of letters, digits, '-', '_' and '.'"
    kind = type(error).__name__
    if any(base.__name__ == "TransportError" for base in type(error).__mro__):  # httpx (1.x) or httpx2 (2.x)
        if kind in ("LocalProtocolError", "UnsupportedProtocol"):  # a token with a line break, an endpoint without http
            return f"the request to {endpoint} could not be formed ({kind}); check HF_TOKEN and HF_ENDPOINT"
        if kind in ("ConnectError", "ConnectTimeout", "ProxyError"):
            where = f"{endpoint} cannot be reached ({kind}), and there is no local folder of that name"
            return f"{where}; check the path, or the connection and HF_ENDPOINT, then {_AGAIN}"
        return f"the connection to {endpoint} was lost ({kind}); {_AGAIN}"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"no space for the cache ({error.strerror}); free some, or set HF_HOME to another disk, then {_AGAIN}"
            )
        if error.errno is not None and error.filename is not None:
            return f"the cache cannot be used ({error.strerror}: {error.filename}); set HF_HOME to a writable folder"
        if "Consistency check failed" in str(error):  # huggingface_hub has no class of its own for this
            return f"a file arrived incomplete; {_AGAIN}"
    return None


def _http_reason(repo_id: str, error: HfHubHTTPError, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    status, page = error.response.status_code, f"{constants.ENDPOINT}/{repo_id}"
    match error:
        case errors.GatedRepoError() if status == 403:
            return (
                f"access is gated and this token's account is not on the list; accept the licence at {page} with that "
                f"account, or use one that has access: {_LOG_IN}"
            )
        case errors.GatedRepoError():
            return f"access is gated; accept the licence at {page} and {_LOG_IN}"
        case errors.RepositoryNotFoundError():
            where = f"not found at {constants.ENDPOINT} (nor is it a local folder)"
            return f"{where}; check the name or, if it is private, {_LOG_IN}"
        case errors.RevisionNotFoundError():
            named = f"revision {revision!r}" if revision else "such revision"
            return f"it has no {named}; see the branches, tags and commits at {page}/tree/main"
        case errors.RemoteEntryNotFoundError():
            path = error.response.request.url.path.partition("/resolve/")[2].partition("/")[2]
            named = path or "its name is not known"
            return f"it lacks a file that is needed ({named}); check the repo, folder and revision"
        case errors.DisabledRepoError():
            return f"access is disabled by its owner or by the Hub; see {page}"
    meanings = {
        401: f"the Hub does not accept this token, or there is none: {_LOG_IN}",
        403: f"this token may not do that; give it the right or use another one: {_LOG_IN}",
        429: f"the Hub answered 'too many requests'; wait some minutes ({_LOG_IN} for a higher limit), then {_AGAIN}",
    }
    return meanings.get(status, f"{constants.ENDPOINT} answered with HTTP status {status}; wait, then {_AGAIN}")
