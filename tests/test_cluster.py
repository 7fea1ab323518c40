"""How many processes there is room for, with a Ray that is made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from logo.backends.cluster import Layout, process_resources


@pytest.mark.parametrize(("gpus", "count"), [(0.1, 10), (0.2, 5), (0.3, 3), (0.5, 2), (1.0, 1), (1 / 3, 3), (1 / 7, 7)])
@pytest.mark.parametrize("address", ["local", "auto"])
def test_processes_that_share_a_gpu_fill_it(gpus: float, count: int, address: str) -> None:
    node = {"Alive": True, "Resources": {"GPU": 1.0, "CPU": 64.0}}
    ray: Any = SimpleNamespace(nodes=lambda: [node])
    found = process_resources(ray, Layout(address=address, gpus=gpus, cpus=1))
    assert (found.count, found.room) == (count, count)
