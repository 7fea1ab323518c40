"""The prompts of evaluation rows in other words: how far does a selection follow the wording of a prompt?

    python tools/reworded.py ROWS OUT --wording terse       or chatty, or first: the input comes first
    python tools/reworded.py ROWS OUT --wording cut         the instruction (the first paragraph) cut off

ROWS has a file NAME.jsonl of `{"context": ..., "completion": ...}` rows per task, whose contexts are an instruction, an
empty line, and `Field: text` lines of which the last is left open. The wordings are in tests/data/wordings.yaml. Tasks
in even positions of the sorted names are for choices; `--held-out` takes the others. `logo eval study --protocols
in-pool` measures the result (docs/how-selection-works.md).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import yaml

WORDINGS = Path(__file__).parent.parent / "tests" / "data" / "wordings.yaml"


def cut(context: str) -> str:
    """A prompt without its first paragraph."""
    return context.split("\n\n", 1)[1]


def reworded(wording: str, context: str) -> str:
    """A prompt in other words: a text in which `{0}`, `{1}`, ... stand for the prompt's fields."""
    lines = cut(context).split("\n")
    closed = lines[:-1] or lines  # the last one is left open, but for tasks of a single line
    return wording.format(*(re.sub(r"^[\w ]{1,14}: ", "", line) for line in closed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wording", choices=("terse", "chatty", "first", "cut"), required=True)
    parser.add_argument("--held-out", action="store_true")
    options = parser.parse_args()
    wordings = yaml.safe_load(WORDINGS.read_text(encoding="utf-8"))
    options.out.mkdir(parents=True)
    for task in sorted(wordings)[int(options.held_out) :: 2]:
        file = options.rows / f"{task}.jsonl"
        if not file.exists():
            continue
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            if options.wording == "cut":
                row["context"] = cut(row["context"])
            else:
                row["context"] = reworded(wordings[task][options.wording], row["context"])
        (options.out / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
