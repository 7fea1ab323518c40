"""Tasks: files and what may be wrong in them, and their rows as tokens."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learning import write_rows
from logo.errors import DataError, UsageError
from logo.scoring import joined
from logo.training.examples import encode
from logo.training.tasks import Pair, Task, find_tasks
from test_chat import MARKED, with_template
from test_engine import tokenizer

texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(str.strip)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


def write_csv(file: Path, rows: list[tuple[str, str]], names: tuple[str, str] = ("context", "completion")) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([names, *rows])
    return file


def write_parquet(file: Path, rows: list[tuple[str, str]]) -> Path:
    import datasets

    columns = {"context": [row[0] for row in rows], "completion": [row[1] for row in rows]}
    datasets.Dataset.from_dict(columns).to_parquet(str(file))
    return file


@given(rows=pairs)
def test_rows_are_the_same_in_every_kind_of_file(folder: Path, rows: list[tuple[str, str]]) -> None:
    """And so are their digests, which say whether an adapter stands already."""
    write_rows(folder / "one.jsonl", [{"context": a, "completion": b} for a, b in rows])
    write_csv(folder / "two.csv", rows)
    found = find_tasks(str(folder), only="one,two")
    expected = tuple(Pair(a, b) for a, b in rows)
    assert [(task.name, task.pairs) for task in found.tasks] == [("one", expected), ("two", expected)]
    assert found.tasks[0].sha256 == found.tasks[1].sha256 and not found.refused
    other = Task("one", "elsewhere", (*expected[:-1], Pair(rows[-1][0], rows[-1][1] + "x")))
    assert other.sha256 != found.tasks[0].sha256


def test_texts_of_csv_and_parquet_files_stay_texts(tmp_path: Path) -> None:
    rows = [("007", "0.10"), ("NA", "true"), (' a "quoted",\ncontext', "1e5"), ("long " * 40_000, "end")]
    write_csv(tmp_path / "bond.csv", rows)
    (tmp_path / "marked.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "bond.csv").read_bytes())  # as Excel saves it
    write_parquet(tmp_path / "table.parquet", rows)
    found = find_tasks(str(tmp_path))
    assert not found.refused and [task.name for task in found.tasks] == ["bond", "marked", "table"]
    for task in found.tasks:
        assert task.pairs == tuple(Pair(a, b) for a, b in rows)


def test_columns_of_other_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [("q", "r")], ("question", "answer"))
    assert find_tasks(str(tmp_path), columns=["question", "answer"]).tasks[0].pairs == (Pair("q", "r"),)
    found = find_tasks(str(tmp_path), columns=["question", "reply"]).refused["a"]
    assert "expected columns 'question' and 'reply', found no 'reply', only question, answer" in found


GOOD = b'{"context": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b"", "t.jsonl: expected one JSON object per line, found an empty file"),
        ("t.jsonl", GOOD + b'{"context": "a"\n', "t.jsonl:2: expected {"),
        ("t.jsonl", GOOD + b'{"context": "a"}\n', 't.jsonl:2: expected {"context": text, "completion": text} or '),
        ("t.jsonl", GOOD + b'{"context": "a", "completion": 7}\n', "t.jsonl:2: expected "),
        ("t.jsonl", GOOD + b'{"context": "\xff", "completion": "b"}\n', "t.jsonl:2: "),
        ("t.jsonl", b'{"messages": []}\n', 't.jsonl:1: expected a prompt in "messages", and its gold answer'),
        (
            "t.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]}\n',
            "2 message(s), the last one of the user",
        ),
        ("t.csv", b"context,completion\n", "found no rows"),
        ("t.csv", b"context,completion\na,b\nc\n", "t.csv:3: expected as many as in line 1, found another number"),
        ("t.csv", b"context,answer\na,b\n", "t.csv:2: expected {"),
        ("t.csv", b"context,completion\na,\xff\n", "t.csv: expected UTF-8"),
        ("t.csv", b'context,completion\na,"b', "t.csv:2: is not valid CSV"),
        ("t.parquet", b"PAR1 and nothing else", "t.parquet: is not a Parquet file that can be read"),
    ],
)
def test_one_bad_file_is_refused_by_name_and_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """And the others are not."""
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    found = find_tasks(str(tmp_path))
    assert [task.name for task in found.tasks] == ["good"] and list(found.refused) == ["t"]
    assert message in found.refused["t"] and name in found.refused["t"]
    assert found.names == ("good", "t")


def test_names(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "deep/b.jsonl", ".hidden/c.jsonl", ".d.jsonl", "notes.txt", "x.y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    found = find_tasks(str(tmp_path))
    assert [task.name for task in found.tasks] == ["deep/b", "x.y"]
    assert found.refused == {"a": "several files have this name (a.csv, a.jsonl); rename all but one"}
    assert [task.name for task in find_tasks(str(tmp_path), only="deep/*").tasks] == ["deep/b"]
    assert find_tasks(str(tmp_path), only="deep/*").names == ("a", "deep/b", "x.y")
    with pytest.raises(UsageError, match=r"task 'x\.yy': not found \(did you mean 'x\.y'\?\)"):
        find_tasks(str(tmp_path), only="x.yy")
    for where, message in [
        (tmp_path / "none", "expected a folder with TASK.jsonl files, found nothing"),
        (tmp_path / "a.csv", "expected a folder with TASK.jsonl files, found a file"),
        (tmp_path / ".hidden" / "empty", "expected files TASK.jsonl, TASK.csv, TASK.parquet, found none"),
    ]:
        (tmp_path / ".hidden" / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=message):
            find_tasks(str(where))


# -- as tokens ---------------------------------------------------------------------------------------------------------

words = st.lists(st.integers(3, 89).map("w{}".format), min_size=1, max_size=9).map(" ".join)


def encoded(pair: Pair, max_length: int = 99, tokens: Any = None) -> tuple[list[int], list[int], int]:
    """The tokens of prompt and completion, and whether the prompt was cut."""
    found = encode(tokens or tokenizer(), Task("t", "t.jsonl", (pair,)), max_length)
    [row] = found.rows
    return list(row.ids[: row.prompt]), list(row.ids[row.prompt :]), found.cut


@given(context=words, completion=words, max_length=st.integers(2, 24))
def test_a_prompt_is_read_as_it_will_be_asked_and_an_answer_ends(
    context: str, completion: str, max_length: int
) -> None:
    """Prompts over the limit lose their beginning, but not the token that opens every text; answers lose nothing."""
    made = tokenizer()
    whole = made(context)["input_ids"]
    answer = [*made(joined(context, completion), add_special_tokens=False)["input_ids"], made.eos_token_id]
    if len(answer) >= max_length:
        with pytest.raises(DataError, match=rf"t\.jsonl, row 1: the completion has {len(answer)} tokens, and a row"):
            encoded(Pair(context, completion), max_length)
        return
    prompt, found, cut = encoded(Pair(context, completion), max_length)
    assert found == answer and len(prompt) + len(found) <= max_length
    room = max_length - len(answer)
    assert cut == (len(whole) > room)
    if not cut:
        assert prompt == whole
    elif room == 1:
        assert prompt == whole[-1:]
    else:
        assert prompt == [made.bos_token_id, *whole[1:][-(room - 1) :]] and len(prompt) == room


def test_a_prompt_of_no_tokens_is_refused() -> None:
    """What comes first in a completion has to be predicted from something."""
    made = tokenizer(bos=False)
    with pytest.raises(DataError, match=r"t\.jsonl, row 1: the prompt has no tokens"):
        encoded(Pair(" ", "w3"), tokens=made)


MESSAGES = ({"role": "system", "content": "w9"}, {"role": "user", "content": "w4 w5"})


def test_a_conversation_is_what_the_template_makes_of_it() -> None:
    made = with_template(
        tokenizer(),
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}",
    )
    prompt, answer, _ = encoded(Pair(MESSAGES, "w7"), tokens=made)
    whole = made.apply_chat_template([*MESSAGES, {"role": "assistant", "content": "w7"}], return_dict=False)
    assert prompt == made.apply_chat_template(list(MESSAGES), add_generation_prompt=True, return_dict=False)
    assert prompt + answer == [*whole, made.eos_token_id]  # as the template ends it, and where generation stops
    parts = ({"role": "user", "content": [{"type": "text", "text": "w4 w5"}]},)
    assert encoded(Pair(parts, "w7"), tokens=made) == encoded(Pair(MESSAGES[1:], "w7"), tokens=made)


def test_without_a_template_a_conversation_is_its_texts() -> None:
    made = tokenizer()
    prompt, answer, _ = encoded(Pair(MESSAGES, "w7"))
    assert prompt == made("w9\nw4 w5")["input_ids"]
    assert answer == [*made("w7", add_special_tokens=False)["input_ids"], made.eos_token_id]
    assert encoded(Pair(MESSAGES[1:], "w7")) == encoded(Pair("w4 w5", "w7"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (({"role": "usr", "content": "w3"},), r"messages\[0\]: expected one of the roles .*'usr'"),
        (({"role": "user", "content": 3},), r"messages\[0\]: expected a 'content'"),
        (({"role": "tool", "content": "w3"},), "the model's chat template refuses them: no tools here"),
    ],
)
def test_a_conversation_that_cannot_be_read_names_its_row(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"t\.jsonl, row 1: .*{message}"):
        encoded(Pair(messages, "w7"), tokens=with_template(tokenizer(), MARKED))


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    """A task in another format is not missing unnoticed."""
    (tmp_path / "plural.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"expected files TASK.jsonl, .*, found notes.txt, plural.json"):
        find_tasks(str(tmp_path))
    write_csv(tmp_path / "capital.csv", [("a", "b")])
    with pytest.warns(UserWarning, match=r": plural.json not read: rows are in files TASK.jsonl"):
        found = find_tasks(str(tmp_path))
    assert [task.name for task in found.tasks] == ["capital"]
    find_tasks(str(tmp_path), only="capital")  # no warning: the task was asked for by name
