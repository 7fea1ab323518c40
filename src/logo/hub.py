"""The Hugging Face Hub: how repositories are written, downloading their files, and what a failure means."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from logo.errors import HubError, UsageError

_NAME = r"(?![^/@]*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}(?<!\.git)")
_NOT_IN_GIT_NAMES = re.compile(r"^/|\.\.|[\\\s\x00-\x1f\x7f~^:?*\[]")
_SECRET = re.compile(r"(?i)(?:bearer\s+|hf_)[^\s'\"]+|\?[^\s'\"]+")  # a token, the signature in a URL
_AGAIN = "run the same command again: finished files are kept and only the rest is fetched"
_LOG_IN = "set HF_TOKEN, or run `hf auth login`"
_OFFLINE = "not in the cache, and offline (HF_HUB_OFFLINE=1 or local_files_only); unset that, or download it beforehand"


class DownloadOptions(TypedDict, total=False):
    """How files are downloaded from the Hub."""

    token: str | bool | None  # a Hub token; True: the stored one; False: none; None: `huggingface_hub`'s default
    cache_dir: str | Path | None  # where snapshots are kept; default: `HF_HUB_CACHE`
    local_files_only: bool  # do not connect (`HF_HUB_OFFLINE=1` does the same for the whole process)
    max_workers: int  # files downloaded at the same time; default: 8
    progress: bool  # show `huggingface_hub`'s progress bars; default: True


def is_repo_id(text: str) -> bool:
    """Whether `text` looks like `namespace/name`."""
    return _REPO_ID.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether `text` looks like `namespace/name` and is not a folder that exists here."""
    return is_repo_id(text) and not os.path.isdir(text)


def is_hub_spec(text: str, *, here: bool = True) -> bool:
    """Whether `text` looks like `namespace/name[/folder...][@revision]` and, unless it does not count what is `here`,
    is not a folder that exists here."""
    repo = "/".join(text.partition("@")[0].split("/")[:2])
    return not os.path.isdir(text) and is_hub_id(repo) if here else is_repo_id(repo)


def split_hub_spec(text: str) -> tuple[str, str | None, str | None]:
    """Repo id, subfolder and revision of `namespace/name[/folder...][@revision]`; raises UsageError for another form.
    The revision comes last and may contain slashes (`org/pool/tasks@refs/pr/4`)."""
    source, at, revision = text.partition("@")
    parts = source.split("/", 2)
    repo_id = "/".join(parts[:2])
    subfolder = "".join(parts[2:])
    if not is_repo_id(repo_id) or (at and not revision):
        raise UsageError(f"{text!r} is neither a folder that exists nor a Hub repo (org/name[/folder][@revision])")
    check_revision(repo_id, revision or None)
    return repo_id, clean_subfolder(repo_id, subfolder) or None, revision or None


def clean_subfolder(repo_id: str, subfolder: str | None) -> str:
    """Normalise `./a//b/` to `a/b`; empty for the whole repository. Raises UsageError if it is not inside of it."""
    text = subfolder or ""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if text.startswith("/") or "\\" in text or ".." in parts or not text.isprintable():
        raise UsageError(f"Hub repo {repo_id}: {text!r} is not a folder inside it; use a relative path such as tasks/a")
    return "/".join(parts)


def check_revision(repo_id: str, revision: str | None) -> None:
    """Raises UsageError for what git refuses as a name, since huggingface_hub makes a path below the cache of it."""
    if revision is not None and (not revision or _NOT_IN_GIT_NAMES.search(revision)):
        raise UsageError(f"Hub repo {repo_id}: {revision!r} is not a branch, a tag or a commit")


