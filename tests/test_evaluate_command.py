"""What `logo evaluate` says about its numbers: which metric, whose rows, how many adapters, what it takes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import make_adapters
import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.adapters.pool import officially_named
from logo.cli.run import run
from logo.demo import heldout
from logo.errors import DataError
from logo.evaluation.comparison import compare
from logo.evaluation.datasets import declared_metric
from logo.evaluation.metrics import KINDS, measure, measures, official_kind, recorded_kind
from logo.evaluation.report import analyse, summary
from logo.evaluation.runs import read_run, read_runs
from test_engine import engine, tokenizer

DEMO = ("--base-model", "demo", "--device", "cpu")


def write_rows(folder: Path, **tasks: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def record(folder: Path, name: str = "run.json") -> Any:
    return json.loads((folder / name).read_text())


# -- training rows --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "method"), [(3, "best-single"), (0, "best-single"), (3, "uniform")])
def test_training_rows_that_are_test_rows_are_said(
    shared: int, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With their number, for a method that learns from them; in `run.json` as well."""
    held = heldout()["antonym"]
    rows = write_rows(tmp_path / "rows", antonym=held[:4])
    train = write_rows(tmp_path / "train", antonym=held[4 - shared : 9])
    command = ["evaluate", *DEMO, "--rows", str(rows), "--train-rows", str(train), "--result-dir", str(tmp_path / "r")]
    learns = method == "best-single"
    expected = f"dataset 'antonym': {shared} of {5 + shared} training rows are test rows too"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shots = ["--shots", "2"] if learns else []
        assert run([*command, "--method", method, *shots, "--max-new-tokens", "2"]) == 0
    assert (expected in capsys.readouterr().err) == bool(shared and learns)
    [folder] = (tmp_path / "r").glob("*/antonym")
    assert record(folder)["found_out"].get("train_rows_also_tested") == (shared if learns else None)


# -- metrics --------------------------------------------------------------------------------------------------------

MEASURED = {"em": {"em"}, "em_multi": {"em"}, "em_first": {"em_first"}, "bleu": {"bleu"}}
MEASURED["rouge"] = {"rouge-1", "rouge-2", "rouge-L"}


def evaluated(tmp_path: Path, *arguments: str, rows: Path | None = None, folder: str = "r") -> Path:
    """The one result folder of a run on the demo."""
    rows = rows or tmp_path / "rows"
    command = ["evaluate", *DEMO, "--rows", str(rows), "--max-new-tokens", "6", "--result-dir", str(tmp_path / folder)]
    assert run([*command, *arguments]) == 0
    [made] = (tmp_path / folder).glob("*/*/run.json")
    return made.parent


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", [True, False])
def test_any_metric_for_any_dataset(kind: str, beside: bool, tmp_path: Path) -> None:
    """Said on the command line or beside the rows; judged by it, recorded, and read so by everything that reads."""
    rows = [row | {"completion": [str(row["completion"]), "x"]} for row in heldout()["antonym"][:3]]
    write_rows(tmp_path / "rows", mine=rows)
    if beside:
        (tmp_path / "rows" / "mine.yaml").write_text(f"metric: {kind}\n")
    folder = evaluated(tmp_path, *([] if beside else ["--metric", kind]))
    ran = record(folder)
    assert (ran["metric"], ran["identity"]["metric"]) == (kind, kind) and recorded_kind(ran, "mine") == kind
    for row, answer, value in zip(
        rows, record(folder, "predictions.json"), record(folder, "eval_results.json"), strict=True
    ):
        assert value == pytest.approx(measure(kind, answer, row["completion"]))
    assert set(record(folder, "metrics.json")["official"]) == MEASURED[kind] == set(measures(kind))
    done = read_run(folder.parent)
    assert {compared.metric for compared in compare(done, done).datasets} == MEASURED[kind]


