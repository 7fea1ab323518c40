"""Adapters from the Hugging Face Hub, and one-line errors for whatever the Hub answers.

Knows: which files of a repository are adapters, whether all of them are on the disk, and what a failure means.
Does not know: how an adapter is read (`format.py`). Parallel downloads, retries, the cache, tokens and the
`HF_*` variables are `huggingface_hub`'s, which is imported inside functions so that `logo --help` stays fast.
"""

from __future__ import annotations

import difflib
import errno
import glob
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from logo.adapters.examples import EXAMPLES
from logo.adapters.notes import NOTES, RESPONSES
from logo.errors import HubError, UsageError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["download_adapters", "download_model", "hub_error", "is_hub_id", "split_hub_spec"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_NAME = r"(?![^/@]*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}(?<!\.git)")
_SECRET = re.compile(r"(?i)(?:bearer\s+|hf_)[^\s'\"]+|\?[^\s'\"]+")  # a token, the signature in a URL
_AGAIN = "run the same command again: finished files are kept and only the rest is fetched"
_NOT_IN_GIT_NAMES = re.compile(r"^/|\.\.|[\\\s\x00-\x1f\x7f~^:?*\[]")
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
MODEL_LEFT_OUT = ["*/*", "consolidated*", "adapter_*"]
_LOG_IN = "set HF_TOKEN, or run `hf auth login`"


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
    if not _REPO_ID.fullmatch(repo_id):
        raise UsageError(f"{repo_id!r} is not a Hub repo id; expected namespace/name of letters, digits, '-', '_', '.'")
    folder = clean_subfolder(repo_id, subfolder)
    _check_revision(repo_id, revision)
    try:
        with _quiet_when_nothing_matches():
            snapshot = _snapshot(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                max_workers=max_workers,
                progress=progress,
                allow_patterns=adapter_patterns(folder, allow_pickle),
            )
        files = _listing(repo_id, snapshot, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    except HubError:
        raise
    except Exception as error:  # the boundary: httpx, xet and the file system each raise their own kinds
        raise hub_error(repo_id, error, revision=revision) from error
    _require_adapters(repo_id, folder, files, allow_pickle)
    return snapshot / folder


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


def hub_error(repo_id: str, error: BaseException, *, revision: str | None = None) -> HubError:
    """Say in one line what a failed download of `repo_id` means and what to do about it.

    Takes what `huggingface_hub` raises and what transformers makes of it (an `OSError` with the cause inside).
    Nothing of a server's answer or of a request's headers is repeated, so a token cannot end up in the message.
    """
    chain = list(causes(error))
    reasons = (_reason(repo_id, link, revision) for link in chain)
    reason = next((found for found in reasons if found), None) or _last_resort(chain)
    return HubError(" ".join(f"Hub repo {repo_id}: {reason}".split()))


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


def adapter_patterns(folder: str, allow_pickle: bool) -> list[str]:
    """The globs of adapter files at any depth below `folder` (in huggingface_hub `*` also matches `/`), and of what
    says where an adapter acts that is asked for by its own folder."""
    names = [CONFIG, WEIGHTS, NOTES, EXAMPLES, f"{RESPONSES}/*.safetensors"]
    names += [PICKLE] if allow_pickle else []
    root = f"{glob.escape(folder)}/" if folder else ""
    above = [f"{glob.escape(folder).rpartition('/')[0]}/{NOTES}".lstrip("/")] if folder else []
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


def _require_adapters(repo_id: str, folder: str, files: list[str], allow_pickle: bool) -> None:
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


# What a failure means


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

    match error:
        case errors.HfHubHTTPError():
            return _http_reason(repo_id, error, revision)
        case errors.IncompleteSnapshotError():
            cause = error.__cause__
            if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
                return f"offline, and its cached copy is incomplete; with a connection, {_AGAIN}"
            return f"its cached copy is incomplete, and {_reason(repo_id, cause, revision) or type(cause).__name__}"
        case errors.OfflineModeIsEnabled():
            return "not in the cache, and HF_HUB_OFFLINE=1 forbids to fetch it; unset that, or download it beforehand"
        case errors.FileMetadataError():
            return f"{constants.ENDPOINT} does not answer like a Hub; check HF_ENDPOINT and the proxy settings"
        case errors.LocalTokenNotFoundError():
            return f"a token is asked for but none is stored; {_LOG_IN}"
        case errors.HFValidationError():
            return "not a valid repo id; expected namespace/name of letters, digits, '-', '_' and '.'"
    if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):  # httpx (1.x) or httpx2 (2.x)
        return _transport_reason(type(error).__name__)
    return _disk_reason(error) if isinstance(error, OSError) else None


def _http_reason(repo_id: str, error: HfHubHTTPError, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    status = error.response.status_code
    page = f"{constants.ENDPOINT}/{repo_id}"
    match error:
        case errors.GatedRepoError() if status == 403:
            return (
                f"access is gated and this token's account is not on the list; accept the licence at {page} with that "
                "account, or use one that has access: set HF_TOKEN, or run `hf auth login`"
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
            return f"it lacks a file that is needed ({_file_of(error)}); check the repo, folder and revision"
        case errors.DisabledRepoError():
            return f"access is disabled by its owner or by the Hub; see {page}"
    if status == 401:
        return f"the Hub does not accept this token; renew it: {_LOG_IN}"
    if status == 403:
        return f"this token may not read it; give it that right or use another one: {_LOG_IN}"
    if status == 429:
        return f"the Hub answered 'too many requests'; wait some minutes ({_LOG_IN} for a higher limit), then {_AGAIN}"
    return f"{constants.ENDPOINT} answered with HTTP status {status}; wait, then {_AGAIN}"


def _file_of(error: HfHubHTTPError) -> str:
    return error.response.request.url.path.partition("/resolve/")[2].partition("/")[2] or "its name is not known"


def _transport_reason(kind: str) -> str:
    from huggingface_hub import constants

    if kind in ("LocalProtocolError", "UnsupportedProtocol"):  # a token with a line break, an HF_ENDPOINT without http
        return f"the request to {constants.ENDPOINT} could not be formed ({kind}); check HF_TOKEN and HF_ENDPOINT"
    if kind in ("ConnectError", "ConnectTimeout", "ProxyError"):
        where = f"{constants.ENDPOINT} cannot be reached ({kind}), and there is no local folder of that name"
        return f"{where}; check the path, or the connection and HF_ENDPOINT, then {_AGAIN}"
    return f"the connection to {constants.ENDPOINT} was lost ({kind}); {_AGAIN}"


def _disk_reason(error: OSError) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space for the cache ({error.strerror}); free some, or set HF_HOME to another disk, then {_AGAIN}"
    if error.errno is not None and error.filename is not None:
        return f"the cache cannot be used ({error.strerror}: {error.filename}); set HF_HOME to a writable folder"
    if "Consistency check failed" in str(error):  # huggingface_hub has no class of its own for a file that ended early
        return f"a file arrived incomplete; {_AGAIN}"
    return None


def _last_resort(chain: list[BaseException]) -> str:
    from huggingface_hub import constants, errors

    if any(isinstance(link, errors.LocalEntryNotFoundError) for link in chain):
        switch = "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else "local_files_only"
        return f"not in the cache, and {switch} forbids to fetch it; unset that, or download it beforehand"
    lines = str(chain[0]).strip().splitlines()
    text = _SECRET.sub("...", lines[0][:300]) if lines else "no message"
    return text if type(chain[0]) is OSError else f"{type(chain[0]).__name__}: {text}"
