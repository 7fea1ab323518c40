"""Every declaration of the package against tiny raw files in its source's schema: the whole way to data files."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from raw_sources import write_hub, write_raw

from answering import load_rows
from logo.errors import DataError, MissingLibrary, StorageError
from logo.evaluation.datasets import OFFICIAL, dataset_file
from logo.evaluation.jobs import declared_metric
from logo.evaluation.metrics import metric_kind
from logo.evaluation.sources.instances import Instance, draw
from logo.evaluation.sources.loading import packaged
from logo.evaluation.sources.manifest import NAME, add_to_manifest, read_manifest, verify
from logo.evaluation.sources.places import find_local
from logo.evaluation.sources.prepare import Request, prepare

BBH = Path(__file__).parent / "data"
NAMES = list(packaged())
CODE = [name for name in NAMES if name.startswith("code_x_glue.")]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of all repositories."""
    root = tmp_path_factory.mktemp("hub")
    for name in NAMES:
        write_hub(root, name)
    return root


def prepared(data: Path, name: str, raw: Path, **options: int) -> tuple[bytes, bytes]:
    prepare(packaged()[name], data, Request(**{"rows": 5, "train_rows": 4, **options}, raw=raw))
    return dataset_file(data, name).read_bytes(), dataset_file(data, name, "train").read_bytes()


def contexts(data: bytes) -> list[str]:
    return [json.loads(line)["context"] for line in data.splitlines()]


# --- the declarations


def test_a_declared_metric_that_the_name_does_not_say_is_written_beside_the_rows(tmp_path: Path) -> None:
    """And goes with it when another one is declared."""
    raw = tmp_path / "raw"
    write_raw(raw, "anli.r1")
    declaration = packaged()["anli.r1"]
    for metric, found in (("rouge", "rouge"), ("em", None), ("bleu", "bleu")):
        made = replace(declaration, metric=metric)  # type: ignore[arg-type]
        entry = prepare(made, tmp_path / "data", Request(rows=3, train_rows=2, raw=raw))
        assert declared_metric(dataset_file(tmp_path / "data", "anli.r1")) == found and entry["metric"] == metric


def test_there_is_one_for_every_official_name_and_code_task() -> None:
    assert tuple(NAMES[: len(OFFICIAL)]) == OFFICIAL
    assert len(NAMES) == len(OFFICIAL) + 13 and len(CODE) == 13


@pytest.mark.parametrize("name", NAMES)
def test_a_declaration_says_where_its_rows_are_from_and_agrees_with_the_metrics(name: str) -> None:
    declaration = packaged()[name]
    assert declaration.name == name
    assert declaration.metric == metric_kind(name)
    assert declaration.hub is not None and "/" in declaration.hub.repo
    assert declaration.homepage.startswith("https://") and declaration.citation and declaration.licence
    assert len(declaration.layouts) >= 2  # the Hub's and the source's own
    assert all({"test", "train"} == set(layout.files) for layout in declaration.layouts)
    assert ("references" in declaration.templates) == (declaration.metric == "rouge")
    assert "from memory" in (Path(__file__).parents[1] / f"src/logo/evaluation/sources/files/{name}.yaml").read_text()


# --- all the way, for each of them


@pytest.mark.parametrize("name", NAMES)
def test_the_repository_becomes_data_files(hub: Path, tmp_path: Path, name: str) -> None:
    test, train = prepared(tmp_path, name, hub)
    check_rows(tmp_path, name)
    entry = read_manifest(tmp_path)[name]
    assert entry["licence"] == packaged()[name].licence and entry["unusable_rows"] == 0
    assert verify(tmp_path, name, entry) == []
    assert len(set(contexts(test))) == 5 and not set(contexts(test)) & set(contexts(train))


