"""Counts the functions of LoGo that one warm call enters, and the files that they are in.

    python tools/walk.py                 # `LoGo.generate` of one prompt on the bundled model
    python tools/walk.py --rows          # an evaluation of four rows by an open engine
    python tools/walk.py --evaluate      # the same by `logo evaluate`, with the opening of the model and its pool
    python tools/walk.py --list          # and names them, in the order in which they are entered first

A call should be short enough to be followed by reading: tests/test_walk.py holds the numbers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import logo
from logo.demo import assets_dir

PACKAGE = str(Path(logo.__file__).parent)
PROMPT = "Give the word garden in all capitals."
INNER = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>")


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
    functions: dict[tuple[str, str], None] = {}
    for code in entered:
        name = code.co_qualname
        while name.rpartition(".")[2] in INNER:
            name = name.rpartition(".")[0].removesuffix(".<locals>")
        functions.setdefault((code.co_filename.removeprefix(f"{PACKAGE}/"), name))
    return list(functions)


def generate() -> Callable[[], object]:
    """A warm `generate` of one prompt."""
    engine = logo.LoGo.from_pretrained("demo")
    engine.generate(PROMPT, max_new_tokens=8)
    return lambda: engine.generate(PROMPT, max_new_tokens=8)


def evaluate_rows(folder: Path) -> Callable[[], object]:
    """Four rows of a dataset, answered, judged and written below a folder by an engine that is open and warm."""
    from logo.evaluation.answer import Opening
    from logo.evaluation.datasets import find_datasets
    from logo.evaluation.run import Run, answer_datasets, in_this_process

    datasets = find_datasets(assets_dir() / "heldout", "antonym", limit=4)
    answerer = Opening("demo", None, {"signal": "calibrated", "device": "cpu"}, max_new_tokens=8)()

    def evaluated(name: str) -> None:
        run = Run(folder / name, answerer.facts, in_this_process(answerer), batch_size=4)
        [done] = answer_datasets(datasets, run)
        if done.skipped:
            raise RuntimeError("nothing was evaluated")

    evaluated("cold")
    return lambda: evaluated("warm")


def evaluate(folder: Path) -> Callable[[], object]:
    """`logo evaluate` of four rows, which opens the model and its pool again, with results below a folder."""
    from logo.cli.evaluate import OfficialOptions
    from logo.cli.evaluate import evaluate as command

    def evaluated(name: str) -> None:
        options = OfficialOptions(
            dataset="antonym",
            data_dir=str(assets_dir() / "heldout"),
            limit=4,
            base_model="demo",
            gpu="-1",
            max_new_tokens=8,
            result_dir=str(folder / name),
        )
        if command(options=options) != 0:
            raise RuntimeError("the evaluation failed")

    evaluated("cold")
    return lambda: evaluated("warm")


def main() -> None:
    """Prints the count of a warm call."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    call = parser.add_mutually_exclusive_group()
    call.add_argument("--rows", action="store_true", help="an evaluation of four rows by an open engine")
    call.add_argument("--evaluate", action="store_true", help="a whole `logo evaluate` of four rows")
    parser.add_argument("--list", action="store_true", help="name the functions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.rows:
            functions = walked(evaluate_rows(Path(folder)))
        elif options.evaluate:
            functions = walked(evaluate(Path(folder)))
        else:
            functions = walked(generate())
    if options.list:
        for file, name in functions:
            print(f"{file}: {name}")
    print(f"{len(functions)} functions in {len({file for file, _ in functions})} files")


if __name__ == "__main__":
    main()
