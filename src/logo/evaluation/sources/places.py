"""Finding a source's files: in its repository on the Hub, or in a local copy.

Only the files that hold the declared splits are fetched, whatever else the repository has; loading scripts are never
run, since nothing but data is looked at. Downloads, cache, tokens and the `HF_*` variables are `huggingface_hub`'s.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.errors import DataError, HubError
from logo.evaluation.sources.declarations import Declaration, Hub, Layout
from logo.evaluation.sources.readers import files_below, matching
from logo.hub.failures import hub_error

_OFFER = "mend that, or prepare from local files with --from DIR"


@dataclass(frozen=True)
class Place:
    """The files of one dataset: `names` by split, below `root`, and the commit of the repository they are from."""

    layout: Layout
    root: Path
    names: dict[str, list[str]]
    commit: str | None = None


def fetch(declaration: Declaration, splits: Sequence[str]) -> Place:
    """Download the files of some splits (those that are not in the cache) and say where they are.

    Without a connection the cached copy is used, if the files asked for are in it.

    Raises:
        DataError: the dataset has no source on the Hub.
        HubError: it cannot be fetched, or the repository does not hold such files.
    """
    hub = declaration.hub
    if hub is None:
        raise DataError(
            f"dataset {declaration.name!r}: it has no source on the Hub; name its raw files with --from DIR"
        )
    layout = declaration.layouts[0]
    repo = f"datasets/{hub.repo}"  # as its page is called
    try:
        listed = _listing(hub)
    except Exception as error:  # the boundary: httpx and the file system each raise their own kinds
        if not _is_offline(error):
            raise HubError(f"{hub_error(repo, error, revision=hub.revision)}; {_OFFER}") from error
        if (cached := _cached(hub, layout, splits)) is None:
            raise HubError(
                f"Hub repo {repo}: {_no_connection()}, and its files are not in the cache; {_OFFER}"
            ) from error
        return cached
    names = _names(layout, splits, listed)
    for split, found in names.items():
        if not found:
            raise HubError(
                f"Hub repo {repo}: revision {hub.revision!r} has no file {layout.files[split]} for {split} rows; "
                f"it has {_some(listed)}; mend the declaration"
            )
    try:
        wanted = sorted({name for found in names.values() for name in found})
        root = _snapshot(hub, [glob.escape(name) for name in wanted])
    except Exception as error:  # the boundary, as above
        raise HubError(f"{hub_error(repo, error, revision=hub.revision)}; {_OFFER}") from error
    return Place(layout, root, names, root.name)


def find_local(declaration: Declaration, folder: Path, splits: Sequence[str]) -> Place:
    """The files in a local copy: of the repository on the Hub, or in one of the other shapes the declaration knows.

    A folder may hold the copies of many sources, each in a folder named as its repository (`org/name` or `name`), as
    the dataset or as the first part of its name; it may also be the copy itself.

    Raises:
        DataError: no such folder, or no such files in it.
    """
    if not folder.is_dir():
        raise DataError(f"--from {folder}: expected a folder, found {'a file' if folder.exists() else 'nothing'}")
    roots = dict.fromkeys(path for path in (folder / below for below in _folders(declaration)) if path.is_dir())
    partial: DataError | None = None
    for root in roots:
        listed = files_below(root)
        for layout in declaration.layouts:
            names = _names(layout, splits, listed)
            if all(names.values()):
                return Place(layout, root, names)
            if any(names.values()):
                there = next(split for split, found in names.items() if found)
                lacking = next(split for split, found in names.items() if not found)
                hint = "; --train-rows 0 does without" if lacking == "train" else ""
                partial = partial or DataError(
                    f"dataset {declaration.name!r}: {root} has {names[there][0]} ({there}), but no file "
                    f"{layout.files[lacking]} ({lacking}){hint}"
                )
    if partial is not None:
        raise partial
    shapes = ", nor ".join(str(layout.files["test"]) for layout in declaration.layouts)
    raise DataError(f"dataset {declaration.name!r}: {folder} has no file {shapes}; expected one of these in it")


def _folders(declaration: Declaration) -> list[str]:
    repo = [] if declaration.hub is None else [declaration.hub.repo, declaration.hub.repo.rpartition("/")[2]]
    return [*repo, declaration.name, declaration.name.partition(".")[0], ""]


def _names(layout: Layout, splits: Sequence[str], listed: Sequence[str]) -> dict[str, list[str]]:
    return {split: matching(layout.files[split], listed) for split in splits if split in layout.files}


def _listing(hub: Hub) -> list[str]:
    """Every file of the repository at the revision."""
    from huggingface_hub import HfApi

    info = HfApi(library_name="logo").dataset_info(hub.repo, revision=hub.revision)
    return sorted(file.rfilename for file in info.siblings or [])


def _snapshot(hub: Hub, patterns: list[str]) -> Path:
    """Downloads the files; the folder that is returned has the commit's name."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        """Hides only these bars: the command has one of its own."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    folder = snapshot_download(
        hub.repo,
        repo_type="dataset",
        revision=hub.revision,
        allow_patterns=patterns,
        library_name="logo",
        tqdm_class=Silent,
    )
    return Path(folder)


def _cached(hub: Hub, layout: Layout, splits: Sequence[str]) -> Place | None:
    """The copy in the cache, if it holds whole files for all splits."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{hub.repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / hub.revision).read_text(encoding="utf-8").strip()
    except OSError:
        commit = hub.revision
    root = folder / "snapshots" / commit
    if os.sep in commit or not root.is_dir():
        return None
    names = _names(layout, splits, files_below(root))
    return Place(layout, root, names, commit) if all(names.values()) else None


def _no_connection() -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE=1 is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"


def _is_offline(error: BaseException | None) -> bool:
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"OfflineModeIsEnabled", "TransportError", "ConnectionError"}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _some(names: Sequence[str]) -> str:
    data = [name for name in names if "." in name.rpartition("/")[2] and not name.startswith(".")]
    return (", ".join(data[:5]) + (f" and {len(data) - 5} more" if len(data) > 5 else "")) or "no files"
