"""What a failure of the Hugging Face Hub means, in one line that says what to do about it.

Nothing of a server's answer or of a request's headers is repeated, so a token cannot end up in a message.
`huggingface_hub` is imported inside functions so that `logo --help` stays fast.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from logo.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_SECRET = re.compile(r"(?i)(?:bearer\s+|hf_)[^\s'\"]+|\?[^\s'\"]+")  # a token, the signature in a URL
_AGAIN = "run the same command again: finished files are kept and only the rest is fetched"
_LOG_IN = "set HF_TOKEN, or run `hf auth login`"


def hub_error(repo_id: str, error: BaseException, *, revision: str | None = None) -> HubError:
    """Say in one line what a failed download of `repo_id` means and what to do about it.

    Takes what `huggingface_hub` raises and what transformers makes of it (an `OSError` with the cause inside).
    Nothing of a server's answer or of a request's headers is repeated, so a token cannot end up in the message.
    """
    chain = list(causes(error))
    reasons = (_reason(repo_id, link, revision) for link in chain)
    reason = next((found for found in reasons if found), None) or _last_resort(chain)
    return HubError(" ".join(f"Hub repo {repo_id}: {reason}".split()))


def is_lasting(error: HubError) -> bool:
    """Whether the repository itself is the reason: it is gated, gone, or holds no adapters. Anything else, such as a
    connection that broke or a full disk, says nothing about it."""
    from huggingface_hub import errors

    own = (
        errors.GatedRepoError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
        errors.DisabledRepoError,
    )
    chain = list(causes(error))
    return len(chain) == 1 or any(isinstance(link, own) for link in chain)


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
            return "not in the cache, and HF_HUB_OFFLINE=1 forbids fetching it; unset that, or download it beforehand"
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
        return f"not in the cache, and {switch} forbids fetching it; unset that, or download it beforehand"
    lines = str(chain[0]).strip().splitlines()
    text = _SECRET.sub("...", lines[0][:300]) if lines else "no message"
    return text if type(chain[0]) is OSError else f"{type(chain[0]).__name__}: {text}"
