"""What the report reads: result folders of ours and of the official script, and what is wrong with others."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.errors import DataError, UsageError
from logo.evaluation.report.runs import differing, labels, seconds
from logo.evaluation.runs import read_runs
from logo.evaluation.stored import read_result
from report_runs import ROWS, SIGNALS, TASKS, demo_results, write_result

NAME = "m_selection_norm_n_2_seed_0"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_results(tmp_path_factory)


def test_real_results_are_read_as_they_were_written(demo: Path) -> None:
    runs = read_runs([demo / "results"], demo / "data")
    assert {run.method for run in runs} == set(SIGNALS)
    for run in runs:
        assert (run.base, run.k, run.seed) == ("demo", 3, 0)
        assert list(run.results) == [f"demo.{task}" for task in TASKS]
        for name, result in run.results.items():
            stored = {file.stem: json.loads(file.read_text()) for file in (run.folder / name).iterdir()}
            assert list(result.values) == stored["eval_results"] and len(result) == ROWS
            assert list(result.predictions) == stored["predictions"]
            assert [list(names) for names in result.selected] == stored["selected_loras"]
            assert [list(shares) for shares in result.weights] == stored["weights"]
            assert result.scores.tolist() == stored["metric_dict"][run.method]
            assert list(result.columns) == stored["run"]["score_columns"]
            lines = (demo / "data" / "demo" / name.partition(".")[2] / "test.jsonl").read_text().splitlines()
            asked = [json.loads(line) for line in lines]
            assert result.prompts is not None
            assert [(p.context, p.golds) for p in result.prompts] == [(r["context"], (r["completion"],)) for r in asked]


def test_one_run_or_one_dataset_may_be_named_and_names_may_overlap(demo: Path) -> None:
    whole = read_runs([demo / "results"])
    one = read_runs([whole[0].folder])
    assert [run.folder for run in one] == [whole[0].folder] and len(one[0].results) == len(TASKS)
    single = read_runs([whole[1].folder / "demo.plural", whole[1].folder / "demo.capital"])
    assert len(single) == 1 and set(single[0].results) == {"demo.plural", "demo.capital"}
    assert len(read_runs([demo / "results", whole[0].folder, whole[0].folder / "demo.plural"])) == len(whole)


def test_a_folder_of_the_official_script_alone(tmp_path: Path) -> None:
    """No run.json: the run is what its folder is called, and columns are named by who was selected from them."""
    scores = [[1.0, 9.0, 3.0, 2.0], [7.0, 1.0, 0.5, 2.0], [4.0, 4.0, 4.0, 1.0]]  # the last one has ties: no evidence
    selected = [["b", "c"], ["a", "d"], ["c", "b"]]
    write_result(
        tmp_path / "Qwen2.5-7B_selection_entropy_n_2_seed_5" / "bbh.navigate",
        [1, 0, 1],
        selected=selected,
        weights=[[0.6, 0.4]] * 3,
        scores={"entropy": scores},
    )
    [run] = read_runs([tmp_path])
    assert (run.base, run.method, run.k, run.seed) == ("Qwen2.5-7B", "entropy", 2, 5)
    [result] = run.results.values()
    assert result.columns == ("a", "b", "c", "d")
    assert result.prompts is None and "does not say" in result.no_prompts


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_columns_are_never_named_wrong(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    names = [f"n{i}" for i in range(data.draw(st.integers(2, 6)))]
    width, k = len(names), data.draw(st.integers(1, len(names)))
    number = st.floats(0, 100, allow_nan=False, width=16)
    scores = data.draw(st.lists(st.lists(number, min_size=width, max_size=width), min_size=1, max_size=5))
    order = [sorted(range(width), key=lambda n, row=row: (-row[n], n))[:k] for row in scores]
    folder = write_result(
        tmp_path_factory.mktemp("columns") / "d.x",
        [0] * len(scores),
        selected=[[names[n] for n in row] for row in order],
        weights=[[1 / k] * k for _ in scores],
        scores={"norm": scores},
    )
    found = read_result(folder, folder.name).columns
    assert len(set(found)) == width
    assert all(name == names[column] or name == f"#{column}" for column, name in enumerate(found))


def test_prompts_come_from_rows_json_or_from_a_data_file_that_is_still_the_same(tmp_path: Path) -> None:
    line = json.dumps({"context": "c", "completion": ["x", "y"], "references": ["x", "z"], "adapter": "b"})
    data = tmp_path / "data" / "d" / "x" / "test.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text(line + "\n")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    elsewhere = {"dataset": {"name": "d.x", "file": "moved/test.jsonl", "sha256": digest, "rows": 1}}
    folder = write_result(tmp_path / NAME / "d.x", [1], run_json=elsewhere)
    lost = read_result(folder, folder.name)
    assert lost.prompts is None and "not there any more" in lost.no_prompts
    found = read_result(folder, "d.x", tmp_path / "data")
    assert found.prompts is not None and found.prompts[0].golds == ("x", "y", "z") and found.prompts[0].adapter == "b"
    data.write_text(line.replace('"c"', '"other"') + "\n")
    assert "has changed since" in read_result(folder, "d.x", tmp_path / "data").no_prompts
    (folder / "rows.json").write_text(f"[{line}]")
    assert read_result(folder, "d.x", tmp_path / "data").prompts == found.prompts


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"completion": None}, "completion: expected a text or a list of texts, found NoneType"),
        ({"completion": "x", "references": 5}, "references: expected a list, found int"),
        ({"completion": "x", "messages": "y"}, "messages: expected a list, found str"),
    ],
)
def test_a_damaged_row_is_one_line(row: dict[str, Any], found: str, tmp_path: Path) -> None:
    folder = write_result(tmp_path / NAME / "d.x", [1])
    (folder / "rows.json").write_text(json.dumps([{"context": "c", **row}]))
    with pytest.raises(DataError, match=f"rows.json: row 0: {found}"):
        read_result(folder, "d.x")


def test_failed_rows_and_runs_without_adapters(tmp_path: Path) -> None:
    folder = write_result(
        tmp_path / NAME / "gem.dart",
        [{"rouge-1": 0.5, "rouge-2": 0.25, "rouge-L": 0.5}, {"rouge-1": 0, "rouge-2": 0, "rouge-L": 0}],
        predictions=["x", ""],
        selected=[["a"], []],
        weights=[[1.0], []],
        scores={"norm": [[2.0, 1.0], [None, None]]},
        metrics={"errors": [{"index": 1, "message": "too long"}], "official_intervals": {"rouge-1": [0.1, None]}},
    )
    result = read_result(folder, folder.name)
    assert result.errors == {1: "too long"}
    assert np.isnan(result.scores[1]).all() and not np.isnan(result.scores[0]).any()
    bare = write_result(tmp_path / "b" / "d.x", [1], selected=[[]], weights=[[]], scores={})
    assert read_result(bare, "d.x").scores.shape == (1, 0)


BROKEN = {
    "values": ("eval_results.json", "[1, {}]", "expected a number"),
    "mixed": ("eval_results.json", '[1, {"rouge-1": 1, "rouge-2": 1, "rouge-L": 1}]', "found both"),
    "empty": ("eval_results.json", "[]", "found an empty list"),
    "length": ("predictions.json", '["x"]', "expected 2 entries"),
    "kind": ("predictions.json", '{"a": 1}', "expected a list"),
    "json": ("weights.json", "[[0.5,", "expected JSON"),
    "nan": ("weights.json", "[[NaN, 0.5], [0.5, 0.5]]", "expected a list of lists"),
    "parallel": ("weights.json", "[[1.0], [0.5, 0.5]]", "instance 0: expected 2 weights"),
    "ragged": ("metric_dict.json", '{"norm": [[1, 2], [1]]}', "instance 1: expected 2 scores"),
    "text": ("metric_dict.json", '{"norm": [[1, 2], [1, "x"]]}', "instance 1: expected numbers"),
    "signals": ("metric_dict.json", '{"a": [[1], [1]], "b": [[1], [1]]}', "one signal"),
    "rows": ("rows.json", '[{"context": "c"}]', "expected a list of 2 rows"),
    "row": ("rows.json", '[{"context": "c"}, {}]', "row 0"),
}


@pytest.mark.parametrize(("file", "text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    folder = write_result(tmp_path / NAME / "d.x", [1, 0])
    read_result(folder, folder.name)
    (folder / file).write_text(text)
    with pytest.raises(DataError) as caught:
        read_result(folder, folder.name)
    assert file in str(caught.value) and message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_and_folders_without_results(tmp_path: Path) -> None:
    folder = write_result(tmp_path / NAME / "d.x", [1])
    (folder / "weights.json").unlink()
    with pytest.raises(DataError, match=r"weights\.json: expected a file, found none"):
        read_runs([tmp_path])
    for path, found in ((tmp_path / "absent", "no such folder"), (folder / "run.json", "no such folder")):
        with pytest.raises(UsageError, match=found):
            read_runs([path])
    (tmp_path / "empty" / ".d.x.new-1234").mkdir(parents=True)
    shutil.copy(folder / "eval_results.json", tmp_path / "empty" / ".d.x.new-1234")  # a writer that died
    with pytest.raises(UsageError, match="found none"):
        read_runs([tmp_path / "empty"])


RUN = st.fixed_dictionaries(
    {
        "base_model": st.sampled_from(["m", "org/m", "n"]),
        "method": st.sampled_from(["logo", "uniform"]),
        "signal": st.sampled_from(["norm", "entropy"]),
        "k": st.integers(1, 2),
        "seed": st.integers(0, 1),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "weighting": st.sampled_from(["linear", "adaptive"]),
    }
)


@given(options=st.lists(RUN, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_labels_tell_all_runs_apart(options: list[dict[str, object]], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("labels")
    for number, each in enumerate(options):
        write_result(root / f"run{number}" / "d.x", [1], run_json={"options": each})
    runs = read_runs([root])
    found = labels(runs)
    assert len(set(found)) == len(runs) and all(found)
    apart = differing(runs)
    for name in ("dtype", "weighting"):
        values = {str(each[name]) for each in options}
        assert (name in apart) == (len(values) > 1)
        assert name not in apart or set(apart[name]) == values


def test_labels_have_the_signal_of_a_plugins_method(tmp_path: Path) -> None:
    methods: dict[str, dict[str, str]] = {
        "logo": {"method": "logo"},
        "flat": {"method": "flat", "plugin": "plug:Flat 12ab"},
    }
    for label, identity in methods.items():
        for signal in ("calibrated", "norm"):
            options = {"method": label, "signal": signal, "points": [signal]}
            run_json = {"options": options, "identity": {"method": identity}}
            write_result(tmp_path / label / signal / "d.x", [1], run_json=run_json)
    runs = {label: read_runs([tmp_path / label]) for label in methods}
    assert labels(runs["logo"]) == ["calibrated", "norm"]
    assert labels(runs["flat"]) == ["flat · signal calibrated", "flat · signal norm"]
    assert list(differing(runs["flat"])) == ["signal", "points"] and list(differing(runs["logo"])) == ["points"]


def test_time_adds_up(demo: Path) -> None:
    for run in read_runs([demo / "results"]):
        spent = seconds(run)
        stored = [json.loads((run.folder / name / "time_dict.json").read_text()) for name in run.results]
        assert math.isclose(sum(spent.stages.values()), sum(each["inference"] for each in stored), rel_tol=0.02)
        assert spent.loading == stored[0]["loading"] and spent.instances == ROWS * len(TASKS)
        assert math.isclose(spent.stages["probe"], sum(each["probe"] for each in stored))


def test_a_run_that_has_a_name_is_called_by_it(tmp_path: Path) -> None:
    for ending in ("", "_first", "_n_9_seed_1"):
        write_result(tmp_path / f"{NAME}{ending}" / "d.x", [1])
    runs = read_runs([tmp_path])
    assert [(run.k, run.seed, run.name) for run in runs] == [(2, 0, None), (2, 0, "first"), (2, 0, "n_9_seed_1")]
    assert labels(runs) == ["norm", "norm · name first", "norm · name n_9_seed_1"]