def test_runs_of_different_metrics_are_not_compared(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", mine=heldout()["antonym"][:2])
    one = evaluated(tmp_path, folder="one").parent
    other = evaluated(tmp_path, "--metric", "bleu", folder="other").parent
    with pytest.raises(DataError, match=r"dataset 'mine': expected one metric in both runs, found em in .* and bleu"):
        compare(read_run(one), read_run(other))


def test_the_answers_of_a_finished_run_are_judged_by_another_metric(tmp_path: Path) -> None:
    """Without a model, and as a run with that metric would have judged them."""
    write_rows(tmp_path / "rows", mine=heldout()["antonym"][:3])
    (tmp_path / "rows" / "mine.yaml").write_text("metric: bleu")
    one, other = evaluated(tmp_path, folder="one"), evaluated(tmp_path, "--metric", "rouge", folder="other")
    told = []
    for folder, more in ((one, ["--metric", "rouge"]), (other, [])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoGo, "generate", None)
            assert run(["eval", "report", str(folder), "-o", str(tmp_path / "r.html"), *more]) == 0
        found = summary(analyse(read_runs([folder], metric=None if folder == other else "rouge")))
        told.append({(line["dataset"], line["metric"]): line["runs"].popitem()[1] for line in found["datasets"]})
    assert told[0] == told[1] and set(told[0]) == {("mine", name) for name in MEASURED["rouge"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("metric: rogue", r"mine.yaml: expected a metric \(em, .*\), found 'rogue' \(did you mean 'rouge'\?\)"),
        ("metric: [em]", r"mine.yaml: expected a metric"),
        ("metrics: em", r"mine.yaml: expected 'metric: NAME' and nothing else, found \"{'metrics': 'em'}\""),
        ("- em", r"mine.yaml: expected 'metric: NAME' and nothing else"),
        ("a: b: c", r"mine.yaml: expected 'metric: NAME', found invalid YAML"),
    ],
)
def test_a_metric_that_cannot_be_read_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(DataError, match=message):
        declared_metric(tmp_path / "mine.jsonl")


def test_the_official_script_sees_only_the_first_gold_text() -> None:
    """Its loader (batches of one) makes of the list of a row as many lists of one text, and its loop takes the first:
    what `em_first` computes."""
    from torch.utils.data import DataLoader

    golds = [["tower", "a spire"], ["Rome", "Roma", "the city"], ["one"]]
    answers = ["a spire", "rome.", "one"]

    class Rows(list[tuple[str, Sequence[str]]]):
        pass

    official = []
    for (_, labels), answer in zip(
        DataLoader(Rows(zip("abc", golds, strict=True)), batch_size=1), answers, strict=True
    ):
        [(output, label)] = zip([answer], labels, strict=False)  # one output, as many labels as gold texts
        official.append(int(any(measure("em", output, gold) for gold in label)))
    assert official == [0, 1, 1]
    assert official == [measure(official_kind("em_multi"), a, g) for a, g in zip(answers, golds, strict=True)]
    assert [measure("em_multi", a, g) for a, g in zip(answers, golds, strict=True)] == [1, 1, 1]
    assert all(official_kind(kind) == kind for kind in KINDS if kind != "em_multi")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [((), "em_multi"), (("--preset", "official"), "em_first"), (("--preset", "official", "--metric", "em"), "em")],
)
def test_the_preset_scores_nq_as_the_script(
    arguments: tuple[str, ...], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data" / "nq" / "open"
    data.mkdir(parents=True)
    (data / "test.jsonl").write_text(json.dumps({"context": "hot ->", "completion": ["x", "cold"]}) + "\n")
    command = ["evaluate", *DEMO, "--data-dir", str(tmp_path / "data"), "--result-dir", str(tmp_path / "r")]
    assert run([*command, "--max-new-tokens", "4", *arguments]) == 0
    said = " ".join(capsys.readouterr().err.split())
    [folder] = (tmp_path / "r").glob("*/nq.open")
    assert record(folder)["metric"] == kind
    assert ("nq.open: answers are compared with the first gold text" in said) == (kind == "em_first")


# -- adapters per prompt --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_command_takes_as_many_adapters_as_suit_the_demos_pool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three, where nobody says a number; the folder's name says so too. The preset's number is the script's."""
    assert LoGo.from_pretrained("demo").k == 3
    capsys.readouterr()
    for command in (["select", "hot ->"], ["generate", "hot ->", "--max-new-tokens", "1"]):
        assert run([*command, "--json", *DEMO]) == 0
        assert len(json.loads(capsys.readouterr().out)["adapters"]) == 3, command
    write_rows(tmp_path / "rows", antonym=heldout()["antonym"][:2])
    folder = evaluated(tmp_path)
    assert folder.parent.name == "demo_selection_norm_n_3_seed_0"
    assert {len(names) for names in record(folder, "selected_loras.json")} == {3}
    assert record(folder)["options"]["k"] == 3
    official = evaluated(tmp_path, "--preset", "official", folder="official")
    assert official.parent.name == "demo_selection_norm_n_20_seed_0"
    assert {len(names) for names in record(official, "selected_loras.json")} == {16}


def test_another_pool_is_asked_for_twenty_or_all_it_has(llama: nn.Module, adapters: Path) -> None:
    """Without a warning, which would be an error here; and what is asked for is what one gets."""
    few = AdapterPool.open(adapters)
    assert engine(llama, adapters, signal="norm", k=None, unscorable="skip").k == len(few) < 20
    assert few.default_k == few.subset("tasks/*").default_k == 20
    few = AdapterPool(few, default_k=2)
    for asked, found in ((None, 2), (4, 4)):
        settings = SelectionSettings(signal="norm", k=asked, unscorable="skip")
        assert LoGo(llama, tokenizer(), few.subset("tasks/*"), settings=settings).k == found


# -- the official layout --------------------------------------------------------------------------------------------

TASKS = ("web_questions_whats_the_answer", "ai2_arc_ARC-Easy", "aeslc", "ag_news_subset", "anli_r1", "anli_r1_x")


@pytest.fixture(scope="module")
def official_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and adapters under one `--model_dir`, called as the script calls them; and a row of an official dataset."""
    root = tmp_path_factory.mktemp("official")
    models = root / "hf_models"
    tiny.model("llama").save_pretrained(models / "Llama-3.1-8B")
    tokenizer().save_pretrained(models / "Llama-3.1-8B")
    for seed, task in enumerate(TASKS):
        make_adapters.write_peft(models / "Llama-3.1-8B-loras-flanv2" / f"flanv2.{task}", seed=seed)
    rows = [{"context": f"w{i} w{2 * i} w{60 - i}", "completion": "w9"} for i in range(5, 9)]
    (root / "data" / "bbh" / "navigate").mkdir(parents=True)
    (root / "data" / "bbh" / "navigate" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("adapters", [(), ("--adapters", "hf_models/Llama-3.1-8B-loras-flanv2")])
def test_adapters_are_called_as_in_the_official_script(
    adapters: tuple[str, ...], official_layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names with their folder, in the order of the script's sorted list, best first by the scores in that order;
    without `--adapters`, and nothing is asked of the Hub."""
    monkeypatch.chdir(official_layout)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = ["evaluate", "--preset", "official", "--base_model", "Llama-3.1-8B", "--dataset", "bbh.navigate"]
    options = ["--device", "cpu", "--n_selected_modules", "3", "--max-new-tokens", "2", "--result_dir", str(tmp_path)]
    assert run([*command, *options, *adapters]) == 0
    folder = tmp_path / "Llama-3.1-8B_selection_norm_n_3_seed_0" / "bbh.navigate"
    expected = [f"Llama-3.1-8B-loras-flanv2/flanv2.{task}" for task in TASKS]
    expected.sort()  # what the script does with its list
    selected, scores = record(folder, "selected_loras.json"), record(folder, "metric_dict.json")["norm"]
    assert len(selected) == 4 and all(len(row) == len(TASKS) for row in scores)
    for names, row in zip(selected, scores, strict=True):
        best = torch.topk(torch.tensor(row), k=3).indices.tolist()
        assert names == [expected[i] for i in best]
    assert list(record(folder)["pool"]) == record(folder)["score_columns"] == expected


def test_without_the_preset_names_are_those_below_the_pools_folder(
    official_layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(official_layout)
    command = ["evaluate", "--base_model", "Llama-3.1-8B", "--dataset", "bbh.navigate", "--limit", "1"]
    assert run([*command, "--device", "cpu", "--max-new-tokens", "1", "--result_dir", str(tmp_path)]) == 0
    [file] = tmp_path.glob("*/bbh.navigate/run.json")
    assert list(json.loads(file.read_text())["pool"]) == sorted(f"flanv2.{task}" for task in TASKS)


def test_other_pools_keep_their_names_under_the_preset(official_layout: Path) -> None:
    pool = AdapterPool.open(official_layout / "hf_models" / "Llama-3.1-8B-loras-flanv2")
    hub = "archon159/LoGo-loras-collection/Llama-3.1-8B-loras-flanv2@main"
    for base, adapters in (("Llama-3.1-8B", "mine/adapters"), ("org/other", None), ("Qwen2.5-7B", hub)):
        assert officially_named(pool, base, adapters) is pool
    for base, adapters in (("Llama-3.1-8B", hub), ("meta-llama/Llama-3.1-8B", None)):
        assert officially_named(pool, base, adapters).names == tuple(
            f"Llama-3.1-8B-loras-flanv2/{name}" for name in pool.names
        )
