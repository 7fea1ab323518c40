"""Recipes: a mixture as a string, which any worker can rebuild from its own pool.

    logo://d1f0a3…:0.25,77b2c9…:0.75            key of the adapter's content : weight, highest weight first

A recipe travels as name and path of a `LoRARequest`. vLLM keys cached keys and values by these two, and recipes name
what adapters contain rather than what they are called. So an adapter that is replaced under its own name never meets
keys and values of the one before. A position from which a mixture acts would follow behind an `@`; there is none yet.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from logo.adapters.digests import KEY_DIGITS
from logo.errors import UsageError

SCHEME = "logo://"
# vLLM's ids of adapters are signed integers of 32 bits, from 1 on.
_IDS = 2**31 - 1


@dataclass(frozen=True)
class Recipe:
    """A mixture.

    Attributes:
        parts: key of an adapter and its weight; every key once.
    """

    parts: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, mixture: Iterable[tuple[str, float]]) -> Recipe:
        """A recipe of keys and weights. The weights of adapters that contain the same are added up."""
        weights: dict[str, float] = {}
        for key, weight in mixture:
            weights[key] = weights.get(key, 0.0) + weight
        # As floats are written with nine digits, every float32 survives.
        parts = ((key, float(f"{weight:.9g}")) for key, weight in weights.items())
        return cls(tuple(sorted(parts, key=lambda part: (-part[1], part[0]))))

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Reads what `str` wrote.

        Raises:
            UsageError: it is no recipe.
        """
        head, _, rest = text.partition("#")[0].partition(SCHEME)
        entries = [entry.partition(":") for entry in rest.split(",")] if rest else []
        try:
            if head or not entries:
                raise ValueError("no scheme, or no adapter")
            parts = tuple((key, float(weight)) for key, _, weight in entries)
        except ValueError:
            raise UsageError(f"expected a recipe {SCHEME}KEY:WEIGHT,..., found {text!r:.80}") from None
        keys = [key for key, _ in parts]
        if not all(map(_is_key, keys)) or len(set(keys)) < len(keys) or not all(math.isfinite(w) for _, w in parts):
            raise UsageError(f"expected a recipe {SCHEME}KEY:WEIGHT,..., found {text!r:.80}")
        return cls(parts)

    def __str__(self) -> str:
        return SCHEME + ",".join(f"{key}:{weight:.9g}" for key, weight in self.parts)

    @property
    def keys(self) -> tuple[str, ...]:
        """Of its adapters."""
        return tuple(key for key, _ in self.parts)

    def salted(self, salt: int) -> str:
        """The recipe as text, and as another one after each failure: what a failure has left in a cache is not met."""
        return f"{self}#{salt}" if salt else str(self)

    def number(self, taken: Mapping[int, str] | None = None, text: str | None = None) -> int:
        """The id that vLLM knows this recipe by: 31 bits of its digest, or of a further one where that is taken.

        Args:
            taken: ids of recipes that are in use, as strings.
            text: of the recipe, where it is salted.
        """
        text, salt = text or str(self), 0
        while True:
            digest = hashlib.sha256(f"{salt} {text}".encode()).digest()
            number = int.from_bytes(digest[:4], "big") % _IDS + 1
            if taken is None or taken.get(number, text) == text:
                return number
            salt += 1


def is_recipe(path: str) -> bool:
    """Whether a `LoRARequest` with this path is a recipe."""
    return path.startswith(SCHEME)


def _is_key(key: str) -> bool:
    return len(key) == KEY_DIGITS and all(character in "0123456789abcdef" for character in key)
