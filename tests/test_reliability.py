"""The reliability of confidences: AUROC, bins and error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo.evaluation.reliability import BELOW, auroc, reliability
from logo.evaluation.summary import Measured

VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def row(own: float | None = None, left: float | None = None, unseen: float | None = None) -> Measured:
    answers = {"top1": 1.0, "confidence": own} if own is not None else {"confidence": unseen}
    without = None if left is None else {"signals": {"s": {"confidence": left}}}
    return Measured("t", 0, {"signals": {"s": answers}}, without)  # type: ignore[dict-item]


@given(VALUES, VALUES)
def test_auroc_counts_pairs(own: list[float], others: list[float]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in own for b in others]
    assert auroc(own, others) == pytest.approx(sum(pairs) / len(pairs))


def test_groups_bins_and_error() -> None:
    found = reliability([row(own=0.95, left=0.05), row(own=0.95, left=0.15), row(unseen=0.35), row(unseen=0.97)])["s"]
    assert found["auroc"] == {"unseen": 0.5, "left_out": 1.0}
    # In the bin from 0.9 on: both own prompts, which weigh 1/4 each, and one of four others, which weigh 1/8 each.
    last = found["bins"][-1]
    assert last["weight"] == pytest.approx(0.625)
    assert last["own"] == pytest.approx(0.8)
    assert last["confidence"] == pytest.approx((0.5 * 0.95 + 0.125 * 0.97) / 0.625)
    rest = 0.125 * (0.05 + 0.15 + 0.35)
    assert found["error"] == pytest.approx(0.625 * abs(last["confidence"] - 0.8) + rest)
    shares = zip(*(found["below"][kind] for kind in ("own", "left_out", "unseen")), strict=True)
    at = dict(zip(found["below"]["confidence"], shares, strict=True))
    assert at[0.05] == (0, 0, 0) and at[0.1] == (0, 0.5, 0) and at[0.4] == (0, 1, 0.5) and at[0.95] == (0, 1, 0.5)


def test_own_rows_without_others_and_signals_without_confidence() -> None:
    found = reliability([row(own=0.5)])["s"]
    assert found.pop("below") == {"confidence": BELOW, "own": [0.0] * 10 + [1.0] * 9}
    assert found == {"auroc": {"unseen": None, "left_out": None}, "error": None, "bins": []}
    assert reliability([row(unseen=0.5)]) == {}
    assert reliability([Measured("t", 0, {"signals": {"norm": {"top1": 1.0}}}, None)]) == {}
