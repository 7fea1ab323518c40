"""`Manifest`: a pool as a list in a file, with the name, the place and the digests of each adapter.

    version: 1
    adapters:
    - name: french                        default: as `gathering` names it
      source: org/repo/folder             a Hub repository and a folder in it; or a folder, relative to the manifest
      revision: <commit>                  default: the main branch
      sha256: <of the weight file>        default: not checked
      config_sha256: <of adapter_config.json>
      examples_sha256: <of the example prompts that count>, or none
      activation: last:4                  default: as the adapter, or the `pool.json` beside it, says
      examples: [a prompt, another one]   default: those that the adapter comes with (`logo.adapters.examples`);
                                          []: none
      notes: free text
      tags: [translation]
    left_out:                             adapters of the pool that are not in the list, and why
    - {name: broken, reason: ...}

`logo pool lock` writes revisions and digests, so that opening the manifest gives the same bytes everywhere, or an error
that says what has changed. In a manifest written by hand, `- org/repo` is enough for an adapter.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from logo.adapters.examples import NO_EXAMPLES
from logo.adapters.places import Place, parse_places
from logo.errors import StorageError, UsageError, closest
from logo.folders import locked, replace_file

VERSION = 1
_HEX = frozenset("0123456789abcdef")
_TOP = ("version", "places", "base_model", "notes", "adapters", "left_out")


@dataclass(frozen=True)
class Entry:
    """One adapter of a manifest.

    Attributes:
        source: a folder or a place on the Hub without its revision, as written.
        name: of the adapter; None: the name that its place gives.
        revision, sha256, config_sha256, examples_sha256, activation, examples, notes, tags: see above.
    """

    source: str
    name: str | None = None
    revision: str | None = None
    sha256: str | None = None
    config_sha256: str | None = None
    examples_sha256: str | None = None
    activation: str | None = None
    examples: tuple[str, ...] | None = None
    notes: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def written(self) -> dict[str, Any]:
        """The entry as the file holds it."""
        said = {"name": self.name, **{key: value for key, value in vars(self).items() if key != "name"}}
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in said.items() if _said(key, value)
        }


@dataclass(frozen=True)
class Manifest:
    """A list of adapters.

    Attributes:
        places: the places of the pool, for readers only.
        base_model: its base model, for readers only.
        left_out: name -> why an adapter is not in the list, for readers only.
    """

    entries: Sequence[Entry]
    places: Sequence[str] = ()
    base_model: str | None = None
    notes: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


def read_manifest(file: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        StorageError: it cannot be read.
        UsageError: it is no manifest, or something in it is not as it has to be; the entry is named.
    """
    import yaml

    try:
        said = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise StorageError(f"manifest {file}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"manifest {file}: is not valid YAML: {' '.join(str(error).split())[:200]}") from error
    problem = _Problem(f"manifest {file}")
    if not isinstance(said, dict) or not isinstance(said.get("adapters"), list) or not said["adapters"]:
        raise problem("expected `adapters:`, a list of one or more, as `logo pool lock` writes it")
    problem.keys(said, _TOP)
    if said.get("version", VERSION) != VERSION:
        raise problem(f"expected version {VERSION}, found {said['version']!r}; this version of LoGo is too old for it")
    entries = [_entry(one, problem.at(f"entry {number}")) for number, one in enumerate(said["adapters"], 1)]
    names = [entry.name for entry in entries if entry.name is not None]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise problem(f"two adapters are called {twice!r}; rename one of them")
    left = said.get("left_out") or []
    texts = {key: said[key] for key in ("base_model", "notes") if isinstance(said.get(key), str)}
    gone = {one["name"]: str(one.get("reason", "")) for one in left if isinstance(one, dict) and "name" in one}
    return Manifest(entries, tuple(map(str, said.get("places") or ())), left_out=gone, **texts)


def manifest_text(manifest: Manifest) -> str:
    """The file that `read_manifest` reads as this."""
    import yaml

    said: dict[str, Any] = {"version": VERSION}
    for key in ("places", "base_model", "notes"):
        if value := getattr(manifest, key):
            said[key] = list(value) if key == "places" else value
    said["adapters"] = [entry.written for entry in manifest.entries]
    if manifest.left_out:
        said["left_out"] = [{"name": name, "reason": why} for name, why in manifest.left_out.items()]
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    head = "# A pool of adapters, as `logo pool lock` found it. Open it with `--adapters THIS_FILE`.\n"
    body: str = yaml.dump(said, Dumper=dumper, sort_keys=False, allow_unicode=True, width=118)
    return head + body


def give_examples(file: Path, examples: Mapping[str, Sequence[str]], *, keep: bool = False) -> list[str]:
    """Writes example prompts of adapters into a manifest, and returns the names of those that got them. Comments in the
    file are lost.

    Args:
        keep: leave adapters alone whose entries have examples by now.

    Raises:
        UsageError: it has no entry with the name of an adapter, because an entry without a name stands for it.
        StorageError, UsageError: as `read_manifest`; or it cannot be written.
    """
    if not examples:
        return []
    with locked(file.absolute().parent):  # another process may give examples, too
        manifest = read_manifest(file)
        check_named(file, manifest, examples)
        given = [
            entry.name
            for entry in manifest.entries
            if entry.name is not None and entry.name in examples and not (keep and entry.examples)
        ]
        entries = [
            replace(entry, examples=tuple(examples[entry.name]), examples_sha256=None)
            if entry.name is not None and entry.name in given
            else entry
            for entry in manifest.entries
        ]
        replace_file(file, manifest_text(replace(manifest, entries=entries)).encode())
    return given


def check_named(file: Path, manifest: Manifest, names: Collection[str]) -> None:
    """Raises UsageError if adapters have no entry of their name, because an entry without a name stands for them."""
    unnamed = sorted(set(names) - {entry.name for entry in manifest.entries})
    if unnamed:
        raise UsageError(
            f"manifest {file}: no entry has the name {unnamed[0]!r}, so it has no place for examples; write the "
            f"names with `logo pool lock {file} --out {file} --replace`"
        )


def entry_place(entry: Entry, manifest: Path) -> Place:
    """Where an adapter of a manifest is: a folder counts from the manifest's own.

    Raises:
        UsageError: it could not exist.
    """
    source, home = os.path.expanduser(entry.source), manifest.absolute().parent
    local = os.path.normpath(home / source)
    if source.startswith((".", "/")) or os.path.isdir(local):
        if entry.revision is not None:
            raise UsageError(f"manifest {manifest}: {entry.source!r} is a folder, which has no revision")
        return Place("folder", local)
    at = f"@{entry.revision}" if entry.revision else ""
    [place, *more] = parse_places([f"{entry.source}{at}"])
    if more or place.kind != "repo" or not place.plain:
        raise UsageError(
            f"manifest {manifest}: {entry.source!r}: expected one folder (./folder) or one place on the Hub "
            "(org/repo[/folder])"
        )
    return place


@dataclass(frozen=True)
class _Problem:
    """Makes errors that say where in a file something is wrong."""

    where: str

    def __call__(self, text: str) -> UsageError:
        return UsageError(f"{self.where}: {text}")

    def at(self, where: str) -> _Problem:
        return replace(self, where=f"{self.where}, {where}")

    def keys(self, said: Mapping[Any, Any], known: Sequence[str]) -> None:
        for key in said:
            if key not in known:
                raise self(f"unknown key {key!r}{closest(str(key), known)}: expected {', '.join(known)}")


def _entry(said: Any, problem: _Problem) -> Entry:
    if isinstance(said, str):
        said = {"source": said}
    if not isinstance(said, dict):
        raise problem(f"expected a place or an object with `source`, found {type(said).__name__}")
    if isinstance(said.get("name"), str):
        problem = problem.at(repr(said["name"]))
    problem.keys(said, list(Entry.__dataclass_fields__))
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(("source", "name", "revision", "activation"), (is_line, "a text of one line")),
        **dict.fromkeys(("sha256", "config_sha256"), (_is_digest, "64 hexadecimal digits")),
        "examples_sha256": (lambda value: value == NO_EXAMPLES or _is_digest(value), "64 hexadecimal digits or none"),
        "notes": (lambda value: isinstance(value, str), "a text"),
        "tags": (lambda value: isinstance(value, list) and all(map(is_line, value)), "a list of texts"),
        "examples": (_are_prompts, "a list of texts"),
    }
    for key, (right, expected) in checks.items():
        if (key in said or key == "source") and not right(said.get(key)):
            raise problem(f"{key}: expected {expected}, found {said.get(key)!r}")
    lists = {key: tuple(said[key]) for key in ("tags", "examples") if key in said}
    return Entry(**{**said, **lists})


def is_line(value: Any) -> bool:
    """Whether a manifest can hold this as a name or a place: a text of one line."""
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _said(key: str, value: Any) -> bool:
    return bool(value) or (key == "examples" and value is not None)


def _are_prompts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)
