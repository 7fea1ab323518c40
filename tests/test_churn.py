"""A pool that changes under threads: every answer is that of one of its states, and no calibration is mixed up."""

from __future__ import annotations

from pathlib import Path

import pytest

from churn import churn, close, elsewhere, engine, pools


@pytest.mark.slow
def test_a_pool_that_changes_while_threads_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGO_CACHE", str(tmp_path / "used"))
    counts, wrong = churn(engine(), pools()[1], threads=4, goes_on=lambda rounds: rounds < 8)
    assert not wrong and sum(counts.values()) > 32
    read, computed = elsewhere(str(tmp_path / "used")), elsewhere(str(tmp_path / "clean"))
    assert all(close(one, other) for one, other in zip(read, computed, strict=True))
