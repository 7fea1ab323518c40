"""Recipes: a mixture as a string, from which any worker can rebuild it with its own pool.

    logo://d1f0a3…:0.25,77b2c9…:0.75            key of the adapter's content : weight, highest weight first
    logo://d1f0a3…:0.25@last:4,77b2c9…:0.75@7.8 where it acts: from the last 4 tokens of a prompt, the tokens 7 8, on

A recipe is the name and the path of a `LoRARequest`. vLLM keys cached keys and values by these, and recipes contain
digests of adapters instead of their names. An adapter that is replaced under its name therefore never uses keys and
values of the old one. Recipes say by rule where adapters act, so they are the same for every prompt;
`logo.backends.vllm.onsets` computes the positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from logo.adapters.activation import EVERYWHERE, Activation
from logo.errors import UsageError
from logo.identity import KEY_DIGITS

SCHEME = "logo://"
# vLLM's ids of adapters are signed integers of 32 bits, from 1 on.
_IDS = 2**31 - 1


@dataclass(frozen=True)
class Recipe:
    """A mixture.

    Attributes:
        parts: key of an adapter and its weight; every key once.
        activations: activation by key, of adapters that do not act everywhere.
    """

    parts: tuple[tuple[str, float], ...]
    activations: Mapping[str, Activation] = field(default_factory=dict)

    @classmethod
    def of(cls, mixture: Iterable[tuple[str, float]], activations: Mapping[str, Activation] | None = None) -> Recipe:
        """A recipe of keys and weights. Weights of adapters with equal content are added.

        Args:
            activations: activation by key; other adapters act everywhere.
        """
        weights: dict[str, float] = {}
        for key, weight in mixture:
            weights[key] = weights.get(key, 0.0) + weight
        # Nine digits, as in the text of a recipe, represent every float32 exactly.
        parts = ((key, float(f"{weight:.9g}")) for key, weight in weights.items())
        late = {key: one for key, one in (activations or {}).items() if key in weights and not one.everywhere}
        return cls(tuple(sorted(parts, key=lambda part: (-part[1], part[0]))), late)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The inverse of `str`.

        Raises:
            UsageError: the text is no recipe.
        """
        head, _, rest = text.partition(SCHEME)
        entries = [entry.partition(":") for entry in rest.split(",")] if rest else []
        parts, activations = [], {}
        try:
            if head or not entries:
                raise ValueError("no scheme, or no adapter")
            for key, _, said in entries:
                weight, late, where = said.partition("@")
                parts.append((key, float(weight)))
                if late:
                    activations[key] = _read(where)
        except ValueError:
            raise UsageError(f"expected a recipe {SCHEME}KEY:WEIGHT,..., found {text!r:.80}") from None
        keys = [key for key, _ in parts]
        if not all(map(_is_key, keys)) or len(set(keys)) < len(keys) or not all(math.isfinite(w) for _, w in parts):
            raise UsageError(f"expected a recipe {SCHEME}KEY:WEIGHT,..., found {text!r:.80}")
        return cls(tuple(parts), activations)

    def __str__(self) -> str:
        return SCHEME + ",".join(f"{key}:{weight:.9g}{self._where(key)}" for key, weight in self.parts)

    def _where(self, key: str) -> str:
        return f"@{_written(self.activations[key])}" if key in self.activations else ""

    def activation(self, key: str) -> Activation:
        """Where an adapter acts."""
        return self.activations.get(key, EVERYWHERE)

    def only(self, keys: Iterable[str]) -> Recipe:
        """The recipe with only those of its adapters that have these keys."""
        kept = set(keys)
        return Recipe(tuple(part for part in self.parts if part[0] in kept), self.activations)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the recipe's adapters."""
        return tuple(key for key, _ in self.parts)

    def number(self, taken: Mapping[int, str] | None = None) -> int:
        """The id of this recipe in vLLM: 31 bits of a digest of its text, salted until no other recipe has the id.

        Args:
            taken: id -> text of the recipes that are in use.
        """
        text, salt = str(self), 0
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


def _written(activation: Activation) -> str:
    """The text of an activation: `last:4`, or invocation tokens `7.8`."""
    return ".".join(map(str, activation.tokens)) or str(activation)


def _read(where: str) -> Activation:
    """The activation whose text `_written` has returned.

    Raises:
        ValueError: it is something else.
    """
    return Activation.parse(where) if where.startswith("last:") else Activation(tuple(map(int, where.split("."))))
