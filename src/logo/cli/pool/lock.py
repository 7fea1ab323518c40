"""`logo pool lock`: a pool as a manifest, with revisions and digests."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from logo.adapters.gathering import Gathered, gather
from logo.adapters.locking import changes, check_recorded, gone_with_notes, locked
from logo.adapters.manifest import Manifest, manifest_text, read_manifest
from logo.adapters.options import Fetching
from logo.adapters.places import SUFFIXES, Place, parse_places
from logo.adapters.pool import AdapterPool
from logo.cache import default_cache
from logo.cli.choices import OnBad
from logo.cli.options import Json, argument, usual
from logo.cli.output import err, out, print_json
from logo.cli.pool.common import AllowPickle, OnBadAdapter, divided, fitting, refusals, tell_refused
from logo.errors import UsageError, listed
from logo.folders import replace_file

_SHOWN = 10  # changes that are listed one by one


def lock(
    places: list[str] = argument(
        ..., metavar="PLACE...", help="One or several places, as `--adapters` takes them; also a manifest."
    ),
    output: Path = usual(Path("pool.yaml"), "The manifest, `.yaml`.", True, "--out", "-o", metavar="FILE"),
    base_model: str | None = usual(None, "Take only adapters that fit this base model (its configuration is enough)."),
    model_dir: str = usual("./hf_models", "Folder that is searched first for the base model."),
    replaces: bool = usual(False, "Replace an existing manifest, and list the changes.", True, "--replace"),
    allow_pickle: AllowPickle = False,
    on_bad_adapter: OnBadAdapter = "error",
    json: Json = False,
) -> None:
    """Write a manifest of a pool: the place and the commit of each adapter, and the digests of its files.

    Opening the manifest (`--adapters pool.yaml`) gives the same bytes, or an error that names the change.

    Example: `logo pool lock 'org/my-loras-*' --out pool.yaml --on-bad-adapter skip`
    """
    if output.suffix not in SUFFIXES:
        raise UsageError(f"--out {output}: expected a name that ends with {' or '.join(SUFFIXES)}")
    if output.exists() and not replaces:
        raise UsageError(f"--out {output}: exists already; choose another name, or add --replace")
    before = read_manifest(output) if output.exists() else None
    asked = [place for text in places for place in parse_places(text)]
    only = Path(asked[0].source) if len(asked) == 1 and asked[0].kind == "manifest" else None
    earlier = read_manifest(only) if only is not None and before is None else before
    found = _found(asked, allow_pickle, on_bad_adapter, base_model, model_dir, output)
    AdapterPool.from_survey(
        ",".join(places), found.adapters, found.refused, on_bad_adapter=on_bad_adapter
    )  # refuses what an opened pool would
    if only is not None and before is not None and only.resolve() == output.resolve():
        places = list(before.places)  # the manifest is no place of its own adapters
    manifest = locked(found, places, base_model, output, earlier)
    lost = [] if before is None else gone_with_notes(before, manifest)
    if lost:
        copy = _copied(output)
        err.print(f"{output}: the notes, tags or examples of {listed(lost)} are kept in {copy}", markup=False)
    replace_file(output, manifest_text(manifest).encode())
    changed = [] if before is None else changes(before, manifest)
    if json:
        report = {"out": str(output), "adapters": [entry.written for entry in manifest.entries]}
        print_json({**report, "changes": changed, "refused": refusals(found.refused)})
        return
    tell_refused(found.refused)
    for line in changed[:_SHOWN]:
        err.print(line, markup=False)
    if len(changed) > _SHOWN:
        err.print(f"... and {len(changed) - _SHOWN} more changes")
    out.print(f"{output}: {_told(manifest, changed if before is not None else None)}", markup=False)


def _found(
    asked: list[Place], allow_pickle: bool, on_bad: OnBad, base_model: str | None, model_dir: str, output: Path
) -> Gathered:
    skip = on_bad == "skip"
    how = Fetching(allow_pickle=allow_pickle)
    found = gather(asked, how, skip=skip, verify=True if skip else None, cache=default_cache(), anew=True)
    good, bad = divided(found.adapters, lambda one: check_recorded(one, found.origins[one.name], output))
    if base_model is not None:
        good, misfits = divided(good, fitting(base_model, model_dir))
        bad += misfits
    return replace(found, adapters=good, refused=[*found.refused, *bad])


def _copied(file: Path) -> Path:
    """Copies a file to a new one beside it, and returns that."""
    names = (file.with_name(f"{file.name}.bak{number or ''}") for number in count())
    copy = next(name for name in names if not name.exists())
    replace_file(copy, file.read_bytes())
    return copy


def _told(manifest: Manifest, changed: list[Any] | None) -> str:
    commits = {entry.revision for entry in manifest.entries if entry.revision}
    parts = [f"{len(manifest.entries)} adapters"]
    parts += [f"{len(commits)} commits"] if commits else []
    parts += [f"{len(manifest.left_out)} left out"] if manifest.left_out else []
    if changed is not None:
        parts.append(f"{len(changed)} change{'s' if len(changed) > 1 else ''}" if changed else "nothing changed")
    return ", ".join(parts)
