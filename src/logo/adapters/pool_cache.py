"""`PoolCache`: configurations and headers of a pool in one file, from which it opens again.

    <cache>/pools/<digest of the folder's path>.json

The entry of an adapter is used while its configuration and its weight file have the same size, time and inode. Adapters
of one training recipe have the same modules, which are written and held in memory once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from logo.adapters.activation import Activation
from logo.adapters.config import LoraConfig
from logo.adapters.examples import FolderExamples
from logo.adapters.files import CONFIG, SAFETENSORS
from logo.adapters.format import Adapter
from logo.adapters.header import LoraModule
from logo.adapters.weights import ContentStamp, SafetensorsFile, Stamp, content_stamp, file_sha256, stamp
from logo.cache import write_cached

# To be raised when the content of the files changes its meaning.
_FORMAT = 3


@dataclass
class PoolCache:
    """The cached adapters of one pool.

    Attributes:
        cache: the cache folder; None: no cache.
        name: of the file in it.
        entries: name -> stamps of configuration and weights, index of the recipe, whether all tensors were checked.
        recipes: the distinct pairs of configuration and modules.
    """

    cache: Path | None = None
    name: str = ""
    entries: dict[str, tuple[Stamp, Stamp, int, bool]] = field(default_factory=dict)
    recipes: list[tuple[LoraConfig, dict[str, LoraModule]]] = field(default_factory=list)

    @classmethod
    def of(cls, place: str, cache: Path | None) -> PoolCache:
        """Reads the cache of a place; it is empty if the file is missing or cannot be read.

        Args:
            place: the folder's real path, or another text that identifies these adapters.
        """
        if cache is None:
            return cls()
        digest = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        name = f"pools/{digest}.json"
        try:
            kept = json.loads((cache / name).read_bytes())
            if kept["format"] != _FORMAT:
                return cls(cache, name)
            recipes = [(_config(config), _modules(modules)) for config, modules in kept["recipes"]]
            entries = {
                name: ((a[0], a[1], a[2], a[3]), (b[0], b[1], b[2], b[3]), recipe, verified)
                for name, a, b, recipe, verified in kept["adapters"]
                if 0 <= recipe < len(recipes)
            }
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return cls(cache, name)
        return cls(cache, name, entries, recipes)

    def get(self, folder: str, name: str) -> Adapter | None:
        """The adapter of this name; None if it is not cached or its files have changed."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        file = SafetensorsFile(Path(folder) / SAFETENSORS)
        stamps = stamp(os.path.join(folder, CONFIG)), file.stamp
        if stamps != entry[:2]:
            return None
        config, modules = self.recipes[entry[2]]
        examples, acts = FolderExamples(Path(folder)), Activation(config.invocation)
        return Adapter(name, Path(folder), config, modules, file, examples, acts, stamps=stamps)

    def verified(self, name: str) -> bool:
        """Whether all tensors of this adapter were read and checked before."""
        return name in self.entries and self.entries[name][3]

    def keep(self, adapters: Iterable[Adapter], verified: Collection[str]) -> None:
        """Replaces the cached adapters by these, if they differ.

        Args:
            verified: names of adapters whose tensors were all read and checked.
        """
        if self.cache is None:
            return
        recipes: dict[tuple[int, int], int] = {}
        held: list[tuple[LoraConfig, dict[str, LoraModule]]] = []
        entries = {}
        for adapter in adapters:
            if adapter.copies or not isinstance(adapter.file, SafetensorsFile):
                continue
            config, weights = adapter.stamps
            if config is None or weights is None:  # removed meanwhile
                continue
            key = id(adapter.config), id(adapter.modules)
            if key not in recipes:
                recipes[key] = len(held)
                held.append((adapter.config, dict(adapter.modules)))
            entries[adapter.name] = config, weights, recipes[key], adapter.name in verified
        if entries == self.entries:
            return
        self.entries, self.recipes = entries, held
        kept = {
            "format": _FORMAT,
            "recipes": [
                [asdict(config), {path: list(vars(module).values()) for path, module in modules.items()}]
                for config, modules in held
            ],
            "adapters": [[name, *entry] for name, entry in entries.items()],
        }
        data = json.dumps(kept, separators=(",", ":")).encode("utf-8", "surrogateescape")
        write_cached(self.cache, self.name, lambda part: Path(part).write_bytes(data))


class DigestCache:
    """The cached digests of a pool's files; a file is read again only when it has changed."""

    def __init__(self, cache: Path | None, name: str, digests: dict[str, tuple[ContentStamp, str]]) -> None:
        self._cache, self._name, self._digests = cache, name, digests
        self._new = False

    @classmethod
    def of(cls, place: str, cache: Path | None) -> DigestCache:
        """Reads the cached digests of a place; `place` and `cache` as `PoolCache.of`."""
        name = f"pools/{hashlib.sha256(place.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}-digests.json"
        digests: dict[str, tuple[ContentStamp, str]] = {}
        with suppress(OSError, ValueError, TypeError, AttributeError):
            if cache is not None:
                kept = json.loads((cache / name).read_bytes())
                digests = {path: ((a, b, c, d), str(digest)) for path, ((a, b, c, d), digest) in kept.items()}
        return cls(cache, name, digests)

    def sha256(self, file: Path) -> str:
        """The digest of a file, as `sha256sum` prints it.

        Raises:
            OSError: it cannot be read.
        """
        now, key = content_stamp(file), os.fspath(file)
        known = self._digests.get(key)
        if known is not None and known[0] == now:
            return known[1]
        digest = file_sha256(file)
        self._digests[key], self._new = (now, digest), True
        return digest

    def keep(self) -> None:
        """Writes the digests, if there are new ones."""
        if self._new and self._cache is not None:
            data = json.dumps(self._digests, separators=(",", ":")).encode("utf-8", "surrogateescape")
            write_cached(self._cache, self._name, lambda part: Path(part).write_bytes(data))


def _config(kept: dict[str, Any]) -> LoraConfig:
    return LoraConfig(**{**kept, "invocation": tuple(kept["invocation"]), "unknown": tuple(kept["unknown"])})


def _modules(kept: dict[str, list[Any]]) -> dict[str, LoraModule]:
    return {path: LoraModule(*values) for path, values in kept.items()}
