"""Tasks: files and what may be wrong in them, and their rows as tokens."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learning import examples, write_rows
from logo.errors import DataError, UsageError
from logo.models import load_tokenizer
from logo.rows import Row
from logo.scoring import joined
from logo.training.config import TrainingConfig
from logo.training.rows import Task, encoded, opening, read_task, shortened, split, task_files
from test_chat import with_template
from test_engine import tokenizer

CONFIG = TrainingConfig()
ASSISTANT = TrainingConfig(activation="assistant")
GOOD = b'{"context": "w3", "completion": "w4"}\n'


def read(file: Path, config: TrainingConfig = CONFIG, tokens: Any = None) -> Task:
    return read_task(file.stem, file, tokens or tokenizer(), config)


# -- files -------------------------------------------------------------------------------------------------------------


def test_rows_of_csv_files_are_texts(tmp_path: Path) -> None:
    """The same rows as those of a JSONL file, whose digest says whether an adapter stands already."""
    tokens = load_tokenizer("demo")
    rows = [("007", "0.10"), ("NA", "true"), (' a "quoted",\ncontext', "1e5"), ("long " * 40_000, "end")]
    with (tmp_path / "bond.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("context", "completion"), *rows])
    (tmp_path / "marked.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "bond.csv").read_bytes())  # as Excel saves it
    write_rows(tmp_path / "lines.jsonl", [{"context": a, "completion": b} for a, b in rows])
    found = [read(tmp_path / name, tokens=tokens) for name in ("bond.csv", "marked.csv", "lines.jsonl")]
    assert len({task.sha256 for task in found}) == 1
    assert found[0].learned == found[2].learned and len(found[0].learned) == 4 and found[0].cut == 1
    assert found[0].prompts == tuple(row[0] for row in rows)
    write_rows(tmp_path / "other.jsonl", [{"context": a, "completion": b + "x"} for a, b in rows])
    assert read(tmp_path / "other.jsonl", tokens=tokens).sha256 != found[0].sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b"", "t.jsonl: expected one JSON object per line, found an empty file"),
        ("t.jsonl", GOOD + b'{"context": "a"\n', "t.jsonl:2: expected {"),
        ("t.jsonl", GOOD + b'{"context": "a"}\n', "t.jsonl:2: expected {"),
        ("t.jsonl", b'{"messages": []}\n', 't.jsonl:1: expected a prompt in "messages", and its gold answer'),
        ("t.csv", b"context,completion\n", "found no rows"),
        ("t.csv", b"context,completion\na,b\nc\n", "t.csv:3: expected as many as in line 1, found another number"),
        ("t.csv", b"context,completion\na,\xff\n", "t.csv:1: is not valid CSV in UTF-8"),
        ("t.csv", b'context,completion\na,b\na,"b', "t.csv:2: is not valid CSV in UTF-8"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_names(tmp_path: Path) -> None:
    for name in ("a.csv", "deep/b.jsonl", ".hidden/c.jsonl", ".d.jsonl", "notes.txt", "x.y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / ".hidden" / "empty").mkdir()
    assert list(task_files(tmp_path)) == ["a", "deep/b", "x.y"]
    assert task_files(tmp_path, "deep/*,a") == {"a": tmp_path / "a.csv", "deep/b": tmp_path / "deep" / "b.jsonl"}
    with pytest.raises(UsageError, match=r"task 'x\.yy': not found \(did you mean 'x\.y'\?\)"):
        task_files(tmp_path, "x.yy")
    (tmp_path / "plural.json").write_text("[]")
    with pytest.warns(UserWarning, match=r": plural\.json not read: rows are in files TASK\.jsonl or TASK\.csv"):
        task_files(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    for where, message in [
        (tmp_path, r"a\.csv and .*a\.jsonl are two files of one task"),
        (tmp_path / "none", "expected a folder with TASK.jsonl files, found nothing"),
        (tmp_path / "a.csv", "expected a folder with TASK.jsonl files, found a file"),
        (tmp_path / ".hidden" / "empty", r"expected files TASK\.jsonl or TASK\.csv, found none"),
    ]:
        with pytest.raises(DataError, match=message):
            task_files(where)


# -- as tokens ---------------------------------------------------------------------------------------------------------

words = st.lists(st.integers(3, 89).map("w{}".format), min_size=1, max_size=9).map(" ".join)
MESSAGES = ({"role": "system", "content": "w9"}, {"role": "user", "content": "w4 w5"})


def tokens_of(row: Row, tokens: Any = None) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of the completion."""
    found = encoded(tokens or tokenizer(), row)
    return list(found.ids[: found.prompt]), list(found.ids[found.prompt :])


@given(context=words, completion=words, most=st.integers(2, 24))
def test_a_text_and_its_completion(context: str, completion: str, most: int) -> None:
    """Prompts over the limit lose their beginning, but not the token that opens every text; answers lose nothing."""
    made = tokenizer()
    prompt, answer = tokens_of(Row(context, completion))
    assert prompt == made(context)["input_ids"]
    assert answer == [*made(joined(context, completion), add_special_tokens=False)["input_ids"], made.eos_token_id]
    room = most - len(answer)
    if room < 1:
        with pytest.raises(DataError, match=rf"the completion has {len(answer)} tokens, and a row may have {most} "):
            shortened(made, encoded(made, Row(context, completion)), most)
        return
    found = shortened(made, encoded(made, Row(context, completion)), most)
    assert list(found.ids[found.prompt :]) == answer and len(found) <= most
    kept = list(found.ids[: found.prompt])
    if len(prompt) <= room:
        assert kept == prompt
    else:
        assert kept == (prompt[-1:] if room == 1 else [made.bos_token_id, *prompt[1:][-(room - 1) :]])


