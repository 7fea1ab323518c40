"""Adapters from the Hugging Face Hub: which files of a repository are adapters, and downloading them."""

from __future__ import annotations

import difflib
import glob
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from logo.adapters.files import CONFIG, EXAMPLES, MODEL_CARD, NOTES, PICKLE, RESPONSES, SAFETENSORS
from logo.errors import HubError
from logo.hub.names import clean_subfolder
from logo.hub.snapshots import DownloadOptions, download_files

if TYPE_CHECKING:
    from typing_extensions import Unpack


def download_adapters(
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    **options: Unpack[DownloadOptions],
) -> Path:
    """Downloads every adapter below a folder of a Hub repository, and returns the local folder that holds them.

    Args:
        subfolder: a folder of the repository; everything below counts. None: the whole repository.
        allow_pickle: also download pickled weights (`adapter_model.bin`), which may run code when they are read.
        **options: see `logo.hub.snapshots.DownloadOptions`.

    Raises:
        UsageError: the repo id, the subfolder or the revision is not one that could exist.
        HubError: everything else, in one line that names the repository and what to do.
    """
    folder = clean_subfolder(repo_id, subfolder)
    snapshot = download_files(
        repo_id,
        adapter_patterns(folder, allow_pickle),
        lambda files: require_adapters(repo_id, folder, files, allow_pickle=allow_pickle),
        optional=MODEL_CARD,
        revision=revision,
        **options,
    )
    return snapshot / folder


def adapter_patterns(folder: str, allow_pickle: bool, *, pattern: bool = False) -> list[str]:
    """Globs of adapter files anywhere below `folder`, and of the `pool.json` above it, which may say where these act.

    Args:
        pattern: a `*` in `folder` matches any characters; else it is a `*`.
    """
    names = [CONFIG, SAFETENSORS, NOTES, EXAMPLES, MODEL_CARD, f"{RESPONSES}/*.safetensors"]
    names += [PICKLE] if allow_pickle else []
    escaped = "*".join(map(glob.escape, folder.split("*"))) if pattern else glob.escape(folder)
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
