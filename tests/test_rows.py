"""The datasets of a folder and their rows, most of it about input that is not as it should be."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.datasets import Dataset, dataset_file, find_datasets, metric_choices
from logo.rows import Row, read_rows
from written import write_rows

GOOD = '{"context": "Q: 1 + 1\\nA:", "completion": "2"}'
START = '{"context": "a", "completion": "b"'


def put(root: Path, dataset: str, content: str | bytes = GOOD + "\n", split: str = "test") -> Path:
    file = dataset_file(root, dataset, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def load_rows(root: Path | str, name: str, limit: int | None = None, split: str = "test") -> list[Row]:
    """The rows of a dataset in a data folder."""
    return read_rows(dataset_file(root, name, split), limit)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
TEXTS = st.lists(TEXT, min_size=1, max_size=3)
ROW = st.fixed_dictionaries(
    {"context": TEXT, "completion": TEXT | TEXTS},
    optional={"references": st.none() | TEXTS, "adapter": st.none() | TEXT, "more": st.just(1)},
)
ENDS = st.sampled_from(["", "\n", "\r\n", "\n\n \n"])


@given(st.lists(ROW, min_size=1, max_size=5), st.booleans(), ENDS, st.sampled_from(["", "\ufeff"]), st.integers(1, 8))
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], ascii_only: bool, end: str, mark: str, limit: int
) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    root = tmp_path_factory.mktemp("data")
    put(root, "mine.rows", mark + "\n".join(lines) + end)
    assert load_rows(root, "mine.rows", limit) == load_rows(root, "mine.rows")[:limit]
    for given_, row in zip(rows, load_rows(root, "mine.rows"), strict=True):
        present = {key: value for key, value in given_.items() if value is not None and key != "more"}
        assert json.loads(json.dumps(row.as_dict())) == present
        first = [present["completion"]] if isinstance(present["completion"], str) else present["completion"]
        assert list(row.golds) == list(dict.fromkeys([*first, *present.get("references", [])]))


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    for line, found in (
        ('{"context": "a", "completion": ', "invalid JSON: Expecting value at column 32"),
        ("", "an empty line between rows"),
        ("null", "found null"),
        ('{"completion": "b", "input": "a"}', "no 'context', only \"completion, input\""),
        ('{"context": ["a"], "completion": "b"}', "'context' is a list"),
        ('{"context": " \\n", "completion": "b"}', "'context' is empty"),
        ('{"context": "a", "completion": []}', "'completion' is an empty list"),
        ('{"context": "a", "completion": ["b", ""]}', "'completion'[1] is empty"),
        ('{"context": "a", "completion": [["b"]]}', "'completion'[0] is a list"),
        ('{"context": "a\\ud800", "completion": "b"}', "'context' holds half of a surrogate pair"),
        (f'{START}, "references": "a"}}', """'references' is "a\""""),
        (f'{START}, "references": ["a", 3]}}', "'references'[1] is 3"),
        (f'{START}, "adapter": ""}}', "'adapter' is empty"),
        (b'{"context": "caf\xe9", "completion": "b"}', "bytes that are not UTF-8 at column 17"),
        ("[" * 200_000, "unreadable JSON: "),
        ('{"context": ' + "1" * 5000 + "}", "unreadable JSON: "),
    ):
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


def test_files_that_have_no_rows(tmp_path: Path) -> None:
    for content in ("", " \n\n", "\ufeff"):
        file = put(tmp_path, "mine.rows", content)
        with pytest.raises(DataError) as caught:
            load_rows(tmp_path, "mine.rows")
        assert str(caught.value) == f"{file}: expected one JSON object per line, found an empty file"
    put(tmp_path, "mine.rows")
    for limit in (0, -1):
        with pytest.raises(UsageError, match=f"limit {limit}: expected at least 1"):
            load_rows(tmp_path, "mine.rows", limit)
    dataset_file(tmp_path, "mine.folder").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"test\.jsonl: cannot be read \(Is a directory\)"):
        load_rows(tmp_path, "mine.folder")