@pytest.mark.parametrize("name", NAMES)
def test_the_sources_own_files_become_data_files(tmp_path: Path, name: str) -> None:
    write_raw(tmp_path / "raw", name)
    first = prepared(tmp_path / "a", name, tmp_path / "raw")
    check_rows(tmp_path / "a", name)
    assert not set(contexts(first[0])) & set(contexts(first[1]))
    assert prepared(tmp_path / "b", name, tmp_path / "raw") == first  # the same seed, the same bytes
    assert prepared(tmp_path / "b", name, tmp_path / "raw", seed=1) != first
    more = prepared(tmp_path / "c", name, tmp_path / "raw", rows=7)
    assert more[0].startswith(first[0])  # fewer rows are a part of more rows


def check_rows(data: Path, name: str) -> None:
    for split, count in (("test", 5), ("train", 4)):
        rows = load_rows(data, name, split=split)
        assert len(rows) == count
        assert all(isinstance(row.completion, tuple) == (metric_kind(name) == "em_multi") for row in rows)
        assert all(row.context == row.context.strip() and "{" not in row.context.split(":")[0] for row in rows)
    for line in dataset_file(data, name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert ("references" in row) == (metric_kind(name) == "rouge")
        if "references" in row:
            assert len(row["references"]) == 2 and row["references"][0] == row["completion"]


@pytest.mark.parametrize("name", ["bbh.navigate", "wmt16.de-en", "nq.natural-questions", "code_x_glue.code_to_text_go"])
def test_both_shapes_of_a_source_draw_the_same_rows(hub: Path, tmp_path: Path, name: str) -> None:
    write_raw(tmp_path / "raw", name)
    assert prepared(tmp_path / "a", name, hub)[0] == prepared(tmp_path / "b", name, tmp_path / "raw")[0]


def test_boolean_expressions_are_laid_out_as_the_official_rows(tmp_path: Path) -> None:
    official = load_rows(BBH, "bbh.boolean_expressions")
    head, tail = "Evaluate the result of a random Boolean expression.\n\nQ: ", "\nA:"
    examples = [
        {"input": row.context.removeprefix(head).removesuffix(tail), "target": row.completion} for row in official
    ]
    (tmp_path / "boolean_expressions.json").write_text(json.dumps({"examples": examples}))
    prepare(packaged()["bbh.boolean_expressions"], tmp_path, Request(rows=8, raw=tmp_path))
    made = dataset_file(tmp_path, "bbh.boolean_expressions").read_text().splitlines()
    assert sorted(made) == sorted((BBH / "bbh/boolean_expressions/test.jsonl").read_text().splitlines())


def test_both_directions_of_a_language_pair_draw_the_same_sentences(hub: Path, tmp_path: Path) -> None:
    there, back = (prepared(tmp_path, name, hub)[0].decode() for name in ("wmt14.en-fr", "wmt14.fr-en"))
    english = [json.loads(line)["context"].splitlines()[2].removeprefix("English: ") for line in there.splitlines()]
    assert english == [json.loads(line)["completion"] for line in back.splitlines()]


# --- the draw


def made(*numbers: int) -> list[Instance]:
    return [Instance(f"Q{i}", "a", (), f"Q{i}") for i in numbers]


def test_the_draw_is_the_same_everywhere() -> None:
    """A change of these would change everybody's rows."""
    assert [instance.context for instance in draw(made(*range(20)), 5, 0)] == ["Q6", "Q2", "Q10", "Q7", "Q15"]
    assert [instance.context for instance in draw(made(*range(20)), 5, 7)] == ["Q8", "Q17", "Q14", "Q19", "Q16"]


def test_the_draw_does_not_depend_on_order_or_on_other_rows() -> None:
    instances = made(*range(200))
    drawn = draw(instances, 50, 3)
    random.Random(0).shuffle(instances)
    assert draw(instances, 50, 3) == drawn
    assert draw(instances[:100], 50, 3) == [i for i in draw(instances, 200, 3) if i in instances[:100]][:50]
    rest = draw(instances, 200, 3, without=drawn)
    assert len(rest) == 150 and not {i.context for i in rest} & {i.context for i in drawn}
    assert abs(sum(int(i.context[1:]) for i in drawn) / 50 - 99.5) < 30  # no part of the source is preferred


# --- what goes wrong


def test_missing_files_are_named(hub: Path, tmp_path: Path) -> None:
    declaration = packaged()["anli.r1"]
    with pytest.raises(DataError, match=r"has no file plain_text/test_r1-\*\.parquet or .*, nor \*\*/R1/test\.jsonl"):
        find_local(declaration, tmp_path, ["test"])
    with pytest.raises(DataError, match="expected a folder, found nothing"):
        find_local(declaration, tmp_path / "absent", ["test"])
    write_raw(tmp_path, "anli.r1")
    (tmp_path / "anli_v1.0/R1/train.jsonl").unlink()
    with pytest.raises(DataError, match=r"has anli_v1.0/R1/test.jsonl \(test\), but no .*--train-limit 0 does without"):
        find_local(declaration, tmp_path, ["test", "train"])
    assert find_local(declaration, tmp_path, ["test"]).names == {"test": ["anli_v1.0/R1/test.jsonl"]}


def test_a_library_that_is_missing_is_named(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingLibrary, match=r'needs datasets, which is not installed: pip install ".*\[eval\]"'):
        prepared(tmp_path, "anli.r1", hub)


def test_without_train_rows_there_is_no_train_file(tmp_path: Path) -> None:
    write_raw(tmp_path, "bbh.navigate")
    prepared(tmp_path, "bbh.navigate", tmp_path)
    prepare(packaged()["bbh.navigate"], tmp_path, Request(rows=5, train_rows=0, raw=tmp_path))
    assert not dataset_file(tmp_path, "bbh.navigate", "train").exists()
    assert list(read_manifest(tmp_path)["bbh.navigate"]["files"]) == ["test"]


def test_what_test_rows_leave_is_all_that_train_rows_get(tmp_path: Path) -> None:
    write_raw(tmp_path, "bbh.navigate", count=8)
    test, train = prepared(tmp_path, "bbh.navigate", tmp_path, rows=6)
    assert len(test.splitlines()) == 6 and len(train.splitlines()) == 2
    prepare(packaged()["bbh.navigate"], tmp_path, Request(rows=150, raw=tmp_path))
    assert not dataset_file(tmp_path, "bbh.navigate", "train").exists()


def test_a_column_that_is_not_there_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    write_raw(tmp_path, "anli.r1")
    before = prepared(tmp_path, "anli.r1", tmp_path)
    file = tmp_path / "anli_v1.0/R1/test.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[3].replace('"context"', '"premise"')]))
    expected = r"anli.r1.*test\.jsonl: row 4: 'premise': 'context' is undefined; the row has 'uid', 'premise', .*; fix"
    with pytest.raises(DataError, match=expected):
        prepared(tmp_path, "anli.r1", tmp_path)
    assert (dataset_file(tmp_path, "anli.r1").read_bytes(), verify(tmp_path, *only(tmp_path))) == (before[0], [])


def only(data: Path) -> tuple[str, dict[str, object]]:
    [item] = read_manifest(data).items()
    return item


def test_the_commit_is_named_in_which_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hub(tmp_path, "gem.dart")  # of which the other dataset knows no column
    place = replace(find_local(packaged()["gem.dart"], tmp_path, ["test"]), commit="056ce9f5")
    monkeypatch.setattr("logo.evaluation.sources.prepare.fetch", lambda hub, layout, splits: place)
    expected = r"'gem.e2e_nlg': .*: 'context': 'attributes' is undefined; .*\(in GEM/e2e_nlg at commit 056ce9f5\)"
    with pytest.raises(DataError, match=expected):
        prepare(packaged()["gem.e2e_nlg"], tmp_path / "data", Request(rows=5, train_rows=0))
    assert not (tmp_path / "data").exists()


def test_a_label_without_a_word_is_named(tmp_path: Path) -> None:
    write_raw(tmp_path, "anli.r1")
    file = tmp_path / "anli_v1.0/R1/test.jsonl"
    file.write_text(file.read_text().replace('"label": "e"', '"label": "x"'))
    with pytest.raises(
        DataError, match="row 1: 'answer': 'dict object' has no attribute 'x'; the row has 'uid', 'context'"
    ):
        prepared(tmp_path, "anli.r1", tmp_path)


@pytest.mark.parametrize("gone", ["00001-of-00003", "00000-of-00003"])
def test_a_repository_that_lacks_a_part_of_a_file_is_refused(tmp_path: Path, gone: str) -> None:
    source = write_hub(tmp_path, "anli.r1") / "plain_text/test_r1-00000-of-00001.parquet"
    for part in range(3):
        if gone != f"{part:05}-of-00003":
            source.with_name(f"test_r1-{part:05}-of-00003.parquet").write_bytes(source.read_bytes())
    source.unlink()
    with pytest.raises(DataError, match=r"test_r1-\*-of-00003\.parquet: expected 3 files, found 2"):
        prepared(tmp_path / "data", "anli.r1", tmp_path)


def test_rows_that_lack_a_text_are_left_out_and_counted(tmp_path: Path) -> None:
    write_raw(tmp_path, "code_x_glue.text_to_text_da-en")
    file = tmp_path / "data/test/da-en.test.en"
    file.write_text(file.read_text().replace("Click 3\n", " \n"))
    prepared(tmp_path, "code_x_glue.text_to_text_da-en", tmp_path, rows=50)
    entry = read_manifest(tmp_path)["code_x_glue.text_to_text_da-en"]
    assert (entry["files"]["test"]["rows"], entry["unusable_rows"]) == (11, 1)


def test_parallel_files_of_different_lengths_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path, "code_x_glue.text_to_text_da-en")
    file = tmp_path / "data/test/da-en.test.en"
    file.write_text(file.read_text() + "one more\n")
    with pytest.raises(DataError, match=r"da-en\.test\.da has 12, .*da-en\.test\.en has 13 lines; expected the same"):
        prepared(tmp_path, "code_x_glue.text_to_text_da-en", tmp_path)


