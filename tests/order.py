"""The order in which test files run."""

from __future__ import annotations

from collections import Counter

import pytest

# A process that began one of these last would have all others wait for it.
FIRST = (
    *("test_replicas_vllm.py", "test_on_gpus.py", "test_activated.py", "test_server.py", "test_offline.py"),
    *("test_docs.py", "test_serve_limits.py", "test_cluster.py", "test_replicas.py", "test_harness.py"),
)


def longest_first(items: list[pytest.Item]) -> None:
    """Sorts tests by file: those that are named here, those with many slow tests, all others in the order they have."""
    slow = Counter(item.path.name for item in items if item.get_closest_marker("slow"))
    rank = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: (rank.get(item.path.name, len(FIRST)), -slow[item.path.name]))
