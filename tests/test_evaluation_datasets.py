"""Finding datasets and reading their rows, most of it about input that is not as it should be."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from answering import load_rows
from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.datasets import OFFICIAL, dataset_file, find_datasets
from logo.rows import Row, file_sha256, read_rows

BBH = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "logo"
GOOD = '{"context": "Q: 1 + 1\\nA:", "completion": "2"}'

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def put(root: Path, dataset: str, content: str | bytes = GOOD + "\n", split: str = "test") -> Path:
    file = dataset_file(root, dataset, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# --- rows


@given(
    rows=st.lists(st.tuples(TEXT, TEXT | st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=6),
    ascii_only=st.booleans(),
    end=st.sampled_from(["", "\n", "\r\n", "\n\n \n"]),
    bom=st.booleans(),
    limit=st.none() | st.integers(1, 8),
)
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str | list[str]]],
    ascii_only: bool,
    end: str,
    bom: bool,
    limit: int | None,
) -> None:
    lines = [json.dumps({"context": a, "completion": b, "more": 1}, ensure_ascii=ascii_only) for a, b in rows]
    root = tmp_path_factory.mktemp("data")
    put(root, "mine.rows", b"\xef\xbb\xbf" * bom + ("\n".join(lines) + end).encode())
    expected = [Row(a, b if isinstance(b, str) else tuple(b)) for a, b in rows]
    assert load_rows(root, "mine.rows", limit) == expected[:limit]


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"context": TEXT, "completion": TEXT | st.lists(TEXT, min_size=1, max_size=3)},
            optional={"references": st.none() | st.lists(TEXT, min_size=1, max_size=3), "adapter": st.none() | TEXT},
        ),
        min_size=1,
        max_size=5,
    )
)
def test_references_and_adapters(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    root = tmp_path_factory.mktemp("data")
    put(root, "mine.rows", "\n".join(map(json.dumps, rows)))
    for given_, row in zip(rows, load_rows(root, "mine.rows"), strict=True):
        present = {key: value for key, value in given_.items() if value is not None}
        assert json.loads(json.dumps(row.as_dict())) == present
        assert (list(row.references), row.adapter) == (present.get("references", []), present.get("adapter"))
        completion = present["completion"]
        first = [completion] if isinstance(completion, str) else completion
        assert list(row.golds) == list(dict.fromkeys([*first, *present.get("references", [])]))


def test_blank_references_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    start = '{"context": "a", "completion": "b", "references": '
    file.write_text(f'{start}["", "c", " "]}}\n{start}[" "]}}\n')
    assert [row.references for row in read_rows(file)] == [("c",), ()]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ('"references": "a"', """found 'references' is "a\""""),
        ('"references": []', "found 'references' is an empty list"),
        ('"references": ["a", 3]', "found 'references'[1] is 3"),
        ('"adapter": ""', "found 'adapter' is empty"),
        ('"adapter": ["a"]', "found 'adapter' is a list"),
    ],
)
def test_malformed_references_and_adapters_are_named(tmp_path: Path, value: str, found: str) -> None:
    file = put(tmp_path, "mine.rows", f'{GOOD}\n{{"context": "a", "completion": "b", {value}}}\n')
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, "mine.rows")
    message = str(caught.value)
    assert message.startswith(f'{file}:2: expected "references", if there are any, to be a list of texts')
    assert found in message and message.endswith("fix or delete the line")


def test_the_official_rows() -> None:
    rows = load_rows(BBH, "bbh.boolean_expressions")
    assert len(rows) == 8
    assert rows[0].context.startswith("Evaluate the result of a random Boolean expression.\n\nQ: ")
    assert {row.completion for row in rows} == {"True", "False"}
    assert load_rows(BBH, "bbh.boolean_expressions", 3) == rows[:3]


