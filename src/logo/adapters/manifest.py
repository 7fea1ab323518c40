"""A manifest: a pool as a list in a file, with the source and the digests of each adapter.

    k: 3                            adapters per prompt; default: `AdapterPool.default_k`
    adapters:
    - name: french                  default: as `logo.adapters.sources` names it
      source: org/repo/folder       a Hub repository and a folder in it; or a folder, relative to the manifest
      revision: <commit>            default: the main branch
      sha256: <of the weight file>  default: not checked
      digest: <of what it does>     of weights, scales and where it acts (`Adapter.digest`); default: not checked
      examples_sha256: <of those in the adapter's folder>    default: not checked
      examples: [a prompt]          default: those in the adapter's folder (`logo.adapters.examples`); []: none
      description: <a sentence>     what it does; default: that in the adapter's folder

`logo pool lock` writes revisions and digests, so that opening the manifest gives the same adapters everywhere, or an
error that says what has changed. By hand, `- org/repo` is enough for an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from logo.adapters.activation import checked_k
from logo.adapters.adapter import Adapter
from logo.adapters.examples import examples_sha256, is_text
from logo.adapters.peft import CONFIG, EXAMPLES, NOTES
from logo.errors import AdapterError, StorageError, UsageError
from logo.files import replace_file

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Entry:
    """One adapter of a manifest; see above."""

    source: str
    name: str | None = None
    revision: str | None = None
    sha256: str | None = None
    digest: str | None = None
    examples_sha256: str | None = None
    examples: tuple[str, ...] | None = None
    description: str | None = None

    def checked(self, adapter: Adapter) -> Adapter:
        """The adapter as the entry describes it. Raises AdapterError if it does not do what that of the entry did."""
        if self.sha256 is not None and adapter.sha256 != self.sha256:
            raise self._changed(adapter, adapter.file.path.name, "sha256", self.sha256, adapter.sha256)
        if self.digest is not None and adapter.digest != self.digest:
            what = f"{CONFIG}, or a {NOTES} in or above its folder,"
            raise self._changed(adapter, what, "digest", self.digest, adapter.digest)
        if self.description is not None:
            adapter = replace(adapter, description=self.description)
        if self.examples is not None:
            return replace(adapter, examples=self.examples, listed=True)
        if self.examples_sha256 is not None:
            found = examples_sha256(adapter.examples)
            if found != self.examples_sha256:
                raise self._changed(adapter, EXAMPLES, "examples_sha256", self.examples_sha256, found)
        return adapter

    def _changed(self, adapter: Adapter, what: str, kind: str, expected: str, found: str) -> AdapterError:
        again = f"{self.source}; if the change is intended, write the manifest again (`logo pool lock`)"
        where = f"{adapter.folder}; delete this damaged copy" if self.revision else again
        differs = f"expected {kind} {expected[:12]}..., found {found[:12]}... in {where}"
        return AdapterError(adapter.name, f"{what} is not the one in the manifest: {differs}")


@dataclass(frozen=True)
class Manifest:
    """A pool: its adapters, and how many of them a prompt selects by default."""

    entries: Sequence[Entry]
    k: int | None = None


def read_manifest(file: Path) -> Manifest:
    """Reads a manifest. Raises StorageError if it cannot be read, and UsageError for what is not as it has to be."""
    import yaml

    try:
        content = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise StorageError(f"manifest {file}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"manifest {file}: is not valid YAML: {' '.join(str(error).split())[:200]}") from error
    try:
        if not isinstance(content, dict) or not {"adapters"} <= content.keys() <= {"k", "adapters"}:
            raise UsageError("expected `adapters:`, a list, and perhaps `k:`, as `logo pool lock` writes it")
        entries = content["adapters"]
        if not isinstance(entries, list) or not entries:
            raise UsageError("expected `adapters:`, a list of one or more")
        return Manifest([_entry(entry, number) for number, entry in enumerate(entries, 1)], checked_k(content))
    except UsageError as error:
        raise UsageError(f"manifest {file}: {error}") from None


def write_manifest(file: Path, manifest: Manifest) -> None:
    """Writes the file that `read_manifest` reads as this manifest. Raises StorageError if it cannot be written."""
    import yaml

    content: dict[str, Any] = {}
    if manifest.k:
        content["k"] = manifest.k
    content["adapters"] = [_written(entry) for entry in manifest.entries]
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    body: str = yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True, width=118)
    head = "# A pool of adapters, as `logo pool lock` found it. Open it with `--adapters THIS_FILE`.\n"
    replace_file(file, (head + body).encode())


def _written(entry: Entry) -> dict[str, Any]:
    """What is known of an adapter, its name first."""
    fields = {"name": entry.name, **asdict(entry)}
    if entry.examples is not None:
        fields["examples"] = list(entry.examples)
    return {key: value for key, value in fields.items() if value is not None}


def is_line(value: Any) -> bool:
    """Whether a manifest can hold this as a name or a source: a text of one line."""
    return is_text(value) and value.isprintable()


def _entry(content: Any, number: int) -> Entry:
    """An entry, checked key by key, since a digest under a mistyped key would not be checked later."""
    fields: Any = {"source": content} if isinstance(content, str) else content
    if not isinstance(fields, dict) or not fields.keys() <= _KINDS.keys():
        raise UsageError(f"entry {number}: expected a source or an object of {', '.join(_KINDS)}, found {fields!r}")
    for key, value in {"source": None, **fields}.items():
        right, expected = _KINDS[key]
        if not right(value):
            raise UsageError(f"entry {number}: {key}: expected {expected}, found {value!r}")
    values: dict[str, Any] = {key: tuple(value) if key == "examples" else value for key, value in fields.items()}
    return Entry(**values)


_LINE = (is_line, "a text of one line")
_SHA256 = (lambda one: isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one), "64 hexadecimal digits")
_KINDS: dict[str, tuple[Callable[[Any], object], str]] = {
    "source": _LINE,
    "name": _LINE,
    "revision": _LINE,
    "sha256": _SHA256,
    "digest": (lambda one: isinstance(one, str) and re.fullmatch("[0-9a-f]{32}", one), "32 hexadecimal digits"),
    "examples_sha256": _SHA256,
    "examples": (lambda all_: isinstance(all_, list) and all(map(is_text, all_)), "a list of texts"),
    "description": (is_text, "a text"),
}
