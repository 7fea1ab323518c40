"""Groups prompts that no adapter serves by their words and spelling.

    text -> words and runs of three characters -> hashed counts, weighted by how rare they are (TF-IDF) -> cosine
    distances -> average linkage, cut at `FAR`

Nothing is downloaded and no model is run, so prompts are similar if they share words and spellings, not meanings.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Groups of prompts are one where their mean cosine distance is below this.
FAR = 0.85
# Prompts that are shown of a group.
EXAMPLES = 2
_COLUMNS = 4096
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Group:
    """Similar prompts.

    Attributes:
        size: number of prompts.
        examples: those that are most similar to the others.
    """

    size: int
    examples: tuple[str, ...]


def groups(prompts: Sequence[str]) -> list[Group]:
    """The groups of two prompts or more, largest first. Time and memory grow with the square of their number."""
    if len(prompts) < 2:
        return []
    from scipy.cluster.hierarchy import fcluster, linkage

    vectors = _vectors(prompts)
    alike = np.clip(vectors @ vectors.T, -1.0, 1.0)
    places = np.triu_indices(len(prompts), 1)
    labels = fcluster(linkage(1.0 - alike[places], "average"), FAR, "distance")
    found = [np.flatnonzero(labels == label) for label in dict.fromkeys(labels.tolist())]
    return sorted((_group(prompts, members, alike) for members in found if len(members) > 1), key=lambda one: -one.size)


def _group(prompts: Sequence[str], members: NDArray[np.intp], alike: NDArray[np.float64]) -> Group:
    central = np.argsort(-alike[np.ix_(members, members)].sum(axis=1).round(9), kind="stable")
    texts = dict.fromkeys(prompts[members[place]] for place in central)
    return Group(len(members), tuple(texts)[:EXAMPLES])


def _vectors(prompts: Sequence[str]) -> NDArray[np.float64]:
    """(prompts, columns), each of length 1; zeros where a prompt has no word."""
    counts = np.zeros((len(prompts), _COLUMNS))
    for row, prompt in enumerate(prompts):
        for feature, count in Counter(_features(prompt)).items():
            counts[row, zlib.crc32(feature.encode("utf-8", "replace")) % _COLUMNS] += count
    rarity = np.log((1 + len(prompts)) / (1 + (counts > 0).sum(axis=0))) + 1
    weighted = np.log1p(counts) * rarity
    lengths = np.linalg.norm(weighted, axis=1, keepdims=True)
    whole: NDArray[np.float64] = weighted / np.where(lengths > 0, lengths, 1.0)
    return whole


def _features(prompt: str) -> Iterator[str]:
    for word in _WORD.findall(prompt.lower()):
        yield word
        marked = f"<{word}>"
        yield from (marked[at : at + 3] for at in range(len(marked) - 2))
