"""Finding a source's files: in its repository on the Hub, or in a local copy.

Only the files that hold the declared splits are fetched, whatever else the repository has (`load_dataset` of a
repository would fetch every split: the training rows of WMT, too); loading scripts are never run, since nothing but
data is looked at. Downloads, cache, offline use, tokens and the `HF_*` variables are `huggingface_hub`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from logo.errors import DataError, HubError, listed
from logo.evaluation.sources.declarations import Declaration, Files, Hub, Layout
from logo.evaluation.sources.readers import matching
from logo.hub import hub_error, snapshot


@dataclass(frozen=True)
class Place:
    """The files of one dataset: `names` by split, below `root`, and the commit of the repository they are from."""

    root: Path
    names: dict[str, list[str]]
    commit: str | None = None


def fetch(hub: Hub, layout: Layout, splits: Sequence[str]) -> Place:
    """Download the files of some splits (those that are not in the cache) and say where they are.

    Without a connection the cached copy is used, if the files asked for are in it.

    Raises:
        HubError: it cannot be fetched, or the repository does not hold such files.
    """
    repo = f"datasets/{hub.repo}"  # as in the address of its page
    wanted = {split: layout.files[split] for split in splits if split in layout.files}
    patterns = [pattern for files in wanted.values() for pattern in files]
    try:
        wider = [*patterns, *(pattern.replace("**/", "") for pattern in patterns)]
        # The folder has the commit's name.
        root = snapshot(hub.repo, progress=False, repo_type="dataset", revision=hub.revision, allow_patterns=wider)
        names = {split: matching(files, root) for split, files in wanted.items()}
        there = [] if all(names.values()) else _listing(hub, root.name)
    except DataError:
        raise
    except Exception as error:  # the boundary: httpx and the file system each raise their own kinds
        raise HubError(
            f"{hub_error(repo, error, revision=hub.revision)}; fix that, or prepare from local files with --from DIR"
        ) from error
    for split, found in names.items():
        if not found:
            raise HubError(
                f"Hub repo {repo}: revision {hub.revision!r} has no file {_shown(wanted[split])} for {split} rows; "
                f"it has {listed(there, 5) or 'no files'}; fix the declaration"
            )
    return Place(root, names, root.name)


def find_local(declaration: Declaration, folder: Path, splits: Sequence[str]) -> Place:
    """The files in a local copy of the repository on the Hub, or the user's own.

    A folder may hold the copies of many sources, each in a folder named as its repository (`org/name` or `name`), as
    the dataset or as the first part of its name; it may also be the copy itself.

    Raises:
        DataError: no such folder, or no such files in it.
    """
    if not folder.is_dir():
        raise DataError(f"--from {folder}: expected a folder, found {'a file' if folder.exists() else 'nothing'}")
    problem, files = None, declaration.layout.files
    for root in dict.fromkeys(folder / below for below in _folders(declaration) if (folder / below).is_dir()):
        names = {split: matching(files[split], root) for split in splits if split in files}
        if all(names.values()):
            return Place(root, names)
        if any(names.values()) and problem is None:
            there = next(split for split, found in names.items() if found)
            lacking = next(split for split, found in names.items() if not found)
            problem = f"{root} has {names[there][0]} ({there}), but no file {_shown(files[lacking])} ({lacking})" + (
                "; --train-limit 0 does without" if lacking == "train" else ""
            )
    problem = problem or f"{folder} has no file {_shown(files['test'])}; expected one of these in it"
    raise DataError(f"dataset {declaration.name!r}: {problem}")


def _folders(declaration: Declaration) -> list[str]:
    repo = [] if declaration.hub is None else [declaration.hub.repo, declaration.hub.repo.rpartition("/")[2]]
    return [*repo, declaration.name, declaration.name.partition(".")[0], ""]


def _shown(files: Files) -> str:
    return " or ".join(files)


def _listing(hub: Hub, commit: str) -> list[str]:
    from huggingface_hub import HfApi

    listed = HfApi(library_name="logo").list_repo_files(hub.repo, revision=commit, repo_type="dataset")
    return sorted(name for name in listed if "." in name.rpartition("/")[2] and not name.startswith("."))
