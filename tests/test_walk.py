"""A warm call enters few functions in few files, so that it can be followed by reading."""

from __future__ import annotations

from pathlib import Path

from walk import evaluate_rows, generate, walked


def test_generate_of_one_prompt_is_a_short_walk() -> None:
    functions = walked(generate())
    assert ("answering.py", "AnsweringEngine.generate") in functions
    assert len(functions) <= 100 and len({file for file, _ in functions}) <= 21, functions


def test_an_evaluation_of_four_rows_is_a_walk_that_can_be_followed(tmp_path: Path) -> None:
    functions = walked(evaluate_rows(tmp_path))
    assert ("evaluation/run.py", "answer_datasets") in functions
    assert ("answering.py", "AnsweringEngine.generate") in functions
    assert len(functions) <= 300 and len({file for file, _ in functions}) <= 45, functions
