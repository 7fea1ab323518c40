"""How repositories of the Hub are written: `namespace/name[/folder...][@revision]`. Nothing here connects to it."""

from __future__ import annotations

import re
from pathlib import Path

from logo.errors import UsageError

_NAME = r"(?![^/@]*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}(?<!\.git)")
_NOT_IN_GIT_NAMES = re.compile(r"^/|\.\.|[\\\s\x00-\x1f\x7f~^:?*\[]")


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
    if not is_repo_id(repo_id) or (at and not revision):
        raise UsageError(f"{text!r} is neither a folder that exists nor a Hub repo (org/name[/folder][@revision])")
    check_revision(repo_id, revision or None)
    return repo_id, clean_subfolder(repo_id, rest) or None, revision or None


def clean_subfolder(repo_id: str, subfolder: str | None) -> str:
    """Normalise `./a//b/` to `a/b`; empty for the whole repository."""
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