def test_prompts_may_come_without_gold_texts(tmp_path: Path) -> None:
    said, answered = {"role": "user", "content": "d"}, {"role": "assistant", "content": "f"}
    lines = [
        {"context": "a"},
        {"context": "b", "completion": "c"},
        {"messages": [said]},
        {"messages": [said, answered]},
    ]
    file = write_rows(tmp_path / "x.jsonl", lines)
    with pytest.raises(DataError, match=r"x\.jsonl:1: .* no 'completion', only \"context\""):
        read_rows(file)
    rows = read_rows(file, answers=False)
    assert [(row.context, row.golds) for row in rows] == [("a", ()), ("b", ("c",)), ("d", ()), ("d", ("f",))]
    assert rows[0].as_dict() == {"context": "a"} and len(rows[3].messages) == 1
    file.write_text('{"completion": "c"}')
    with pytest.raises(DataError, match=r"x\.jsonl:1: .* no 'context'"):
        read_rows(file, answers=False)
    file.write_text(f'{START}, "references": ["", "c", " "]}}\n{START}, "references": [" "]}}\n')
    assert [row.references for row in read_rows(file)] == [("c",), ()]  # blank ones are passed over


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
    for name in ("deep/mine.jsonl", "learn/zoo.b.jsonl", "results/run/x/rows.jsonl"):
        flat(tmp_path / name, "1")
    (tmp_path / "results/run/x/run.json").touch()
    unread, missing = r": deep/mine\.jsonl, gem/dart/train\.jsonl not read: ", r"left out: bbh\.boolean_.*gem\.dart"
    with pytest.warns(UserWarning, match=unread), pytest.warns(UserWarning, match=missing):
        found = find_datasets(tmp_path, train_rows=tmp_path / "learn")
    names = ["bbh.navigate", "bbh.word_sorting", "glue.qnli", "alpha.c", "zoo.a.1", "zoo.b"]
    assert [one.name for one in found] == names
    file, train = tmp_path / "bbh/navigate/test.jsonl", tmp_path / "learn/bbh.navigate.jsonl"
    assert found[0] == Dataset("bbh.navigate", file, (Row("Q: 1 + 1\nA:", "2"),), "em", train)


@pytest.mark.filterwarnings("ignore:not in .*, left out")
def test_names_lists_and_patterns(tmp_path: Path) -> None:
    for name in ("bbh.navigate", "bbh.word_sorting", "anli.r1", "anli.r2", "anli.r3", "zoo.b"):
        put(tmp_path, name)
    for request, expected in {
        "zoo.b": ["zoo.b"],
        "zoo": ["zoo.b"],
        "zoo.b, bbh.navigate,": ["zoo.b", "bbh.navigate"],
        "bbh.*": ["bbh.navigate", "bbh.word_sorting"],
        "bbh": ["bbh.navigate", "bbh.word_sorting"],
        "anli.r3,anli.*,zoo.?": ["anli.r3", "anli.r1", "anli.r2", "zoo.b"],
    }.items():
        assert [found.name for found in find_datasets(tmp_path, request)] == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all that was meant is there
        assert len(find_datasets(tmp_path, "anli.r[13]")) == 2 and len(find_datasets(tmp_path, "zoo.*")) == 1
    with pytest.raises(UsageError, match="expected names separated by commas"):
        find_datasets(tmp_path, " , ")


def test_unknown_and_absent_datasets(tmp_path: Path) -> None:
    put(tmp_path, "bbh.navigate")
    put(tmp_path, "zoo.lions")
    there = f"not in {tmp_path}; there are bbh.navigate, zoo.lions"
    for request, message in (
        ("bbh.navigat", "did you mean 'bbh.navigate'"),
        ("bbh/navigate", "did you mean 'bbh.navigate'"),
        ("qqqqqq.zzzzzz", there),
        ("gem.*", f"{there}; `logo data prepare` fetches official ones"),
        ("bbh.navigate,nope", "dataset 'nope': not in"),
    ):
        with pytest.raises(DataError) as caught:
            find_datasets(tmp_path, request)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folders_without_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("")
    for folder, found in (("none", "nothing"), ("rows.csv", "a file"), (".", r"rows\.csv")):
        with pytest.raises(DataError, match=f'"completion": ...}}, found {found}'):
            find_datasets(tmp_path / folder)


