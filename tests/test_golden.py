"""Parity with the official code's own outputs on the tiny model F1 (tests/data/golden/README.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from logo import LoGo
from logo.prompts import Truncation
from test_engine import ids_of
from tolerances import SCORES, same_weights

GOLDEN = Path(__file__).parent / "data" / "golden"
FILES = sorted((GOLDEN / "expected").glob("*.json"))
PROMPTS = json.loads((GOLDEN / "F1" / "prompts.json").read_text())
CONTEXTS = {"base": "base", "all": "pool", "asis": "carry", "asis_reversed": "carry"}


def engine(signal: str, k: int, context: str) -> LoGo:
    how: dict[str, Any] = {"signal": signal, "k": k, "probe_context": context, "truncation": Truncation(2048, "right")}
    return LoGo.from_pretrained(str(GOLDEN / "F1" / "model"), GOLDEN / "F1" / "adapters", device="cpu", **how)


def difference(instance: dict[str, Any], answer: Any, names: tuple[str, ...]) -> str | None:
    """What is not equal in the sense of the golden README, or None."""
    selection = answer.selection
    scores = [selection.scores[name] for name in names]
    if scores != pytest.approx(instance["scores"], rel=SCORES):
        return f"scores {scores} != {instance['scores']}"
    if [names.index(name) for name in selection.adapters] != instance["selected"]:
        return f"selected {selection.adapters} != {instance['selected']}"
    if list(selection.weights) != same_weights(instance["weights"]):
        return f"weights {selection.weights} != {instance['weights']}"
    if list(answer.token_ids) != instance["gen_ids"] and instance["min_top2_margin"] >= 1e-4:
        return f"tokens {answer.token_ids} != {instance['gen_ids']}"
    return None


def test_all_golden_files_are_here() -> None:
    assert len(FILES) == 14
    modes = {re.fullmatch(r"F1_(norm|entropy)_k\d_(.+)", path.stem).groups() for path in FILES}  # type: ignore[union-attr]
    assert {signal for signal, _ in modes} == {"norm", "entropy"}
    assert {mode for _, mode in modes} == set(CONTEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_equals_official_output(path: Path) -> None:
    expected = json.loads(path.read_text())
    meta, instances = expected["meta"], expected["instances"]
    logo = engine(meta["metric"], meta["k"], CONTEXTS[meta["mode"]])
    asked = [PROMPTS["prompts"][one["prompt_index"]] for one in instances]
    size = 1 if path.stem == "F1_norm_k3_base" else 16  # the official code has one prompt at a time
    answers = logo.generate(asked, max_new_tokens=meta["max_new_tokens"], batch_size=size)
    assert [difference(*pair, logo.names) for pair in zip(instances, answers, strict=True)] == [None] * 40


def test_tokenization_is_the_official_one() -> None:
    assert ids_of(engine("norm", 3, "base"), PROMPTS["prompts"]) == PROMPTS["token_ids"]
