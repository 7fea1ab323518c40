"""A warm call enters few functions in few files, so that it can be followed by reading."""

from __future__ import annotations

from logo import LoGo
from walk import PROMPT, walked


def test_generate_of_one_prompt_is_a_short_walk() -> None:
    logo = LoGo.from_pretrained("demo")
    logo.generate(PROMPT, max_new_tokens=8)
    found = walked(lambda: logo.generate(PROMPT, max_new_tokens=8))
    assert ("answering.py", "AnsweringEngine.generate") in found
    assert len(found) <= 100 and len({file for file, _ in found}) <= 20, found
