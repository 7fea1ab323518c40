"""What a command evaluates, from a data folder or a flat one, and where its training rows are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch import nn

from logo.baselines import get_method
from logo.cli.contests import contest_of
from logo.errors import DataError, UsageError
from logo.evaluation.jobs import find_jobs
from logo.evaluation.session import Session
from logo.evaluation.study import Task
from logo.rows import Row, file_sha256
from test_engine import engine

DATA = Path(__file__).parent / "data"


def put(file: Path, *completions: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"context": f"q{i}", "completion": text}) for i, text in enumerate(completions)]
    file.write_text("\n".join(lines))
    return file


def test_jobs_of_a_data_folder(tmp_path: Path) -> None:
    jobs, missing = find_jobs(tmp_path / "run", "bbh.*", data_dir=DATA, limit=3)
    assert [job.dataset for job in jobs] == ["bbh.boolean_expressions", "bbh.word_sorting"]
    assert "bbh.navigate" in missing
    job = jobs[0]
    assert job.folder == tmp_path / "run" / "bbh.boolean_expressions"
    assert (job.file, job.sha256) == (DATA / "bbh/boolean_expressions/test.jsonl", file_sha256(job.file))
    assert len(job.rows) == 3


def test_jobs_of_a_flat_folder(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        put(tmp_path / "rows" / f"{name}.jsonl", "1", "2")
    jobs, missing = find_jobs(tmp_path / "run", rows=tmp_path / "rows")
    assert [job.dataset for job in jobs] == ["a", "b", "deep/c"] and missing == ()
    assert jobs[2].folder == tmp_path / "run" / "deep" / "c"
    assert jobs[0].rows == (Row("q0", "1"), Row("q1", "2"))
    for request, names in (("b", ["b"]), ("b,a", ["a", "b"]), ("*c", ["deep/c"])):
        assert [job.dataset for job in find_jobs(tmp_path, request, rows=tmp_path / "rows")[0]] == names
    with pytest.raises(DataError, match="no such file"):
        find_jobs(tmp_path, "d", rows=tmp_path / "rows")
    with pytest.raises(UsageError, match="expected one of them, found both"):
        find_jobs(tmp_path, rows=tmp_path / "rows", data_dir=DATA)


def test_training_rows(tmp_path: Path) -> None:
    put(tmp_path / "data/mine/x/test.jsonl", "1")
    put(tmp_path / "rows/x.jsonl", "1")
    put(tmp_path / "train/x.jsonl", "3", "4")
    [job], _ = find_jobs(tmp_path, data_dir=tmp_path / "data")
    with pytest.raises(DataError, match=r"needs training rows, expected the file .*train\.jsonl, found none"):
        _ = job.train
    put(tmp_path / "data/mine/x/train.jsonl", "2")
    assert job.train == (Row("q0", "2"),)
    [job], _ = find_jobs(tmp_path, rows=tmp_path / "rows")
    with pytest.raises(UsageError, match=r"a folder that has x\.jsonl with --train-rows"):
        _ = job.train
    [job], _ = find_jobs(tmp_path, rows=tmp_path / "rows", train_rows=tmp_path / "train", limit=1)
    assert job.train == (Row("q0", "3"), Row("q1", "4"))  # a limit is for what is evaluated


def test_rows_that_choose_adapters_and_are_test_rows_too_are_said(
    tmp_path: Path, llama: nn.Module, adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a run, and by a study of held-out rows."""
    file = put(tmp_path / "rows" / "x.jsonl", "1", "2", "3")
    [job], _ = find_jobs(tmp_path / "run", rows=tmp_path / "rows", train_rows=tmp_path / "rows")
    method = get_method("best-single")
    session = Session(engine(llama, adapters, k=2), "M", {}, seed=0, batch_size=1, max_new_tokens=2, method=method)
    said = "3 of 3 training rows are test rows too (they have the same context), and method 'best-single' chose by them"
    with pytest.warns(UserWarning, match=re.escape(f"dataset 'x': {said}")):
        session.plans([job])
    task = Task("x", file, job.rows)
    contest_of([task], "own", None, {"best-single": method}, None, None, {"x": job.rows})
    assert f"logo: warning: task 'x': {said}: the result may be too good" in " ".join(capsys.readouterr().err.split())
    contest_of([task], "own", None, {"best-single": method}, None, None, {"x": [Row("q9", "1")]})
    assert "warning" not in capsys.readouterr().err
