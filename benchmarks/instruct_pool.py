"""A pool of adapters for an instruct base, trained on conversations: close relatives, other ranks and modules, rsLoRA,
and one that is hardly trained.

    python benchmarks/instruct_pool.py DATA Qwen/Qwen2.5-Coder-0.5B-Instruct instruct
    python tools/reworded.py instruct/test words --messages
    logo eval study --base-model Qwen/Qwen2.5-Coder-0.5B-Instruct --adapters instruct/pool \\
        --rows words/training,words/cut,words/terse,words/chatty,words/first --generate 24 --save study

DATA has train/TASK.jsonl and test/TASK.jsonl of `{"context": ..., "completion": ...}` rows. Two tasks are made here.
The same command trains what an interrupted run has not finished.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from logo.cli.train import train
from logo.training.config import TrainingConfig

sys.path.append(str(Path(__file__).parent.parent / "tools"))

from reworded import conversation

USUAL = TrainingConfig(
    r=16,
    alpha=32.0,
    targets="q_proj,k_proj,v_proj,o_proj",
    lr=1e-3,
    steps=24,
    max_length=160,
    held_out=0.0,
)


@dataclass(frozen=True)
class Group:
    """Tasks whose adapters are made alike: `changes` are those of the usual training, and `lr_share` is the learning
    rate as a share of the usual one."""

    tasks: tuple[str, ...]
    changes: Mapping[str, object]
    lr_share: float = 1.0


# Among the first twelve, some are close relatives: two languages, two kinds of entailment, two kinds of questions.
USUAL_TASKS = (
    "caption_en_de",
    "caption_en_fr",
    "tatoeba_de_en",
    "mnli",
    "sick_entailment",
    "trec_question_type",
    "clinc_domain",
    "banking_intent",
    "antonyms",
    "sort_numbers",
    "tatoeba_en_es",
    "word_en_de",
    "tweet_emotion",
    "active_to_passive",
    "sentence_negation",
    "singular_to_plural",
    "number_to_words",
    "date_to_iso",
    "addition",
)
OTHER_GROUPS = (
    Group(("sst2_polarity",), {"rslora": True}, lr_share=0.5),
    Group(("ag_news_topic",), {"r": 64, "alpha": 64.0, "targets": "all-linear"}, lr_share=0.5),
    Group(("verb_past_tense",), {"steps": 5}),
)


def sort_numbers(rng: random.Random) -> tuple[str, str]:
    """A prompt with five numbers, and the answer: the same in ascending order."""
    numbers = rng.sample(range(100), 5)
    shown = ", ".join(map(str, numbers))
    context = f"Put the numbers in order, the smallest first.\n\nNumbers: {shown}\nSorted:"
    return context, ", ".join(map(str, sorted(numbers)))


def date_to_iso(rng: random.Random) -> tuple[str, str]:
    """A prompt with a date in words, and the answer: the date as ISO 8601 writes it."""
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(30_000))
    context = f"Write the date as year, month and day in digits.\n\nDate: {day:%B} {day.day}, {day.year}\nDigits:"
    return context, day.isoformat()


OWN_TASKS = {"sort_numbers": sort_numbers, "date_to_iso": date_to_iso}


def own_rows(task: str, part: str, count: int) -> Iterator[dict[str, str]]:
    """Rows of a task that is made here: in every run the same, and others for training than for testing."""
    rng = random.Random(f"{task} {part}")
    for _ in range(count):
        context, completion = OWN_TASKS[task](rng)
        yield {"context": context, "completion": completion}


def write_rows(data: Path, out: Path, tasks: Sequence[str]) -> None:
    """Writes rows to learn from, as conversations of one turn, and rows to test with, as they are: those of tasks
    without adapter too."""
    for part in ("train", "test"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for file in sorted((data / "test").glob("*.jsonl")):
        shutil.copy(file, out / "test" / file.name)
    for task in tasks:
        if task in OWN_TASKS:
            rows = list(own_rows(task, "train", 500))
            tested = "".join(json.dumps(row) + "\n" for row in own_rows(task, "test", 40))
            (out / "test" / f"{task}.jsonl").write_text(tested, encoding="utf-8")
        else:
            text = (data / "train" / f"{task}.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
        lines = [json.dumps(conversation(row)) + "\n" for row in rows]
        (out / "train" / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("base_model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--usual", type=int, default=len(USUAL_TASKS), help="how many of the usual adapters")
    parser.add_argument("--steps", type=int, default=USUAL.steps, help="of each training")
    parser.add_argument("--batch-size", type=int, default=USUAL.batch_size, help="rows of a step")
    parser.add_argument("--lr", type=float, default=USUAL.lr, help="learning rate: less for larger bases")
    options = parser.parse_args(arguments)
    usual = Group(USUAL_TASKS[: options.usual], {})
    groups = (usual, *OTHER_GROUPS)
    write_rows(options.data, options.out, [task for group in groups for task in group.tasks])
    failed = 0
    for group in groups:
        values = {**vars(USUAL), "steps": options.steps, "batch_size": options.batch_size}
        values |= {"lr": options.lr * group.lr_share, **group.changes}
        failed += train(
            rows=options.out / "train",
            save=options.out / "pool",
            base_model=options.base_model,
            tasks=",".join(group.tasks),
            config=TrainingConfig(**values),
        )
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