def test_another_split(tmp_path: Path) -> None:
    put(tmp_path, "mine.rows", split="train")
    assert load_rows(tmp_path, "mine.rows", split="train") == [Row("Q: 1 + 1\nA:", "2")]
    with pytest.raises(DataError, match=r"test\.jsonl: expected a file, found none"):
        load_rows(tmp_path, "mine.rows")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"context": "a", "completion": ', "invalid JSON: Expecting value at column 32"),
        ("nonsense", "invalid JSON: Expecting value at column 1"),
        ("", "an empty line between rows"),
        ('["a", "b"]', "found a list"),
        ("null", "found null"),
        ('"text"', 'found "text"'),
        ("12", "found 12"),
        ("{}", "no 'context', only \"\""),
        ('{"completion": "b", "input": "a"}', "no 'context', only \"completion, input\""),
        ('{"context": "a"}', "no 'completion', only \"context\""),
        ('{"context": null, "completion": "b"}', "'context' is null"),
        ('{"context": ["a"], "completion": "b"}', "'context' is a list"),
        ('{"context": "", "completion": "b"}', "'context' is empty"),
        ('{"context": " \\n", "completion": "b"}', "'context' is empty"),
        ('{"context": "a", "completion": true}', "'completion' is true"),
        ('{"context": "a", "completion": {"b": 1}}', "'completion' is an object"),
        ('{"context": "a", "completion": ""}', "'completion' is empty"),
        ('{"context": "a", "completion": []}', "'completion' is an empty list"),
        ('{"context": "a", "completion": ["b", 3]}', "'completion'[1] is 3"),
        ('{"context": "a", "completion": ["b", ""]}', "'completion'[1] is empty"),
        ('{"context": "a", "completion": [["b"]]}', "'completion'[0] is a list"),
        ('{"context": "a\\ud800", "completion": "b"}', "'context' holds half of a surrogate pair"),
        (b'{"context": "caf\xe9", "completion": "b"}', "bytes that are not UTF-8 at column 17"),
        ("[" * 200_000, "unreadable JSON: "),
        ('{"context": ' + "1" * 5000 + "}", "unreadable JSON: "),
    ],
    ids=lambda value: None if len(value) < 100 else "long",
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str | bytes, found: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    file = put(tmp_path, "mine.rows", f"{GOOD}\n".encode() * 2 + raw + b"\n" + GOOD.encode())
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, "mine.rows", limit=1)  # the whole file is checked whatever the limit
    message = str(caught.value)
    assert message.startswith(f"{file}:3: expected {{")
    assert found in message
    assert message.endswith("fix or delete the line")
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(file)) + 300


def test_the_first_of_several_empty_lines_is_named(tmp_path: Path) -> None:
    file = put(tmp_path, "mine.rows", f"{GOOD}\n\n \n\n{GOOD}\n")
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, "mine.rows")
    assert str(caught.value).startswith(f"{file}:2: ")


@given(st.binary(max_size=40))
def test_any_bytes_are_rows_or_one_clear_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzz"
    file = put(root, "mine.rows", f"{GOOD}\n".encode() + content)
    try:
        rows = load_rows(root, "mine.rows")
    except DataError as error:
        assert str(error).startswith(f"{file}:")
        assert len(str(error).splitlines()) == 1
    else:
        assert rows == [Row("Q: 1 + 1\nA:", "2")]
        assert not content.strip()


@pytest.mark.parametrize("content", ["", "\n", " \n\n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    file = put(tmp_path, "mine.rows", content)
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, "mine.rows")
    assert str(caught.value) == f"{file}: expected one JSON object per line, found an empty file"


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(UsageError, match=f"limit {limit}: expected at least 1"):
        load_rows(BBH, "bbh.word_sorting", limit)


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    dataset_file(tmp_path, "mine.rows").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"test\.jsonl: cannot be read \(Is a directory\)"):
        load_rows(tmp_path, "mine.rows")


def test_sha256(tmp_path: Path) -> None:
    file = put(tmp_path, "mine.rows")
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(DataError, match="expected a file"):
        file_sha256(tmp_path / "none")


# --- names


def test_the_official_list() -> None:
    assert len(OFFICIAL) == len(set(OFFICIAL)) == 26
    mains = Counter(name.partition(".")[0] for name in OFFICIAL)
    assert mains == Counter(bbh=8, wmt14=2, wmt16=4, gem=4, ai2_arc=2, nq=1, tqa=1, anli=3, glue=1)


def test_a_name_is_a_file() -> None:
    assert dataset_file("d", "bbh.navigate") == Path("d/bbh/navigate/test.jsonl")
    assert dataset_file("d", "x.v1.2", "train") == Path("d/x/v1.2/train.jsonl")


@given(st.text(alphabet="a./\\\0-", max_size=8))
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    root = Path("/data/logo")
    try:
        file = dataset_file(root, name)
    except DataError:
        return
    assert ".." not in file.parts
    assert file.parent.parent.parent == root


