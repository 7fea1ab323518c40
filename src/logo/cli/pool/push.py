"""`logo pool push`: a pool to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.filesize import decimal

from logo.adapters.adapter import own_name
from logo.adapters.pool import AdapterPool
from logo.adapters.sources import Source
from logo.cli.options import in_words
from logo.cli.output import out, print_json
from logo.cli.pool.common import refusals, tell_refused


def push(
    folder: Path,
    repo: str,
    /,
    *,
    path_in_repo: Annotated[str | None, in_words("{base model}-loras-{DIR}, as in the official collection")] = None,
    private: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Upload a pool to the Hub: safetensors adapters, their configurations and pool.json; no pickles or checkpoints.

    A model card is made if the folder has no README.md. The token is HF_TOKEN, or the one that `hf auth login` stored.
    Files that the Hub already has are not sent again.

    Example: logo pool push adapters/ org/my-loras --private --dry-run

    Args:
        folder: Folder of adapters, at any depth.
        repo: `namespace/name`; created if it does not exist.
        path_in_repo: Folder in the repository; `.` for its top.
        private: Make the repository private.
        dry_run: List the files; send nothing.
        json: Print JSON instead.
    """
    from logo.cli.pool import publish

    pool = AdapterPool.opened([Source("folder", str(folder))], {"verify": True})
    tell_refused(pool.refused)
    contents = publish.contents_of(folder, list(pool), repo, path_in_repo)
    sizes = {
        path: len(content) if isinstance(content, bytes) else content.stat().st_size
        for path, content in contents.items()
    }
    address: str | None = None
    deleted: list[str] = []
    if not dry_run:
        message = f"{len(contents)} files of the pool {own_name(folder)}"
        address, deleted = publish.push(repo, contents, private=private, message=message)
    if json:
        files = [{"path": path, "bytes": size} for path, size in sizes.items()]
        refused = refusals(pool.refused)
        print_json({"repo": repo, "url": address, "files": files, "deleted": deleted, "refused": refused})
        return
    if dry_run:
        for path, size in sizes.items():
            out.print(f"{path}  {decimal(size)}", markup=False)
    for path in deleted:
        out.print(f"deleted {path}", markup=False)
    total = f"{len(pool)} adapters, {len(sizes)} files, {decimal(sum(sizes.values()))}"
    out.print(f"{repo}: {total}, nothing sent" if address is None else f"{address}: {total}", markup=False)
