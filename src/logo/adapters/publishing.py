"""Uploads a pool to the Hub.

Only safetensors adapters, their configurations and training records, `pool.json` and a model card are uploaded: no
pickles, no example prompts, no checkpoints, and no other files of the folder. Uploading, retries and tokens are
`huggingface_hub`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from logo.adapters.card import base_models, card_text
from logo.adapters.files import CONFIG, NOTES, RECORD, SAFETENSORS
from logo.adapters.format import Adapter, own_name
from logo.adapters.notes import checked, homes
from logo.errors import HubError, UsageError
from logo.hub import causes, clean_subfolder, hub_error, is_repo_id

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
        card: the model card that is made, if there is no `README.md` in the folder.
    """

    root: Path
    repo: str
    folder: str
    files: tuple[str, ...]
    card: bytes | None

    @classmethod
    def of(
        cls,
        root: Path,
        adapters: Sequence[Adapter],
        repo: str,
        folder: str | None = None,
        licence: str | None = None,
    ) -> Upload:
        """The files of these adapters and of their pool.

        Args:
            adapters: read from safetensors files.
            folder: None: `{base}-loras-{name of the pool}`, as in the official collection.
            licence: for a card that is made.

        Raises:
            UsageError: the repository or the folder is not valid; no base model is known for the folder's name; a
                file beside adapters is a link out of the pool or no JSON object; or a `pool.json` that applies to an
                adapter is outside of the pool.
        """
        if not is_repo_id(repo):
            raise UsageError(f"{repo!r} is not a Hub repo id; expected namespace/name")
        folder = clean_subfolder(repo, (_official(root, adapters) if folder is None else folder).strip("/"))
        speaking = {home: None for adapter in adapters for home in (*homes(adapter.folder, root), root)}
        sent = [checked(file, root) for file in (root / CARD, *(home / NOTES for home in speaking)) if file.is_file()]
        for adapter in adapters:
            if adapter.activation.last is not None and not homes(adapter.folder, root):
                raise UsageError(
                    f"{adapter.folder} acts on {adapter.activation} because of a {NOTES} in the folder above it, which "
                    f"would not be uploaded: push that folder, or copy its {NOTES} into this one"
                )
            # These two were read as an adapter. Other files may be links to anything, and are checked.
            sent += [adapter.folder / CONFIG, adapter.folder / SAFETENSORS]
            if (adapter.folder / RECORD).is_file():
                sent.append(checked(adapter.folder / RECORD, root, adapter.folder))
        files = tuple(sorted({file.relative_to(root).as_posix() for file in sent}))
        card = None if CARD in files else card_text(own_name(root), adapters, root, repo, folder, licence).encode()
        return cls(root, repo, folder, files, card)

    @property
    def targets(self) -> Iterator[tuple[str, int]]:
        """Paths in the repository, with the sizes of the files."""
        for path, content in self.contents:
            yield path, len(content) if isinstance(content, bytes) else content.stat().st_size

    @property
    def contents(self) -> Iterator[tuple[str, Path | bytes]]:
        """Paths in the repository, with the files or what is to be in them."""
        found: dict[str, Path | bytes] = {file: self.root / file for file in self.files}
        if self.card is not None:
            found[CARD] = self.card
        for file, content in sorted(found.items(), key=lambda one: one[0]):
            yield "/".join(part for part in (self.folder, file) if part), content


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
    repo, folder, contents = upload.repo, upload.folder, dict(upload.contents)
    message = message or f"{len(contents)} files of the pool {own_name(upload.root)}"
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise HubError(f"Hub repo {repo}: it exists and is public, but --private was given; nothing was sent")
        if folder and not api.file_exists(repo, CARD):
            contents[CARD] = contents[f"{folder}/{CARD}"]
        # Not `upload_folder`, which lists the folder itself and does not follow links.
        api.create_commit(
            repo, [CommitOperationAdd(path, content) for path, content in contents.items()], commit_message=message
        )
    except HubError:
        raise
    except Exception as error:  # the boundary: httpx, xet and the file system each raise their own kinds
        raise push_error(repo, error) from error
    return f"{api.endpoint}/{repo}" + (f"/tree/main/{folder}" if folder else "")


def push_error(repo: str, error: BaseException) -> HubError:
    """What a failed upload means, in one line, which quotes no request and no response; see `hub_error`."""
    from huggingface_hub.errors import HfHubHTTPError

    for link in causes(error):
        if isinstance(link, HfHubHTTPError) and (reason := _REFUSALS.get(link.response.status_code)):
            return HubError(f"Hub repo {repo}: {reason}")
        if isinstance(link, ValueError) and "metadata" in str(link):
            return HubError(f"Hub repo {repo}: the Hub does not accept the front matter of {CARD}")
    return hub_error(repo, error)


_CHANGED = "it was changed meanwhile; run the same command again: what has arrived is not sent twice"
_REFUSALS = {
    401: f"the Hub does not accept this token, or there is none; {_LOG_IN}",
    403: f"this token may not write there; use another one: {_LOG_IN}",
    404: f"not found, and this token may not create it; check the name, and {_LOG_IN}",
    409: _CHANGED,
    412: _CHANGED,
    413: "the Hub refuses files of this size; see its limits on storage",
}


def _official(root: Path, adapters: Sequence[Adapter]) -> str:
    bases = {name.rsplit("/", 1)[-1] for name in base_models(adapters)}
    if len(bases) != 1:
        found = f"several base models ({', '.join(sorted(bases))})" if bases else "no base model"
        raise UsageError(f"the adapters name {found}; give the folder to write with --path-in-repo ('.' for the top)")
    return f"{bases.pop()}-loras-{own_name(root)}"