def test_a_conversation_is_what_the_template_makes_of_it() -> None:
    made = with_template(
        tokenizer(),
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}",
    )
    prompt, answer = tokens_of(Row("", "w7", messages=MESSAGES), made)
    whole = made.apply_chat_template([*MESSAGES, {"role": "assistant", "content": "w7"}], return_dict=False)
    assert prompt == made.apply_chat_template(list(MESSAGES), add_generation_prompt=True, return_dict=False)
    assert prompt + answer == [*whole, made.eos_token_id]  # as the template ends it, and where generation stops
    prompt, answer = tokens_of(Row("", "w7", messages=MESSAGES))  # without a template it is its texts
    assert prompt == tokenizer()("w9\nw4 w5")["input_ids"]
    assert answer == [*made("w7", add_special_tokens=False)["input_ids"], made.eos_token_id]


# -- where adapters act ------------------------------------------------------------------------------------------------


def chats(file: Path, *prompts: str) -> Path:
    answer = {"role": "assistant", "content": "w5"}
    return write_rows(file, [{"messages": [{"role": "user", "content": text}, answer]} for text in prompts])


def test_the_assistants_turn_begins_where_the_template_opens_it(tmp_path: Path) -> None:
    """Also with a tokenizer that splits what opens it by what stands before it."""
    tokens = load_tokenizer("demo")
    text = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokens.chat_template = text + "{% if add_generation_prompt %}Answer:{% endif %}"
    found = read(chats(tmp_path / "t.jsonl", "One?", "Answer: or not? Two?"), ASSISTANT, tokens)
    assert tokens.convert_ids_to_tokens(list(found.invocation)) == ["\u0120Answer", ":"]
    assert [row.begin for row in found.learned] == [row.prompt - 2 for row in found.learned]
    last = read(tmp_path / "t.jsonl", replace(CONFIG, activation="last:3"), tokens)
    assert not last.invocation and [row.begin for row in last.learned] == [row.prompt - 3 for row in last.learned]
    assert len({found.sha256, last.sha256, read(tmp_path / "t.jsonl", tokens=tokens).sha256}) == 3


def test_what_opens_no_turn(tmp_path: Path) -> None:
    made = with_template(tokenizer(), "{% for m in messages %}w9 {{ m.content }} {% endfor %}")
    for row in (Row("w3", "w4"), Row("", "w4", messages=MESSAGES)):
        with pytest.raises(DataError, match="activation assistant: expected a conversation"):
            opening(made, row)
    with pytest.raises(
        DataError, match=r"row 1: activation assistant: expected a conversation .* give --activation last:4"
    ):
        read(chats(tmp_path / "t.jsonl", "w4"), ASSISTANT)
    text = "{% for m in messages %}{{ m.content }} {% endfor %}"
    asks = "{% if add_generation_prompt %}{% if messages[0].content == 'w6' %}w8{% else %}w9{% endif %}{% endif %}"
    with pytest.raises(DataError, match=r"t\.jsonl, row 2: its chat template opens the assistant's turn in another"):
        read(chats(tmp_path / "t.jsonl", "w4", "w6"), ASSISTANT, with_template(tokenizer(), text + asks))


# -- rows that are held out, steps -------------------------------------------------------------------------------------


def test_copies_of_held_out_rows_are_not_learned_from() -> None:
    some = examples(20, 5)
    learned, held_out = split("a", CONFIG, (*some, *some))
    assert len(held_out) == 4 and not set(learned) & set(held_out)
    assert set(learned) | set(held_out) == set(some) and len(learned) == 40 - 2 * len(set(held_out))
    assert split("a", replace(CONFIG, held_out=0.0), (*some, *some)) == ((*some, *some), ())
    plain = split("a", CONFIG, some)
    assert len(plain[0]) == 18 and len(plain[1]) == 2  # nothing is lost where there are no copies
    assert split("a", CONFIG, some[:1] * 12) == (some[:1] * 12, ())  # nothing would be left to learn


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    config, task = TrainingConfig(batch_size=5), Task("a", examples(18))
    epochs = [[row for step in range(at, at + 4) for row in task.batch(step, config)] for at in (0, 4)]
    assert all(sorted(map(id, rows)) == sorted(map(id, task.learned)) for rows in epochs) and epochs[0] != epochs[1]
    lengths = [replace(config, epochs=epochs).length(18) for epochs in (0.1, 2.0, 2.5)]
    assert lengths == [1, 8, 10] and replace(config, steps=7).length(18) == 7
    assert [config.held_out_rows(rows) for rows in (9, 10, 600, 6000)] == [0, 1, 60, 64]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r: expected 1 or more, found 0"),
        ({"lr": math.nan}, "lr: expected a number above 0, found nan"),
        ({"targets": ","}, "targets: expected names of modules or all-linear, found ','"),
        ({"activation": "late"}, "or assistant, found 'late'"),
        (
            {"activation": "last:0"},
            r"activation: expected everywhere, last:N \(N is 1 or more\) or assistant, found 'last:0'",
        ),
    ],
)
def test_what_no_config_has(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingConfig(**values)
