"""Digests of the content of adapters and pools, which do not depend on names or folders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from logo.adapters.examples import examples_sha256
from logo.adapters.format import Adapter

# Hexadecimal digits of an adapter's key, and of a pool's digest: 64 bits.
KEY_DIGITS = 16


def adapter_key(adapter: Adapter) -> str:
    """The digest of an adapter's weights, scales and activation. Reads its whole file."""
    one = adapter.activation
    where = "" if one.everywhere else f" {list(one.tokens)} {one.last}"
    return hashlib.sha256(f"{adapter.sha256} {list(adapter.scales)}{where}".encode()).hexdigest()[:32]


def key_of(adapter: Adapter) -> str:
    """The short form of `adapter_key`, in which example prompts count, too, since they decide selections."""
    key = adapter_key(adapter)
    if adapter.examples:
        key = hashlib.sha256(f"{key} {examples_sha256(adapter.examples)}".encode()).hexdigest()
    return key[:KEY_DIGITS]


def pool_digest(keys: Mapping[str, str]) -> str:
    """The digest of a pool's names and contents. `keys`: adapter name -> key, in pool order."""
    digest = hashlib.sha256()
    for name, key in keys.items():
        digest.update(f"{len(name)} {name} {key}\n".encode())
    return digest.hexdigest()[:KEY_DIGITS]
