"""`logo eval compare` on result folders as runs and the official script write them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from logo.cli.app import run
from logo.evaluation.compare import GROUPS, grouped
from logo.evaluation.statistics import holm
from report_runs import LEFT, RIGHT, two_runs, write_result


def compared(*arguments: object, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert run(["eval", "compare", *map(str, arguments), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def refused(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["eval", "compare", *map(str, arguments)]) != 0
    return capsys.readouterr().err


def test_two_runs_by_dataset_and_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_runs(tmp_path)
    found = compared(a, b, capsys=capsys)
    assert [(one["name"], one["measure"], one["datasets"], one["rows"]) for one in found] == [
        ("bbh.one", "em", 1, 8),
        ("bbh.two", "em", 1, 8),
        ("wmt16.en-de", "bleu", 1, 1),
        ("BIG-Bench Hard", "em", 2, 16),
    ]
    first, second, third, group = found
    assert (first["a"], first["b"], first["difference"], first["better"], first["worse"]) == (0.25, 1, 0.75, 6, 0)
    assert (first["test"], first["p"]) == ("McNemar", pytest.approx(2 / 2**6))
    assert group["difference"] == pytest.approx((0.75 + 0.25) / 2) and group["p"] == pytest.approx(2 / 2**8)
    assert [one["p_holm"] for one in found] == holm([one["p"] for one in found]) and group["marked"]
    assert not second["marked"] and third["p"] == 1 and third["interval"] is None
    assert {(one["run_a"], one["run_b"]) for one in found} == {(LEFT, RIGHT)}
    back = compared(b, a, capsys=capsys)
    assert [one["difference"] for one in back] == pytest.approx([-one["difference"] for one in found])


def test_three_runs_are_corrected_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_runs(tmp_path / "one")
    third, _ = two_runs(tmp_path / "two")  # called as the first one is
    found = compared(a, b, third, capsys=capsys)
    assert [one["run_b"] for one in found] == [RIGHT] * 4 + [f"two/{LEFT}"] * 4
    assert {one["run_a"] for one in found} == {f"one/{LEFT}"} and all(one["p"] == 1 for one in found[4:])
    assert [one["p_holm"] for one in found] == holm([one["p"] for one in found])


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "compare", *map(str, two_runs(tmp_path))]) == 0
    said = capsys.readouterr()
    assert re.search(r"bbh\.one +em +8 +25\.00 +100\.00 +\+75\.00 +\[\+", said.out)
    assert "BIG-Bench Hard (2)" in said.out and "corrected for 4 together" in said.err


def test_another_metric_judges_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(*two_runs(tmp_path), "--metric", "rouge", capsys=capsys)
    measured = [one["measure"] for one in found if one["name"] == "wmt16.en-de"]
    assert measured == ["rouge-1", "rouge-2", "rouge-L"]
    assert [one["name"] for one in found if one["measure"] == "rouge-L"][-2:] == ["BIG-Bench Hard", "all"]
    assert "expected a metric" in refused(tmp_path, "--metric", "rogue", capsys=capsys)


def test_what_the_official_script_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = compared(*two_runs(tmp_path / "ours"), capsys=capsys)
    theirs = two_runs(tmp_path / "theirs", official=True)
    assert run(["eval", "compare", *map(str, theirs), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == ours and "has no prompts: rows of bbh.one" in said.err
    assert "gold texts to judge by" in refused(*theirs, "--metric", "em", capsys=capsys)


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_runs(tmp_path)
    assert f"two runs or more to compare, found one, {LEFT}" in refused(a, a, capsys=capsys)
    assert "no such folder" in refused(a, tmp_path / "none", capsys=capsys)
    shutil.rmtree(b / "wmt16.en-de")
    assert run(["eval", "compare", str(a), str(b), "--json"]) == 0
    assert f"only {LEFT} has wmt16.en-de" in capsys.readouterr().err
    shutil.rmtree(b / "bbh.two")
    write_result(b / "bbh.two", ["no"] * 8, ["yes", "no", "yes", "yes", "yes", "no", "yes", "no"])
    assert "'bbh.two': expected the same rows, found row 4 with the completion 'no'" in refused(a, b, capsys=capsys)
    shutil.rmtree(b / "bbh.one")
    write_result(b / "bbh.one", ["no"] * 7, ["yes"] * 7)
    assert f"found 8 in {LEFT} and 7 in {RIGHT}" in refused(a, b, capsys=capsys)
    shutil.rmtree(b)
    write_result(b / "nq.open", ["no"], ["yes"])
    assert "no dataset in common" in refused(a, b, capsys=capsys)
    write_result(b / "bbh.one", ["no"] * 8, ["yes", "no"] * 4, more={"metric": "rouge"}, value=[0.0] * 8)
    assert "expected values of the metric rouge, found 0.0" in refused(a, b, capsys=capsys)


def test_groups_of_the_paper() -> None:
    found = grouped(["code_x_glue.x", "mine/a.b", "tqa.rc", "bbh.a", "wmt16.de-en", "nq.open", "bbh.b"])
    assert list(found) == ["BIG-Bench Hard", "Translation", "Closed-Book QA", "Code", "mine"] and len(GROUPS) == 6
    assert found["Closed-Book QA"] == ["tqa.rc", "nq.open"] and found["BIG-Bench Hard"] == ["bbh.a", "bbh.b"]
