"""Uploads a pool to the Hub.

Only safetensors adapters, their configurations, the files of `logo train`, the card with its picture and `pool.json`
are uploaded: no pickles, no checkpoints, and no other files of the folder. Uploading, retries and tokens are
`huggingface_hub`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from logo.adapters.files import CONFIG, NOTES, RECORD, RESPONSES, SAFETENSORS
from logo.adapters.format import Adapter, own_name
from logo.adapters.initial import WithInitial, initial_folder
from logo.adapters.notes import checked, homes
from logo.adapters.upkeep.card import PICTURE
from logo.errors import HubError, UsageError
from logo.hub.failures import causes, hub_error
from logo.hub.names import clean_subfolder, is_repo_id

CARD = "README.md"
# Folders of checkpoints, as training tools name them.
_CHECKPOINT = re.compile(r"checkpoints?([-_.]?\d+)?", re.IGNORECASE)
_LOG_IN = "set HF_TOKEN to a token that may write, or run `hf auth login`"


@dataclass(frozen=True)
class Upload:
    """The files to upload, and where.

    Attributes:
        root: the pool's folder.
        repo: `namespace/name`.
        folder: in the repository; empty: its top.
        files: below the root, sorted.
    """

    root: Path
    repo: str
    folder: str
    files: tuple[str, ...]

    @classmethod
    def of(cls, root: Path, adapters: Sequence[Adapter], repo: str, folder: str | None = None) -> Upload:
        """The files of these adapters and of their pool.

        Args:
            adapters: read from safetensors files.
            folder: None: `{base}-loras-{name of the pool}`, as in the official collection.

        Raises:
            UsageError: the repository or the folder is not valid; no base model is known for the folder's name; a
                file beside adapters is a link out of the pool or no JSON object; or a `pool.json` that applies to an
                adapter is outside of the pool.
        """
        if not is_repo_id(repo):
            raise UsageError(f"{repo!r} is not a Hub repo id; expected namespace/name")
        if folder is None:
            folder = _official(root, adapters)
        speaking = {home: None for adapter in adapters for home in (*homes(adapter.folder, root), root)}
        sent = [root / name for name in (CARD, PICTURE)] + [home / NOTES for home in speaking]
        sent = [checked(file, root) for file in sent if file.is_file()]
        for adapter in adapters:
            if adapter.activation.last is not None and not homes(adapter.folder, root):
                raise UsageError(
                    f"{adapter.folder} acts on {adapter.activation} because of a {NOTES} in the folder above it, which "
                    "would not be uploaded: push that folder, or copy this one with `logo pool convert`, which adds "
                    f"a {NOTES}"
                )
            # These two were read as adapters. The other files may be links to anything, and are checked.
            sent += [adapter.folder / CONFIG, adapter.folder / SAFETENSORS]
            beside = [file for file in (adapter.folder / RECORD,) if file.is_file()]
            beside += (adapter.folder / RESPONSES).rglob("*.safetensors")
            start = initial_folder(adapter.folder) if isinstance(adapter.file, WithInitial) else None
            beside += () if start is None else (start / CONFIG, start / SAFETENSORS)
            sent += [checked(file, root, adapter.folder) for file in beside]
        files = [file.relative_to(root).as_posix() for file in sent]
        return cls(root, repo, clean_subfolder(repo, folder.strip("/")), tuple(sorted(files)))

    @property
    def targets(self) -> Iterator[tuple[str, int]]:
        """Paths in the repository, with the sizes of the files."""
        for file in self.files:
            yield "/".join(part for part in (self.folder, file) if part), (self.root / file).stat().st_size


def stays_behind(name: str) -> bool:
    """Whether an adapter is not published: its folder, or one above it, is called as any training tool calls
    checkpoints. Opening a pool leaves out less (`logo.adapters.survey.is_checkpoint`)."""
    return any(_CHECKPOINT.fullmatch(part) for part in name.split("/"))


def push(upload: Upload, *, private: bool = False, message: str | None = None) -> str:
    """Creates the repository if there is none, uploads what has changed, and returns the address.

    The card is also uploaded to the top of the repository, where the Hub shows it, unless there is one.

    Args:
        private: a new repository is private, and an existing one has to be.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="logo")
    repo, folder = upload.repo, upload.folder
    message = message or f"{len(upload.files)} files of the pool {own_name(upload.root)}"
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise HubError(f"Hub repo {repo}: it exists and is public, but --private was given; nothing was sent")
        # Not `upload_folder`, which lists the folder itself and does not follow links.
        files = zip(upload.targets, upload.files, strict=True)
        added = [CommitOperationAdd(path, upload.root / file) for (path, _), file in files]
        api.create_commit(repo, added, commit_message=message)
        if folder and CARD in upload.files and not api.file_exists(repo, CARD):
            text = (upload.root / CARD).read_text(encoding="utf-8").replace(f"]({PICTURE})", f"]({folder}/{PICTURE})")
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=CARD, repo_id=repo, commit_message="Model card")
    except HubError:
        raise
    except Exception as error:  # the boundary: httpx, xet and the file system each raise their own kinds
        raise push_error(repo, error) from error
    return f"{api.endpoint}/{repo}" + (f"/tree/main/{folder}" if folder else "")


def push_error(repo: str, error: BaseException) -> HubError:
    """What a failed upload means, in one line, which quotes no request and no response; see `hub_error`."""
    from huggingface_hub.errors import HfHubHTTPError

    for link in causes(error):
        if isinstance(link, HfHubHTTPError):
            reason = _refusals().get(link.response.status_code)
            if reason is not None:
                return HubError(f"Hub repo {repo}: {reason}")
        if isinstance(link, ValueError) and "metadata" in str(link):
            return HubError(
                f"Hub repo {repo}: the Hub does not accept the front matter of {CARD}; see `logo pool card`"
            )
    return hub_error(repo, error)


def _refusals() -> dict[int, str]:
    again = "run the same command again: what has arrived is not sent twice"
    return {
        401: f"the Hub does not accept this token, or there is none; {_LOG_IN}",
        403: f"this token may not write there; use another one: {_LOG_IN}",
        404: f"not found, and this token may not create it; check the name, and {_LOG_IN}",
        409: f"it was changed meanwhile; {again}",
        412: f"it was changed meanwhile; {again}",
        413: "the Hub refuses files of this size; see its limits on storage",
        429: f"the Hub answered 'too many requests'; wait some minutes, then {again}",
    }


def _official(root: Path, adapters: Sequence[Adapter]) -> str:
    bases = {
        adapter.config.base_model.rstrip("/").rsplit("/", 1)[-1] for adapter in adapters if adapter.config.base_model
    }
    if len(bases) != 1:
        found = f"several base models ({', '.join(sorted(bases))})" if bases else "no base model"
        raise UsageError(f"the adapters name {found}; give the folder to write with --path-in-repo ('.' for the top)")
    return f"{bases.pop()}-loras-{own_name(root)}"
