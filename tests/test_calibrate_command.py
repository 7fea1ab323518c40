"""`logo pool calibrate` and the options of the calibrated signal on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from logo.cli.app import run
from tolerances import same_scores


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_calibrating_shows_what_selecting_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGO_CACHE", str(tmp_path))
    report = answer(capsys, "pool", "calibrate")
    assert report["measured"] == 16
    assert list(report["sizes"]) == report["adapters"] and all(0.05 < size < 0.2 for size in report["sizes"].values())
    assert 0 < len(report["points"]) <= len(report["ranking"]) and report["ranking"][0]["point"] in report["points"]
    assert answer(capsys, "pool", "calibrate")["measured"] == 0
    chosen = answer(capsys, "select", "What is 7 plus 5?")
    assert chosen["adapters"][0] == "add_numbers"
    assert run(["pool", "calibrate"]) == 0
    shown = capsys.readouterr()
    assert "contrast" in shown.out and "0 calibrated now, 16 known already" in shown.err
    assert f"{min(report['sizes'].values()):.3f} to {max(report['sizes'].values()):.3f}" in shown.err


def test_generate_and_select_are_calibrated_and_evaluate_is_official(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Please spell the word fence in reverse."
    ours = answer(capsys, "select", prompt)
    assert ours["scores"] == same_scores(answer(capsys, "select", prompt, "--signal", "calibrated")["scores"])
    assert ours["scores"] != answer(capsys, "select", prompt, "--signal", "norm")["scores"]
    assert answer(capsys, "generate", prompt)["adapters"] == ours["adapters"]
