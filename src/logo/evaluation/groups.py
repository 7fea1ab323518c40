"""The paper's groups of datasets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_GROUPS: Mapping[str, str] = {
    "bbh": "BIG-Bench Hard",
    "wmt14": "Translation",
    "wmt16": "Translation",
    "gem": "Struct-to-Text",
    "ai2_arc": "Closed-Book QA",
    "nq": "Closed-Book QA",
    "tqa": "Closed-Book QA",
    "anli": "NLI",
    "glue": "NLI",
    "code_x_glue": "Code",
}
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(_GROUPS.values()))
"""The groups' names in the order of the paper; code comes last."""


def group_of(dataset: str) -> str:
    """The group of a dataset, by the part of its name before the first dot or slash; that part itself for any other
    name."""
    main = re.split(r"[./]", dataset, maxsplit=1)[0]
    return _GROUPS.get(main, main)


def grouped(datasets: Iterable[str]) -> dict[str, list[str]]:
    """Group -> its datasets in the order they came; the paper's groups first, then others as they came."""
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for dataset in datasets:
        found.setdefault(group_of(dataset), []).append(dataset)
    return {group: names for group, names in found.items() if names}
