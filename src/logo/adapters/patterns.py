"""Patterns: the keys of `rank_pattern` and `alpha_pattern`, regular expressions that are matched as PEFT matches them.

A configuration is downloaded, and Python tries one way after another in which an expression may match, of which there
can be more than anybody waits for. So they are counted before anything is matched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import TypeVar

_T = TypeVar("_T", int, float)

# Ways to match all names of an adapter that are tried at most, which takes seconds.
_MOST_WAYS = 1e9
_ONE_CHARACTER = re.compile(r"\\[^1-9]|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_QUANTIFIER = re.compile(r"(?<!\()(?:[*+?]|\{[^{}]*\})[?+]?")
_OTHER_GROUP = re.compile(r"\(\?(?!:)|\\")  # looks around, sets flags, refers back, ...


def lookup(pattern: tuple[tuple[str, _T], ...], module: str, default: _T) -> _T:
    """PEFT's `get_pattern_key`: the first key in dict order that matches the end of the path wins."""
    return next((value for key, value in pattern if expression(key).match(module)), default)


@lru_cache(maxsize=4096)  # Python itself keeps fewer than a large model has modules, each of which may be a key
def expression(key: str) -> re.Pattern[str]:
    """The expression that PEFT makes of a key. Raises re.error, OverflowError or RecursionError if there is none."""
    return re.compile(rf"(.*\.)?({key})$")


def endless(keys: Iterable[str], modules: Collection[str]) -> str | None:
    """The first key that makes it take too long to look up all of these modules; None: there is none."""
    longest = max(map(len, modules), default=0)
    parts = max((module.count(".") + 1 for module in modules), default=1)
    total = 0.0
    for key in keys:
        total += len(modules) * parts * _ways(key, longest)
        if total > _MOST_WAYS:
            return key
    return None


def _ways(key: str, length: int) -> float:
    """In how many ways a key may match a text of so many characters, at most; infinite if it is not easily known."""
    bare = _ONE_CHARACTER.sub("x", f"({key})")
    if _OTHER_GROUP.search(bare):
        return math.inf
    repeated = 0  # characters, each some number of times, all of them together `length` times at most
    optional = 0  # groups
    for quantifier in _QUANTIFIER.finditer(bare):
        if bare[quantifier.start() - 1] != ")":
            repeated += 1
        elif quantifier[0].startswith("?"):
            optional += 1
        else:  # as many ways as there are for the group, to the power of how often it is repeated
            return math.inf
    groups = bare.count("(")
    logarithm = math.log(math.comb(length + repeated, repeated)) + optional * math.log(2)
    logarithm += groups * math.log1p(bare.count("|") / groups)  # most, if all groups have equally many alternatives
    return math.exp(min(logarithm, 700.0))
