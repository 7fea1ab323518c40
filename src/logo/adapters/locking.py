"""Checks adapters against a manifest, and makes the manifest of adapters that were found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from logo.adapters.activation import Activation, acting
from logo.adapters.examples import MOST, NO_EXAMPLES, examples_record
from logo.adapters.files import CONFIG
from logo.adapters.format import Adapter
from logo.adapters.manifest import Entry, Manifest, is_line
from logo.adapters.pool_cache import DigestCache
from logo.adapters.weights import PickleFile, SafetensorsFile, file_sha256
from logo.errors import AdapterError, StorageError, UsageError

if TYPE_CHECKING:
    from logo.adapters.gathering import Gathered, Origin

_SHOWN = 12  # digits of a digest that a message shows
_UNSET = Entry("")
_AGAIN = "if the change is intended, write the manifest again (`logo pool lock`)"


def as_locked(
    adapters: Sequence[Adapter], entries: Mapping[str, Entry], refused: list[AdapterError], digests: DigestCache
) -> list[Adapter]:
    """The adapters that match their entries, with the entries' activations; the others are added to `refused`."""
    same = []
    for adapter in adapters:
        entry = entries.get(adapter.name)
        try:
            same.append(adapter if entry is None else _as_entry(adapter, entry, digests))
        except AdapterError as error:
            refused.append(error)
    digests.keep()
    return same


def to_lock_anew(entry: Entry) -> Entry:
    """The entry without the digests of what may have changed: all but files of a commit on the Hub."""
    kept = replace(entry, examples_sha256=None)
    return kept if entry.revision else replace(kept, sha256=None, config_sha256=None)


def _as_entry(adapter: Adapter, entry: Entry, digests: DigestCache) -> Adapter:
    for file, expected in ((adapter.file.path, entry.sha256), (adapter.folder / CONFIG, entry.config_sha256)):
        if expected is None:
            continue
        try:
            whole = file == adapter.file.path and not isinstance(adapter.file, (SafetensorsFile, PickleFile))
            found = adapter.sha256 if whole else digests.sha256(file)
        except OSError as error:
            raise AdapterError(adapter.name, f"{file} cannot be read: {error.strerror or error}") from error
        if found != expected:
            raise AdapterError(
                adapter.name,
                f"{file.name} is not the one in the manifest: expected sha256 {expected[:_SHOWN]}..., found "
                f"{found[:_SHOWN]}... in "
                + (
                    f"{adapter.folder}; that cached copy is damaged: delete it, and it is fetched again"
                    if entry.revision
                    else f"{entry.source}; {_AGAIN}"
                ),
            )
    if entry.examples is not None:
        adapter = replace(adapter, given_examples=entry.examples[:MOST])
    elif entry.examples_sha256 is not None and (found := examples_record(adapter.examples)) != entry.examples_sha256:
        raise AdapterError(
            adapter.name,
            f"its example prompts are not those in the manifest: expected {_shown(entry.examples_sha256)}, found "
            f"{_shown(found)} in {adapter.folder if entry.revision else entry.source}; "
            + (f"delete that cached copy, and it is fetched again, or, {_AGAIN}" if entry.revision else _AGAIN),
        )
    own = Activation(adapter.config.invocation)
    if entry.activation is None:  # a `pool.json` beside it may have changed since it was locked
        return adapter if entry.config_sha256 is None else replace(adapter, activation=own)
    try:
        return replace(adapter, activation=acting(own, entry.activation))
    except UsageError as error:
        raise AdapterError(adapter.name, f"{error} (in its manifest)") from None


def _shown(examples: str) -> str:
    return "none" if examples == NO_EXAMPLES else f"those of sha256 {examples[:_SHOWN]}..."


def check_recorded(adapter: Adapter, origin: Origin, file: Path) -> None:
    """Raises AdapterError unless a manifest that is written there can hold the adapter's name and place."""
    for what, text in (("name", adapter.name), ("place", _source(origin, file))):
        if not is_line(text):
            raise AdapterError(
                adapter.name,
                f"a manifest cannot hold its {what} {text!r}: expected one line of printable text; rename the folder",
            )