def test_a_flat_folder(tmp_path: Path) -> None:
    """Named as adapters are, by their paths."""
    for name in ("b", "a", "deep/c", ".hidden/d"):
        flat(tmp_path / f"{name}.jsonl", "1", "2\n3")
    (tmp_path / "capital.CSV").touch()
    (tmp_path / "deep").symlink_to((tmp_path / "deep").rename(tmp_path.parent / "elsewhere"))
    with pytest.warns(UserWarning, match=r": capital\.CSV not read: here rows are in files NAME\.jsonl"):
        found = [(one.name, one.rows, one.train_file) for one in find_datasets(tmp_path, limit=1)]
    assert found == [(name, (Row("q0", "1"),), None) for name in ("a", "b", "deep/c")]
    assert [one.name for one in find_datasets(tmp_path, "b,*c")] == ["b", "deep/c"]
    assert [one.name for one in find_datasets(tmp_path, "*", train_rows=tmp_path / "deep")] == ["a", "b"]
    with pytest.raises(DataError, match=r"dataset 'd': not in .*; there are a, b, deep/c"):
        find_datasets(tmp_path, "d")


def test_rows_beside_a_result_or_an_adapter_are_named(tmp_path: Path) -> None:
    """What the result and the adapter have there themselves is no row of anybody's, and not worth a word."""
    for name in ("a", "done/b", "done/rows", "own/examples", "study/rows", "adapter/c", "adapter/examples"):
        flat(tmp_path / f"{name}.jsonl", "1")
    for mark in ("done/run.json", "study/run.json", "adapter/adapter_config.json", "own/adapter_config.json"):
        (tmp_path / mark).touch()
    said = (
        r"adapter/c\.jsonl not read: adapter/adapter_config\.json beside it says that the folder holds an adapter; "
        r"done/b\.jsonl not read: done/run\.json beside it says that the folder holds a result; keep rows in a folder"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        assert [one.name for one in find_datasets(tmp_path)] == ["a"]
    assert len(caught) == 1 and "rows.jsonl" not in str(caught[0].message)
    with pytest.raises(DataError, match=r"dataset 'done/b': done/b\.jsonl not read: done/run\.json beside it says"):
        find_datasets(tmp_path, "done/b")
    with pytest.raises(
        DataError, match=r"expected NAME\.jsonl or .*, found none: b\.jsonl not read: run\.json beside it"
    ):
        find_datasets(tmp_path / "done")


def flat(file: Path, *completions: str) -> Path:
    return write_rows(file, [{"context": f"q{i}", "completion": text} for i, text in enumerate(completions)])


def test_the_metric_is_the_one_asked_for_or_declared_or_the_names(tmp_path: Path) -> None:
    for name in ("nq.natural-questions", "wmt14.fr-en", "mine.x"):
        put(tmp_path, name)
    (tmp_path / "mine/x/test.yaml").write_text("metric: rouge\n")

    def metrics(**options: Any) -> list[str]:
        return [one.metric for one in find_datasets(tmp_path, "nq,wmt14.fr-en,mine", **options)]

    assert metrics() == ["em_multi", "bleu", "rouge"]
    assert metrics(official=True) == ["em_first", "bleu", "rouge"]
    assert metrics(metrics=metric_choices(["em_multi"]), official=True) == ["em_multi"] * 3
    chosen = metric_choices(["em", "wmt14=bleu", "nq=rouge", "nq.*=em_multi"])
    assert metrics(metrics=chosen, official=True) == ["em_multi", "bleu", "em"]
    with pytest.raises(UsageError, match=r"--metric n1=...: expected a dataset, found 'n1'.*; there are nq"):
        metrics(metrics={"n1": "em"})
    for texts, message in (
        (["em", "bleu"], "expected one metric for all datasets, found em and bleu; DATASET=METRIC"),
        (["nq=f1"], r"--metric: expected a metric \(em, .*found 'f1'"),
    ):
        with pytest.raises(UsageError, match=message):
            metric_choices(texts)
    for content, message in (
        ("metric: blue\n", r"test\.yaml: expected a metric \(em, .*found 'blue' \(did you mean 'bleu'"),
        ("metric: em\nother: 1\n", r"test\.yaml: expected 'metric: NAME' and nothing else, found"),
        ("metric: [", r"test\.yaml: expected 'metric: NAME', found invalid YAML"),
    ):
        (tmp_path / "mine/x/test.yaml").write_text(content)
        with pytest.raises(DataError, match=message):
            metrics()


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
