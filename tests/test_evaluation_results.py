"""The files of a dataset: where they go, what is in them."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from logo.errors import StorageError
from logo.evaluation.intervals import proportion
from logo.evaluation.metrics import metric_kind
from logo.evaluation.results import (
    RESULT_FILES,
    metrics_record,
    read_results,
    result_files,
    run_folder,
    run_record,
    write_results,
)
from logo.evaluation.runner import DatasetResult
from logo.rows import Row

RESULT = DatasetResult(
    dataset="bbh.navigate",
    metric="em",
    eval_results=(1, 0),
    predictions=("Yes", "Né\u2028"),
    selected=(("b", "a/x.1"), ("a/x.1", "b")),
    weights=((0.75, 0.25), (0.6, 0.4)),
    scored=("a/x.1", "b"),
    scores=((1.0, 3.0), (3.0, 2.0)),
    seconds={"inference": 2.5, "probe": 0.5, "generate": 1.5},
    forms={"merged": 1, "gated": 1},
)

ROWS = [Row("Q: a?", "Yes"), Row("Q: b?", ("No", "no way"), ("no", "No"), "b")]


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
    assert run_folder("results", base_model, "norm", 20, 0) == Path(f"results/{name}_selection_norm_n_20_seed_0")


def test_another_method_has_a_folder_of_its_own() -> None:
    folder = run_folder("results", "org/M", "norm", 20, 1, method="lorahub")
    assert folder == Path("results/M_method_lorahub_n_20_seed_1")


def test_a_model_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "F1" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "F1")
    for base_model in (".", "./", "deep/.."):
        assert run_folder("r", base_model, "entropy", 3, 7) == Path("r/F1_selection_entropy_n_3_seed_7")


def test_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "F1_selection_norm_n_2_seed_0" / "bbh.navigate"
    write_results(folder, result_files(RESULT, ROWS, strategy="norm", loading_seconds=4.0, run=record()))
    files = read(folder)
    assert sorted(files) == sorted(RESULT_FILES)
    assert files["eval_results.json"] == [1, 0]
    assert files["predictions.json"] == ["Yes", "Né\u2028"]
    assert files["selected_loras.json"] == [["b", "a/x.1"], ["a/x.1", "b"]]
    assert files["weights.json"] == [[0.75, 0.25], [0.6, 0.4]]
    assert files["metric_dict.json"] == {"norm": [[1.0, 3.0], [3.0, 2.0]]}
    assert files["time_dict.json"] == {"loading": 4.0, "inference": 2.5, "probe": 0.5, "generate": 1.5}
    assert files["run.json"] == {
        **record(),
        "score_columns": ["a/x.1", "b"],
        "forms": {"merged": 1, "gated": 1},
    }
    assert files["rows.json"] == [
        {"context": "Q: a?", "completion": "Yes"},
        {"context": "Q: b?", "completion": ["No", "no way"], "references": ["no", "No"], "adapter": "b"},
    ]
    assert read_results(folder) == files
    # byte for byte what json.dump writes by default
    assert (folder / "predictions.json").read_bytes() == b'["Yes", "N\\u00e9\\u2028"]'


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
        "vllm_options": '{"hf_token": "hf_secret", "more": {"aws_secret_access_key": "hf_secret", "eos_token_id": 3}}',
        "prompts": ['{"text": "no JSON of ours", "token": "abc"}'],
        "command": {"options": {"vllm_options": '{"hf_token": "hf_secret"}', "limit": 3}},
        "max_new_tokens": 256,
        "data_dir": Path("data"),
        "adapters": ("a", "b"),
        "limit": None,
        "generation_early_stop": True,
    }
    run = record(options=options)
    assert run["options"] == {
        "vllm_options": '{"more": {"eos_token_id": 3}}',
        "prompts": ['{"text": "no JSON of ours", "token": "abc"}'],
        "command": {"options": {"vllm_options": "{}", "limit": 3}},
        "max_new_tokens": 256,
        "data_dir": "data",
        "adapters": ["a", "b"],
        "limit": None,
        "generation_early_stop": True,
    }
    assert "hf_secret" not in json.dumps(run)


def test_a_second_run_replaces_the_first_and_keeps_notes(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    write_results(folder, {**result_files(RESULT, ROWS, strategy="norm", loading_seconds=1.0, run={})})
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
    folder = run_folder(tmp_path / "results", "m", "norm", 1, 0) / "bbh.navigate"
    with pytest.raises(StorageError) as caught:
        write_results(folder, {"eval_results.json": [1]})
    assert str(caught.value).startswith(f"folder {str(folder)!r}: cannot be written (")
    assert len(str(caught.value).splitlines()) == 1


def test_results_that_are_not_whole_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    write_results(folder, result_files(RESULT, ROWS, strategy="norm", loading_seconds=1.0, run={}))
    (folder / "weights.json").write_text("[1, ")
    with pytest.raises(StorageError, match=r"weights\.json cannot be read"):
        read_results(folder)
    (folder / "weights.json").unlink()
    with pytest.raises(
        StorageError, match=r"expected the file weights\.json, found none; answer it again with --overwrite"
    ):
        read_results(folder)


# --- metrics.json


def result(dataset: str, values: list[object], predictions: list[str], errors: dict[int, str]) -> DatasetResult:
    empty: tuple[tuple[str, ...], ...] = ((),) * len(values)
    judged = (dataset, metric_kind(dataset), tuple(values), tuple(predictions))
    return DatasetResult(*judged, empty, ((),) * len(values), (), ((),) * len(values), {}, errors)


def test_metrics_of_right_and_wrong() -> None:
    values = [1, 0, 1, 1, 0, 0, 1, 0]
    found = metrics_record(
        result("bbh.x", values, ["the cat", *["x"] * 7], {7: "gone", 1: "refused"}), [["cat"]] * 8, seed=3
    )
    assert found["official"] == {"em": 0.5}
    assert found["official_intervals"] == {"em": proportion(4, 8)}
    assert found["extra"]["exact_match"] == 1 / 8 and found["extra_intervals"]["exact_match"] == proportion(1, 8)
    assert found["errors"] == [{"index": 1, "message": "refused"}, {"index": 7, "message": "gone"}]
    values = [0.1, 0.35, 0.2, 0.9, 0.71] * 2
    ends = [metrics_record(result("wmt14.x", values, ["a"] * 10, {}), [["b"]] * 10, seed=seed) for seed in (0, 0, 1)]
    assert ends[0] == ends[1] and ends[0]["official_intervals"] != ends[2]["official_intervals"]


def test_metrics_of_text() -> None:
    zeros = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-L": 0.0}
    ones = dict.fromkeys(zeros, 1.0)
    found = metrics_record(result("gem.x", [ones, zeros], ["a b c d", ""], {}), [["x", "a b c d"], ["e"]])
    assert found["official"] == dict.fromkeys(zeros, 0.5)
    assert found["official_intervals"] == dict.fromkeys(zeros, proportion(1, 2))
    assert found["extra"]["rouge-L"] == 0.5  # the second gold text counts
    assert "version" in found["signatures"]["bleu"] and set(found["extra"]) >= {"bleu", "chrf"}