def locked(
    found: Gathered, places: Sequence[str], base_model: str | None, file: Path, earlier: Manifest | None = None
) -> Manifest:
    """The manifest of a pool with revisions and digests.

    Args:
        places: the places of the pool, as a user writes them.
        base_model: None: that of the earlier manifest.
        file: the manifest is going to be written there.
        earlier: a manifest whose notes, tags, examples and activations are kept, also if the manifest that an adapter
            was found in has others; an activation that is found now replaces its own.

    Raises:
        StorageError: a file became unreadable.
    """
    entries = []
    earlier = earlier or Manifest(())
    kept = {entry.name: entry for entry in earlier.entries}
    for adapter in found.adapters:
        before = _merged(kept.get(adapter.name), found.entries.get(adapter.name))
        origin = found.origins[adapter.name]
        try:
            config = file_sha256(adapter.folder / CONFIG)
        except OSError as error:
            raise StorageError(f"{adapter.folder / CONFIG}: cannot be read: {error.strerror or error}") from error
        entries.append(
            Entry(
                source=_source(origin, file),
                name=adapter.name,
                revision=origin.commit,
                sha256=adapter.sha256,
                config_sha256=config,
                examples_sha256=None if before.examples is not None else examples_record(adapter.examples),
                activation=_activation(adapter, before),
                examples=before.examples,
                notes=before.notes,
                tags=before.tags,
            )
        )
    left_out = {bad.name: bad.reason for bad in found.refused}
    return Manifest(entries, tuple(places), base_model or earlier.base_model, earlier.notes, left_out)


def _merged(first: Entry | None, second: Entry | None) -> Entry:
    """An entry with each field of the first that has it."""
    if first is None or second is None:
        return first or second or _UNSET
    return Entry(
        **{key: value if value != vars(_UNSET)[key] else vars(second)[key] for key, value in vars(first).items()}
    )


def _activation(adapter: Adapter, before: Entry) -> str | None:
    """Where an adapter acts, as its new entry says it; None: as its configuration says."""
    own = Activation(adapter.config.invocation)
    if adapter.activation != own:
        return str(adapter.activation)
    try:
        acting(own, before.activation)
    except UsageError:  # it has no invocation tokens any more
        return None
    return before.activation


def changes(before: Manifest, now: Manifest) -> list[str]:
    """The differences between two manifests, a line for each adapter that has changed."""
    old, new = ({entry.name: entry for entry in one.entries} for one in (before, now))
    lines = [f"- {name}: gone" for name in old if name is not None and name not in new]
    for name, entry in new.items():
        if name not in old:
            lines.append(f"+ {name}: new")
            continue
        other = old[name]
        what = {"source": "another place", "sha256": "other weights", "config_sha256": "another configuration"}
        what |= {"examples_sha256": "other examples", "examples": "other examples", "activation": "another activation"}
        if other.examples_sha256 is None:  # an earlier version did not record them
            del what["examples_sha256"]
        differs = dict.fromkeys(text for key, text in what.items() if getattr(other, key) != getattr(entry, key))
        if differs:
            commits = f" ({(other.revision or '?')[:7]} -> {entry.revision[:7]})" if entry.revision else ""
            lines.append(f"~ {name}: {', '.join(differs)}{commits}")
    return lines


def gone_with_notes(before: Manifest, now: Manifest) -> list[str]:
    """The adapters that are gone with notes, tags or examples, of which the earlier manifest may be the only copy."""
    names = {entry.name for entry in now.entries}
    gone = (entry for entry in before.entries if entry.name not in names)
    return [entry.name or entry.source for entry in gone if entry.notes or entry.tags or entry.examples]


def _source(origin: Origin, file: Path) -> str:
    """The place of an adapter as a manifest writes it; folders are relative to the manifest, to move with it."""
    if origin.commit is not None:
        return "/".join(filter(None, (origin.source, origin.below)))
    path = os.path.relpath(Path(origin.source, origin.below).absolute(), file.absolute().parent)
    return path if path.startswith(".") else f"./{path}"