@pytest.mark.parametrize("name", ["../x.y", "x...", "x..", ".x", "x.", "/etc.d", "x.a/b", "x.\\b", "..", "a/../b.c"])
def test_names_that_would_escape_are_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, "bbh.navigate")
    for call in (load_rows, find_datasets):
        with pytest.raises(DataError, match=r"expected a name like 'bbh\.navigate'"):
            call(tmp_path, name)


def test_everything_in_official_order_then_the_rest(tmp_path: Path) -> None:
    for name in ("zoo.b", "glue.qnli", "alpha.c", "bbh.word_sorting", "bbh.navigate", "zoo.a.1"):
        put(tmp_path, name)
    put(tmp_path, "gem.dart", split="train")  # no test split: not there
    put(tmp_path / ".cache", "x.y")
    (tmp_path / "zoo" / ".hidden").mkdir()
    (tmp_path / "zoo" / ".hidden" / "test.jsonl").write_text(GOOD)
    found = find_datasets(tmp_path)
    assert found.names == ("bbh.navigate", "bbh.word_sorting", "glue.qnli", "alpha.c", "zoo.a.1", "zoo.b")
    assert found.missing == tuple(name for name in OFFICIAL if name not in found.names)
    assert all(load_rows(tmp_path, name) for name in found.names)


def test_names_lists_and_patterns(tmp_path: Path) -> None:
    for name in ("bbh.navigate", "bbh.word_sorting", "anli.r1", "anli.r2", "anli.r3", "zoo.b"):
        put(tmp_path, name)
    assert find_datasets(tmp_path, "zoo.b").names == ("zoo.b",)
    assert find_datasets(tmp_path, "zoo.b, bbh.navigate,").names == ("zoo.b", "bbh.navigate")
    assert find_datasets(tmp_path, "bbh.*").names == ("bbh.navigate", "bbh.word_sorting")
    assert "bbh.web_of_lies" in find_datasets(tmp_path, "bbh.*").missing
    assert find_datasets(tmp_path, "anli.r[13]").missing == ()
    assert find_datasets(tmp_path, "anli.r3,anli.*,zoo.?").names == ("anli.r3", "anli.r1", "anli.r2", "zoo.b")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("bbh.navigat", "did you mean 'bbh.navigate'"),
        ("boolean_expressions", "did you mean 'bbh.boolean_expressions'"),
        ("BBH.Navigate", "did you mean 'bbh.navigate'"),
        ("arc-easy", "'ai2_arc.ARC-Easy'"),
        ("zoo.lion", "did you mean 'zoo.lions'"),
        ("bbh", "did you mean 'bbh.*'?"),
        ("bbh/navigate", "did you mean 'bbh.navigate'"),
        ("qqqqqq.zzzzzz", "qqqqqq/zzzzzz/test.jsonl, found none; `logo data list` shows what is there"),
        ("bbh.web_of_lies", "expected the file {root}/bbh/web_of_lies/test.jsonl, found none; put it there"),
        ("gem.*", "expected the file {root}/gem/common_gen/test.jsonl, found none"),
        ("nothing.*", "no dataset in '{root}' matches"),
        ("../*", "no dataset in '{root}' matches"),
        ("bbh.navigate,nope", "dataset 'nope': unknown"),
    ],
)
def test_unknown_and_absent_datasets(tmp_path: Path, request_: str, message: str) -> None:
    put(tmp_path, "bbh.navigate")
    put(tmp_path, "zoo.lions")
    with pytest.raises(DataError) as caught:
        find_datasets(tmp_path, request_)
    assert message.format(root=tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_list_of_nothing_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected names separated by commas"):
        find_datasets(tmp_path, " , ")


def test_data_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found nothing; name it with --data_dir"):
        find_datasets(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="found a file"):
        find_datasets(tmp_path / "file")
    with pytest.raises(DataError, match=r"bbh/boolean_expressions/test\.jsonl, found none"):
        find_datasets(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not on this machine")
def test_every_shared_file_loads() -> None:
    found = find_datasets(SHARED)
    assert found.missing == ()
    assert found.names[:26] == OFFICIAL
    for name in found.names:
        assert load_rows(SHARED, name), name
    answers = {type(row.completion) for row in load_rows(SHARED, "nq.natural-questions")}
    assert answers == {tuple}
