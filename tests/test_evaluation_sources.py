"""Every declaration of the package against tiny files in its source's schema: the whole way to data files."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from answering import load_rows
from hub_sources import write_hub
from logo.errors import DataError, MissingLibrary, StorageError
from logo.evaluation.datasets import OFFICIAL, dataset_file
from logo.evaluation.jobs import declared_metric
from logo.evaluation.metrics import metric_kind
from logo.evaluation.sources.declarations import SPLITS
from logo.evaluation.sources.instances import Instance, draw
from logo.evaluation.sources.loading import packaged
from logo.evaluation.sources.manifest import NAME, add_to_manifest, read_manifest, state
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
    write_hub(raw, "anli.r1")
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
    assert set(declaration.layout.files) == {"test", "train"}
    assert ("references" in declaration.templates) == (declaration.metric == "rouge")
    assert "from memory" in (Path(__file__).parents[1] / f"src/logo/evaluation/sources/files/{name}.yaml").read_text()


# --- all the way, for each of them


@pytest.mark.parametrize("name", NAMES)
def test_the_repository_becomes_data_files(hub: Path, tmp_path: Path, name: str) -> None:
    test, train = prepared(tmp_path, name, hub)
    check_rows(tmp_path, name)
    entry = read_manifest(tmp_path)[name]
    assert entry["licence"] == packaged()[name].licence and entry["unusable_rows"] == 0
    assert state(tmp_path, name, SPLITS, entry) == "whole"
    assert len(set(contexts(test))) == 5 and not set(contexts(test)) & set(contexts(train))
    assert prepared(tmp_path, name, hub) == (test, train)  # the same seed, the same bytes
    assert prepared(tmp_path, name, hub, seed=1) != (test, train)
    assert prepared(tmp_path, name, hub, rows=7)[0].startswith(test)  # fewer rows are a part of more rows


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


def test_boolean_expressions_are_laid_out_as_the_official_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    official = load_rows(BBH, "bbh.boolean_expressions")
    head, tail = "Evaluate the result of a random Boolean expression.\n\nQ: ", "\nA:"
    examples = [
        {"input": row.context.removeprefix(head).removesuffix(tail), "target": row.completion} for row in official
    ]
    file = write_hub(tmp_path, "bbh.boolean_expressions") / "boolean_expressions" / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(examples), file)
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


def test_missing_files_are_named(tmp_path: Path) -> None:
    declaration = packaged()["anli.r1"]
    with pytest.raises(DataError, match=r"has no file plain_text/test_r1-.*; expected one of these in it"):
        find_local(declaration, tmp_path, ["test"])
    with pytest.raises(DataError, match="expected a folder, found nothing"):
        find_local(declaration, tmp_path / "absent", ["test"])
    folder = write_hub(tmp_path, "anli.r1")
    (folder / "plain_text/train_r1-00000-of-00001.parquet").unlink()
    test = "plain_text/test_r1-00000-of-00001.parquet"
    with pytest.raises(DataError, match=rf"has {test} \(test\), but no .*--train-limit 0 does without"):
        find_local(declaration, tmp_path, ["test", "train"])
    assert find_local(declaration, tmp_path, ["test"]).names == {"test": [test]}


def test_a_library_that_is_missing_is_named(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingLibrary, match=r'needs datasets, which is not installed: pip install ".*\[eval\]"'):
        prepared(tmp_path, "anli.r1", hub)


def test_without_train_rows_there_is_no_train_file(tmp_path: Path) -> None:
    write_hub(tmp_path, "bbh.navigate")
    prepared(tmp_path, "bbh.navigate", tmp_path)
    prepare(packaged()["bbh.navigate"], tmp_path, Request(rows=5, train_rows=0, raw=tmp_path))
    assert not dataset_file(tmp_path, "bbh.navigate", "train").exists()
    assert list(read_manifest(tmp_path)["bbh.navigate"]["files"]) == ["test"]


def test_what_test_rows_leave_is_all_that_train_rows_get(tmp_path: Path) -> None:
    write_hub(tmp_path, "bbh.navigate", count=8)
    test, train = prepared(tmp_path, "bbh.navigate", tmp_path, rows=6)
    assert len(test.splitlines()) == 6 and len(train.splitlines()) == 2
    prepare(packaged()["bbh.navigate"], tmp_path, Request(rows=150, raw=tmp_path))
    assert not dataset_file(tmp_path, "bbh.navigate", "train").exists()


def test_a_changed_metric_beside_prepared_rows_is_noticed(hub: Path, tmp_path: Path) -> None:
    """With it, the same rows are judged otherwise."""
    prepared(tmp_path, "anli.r1", hub)
    [entry] = read_manifest(tmp_path).values()
    beside = dataset_file(tmp_path, "anli.r1").with_suffix(".yaml")
    beside.write_text("metric: rouge\n")
    assert state(tmp_path, "anli.r1", SPLITS, entry) == "changed"
    beside.unlink()
    assert state(tmp_path, "anli.r1", SPLITS, entry) == "whole"
    assert state(tmp_path, "anli.r1", SPLITS, {**entry, "metric": "rouge"}) == "changed"  # and it is missing


def test_the_commit_is_named_in_which_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hub(tmp_path, "gem.dart")  # of which the other dataset knows no column
    place = replace(find_local(packaged()["gem.dart"], tmp_path, ["test"]), commit="056ce9f5")
    monkeypatch.setattr("logo.evaluation.sources.prepare.fetch", lambda hub, layout, splits: place)
    expected = r"'gem.e2e_nlg': .*'meaning_representation' is undefined; .*\(in GEM/e2e_nlg at commit 056ce9f5\)"
    with pytest.raises(DataError, match=expected):
        prepare(packaged()["gem.e2e_nlg"], tmp_path / "data", Request(rows=5, train_rows=0))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("gone", ["00001-of-00003", "00000-of-00003"])
def test_a_repository_that_lacks_a_part_of_a_file_is_refused(tmp_path: Path, gone: str) -> None:
    source = write_hub(tmp_path, "anli.r1") / "plain_text/test_r1-00000-of-00001.parquet"
    for part in range(3):
        if gone != f"{part:05}-of-00003":
            source.with_name(f"test_r1-{part:05}-of-00003.parquet").write_bytes(source.read_bytes())
    source.unlink()
    with pytest.raises(DataError, match=r"test_r1-\*-of-00003\.parquet: expected 3 files, found 2"):
        prepared(tmp_path / "data", "anli.r1", tmp_path)


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