def snapshot(repo_id: str, *, revision: str | None = None, progress: bool = True, **options: Any) -> Path:
    """The folder that `huggingface_hub.snapshot_download` makes with these options.

    Raises:
        UsageError: no branch, tag or commit can have the name `revision`.
        HubError: everything else.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):  # `disable_progress_bars()` would silence the whole process
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")  # callers raise a clearer error

    check_revision(repo_id, revision)
    options |= {"revision": revision, "library_name": "logo", "tqdm_class": None if progress else Silent}
    logger = logging.getLogger("huggingface_hub._snapshot_download")
    logger.addFilter(keep)
    try:
        return Path(snapshot_download(repo_id, **options))
    except Exception as error:  # the boundary: httpx, xet and the file system each raise their own kinds
        raise hub_error(repo_id, error, revision=revision) from error
    finally:
        logger.removeFilter(keep)


def download_files(repo_id: str, patterns: list[str], **options: Any) -> Path:
    """Downloads what matches and is not in the cache; returns the snapshot's folder. Offline the cached copy is used if
    it is known to be complete: an interrupted download is an error, never a smaller snapshot.

    Args:
        patterns: globs of the files, in which `*` also matches `/`.
        **options: `revision`, and see `DownloadOptions`. Errors as `snapshot`.
    """
    from huggingface_hub import constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder = snapshot(repo_id, allow_patterns=patterns, **options)
    # huggingface_hub keeps a listing and refuses an offline snapshot that lacks some of it, but not one without a
    # listing, as downloads of single files (PEFT's) leave behind.
    if options.get("local_files_only") or constants.HF_HUB_OFFLINE:
        try:
            get_cached_repo_tree(repo_id, revision=folder.name, cache_dir=options.get("cache_dir"))
        except CachedRepoTreeNotFoundError as missing:
            found = f"Hub repo {repo_id}: offline, and LoGo cannot tell whether its cached copy is complete"
            raise HubError(f"{found}; run this online once, or, if you know that it is, pass: {folder}") from missing
    return folder


def hub_error(repo_id: str, error: BaseException, *, revision: str | None = None) -> HubError:
    """What a failed download of `repo_id` means, and what to do about it. Takes what `huggingface_hub` raises and what
    transformers makes of it, and repeats nothing of a request's headers, so that no token ends up in the message."""
    from huggingface_hub import errors

    chain = list(causes(error))
    reason = next(filter(None, (_reason(repo_id, link, revision) for link in chain)), None)
    if reason is None and any(isinstance(link, errors.LocalEntryNotFoundError) for link in chain):
        reason = _OFFLINE
    if reason is None:
        text = _SECRET.sub("...", (str(error).strip().splitlines() or ["no message"])[0][:300])
        reason = text if type(error) is OSError else f"{type(error).__name__}: {text}"
    return HubError(" ".join(f"Hub repo {repo_id}: {reason}".split()))


def is_lasting(error: HubError) -> bool:
    """Whether the repository itself is the reason, as it is gated, gone, or holds no adapters; not the connection."""
    from huggingface_hub import errors

    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
    closed = (errors.GatedRepoError, errors.DisabledRepoError)
    chain = list(causes(error))
    return len(chain) == 1 or any(isinstance(link, (*absent, *closed)) for link in chain)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what caused it, the way a traceback shows them."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reason(repo_id: str, error: BaseException, revision: str | None) -> str | None:
    """What one link of the chain means; None if it only wraps another or is not known."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    page = f"{hub}/{repo_id}"
    kind = type(error).__name__
    match error:
        case errors.GatedRepoError():
            who = " and this token's account is not on the list" if error.response.status_code == 403 else ""
            return f"access is gated{who}; accept the licence at {page} and {_LOG_IN}"
        case errors.RepositoryNotFoundError():
            return f"not found at {hub} (nor is it a local folder); check the name or, if it is private, {_LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"it has no revision {revision!r}; see the branches, tags and commits at {page}/tree/main"
        case errors.RemoteEntryNotFoundError():
            path = error.response.request.url.path.partition("/resolve/")[2].partition("/")[2]
            return f"it lacks a file that is needed ({path}); check the repo, folder and revision"
        case errors.DisabledRepoError():
            return f"access is disabled by its owner or by the Hub; see {page}"
        case errors.HfHubHTTPError():
            meanings = {
                401: f"the Hub does not accept this token, or there is none: {_LOG_IN}",
                403: f"this token may not do that; give it the right or use another one: {_LOG_IN}",
                429: f"the Hub answered 'too many requests'; wait some minutes, then {_AGAIN}",
            }
            status = error.response.status_code
            return meanings.get(status, f"{hub} answered with HTTP status {status}; wait, then {_AGAIN}")
        case errors.IncompleteSnapshotError():
            cause = error.__cause__
            if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
                return f"offline, and its cached copy is incomplete; with a connection, {_AGAIN}"
            return f"its cached copy is incomplete, and {_reason(repo_id, cause, revision) or type(cause).__name__}"
        case errors.OfflineModeIsEnabled():
            return _OFFLINE
        case OSError(errno=int()):
            return f"the cache cannot be used ({error}); free some space, or set HF_HOME to another folder; {_AGAIN}"
    if any(base.__name__ == "TransportError" for base in type(error).__mro__):  # httpx (1.x) or httpx2 (2.x)
        if kind in ("LocalProtocolError", "UnsupportedProtocol"):  # a token with a line break, an endpoint without http
            return f"the request to {hub} could not be formed ({kind}); check HF_TOKEN and HF_ENDPOINT"
        if kind in ("ConnectError", "ConnectTimeout", "ProxyError"):
            found = f"{hub} cannot be reached ({kind}), and there is no local folder of that name"
            return f"{found}; check the path, or the connection and HF_ENDPOINT, then {_AGAIN}"
        return f"the connection to {hub} was lost ({kind}); {_AGAIN}"
    return None
