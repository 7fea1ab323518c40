"""The seven files of a dataset: where they go, what is in them."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from logo.errors import StorageError
from logo.evaluation.results import RESULT_FILES, result_files, result_folder, run_record, write_results
from logo.evaluation.runner import DatasetResult

RESULT = DatasetResult(
    dataset="bbh.navigate",
    eval_results=(1, 0),
    predictions=("Yes", "Né\u2028"),
    selected=(("b", "a/x.1"), ("a/x.1", "b")),
    weights=((0.75, 0.25), (0.6, 0.4)),
    scored=("a/x.1", "b"),
    scores=((1.0, 3.0), (3.0, 2.0)),
    seconds={"inference": 2.5, "probe": 0.5, "generate": 1.5},
)


def record(**changes: object) -> dict[str, object]:
    fields: dict[str, object] = {
        "options": {"dataset": "bbh.navigate", "seed": 0, "limit": None, "probe_token": "last", "max_new_tokens": 256},
        "pool": {"a/x.1": "00ff", "b": "11ee"},
        "dataset": "bbh.navigate",
        "data_file": Path("data/bbh/navigate/test.jsonl"),
        "data_sha256": "abcd",
        "rows": 2,
        "device": "cpu",
        "started": datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2))),
        "seconds": 12.5,
    }
    return run_record(**(fields | changes))  # type: ignore[arg-type]


def read(folder: Path) -> dict[str, object]:
    return {file.name: json.loads(file.read_text(encoding="ascii")) for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("base_model", "name"),
    [
        ("Llama-3.1-8B", "Llama-3.1-8B"),
        ("Qwen/Qwen2.5-7B", "Qwen2.5-7B"),
        ("/models/F1", "F1"),
        ("/models/F1/", "F1"),
        ("models//F1//", "F1"),
        ("demo", "demo"),
        (Path("models/F1"), "F1"),
        ("/", "model"),
    ],
)
def test_the_folder_is_named_as_the_official_one(base_model: str | Path, name: str) -> None:
    folder = result_folder("results", base_model, "norm", 20, 0, "bbh.boolean_expressions")
    assert folder == Path(f"results/{name}_selection_norm_n_20_seed_0/bbh.boolean_expressions")


def test_a_model_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "F1" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "F1")
    for base_model in (".", "./", "deep/.."):
        assert result_folder("r", base_model, "entropy", 3, 7, "d.x") == Path("r/F1_selection_entropy_n_3_seed_7/d.x")


def test_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "F1_selection_norm_n_2_seed_0" / "bbh.navigate"
    write_results(folder, result_files(RESULT, strategy="norm", loading_seconds=4.0, run=record()))
    files = read(folder)
    assert sorted(files) == sorted(RESULT_FILES)
    assert files["eval_results.json"] == [1, 0]
    assert files["predictions.json"] == ["Yes", "Né\u2028"]
    assert files["selected_loras.json"] == [["b", "a/x.1"], ["a/x.1", "b"]]
    assert files["weights.json"] == [[0.75, 0.25], [0.6, 0.4]]
    assert files["metric_dict.json"] == {"norm": [[1.0, 3.0], [3.0, 2.0]]}
    assert files["time_dict.json"] == {"loading": 4.0, "inference": 2.5, "probe": 0.5, "generate": 1.5}
    assert files["run.json"] == {**record(), "score_columns": ["a/x.1", "b"]}
    # byte for byte what json.dump writes by default
    assert (folder / "predictions.json").read_bytes() == b'["Yes", "N\\u00e9\\u2028"]'


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the time zone cannot be changed here")
def test_the_date_is_utc_wherever_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XYZ-5")  # five hours ahead
    time.tzset()
    try:
        assert record()["date"] == "2026-01-02T01:04:05+00:00"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_run_json_says() -> None:
    run = record()
    assert run["date"] == "2026-01-02T01:04:05+00:00"
    assert run["duration"] == 12.5
    assert run["pool"] == {"a/x.1": "00ff", "b": "11ee"}
    assert run["dataset"] == {
        "name": "bbh.navigate",
        "file": str(Path("data/bbh/navigate/test.jsonl")),
        "sha256": "abcd",
        "rows": 2,
    }
    assert run["device"] == "cpu"
    versions = run["versions"]
    assert isinstance(versions, dict)
    assert {"logo", "python", "platform", "torch", "transformers", "huggingface_hub"} <= set(versions)
    assert all(isinstance(versions[name], str) for name in ("python", "platform", "torch", "transformers"))


def test_options_are_kept_but_no_secret() -> None:
    options = {
        "token": "hf_secret",
        "--hf-token": "hf_secret",
        "api_key": "hf_secret",
        "probe_token": "last",
        "max_new_tokens": 256,
        "data_dir": Path("data"),
        "adapters": ("a", "b"),
        "limit": None,
        "generation_early_stop": True,
    }
    run = record(options=options)
    assert run["options"] == {
        "probe_token": "last",
        "max_new_tokens": 256,
        "data_dir": "data",
        "adapters": ["a", "b"],
        "limit": None,
        "generation_early_stop": True,
    }
    assert "hf_secret" not in json.dumps(run)


def test_no_environment_variable_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_environment")
    assert "hf_from_the_environment" not in json.dumps(record())


def test_a_second_run_replaces_the_first_and_keeps_notes(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    write_results(folder, {**result_files(RESULT, strategy="norm", loading_seconds=1.0, run={})})
    (folder / "notes.md").write_text("mine")
    write_results(folder, {"eval_results.json": [1]})
    assert sorted(path.name for path in folder.iterdir()) == ["eval_results.json", "notes.md"]


def test_content_that_json_cannot_hold_touches_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    write_results(folder, {"eval_results.json": [1]})
    with pytest.raises(TypeError):
        write_results(folder, {"eval_results.json": [0], "weights.json": object()})
    assert read(folder) == {"eval_results.json": [1]}


def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    folder = result_folder(tmp_path / "results", "m", "norm", 1, 0, "bbh.navigate")
    with pytest.raises(StorageError) as caught:
        write_results(folder, {"eval_results.json": [1]})
    assert str(caught.value).startswith(f"result folder {str(folder)!r}: cannot be written (")
    assert str(caught.value).endswith("--result_dir")
    assert len(str(caught.value).splitlines()) == 1
