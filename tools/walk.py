"""Counts the functions of LoGo that one warm call enters, and the files that they are in.

    python tools/walk.py                 # `LoGo.generate` of one prompt on the bundled model
    python tools/walk.py --list          # and names them, in the order in which they are entered first

A call should be short enough to be followed by reading: tests/test_walk.py holds the numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import logo

PACKAGE = str(Path(logo.__file__).parent)
PROMPT = "Give the word garden in all capitals."


def walked(call: Callable[[], object]) -> list[tuple[str, str]]:
    """The (file, function) pairs of the package that a call enters in this thread, in the order of the first entry.

    Comprehensions, lambdas and generator expressions count as a part of the function around them.
    """
    entered: dict[CodeType, None] = {}

    def entering(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.setdefault(frame.f_code)

    sys.setprofile(entering)
    try:
        call()
    finally:
        sys.setprofile(None)
    found: dict[tuple[str, str], None] = {}
    for code in entered:
        name = code.co_qualname
        while name.rpartition(".")[2] in ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>"):
            name = name.rpartition(".")[0].removesuffix(".<locals>")
        found.setdefault((code.co_filename.removeprefix(f"{PACKAGE}/"), name))
    return list(found)


def main() -> None:
    """Prints the count of a warm `generate`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the functions")
    asked = parser.parse_args()
    engine = logo.LoGo.from_pretrained("demo")
    engine.generate(PROMPT, max_new_tokens=8)
    found = walked(lambda: engine.generate(PROMPT, max_new_tokens=8))
    if asked.list:
        for file, name in found:
            print(f"{file}: {name}")
    print(f"{len(found)} functions in {len({file for file, _ in found})} files")


if __name__ == "__main__":
    main()
