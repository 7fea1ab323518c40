"""`logo pool dedupe`: a pool without its near-duplicates."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from logo.cli.options import Json, usual
from logo.cli.output import out, print_json
from logo.cli.pool.common import AllowPickle, Folder, OnBadAdapter, Threshold, opened, refusals
from logo.cli.pool.spectra import taken_apart
from logo.errors import UsageError


def dedupe(
    folder: Folder,
    out_folder: Path | None = usual(
        None,
        "The new pool; must not exist yet. DIR is never changed.",
        "not needed with --dry-run",
        "--out",
        "-o",
        metavar="DIR2",
    ),
    threshold: Threshold = 0.9,
    dry_run: bool = usual(False, "List the adapters that would be removed; write nothing."),
    allow_pickle: AllowPickle = False,
    on_bad_adapter: OnBadAdapter = "error",
    json: Json = False,
) -> None:
    """Copy a pool without near-duplicates. The one with most parameters stays, else the first by name.

    Example: `logo pool dedupe adapters/ --out fewer-adapters/`
    """
    from logo.adapters.upkeep.duplicates import duplicates
    from logo.adapters.writing import check_new, copy_adapter, write_pool

    if out_folder is not None:
        check_new(out_folder)
    elif not dry_run:
        raise UsageError("expected --out DIR2 for the new pool, or --dry-run to list only")
    pool = opened(folder, allow_pickle, on_bad_adapter, lambda adapter: adapter.check_compared())
    adapters = list(pool)
    gone = duplicates(adapters, taken_apart(adapters), threshold)
    left_out = {one.name for one in gone}
    kept = [adapter for adapter in adapters if adapter.name not in left_out]
    if out_folder is not None and not dry_run:
        change = {"command": "dedupe", "threshold": threshold, "gone": {one.name: one.kept for one in gone}}
        change["refused"] = [bad.name for bad in pool.refused]
        write_pool(folder, kept, out_folder, copy_adapter, lambda: change)
    if json:
        print_json(
            {
                "folder": str(folder),
                "out": None if dry_run else str(out_folder),
                "refused": refusals(pool.refused),
                "kept": [adapter.name for adapter in kept],
                "gone": [
                    {
                        "name": one.name,
                        "kept": one.kept,
                        "overlap": one.overlap,
                        "cosine": one.cosine,
                        "norms": [one.norm, one.kept_norm],
                    }
                    for one in gone
                ],
            }
        )
        return
    for one in gone:
        out.print(
            Text.assemble(
                ("gone ", "yellow"),
                (one.name, "bold"),
                f" for {one.kept}: overlap {one.overlap:.2f}, cosine {one.cosine:.2f}, norms {one.norm:.3g} and "
                f"{one.kept_norm:.3g}",
            )
        )
    where = "nothing written" if dry_run else f"{out_folder}: written"
    out.print(f"{where}, {len(kept)} of {len(adapters)} adapters stay", markup=False)
