"""A manifest: a pool as a list in a file, with the source and the digest of each adapter.

    k: 3                            adapters per prompt; default: `AdapterPool.default_k`
    adapters:
    - name: french                  default: as `logo.adapters.sources` names it
      source: org/repo/folder       a Hub repository and a folder in it; or a folder, relative to the manifest
      revision: <commit>            default: the main branch
      sha256: <of the weight file>  default: not checked
      examples: [a prompt]          default: those in the adapter's folder (`logo.adapters.examples`); []: none

`logo pool lock` writes revisions and digests, so that opening the manifest gives the same weights everywhere, or an
error that says what has changed. In a manifest written by hand, `- org/repo` is enough for an adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logo.adapters.activation import checked_k
from logo.adapters.adapter import Adapter
from logo.adapters.examples import MOST
from logo.errors import AdapterError, StorageError, UsageError, closest
from logo.files import replace_file

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Entry:
    """One adapter of a manifest.

    Attributes:
        source: a folder or a source on the Hub without its revision, as written.
        name: of the adapter; None: the name that its source gives.
        revision, sha256, examples: see above.
    """

    source: str
    name: str | None = None
    revision: str | None = None
    sha256: str | None = None
    examples: tuple[str, ...] | None = None

    def checked(self, adapter: Adapter) -> Adapter:
        """The adapter with the entry's examples. Raises AdapterError if its weights are not those of the entry."""
        if self.sha256 is not None and adapter.sha256 != self.sha256:
            again = (
                f"{adapter.folder}: delete this damaged copy, and it is fetched again"
                if self.revision
                else f"{self.source}; if the change is intended, write the manifest again (`logo pool lock`)"
            )
            raise AdapterError(
                adapter.name,
                f"{adapter.file.path.name} is not the one in the manifest: expected sha256 {self.sha256[:12]}..., "
                f"found {adapter.sha256[:12]}... in {again}",
            )
        return adapter if self.examples is None else replace(adapter, given_examples=self.examples[:MOST])


@dataclass(frozen=True)
class Manifest:
    """A pool: its adapters, and how many of them a prompt selects by default."""

    entries: Sequence[Entry]
    k: int | None = None


def read_manifest(file: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        StorageError: it cannot be read.
        UsageError: it is no manifest, or something in it is not as it has to be; the entry is named.
    """
    import yaml

    where = f"manifest {file}"
    try:
        said = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise StorageError(f"{where}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not valid YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(said, dict) or not isinstance(said.get("adapters"), list) or not said["adapters"]:
        raise UsageError(f"{where}: expected `adapters:`, a list of one or more, as `logo pool lock` writes it")
    _check_keys(where, said, ["k", "adapters"])
    entries = [_entry(one, f"{where}, entry {number}") for number, one in enumerate(said["adapters"], 1)]
    for name, count in Counter(entry.name for entry in entries if entry.name is not None).items():
        if count > 1:
            raise UsageError(f"{where}: two adapters are called {name!r}; rename one of them")
    return Manifest(entries, checked_k(said, where))


def write_manifest(file: Path, manifest: Manifest) -> None:
    """Writes the file that `read_manifest` reads as this manifest.

    Raises:
        StorageError: it cannot be written.
    """
    import yaml

    rows: list[dict[str, Any]] = []
    for entry in manifest.entries:
        said = {"name": entry.name, **{key: value for key, value in vars(entry).items() if key != "name"}}
        rows.append({k: list(v) if isinstance(v, tuple) else v for k, v in said.items() if v is not None})
    head = "# A pool of adapters, as `logo pool lock` found it. Open it with `--adapters THIS_FILE`.\n"
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    content = {**({"k": manifest.k} if manifest.k else {}), "adapters": rows}
    body: str = yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True, width=118)
    replace_file(file, (head + body).encode())


def is_line(value: Any) -> bool:
    """Whether a manifest can hold this as a name or a source: a text of one line."""
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _entry(said: Any, where: str) -> Entry:
    said = {"source": said} if isinstance(said, str) else said
    if not isinstance(said, dict):
        raise UsageError(f"{where}: expected a source or an object with `source`, found {type(said).__name__}")
    _check_keys(where, said, list(Entry.__dataclass_fields__))
    for key, value in {"source": None, **said}.items():
        if key == "examples":
            right = isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)
            expected = "a list of texts"
        elif key == "sha256":
            right = isinstance(value, str) and len(value) == 64 and set("0123456789abcdef").issuperset(value)
            expected = "64 hexadecimal digits"
        else:
            right, expected = is_line(value), "a text of one line"
        if not right:
            raise UsageError(f"{where}: {key}: expected {expected}, found {value!r}")
    return Entry(**{**said, **({"examples": tuple(said["examples"])} if "examples" in said else {})})


def _check_keys(where: str, said: dict[Any, Any], known: Sequence[str]) -> None:
    for key in said:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}{closest(str(key), known)}: expected {', '.join(known)}")
