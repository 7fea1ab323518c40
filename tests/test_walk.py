"""A warm call enters few functions in few files, so that it can be followed by reading."""

from __future__ import annotations

from pathlib import Path

import pytest

from walk import evaluate, generate, walked


def test_generate_of_one_prompt_is_a_short_walk() -> None:
    functions = walked(generate())
    assert ("answering.py", "AnsweringEngine.generate") in functions
    assert len(functions) <= 100 and len({file for file, _ in functions}) <= 20, functions


@pytest.mark.slow
def test_an_evaluation_of_four_rows_is_a_walk_that_can_be_followed(tmp_path: Path) -> None:
    functions = walked(evaluate(tmp_path))
    assert ("cli/evaluate.py", "evaluate") in functions and ("answering.py", "AnsweringEngine.generate") in functions
    assert len(functions) <= 370 and len({file for file, _ in functions}) <= 48, functions
