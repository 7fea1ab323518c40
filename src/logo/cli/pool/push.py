"""`logo pool push`: a pool to the Hugging Face Hub."""

from __future__ import annotations

from logo.adapters.files import NOTES
from logo.adapters.notes import checked
from logo.cli.options import Json, argument, usual
from logo.cli.output import note, out, print_json, size
from logo.cli.pool.common import Folder, OnBadAdapter, refusals, without_checkpoints


def push(
    folder: Folder,
    repo: str = argument(..., metavar="REPO", help="`namespace/name`; created if it does not exist."),
    path_in_repo: str | None = usual(
        None,
        "Folder in the repository; `.` for its top.",
        "{base model}-loras-{DIR}, as in the official collection",
        metavar="FOLDER",
    ),
    private: bool = usual(False, "Make the repository private."),
    message: str | None = usual(None, "Commit message.", "the number of files"),
    dry_run: bool = usual(False, "List the files; send nothing."),
    on_bad_adapter: OnBadAdapter = "error",
    json: Json = False,
) -> None:
    """Upload a pool to the Hub: safetensors adapters, their configurations, the card and pool.json; no pickles or
    checkpoints.

    The token is HF_TOKEN, or the one that `hf auth login` stored. Files that the Hub already has are not sent again.

    Example: `logo pool push adapters/ org/my-loras --private --dry-run`
    """
    from logo.adapters.upkeep.publishing import CARD, Upload
    from logo.adapters.upkeep.publishing import push as send

    if (folder / NOTES).is_file():  # before its content is used
        checked(folder / NOTES, folder)
    pool, checkpoints = without_checkpoints(folder, on_bad_adapter, verify=True)
    upload = Upload.of(folder, list(pool), repo, path_in_repo)
    targets = dict(upload.targets)
    if CARD not in upload.files:
        place = "/".join(part for part in (repo, upload.folder) if part)
        note(f"without a model card: `logo pool card {folder} --repo {place}` writes one")
    address = None if dry_run else send(upload, private=private, message=message)
    if json:
        files = [{"path": path, "bytes": count} for path, count in targets.items()]
        report = {"repo": repo, "url": address, "files": files, "left_out": checkpoints}
        print_json({**report, "refused": refusals(pool.refused)})
        return
    for path, count in targets.items() if dry_run else ():
        out.print(f"{path}  {size(count)}", markup=False)
    total = f"{len(pool)} adapters, {len(targets)} files, {size(sum(targets.values()))}"
    out.print(f"{repo}: {total}, nothing sent" if address is None else f"{address}: {total}", markup=False)
