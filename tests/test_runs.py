"""Results are found whatever their datasets are called, and are the same from every folder that leads to them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logo.cli.run import run
from logo.errors import DataError, UsageError
from logo.evaluation.results import read_results, run_folder
from logo.evaluation.runs import place_of, read_run, read_runs
from report_runs import HELDOUT, write_result

PART = st.from_regex(r"[a-c][a-c.]{0,3}[a-c]|[a-c]", fullmatch=True) | st.sampled_from(
    ["v1.2", "x.y.z", "bbh.navigate"]
)
NAME = st.lists(PART, min_size=1, max_size=3).map("/".join)
NAMES = st.sets(NAME, min_size=1, max_size=5)
RUN = "m_selection_norm_n_2_seed_0"


def named(name: str, **more: Any) -> dict[str, Any]:
    return {"dataset": {"name": name, "sha256": "ab", "rows": 2}, "options": {}, **more}


def write_run(folder: Path, names: set[str]) -> Path:
    for name in sorted(names):
        rows = [{"context": f"{name} {i}", "completion": "x"} for i in range(2)]
        write_result(folder / name, [1, 0], run_json=named(name), rows=rows)
    return folder


@given(names=NAMES, other=NAMES)
@settings(max_examples=40, deadline=None)
def test_every_dataset_is_found_again(
    names: set[str], other: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("runs")
    first, second = write_run(root / RUN, names), write_run(root / "second", other)
    for run_at, expected in ((first, names), (second, other)):
        found = read_run(run_at)
        assert found.folder == run_at and set(found.results) == expected
        assert all(result.folder == run_at / name for name, result in found.results.items())
        for name in expected:
            assert place_of(run_at / name).dataset == name and place_of(run_at / name).run_folder == run_at
            alone = read_run(run_at / name)  # with those below it, where a name is the beginning of another
            assert alone.folder == run_at and name in alone.results
            assert set(alone.results) == {each for each in expected if each == name or each.startswith(f"{name}/")}
    together = read_runs([root])
    assert {each.folder: set(each.results) for each in together} == {first: names, second: other}
    assert [each.folder for each in read_runs([root, first, second / next(iter(other))])] == [
        each.folder for each in together
    ]


@given(names=NAMES)
@settings(max_examples=25, deadline=None)
def test_results_of_the_official_script_are_known_by_their_folders(
    names: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("official")
    for name in names:
        write_result(root / RUN / name, [1, 0])
    found = read_run(root)
    assert found.folder == root / RUN and set(found.results) == names
    assert (found.base, found.method, found.k, found.seed) == ("m", "norm", 2, 0)
    for name in names:
        assert read_run(root / RUN / name).folder == root / RUN


def test_a_folder_of_another_name_holds_one_dataset(tmp_path: Path) -> None:
    write_result(tmp_path / "mine" / "d.x", [1])
    assert place_of(tmp_path / "mine" / "d.x").dataset == "d.x"
    assert read_run(tmp_path).folder == tmp_path / "mine"


@pytest.mark.parametrize("name", ["d.x", "words/forms/plural.v2"])
def test_paths_may_be_relative_or_links_or_end_in_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = write_run(tmp_path / "results" / RUN, {name})
    (tmp_path / "best").symlink_to(folder)
    (folder / "loop").symlink_to(tmp_path / "results")
    inside = folder / name
    ways = [
        (tmp_path, "results"),
        (tmp_path, "best"),
        (folder, "."),
        (inside, "."),
        (inside, ".."),
        (inside.parent, inside.name),
    ]
    for where, path in ways:
        monkeypatch.chdir(where)
        found = read_run(Path(path))
        assert set(found.results) == {name} and found.folder.resolve() == folder.resolve(), (where, path)
        assert found.k == 2
    monkeypatch.chdir(tmp_path)
    assert len(read_runs([Path("results"), Path("best"), folder, Path(f"{folder}{os.sep}")])) == 1
    (tmp_path / "results" / "a link").symlink_to(folder)
    assert [found.folder.name for found in read_runs([Path("results")])] == [RUN]


def test_a_moved_dataset_keeps_its_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / RUN, {"words/antonym"})
    shutil.copytree(folder / "words" / "antonym", tmp_path / "kept" / "yesterday")
    found = read_run(tmp_path / "kept")
    assert found.folder == tmp_path / "kept" and set(found.results) == {"words/antonym"}


def test_two_results_of_one_dataset_in_one_run_are_not_chosen_from(tmp_path: Path) -> None:
    folder = write_run(tmp_path / RUN, {"d.x"})
    shutil.copytree(folder / "d.x", folder / "d.x.bak")
    with pytest.raises(
        DataError, match=r"'d\.x': expected one result in the run .* found two, .*d\.x' and .*d\.x\.bak'"
    ):
        read_runs([tmp_path])
    assert set(read_run(folder / "d.x.bak").results) == {"d.x"}


def test_several_runs_are_not_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, {"d.x"})
    with pytest.raises(UsageError, match="expected the results of one run, found 2: a, b; name one"):
        read_run(tmp_path)


def test_a_run_json_that_is_none_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / RUN, {"d.x"})
    (folder / "d.x" / "run.json").write_text("[")
    with pytest.raises(DataError, match=r"d\.x/run\.json: expected JSON"):
        read_run(folder)


@pytest.mark.slow
def test_nested_rows_from_the_first_command_to_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows in folders within folders, names with dots: answered, compared, reported."""
    names = {"capital": "capital", "words/antonym": "antonym", "words/forms/plural.v2": "plural"}
    for name, task in names.items():
        file = tmp_path / "rows" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join((HELDOUT / f"{task}.jsonl").read_text().splitlines(keepends=True)[:4]))
    how = ["evaluate", "--base-model", "demo", "--rows", str(tmp_path / "rows"), "-k", "3", "--max-new-tokens", "4"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    for results in (whole, again):
        assert run([*how, "--result-dir", str(results)]) == 0
    folder = run_folder(whole, "demo", "norm", 3, 0)
    assert set(read_run(whole).results) == set(names)
    for name in names:
        assert read_results(folder / name)["predictions.json"] == list(read_run(whole).results[name].predictions)
    capsys.readouterr()
    assert run(["eval", "compare", str(again), str(whole), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in compared["datasets"]] == sorted(names)
    assert [(row["name"], row["datasets"]) for row in compared["groups"]] == [("words", 2), ("all", 3)]
    assert run(["eval", "report", str(folder), "-o", str(tmp_path / "r.html"), "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)["runs"]
    assert told["datasets"] == 3
    assert run([*how, "--result-dir", str(whole)]) == 0
    told_again = capsys.readouterr().err
    assert all(f"{name} is done already" in told_again for name in names)