# --- the manifest


def test_entries_of_others_stay(tmp_path: Path) -> None:
    for name in ("b.x", "a.x"):
        add_to_manifest(tmp_path, name, {"files": {"test": {"sha256": "0", "rows": 1}}})
    assert list(read_manifest(tmp_path)) == ["a.x", "b.x"]
    assert read_manifest(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 2, "datasets": {}}', '{"version": 1, "datasets": {"a.x": {"files": {"test": 1}}}}'],
)
def test_what_is_no_manifest_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with pytest.raises(DataError, match="expected a manifest of version 1"):
        read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    write_raw(tmp_path / "raw", "bbh.navigate")
    prepared(tmp_path, "bbh.navigate", tmp_path / "raw")
    yield tmp_path


def test_verify_finds_every_kind_of_damage(data: Path) -> None:
    name, entry = only(data)
    test, train = dataset_file(data, name), dataset_file(data, name, "train")
    good = test.read_bytes()

    def problems(content: bytes) -> list[str]:
        test.write_bytes(content)
        return verify(data, name, entry)

    assert problems(good) == []
    [changed] = problems(good.replace(b"True", b"Tru", 1))
    assert changed.startswith(f"{name}: {test}: expected sha256 ")
    assert len(problems(good + train.read_bytes().splitlines()[0])) == 3  # checksum, count, a train prompt in the test
    assert any("5: expected {" in problem for problem in problems(good[:-20]))
    test.unlink()
    assert [problem.split(":")[0] for problem in verify(data, name, entry)] == [name]
