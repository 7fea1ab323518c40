"""The prompts of evaluation rows in other words: how far does a selection follow the wording of a prompt?

    python tools/reworded.py ROWS OUT --pool POOL
    logo eval study --base-model M --adapters POOL --rows OUT/training,OUT/cut,OUT/terse --save study

ROWS has a file NAME.jsonl of `{"context": ..., "completion": ...}` rows per task, whose contexts are an instruction, an
empty line, and `Field: text` lines of which the last is left open. OUT gets a folder of such files for each wording:
`training` has the rows as they are, `cut` lacks the instruction (the first paragraph), and the others are those of
tests/data/wordings.yaml, or of another such file (`--wordings`). Tasks in even positions of the sorted names are for
choices; `--held-out` takes the others. Positions are counted among the tasks for which POOL has an adapter, and among
the others apart, so that both halves have some of both. Without a pool, all tasks are taken. With `--messages` rows are
conversations of one turn, for adapters that were trained on such.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a question and its answer; of several right answers, the first."""
    completion = row["completion"]
    answer = completion if isinstance(completion, str) else completion[0]
    return {"messages": [{"role": "user", "content": row["context"]}, {"role": "assistant", "content": answer.strip()}]}


def halved(tasks: Sequence[str], pool: Path, held_out: bool) -> list[str]:
    """One half of the tasks with an adapter in a pool, and one of those without."""
    with_adapter = sorted(task for task in tasks if (pool / task).is_dir())
    without = sorted(set(tasks) - set(with_adapter))
    first = int(held_out)
    return with_adapter[first::2] + without[first::2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wordings", type=Path, default=WORDINGS)
    parser.add_argument("--pool", type=Path)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--messages", action="store_true")
    options = parser.parse_args()
    of_tasks = yaml.safe_load(options.wordings.read_text(encoding="utf-8"))
    present = [task for task in of_tasks if (options.rows / f"{task}.jsonl").exists()]
    taken = present if options.pool is None else halved(present, options.pool, options.held_out)
    for task in taken:
        file = options.rows / f"{task}.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        contexts = {"training": [row["context"] for row in rows], "cut": [cut(row["context"]) for row in rows]}
        for wording, text in of_tasks[task].items():
            contexts[wording] = [reworded(text, row["context"]) for row in rows]
        for wording, of_rows in contexts.items():
            shown = [{**row, "context": text} for row, text in zip(rows, of_rows, strict=True)]
            lines = [json.dumps(conversation(row) if options.messages else row) + "\n" for row in shown]
            (options.out / wording).mkdir(parents=True, exist_ok=True)
            (options.out / wording / file.name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
