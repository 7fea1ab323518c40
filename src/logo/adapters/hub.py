"""Adapters from the Hugging Face Hub: which files of a repository are adapters, and downloading them."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from logo.adapters.files import CONFIG, EXAMPLES, NOTES, PICKLE, SAFETENSORS
from logo.adapters.options import Fetching
from logo.errors import HubError
from logo.hub import download_files


def download_adapters(
    repo_id: str,
    folders: Collection[str],
    how: Fetching,
    *,
    revision: str | None = None,
    required: Collection[str] | None = None,
) -> Path:
    """Downloads every adapter below some folders of a Hub repository, and returns the folder of its snapshot.

    Args:
        folders: of the repository, as `clean_subfolder` gives them; everything below counts. An empty text is the whole
            repository.
        required: those of the folders that have to hold an adapter; None: all.

    Raises:
        UsageError: the repo id or the revision is not one that could exist.
        HubError: everything else, in one line that names the repository and what to do.
    """

    def check(files: list[str]) -> None:
        for folder in folders if required is None else required:
            require_adapters(repo_id, folder, files, allow_pickle=how.allow_pickle)

    return download_files(
        repo_id,
        [pattern for folder in folders for pattern in adapter_patterns(folder, how.allow_pickle)],
        check,
        revision=revision,
        token=how.token,
        cache_dir=how.cache_dir,
        local_files_only=how.local_files_only,
        max_workers=how.max_workers,
        progress=how.progress,
    )


def adapter_patterns(folder: str, allow_pickle: bool) -> list[str]:
    """Globs of adapter files anywhere below `folder`, and of the `pool.json` above it, which may say where these
    act."""
    names = [CONFIG, SAFETENSORS, NOTES, EXAMPLES, *([PICKLE] if allow_pickle else [])]
    escaped = glob.escape(folder)
    root = f"{escaped}/" if folder else ""
    above = [f"{escaped.rpartition('/')[0]}/{NOTES}".lstrip("/")] if folder else []
    return [pattern for name in names for pattern in (f"{root}{name}", f"{root}*/{name}")] + above


def require_adapters(repo_id: str, folder: str, files: list[str], *, allow_pickle: bool) -> None:
    """Raises HubError unless at least one folder at or below `folder` has a config and weights."""
    names = _names_by_folder(files)
    below = [held for place, held in names.items() if not folder or f"{place}/".startswith(f"{folder}/")]
    adapters = [held for held in below if CONFIG in held]
    readable = {SAFETENSORS, PICKLE} if allow_pickle else {SAFETENSORS}
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
    raise HubError(
        f"Hub repo {repo_id}: {where} has an {CONFIG} but no {SAFETENSORS}; check the repo, folder and revision"
    )


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
