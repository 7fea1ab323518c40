"""Memory that a server may take: told in one line, and refused where it is more than there is."""

from __future__ import annotations

import pytest
from torch import nn

from logo.errors import UsageError
from logo.mixing.cache import ADAPTER_SHARE
from logo.serve import batching
from logo.serve.batching import Memory, MemoryPlan


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte is free."""
    monkeypatch.setattr(batching, "free_bytes", lambda devices: 10**9)


def test_defaults_fit_beside_each_other() -> None:
    model = nn.Linear(1000, 1000, bias=False)
    plan = MemoryPlan.of(model, int(ADAPTER_SHARE * 10**9), Memory())
    assert (plan.model, plan.kv, plan.free) == (4_000_000, 300_000_000, 10**9)
    assert plan.line == (
        "Memory: model 0.00 GB · up to 0.30 GB of adapters · up to 0.30 GB of keys and values · 1.00 GB free beside "
        "the model"
    )


def test_more_than_is_free_is_refused_before_it_is_taken() -> None:
    with pytest.raises(UsageError, match=r"0\.70 GB of adapters · up to 0\.40 GB.*--adapter-memory-gb or --kv-cache"):
        MemoryPlan.of(nn.Linear(2, 2), 700_000_000, Memory(kv_cache_gb=0.4))
    assert MemoryPlan.of(nn.Linear(2, 2), 600_000_000, Memory(kv_cache_gb=0.4)).kv == 400_000_000
