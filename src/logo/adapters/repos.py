"""Pools of many Hub repositories: lists the repositories of an owner, and downloads them, a few at a time.

Lists are cached, so that the same pool can be opened without a connection:

    <cache>/repos/<digest of the place>.json     {"repos": {"org/one": "<commit>"}, "refused": {"org/two": "<why>"}}

A repository that is refused for a reason of its own (gated, gone, without adapters) does not affect the others. Any
other failure raises, since a pool must not be smaller because a connection broke.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from logo.adapters.places import Place
from logo.cache import write_cached
from logo.errors import HubError
from logo.hub.failures import hub_error, is_lasting

_K = TypeVar("_K")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Listing:
    """The repositories of an owner that match a pattern.

    Attributes:
        repos: id -> the commit of its main branch.
        refused: id -> why the repository cannot be used, as found when it was opened.
    """

    repos: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict)


def list_repos(
    place: Place, *, token: str | bool | None = None, local_files_only: bool = False, cache: Path | None = None
) -> Listing:
    """Asks the Hub which repositories match `org/prefix-*`; without a connection, the cached list is used.

    If there is none of this place, which may be a folder of these repositories, that of the whole repositories is used.

    Raises:
        HubError: no repository matches, or the Hub cannot be reached and there is no cached list.
    """
    from huggingface_hub import HfApi, constants

    pattern = place.source
    kept = _kept(place.spec, cache) or _kept(replace(place, below="").spec, cache)
    if local_files_only or constants.HF_HUB_OFFLINE:
        if kept is None:
            raise HubError(
                f"Hub repos {pattern}: offline, and no earlier list of them is in the cache; open them once with a "
                "connection, or open a manifest of them (`logo pool lock`)"
            )
        return kept
    owner, _, name = pattern.partition("/")
    longest = max(name.split("*"), key=len)
    try:
        models = HfApi(token=token, library_name="logo").list_models(
            author=owner, search=longest or None, expand=["sha"]
        )
        found = {one.id: one.sha or "" for one in models if fnmatchcase(one.id, pattern)}
    except Exception as error:  # the boundary, as in `download_files`
        failure = hub_error(pattern, error)
        if kept is None or not _is_unreachable(error):
            raise failure from error
        warnings.warn(f"{failure}; using the list of an earlier run", UserWarning, stacklevel=2)
        return kept
    if not found:
        raise HubError(
            f"Hub repos {pattern}: no repository at {constants.ENDPOINT} matches; check the name, and HF_TOKEN if they "
            "are private"
        )
    listing = Listing(dict(sorted(found.items())))
    keep_listing(place, listing, cache)
    return listing


def keep_listing(place: Place, listing: Listing, cache: Path | None) -> None:
    """Caches a list for use without a connection. What is refused depends on the folder and the revision."""
    if cache is not None:
        data = json.dumps({"place": place.spec, "repos": listing.repos, "refused": listing.refused})
        write_cached(cache, _file(place.spec), lambda part: Path(part).write_text(data, encoding="utf-8"))


def fetch_each(
    jobs: Mapping[_K, Callable[[], _T]], *, skip: bool, workers: int, progress: bool
) -> dict[_K, _T | HubError]:
    """Runs downloads, some at a time, and returns the result of each, or why its repository cannot be used.

    Args:
        jobs: repository -> its download.
        skip: False: stop at the first repository that cannot be used.

    Raises:
        HubError: a failure that is not the repository's own, such as a broken connection.
    """
    from huggingface_hub.utils.tqdm import tqdm

    done: dict[_K, _T | HubError] = {}
    with tqdm(total=len(jobs), desc="Repositories", unit="repo", disable=not progress or len(jobs) == 1) as bar:  # type: ignore[no-untyped-call]

        def one(repo: _K) -> None:
            try:
                done[repo] = jobs[repo]()
            except HubError as error:
                if not is_lasting(error):
                    raise
                done[repo] = error
                if not skip:
                    raise
            bar.update()

        _in_threads(one, list(jobs), workers)
    return {repo: done[repo] for repo in jobs if repo in done}


def _in_threads(task: Callable[[_K], None], repos: Sequence[_K], workers: int) -> None:
    """Runs a task for every repository until one fails; a failure that is not the repository's own is raised."""
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="hub")
    try:
        futures: list[Future[None]] = [pool.submit(task, repo) for repo in repos]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:  # also after Ctrl-C: running downloads end, and no other begins
        pool.shutdown(wait=True, cancel_futures=True)
    ended = [future for future in futures if not future.cancelled()]
    failures = [error for future in ended if (error := future.exception()) is not None]
    for error in failures:
        if not isinstance(error, HubError):
            raise error
        if not is_lasting(error):
            here = len(ended) - len(failures)
            raise HubError(f"{error} ({here} of {len(repos)} repositories fetched)" if len(repos) > 1 else str(error))


def _is_unreachable(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _kept(spec: str, cache: Path | None) -> Listing | None:
    if cache is None:
        return None
    try:
        kept: Any = json.loads((cache / _file(spec)).read_bytes())
        repos, refused = kept["repos"], kept["refused"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = all(
        isinstance(value, dict) and all(isinstance(one, str) for one in value.values()) for value in (repos, refused)
    )
    return Listing(repos, refused) if whole else None


def _file(spec: str) -> str:
    return f"repos/{hashlib.sha256(spec.encode()).hexdigest()[:24]}.json"
