"""The datasets of a folder and their rows, most of it about input that is not as it should be."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from answering import load_rows
from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.datasets import Dataset, dataset_file, find_datasets
from logo.rows import Row, read_rows

BBH = Path(__file__).parent / "data"
GOOD = '{"context": "Q: 1 + 1\\nA:", "completion": "2"}'

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def put(root: Path, dataset: str, content: str | bytes = GOOD + "\n", split: str = "test") -> Path:
    file = dataset_file(root, dataset, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# --- rows


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"context": TEXT, "completion": TEXT | st.lists(TEXT, min_size=1, max_size=3)},
            optional={
                "references": st.none() | st.lists(TEXT, min_size=1, max_size=3),
                "adapter": st.none() | TEXT,
                "more": st.just(1),
            },
        ),
        min_size=1,
        max_size=5,
    ),
    ascii_only=st.booleans(),
    end=st.sampled_from(["", "\n", "\r\n", "\n\n \n"]),
    bom=st.booleans(),
    limit=st.none() | st.integers(1, 8),
)
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    ascii_only: bool,
    end: str,
    bom: bool,
    limit: int | None,
) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    root = tmp_path_factory.mktemp("data")
    put(root, "mine.rows", b"\xef\xbb\xbf" * bom + ("\n".join(lines) + end).encode())
    found = load_rows(root, "mine.rows", limit)
    assert len(found) == len(rows[:limit])
    for given_, row in zip(rows, found, strict=False):
        present = {key: value for key, value in given_.items() if value is not None and key != "more"}
        assert json.loads(json.dumps(row.as_dict())) == present
        first = [present["completion"]] if isinstance(present["completion"], str) else present["completion"]
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
    assert (
        message.startswith(f"{file}:2: expected ") and found in message and message.endswith("fix or delete the line")
    )


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


def test_prompts_may_come_without_gold_texts(tmp_path: Path) -> None:
    lines = [
        '{"context": "a"}',
        '{"context": "b", "completion": "c"}',
        '{"messages": [{"role": "user", "content": "d"}]}',
    ]
    lines.append('{"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]}')
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"x\.jsonl:1: .* no 'completion', only \"context\""):
        read_rows(file)
    rows = read_rows(file, answers=False)
    assert [(row.context, row.golds) for row in rows] == [("a", ()), ("b", ("c",)), ("d", ()), ("e", ("f",))]
    assert rows[0].as_dict() == {"context": "a"} and len(rows[3].messages) == 1
    file.write_text('{"completion": "c"}')
    with pytest.raises(DataError, match=r"x\.jsonl:1: .* no 'context'"):
        read_rows(file, answers=False)


# --- names


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


def names(folder: Path, request: str = "") -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [found.name for found in find_datasets(folder, request)]


@pytest.mark.parametrize("name", ["../x.y", "x...", "x..", ".x", "x.", "/etc.d", "x.a/b", "x.\\b", "..", "a/../b.c"])
def test_names_that_would_escape_are_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, "bbh.navigate")
    with pytest.raises(DataError, match=r"expected a name like 'bbh\.navigate'"):
        load_rows(tmp_path, name)
    with pytest.raises(DataError, match=r"not in .*; there are bbh\.navigate"):
        find_datasets(tmp_path, name)


def test_everything_in_official_order_then_the_rest(tmp_path: Path) -> None:
    for name in ("zoo.b", "glue.qnli", "alpha.c", "bbh.word_sorting", "bbh.navigate", "zoo.a.1"):
        put(tmp_path, name)
    put(tmp_path, "gem.dart", split="train")  # no test split: not there
    put(tmp_path / ".cache", "x.y")
    (tmp_path / "zoo" / ".hidden").mkdir()
    (tmp_path / "zoo" / ".hidden" / "test.jsonl").write_text(GOOD)
    with pytest.warns(UserWarning, match=r"left out: bbh\.boolean_expressions, .*gem\.dart"):
        found = find_datasets(tmp_path)
    assert [one.name for one in found] == [
        "bbh.navigate",
        "bbh.word_sorting",
        "glue.qnli",
        "alpha.c",
        "zoo.a.1",
        "zoo.b",
    ]
    one = found[0]
    assert one == Dataset(
        "bbh.navigate",
        tmp_path / "bbh/navigate/test.jsonl",
        (Row("Q: 1 + 1\nA:", "2"),),
        "em",
        hashlib.sha256(one.file.read_bytes()).hexdigest(),
        tmp_path / "bbh/navigate/train.jsonl",
    )


def test_names_lists_and_patterns(tmp_path: Path) -> None:
    for name in ("bbh.navigate", "bbh.word_sorting", "anli.r1", "anli.r2", "anli.r3", "zoo.b"):
        put(tmp_path, name)
    assert names(tmp_path, "zoo.b") == names(tmp_path, "zoo") == ["zoo.b"]
    assert names(tmp_path, "zoo.b, bbh.navigate,") == ["zoo.b", "bbh.navigate"]
    assert names(tmp_path, "bbh.*") == names(tmp_path, "bbh") == ["bbh.navigate", "bbh.word_sorting"]
    assert names(tmp_path, "anli.r3,anli.*,zoo.?") == ["anli.r3", "anli.r1", "anli.r2", "zoo.b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all that was meant is there
        assert len(find_datasets(tmp_path, "anli.r[13]")) == 2 and len(find_datasets(tmp_path, "zoo.*")) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("bbh.navigat", "did you mean 'bbh.navigate'"),
        ("BBH.Navigate", "did you mean 'bbh.navigate'"),
        ("zoo.lion", "did you mean 'zoo.lions'"),
        ("bbh/navigate", "did you mean 'bbh.navigate'"),
        ("qqqqqq.zzzzzz", "not in {root}; there are bbh.navigate, zoo.lions"),
        ("gem.*", "not in {root}; there are bbh.navigate, zoo.lions; `logo data prepare` fetches official ones"),
        ("bbh.navigate,nope", "dataset 'nope': not in"),
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
    put(tmp_path, "zoo.lions")
    with pytest.raises(UsageError, match="expected names separated by commas"):
        find_datasets(tmp_path, " , ")


def test_folders_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"NAME\.jsonl files, found nothing"):
        find_datasets(tmp_path / "none")
    (tmp_path / "rows.csv").write_text("")
    with pytest.raises(DataError, match="found a file"):
        find_datasets(tmp_path / "rows.csv")
    with pytest.raises(DataError, match=r"NAME\.jsonl files, found rows\.csv"):
        find_datasets(tmp_path)


def test_a_flat_folder(tmp_path: Path) -> None:
    """Named as adapters are, by their paths."""
    for name in ("b", "a", "deep/c", ".hidden/d"):
        flat(tmp_path / f"{name}.jsonl", "1", "2")
    found = find_datasets(tmp_path, limit=1)
    assert [(one.name, one.rows, one.train_file) for one in found] == [
        (name, (Row("q0", "1"),), None) for name in ("a", "b", "deep/c")
    ]
    assert names(tmp_path, "b,a") == ["b", "a"] and names(tmp_path, "*c") == ["deep/c"]
    with pytest.raises(DataError, match=r"dataset 'd': not in .*; there are a, b, deep/c"):
        find_datasets(tmp_path, "d")


# --- metrics and training rows


def flat(file: Path, *completions: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "\n".join(json.dumps({"context": f"q{i}", "completion": text}) for i, text in enumerate(completions))
    )
    return file


def test_the_metric_is_the_one_asked_for_or_declared_or_the_names(tmp_path: Path) -> None:
    for name in ("nq.natural-questions", "wmt14.fr-en", "mine.x"):
        put(tmp_path, name)
    (tmp_path / "mine/x/test.yaml").write_text("metric: rouge\n")

    def metrics(**options: Any) -> list[str]:
        return [one.metric for one in find_datasets(tmp_path, "nq,wmt14,mine", **options)]

    assert metrics() == ["em_multi", "bleu", "rouge"]
    assert metrics(official=True) == ["em_first", "bleu", "rouge"]
    assert metrics(metric="em_multi", official=True) == ["em_multi"] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("metric: blue\n", r"mine\.yaml: expected a metric \(em, .*found 'blue' \(did you mean 'bleu'"),
        ("metric: em\nother: 1\n", r"mine\.yaml: expected 'metric: NAME' and nothing else, found"),
        ("- em\n", r"mine\.yaml: expected 'metric: NAME' and nothing else, found"),
        ("metric: [", r"mine\.yaml: expected 'metric: NAME', found invalid YAML"),
    ],
)
def test_what_declares_no_metric_is_said(tmp_path: Path, content: str, message: str) -> None:
    flat(tmp_path / "mine.jsonl", "1")
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(DataError, match=message):
        find_datasets(tmp_path)


def test_training_rows(tmp_path: Path) -> None:
    put(tmp_path / "data", "mine.x")
    flat(tmp_path / "rows/x.jsonl", "1")
    flat(tmp_path / "train/x.jsonl", "3", "4")
    [found] = find_datasets(tmp_path / "data")
    with pytest.raises(DataError, match=r"training rows, expected the file .*train\.jsonl, found none"):
        _ = found.train
    flat(tmp_path / "data/mine/x/train.jsonl", "2")
    assert found.train == (Row("q0", "2"),)
    [found] = find_datasets(tmp_path / "rows")
    with pytest.raises(UsageError, match=r"a folder that has x\.jsonl with --train-rows"):
        _ = found.train
    [found] = find_datasets(tmp_path / "rows", train_rows=tmp_path / "train", limit=1)
    assert found.train == (Row("q0", "3"), Row("q1", "4"))  # a limit is for what is evaluated
