"""A pool that changes under threads: every answer is that of one of its states, and no calibration is mixed up."""

from __future__ import annotations

from pathlib import Path

import pytest

from churn import churn, differing, engine, expected, pools


@pytest.mark.slow
def test_a_pool_that_changes_while_threads_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGO_CACHE", str(tmp_path))
    right = expected(pools()[1])
    counts, wrong = churn(engine(), right, threads=4, goes_on=lambda rounds: rounds < 8)
    assert not wrong and sum(counts.values()) > 32
    assert differing(right, str(tmp_path)) == (30, 0)
