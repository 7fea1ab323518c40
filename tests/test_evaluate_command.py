"""What `logo evaluate` says about its numbers: which metric, whose rows, how many adapters, what it takes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from logo import AdapterPool, LoGo, SelectionSettings
from logo.cli.run import run
from logo.demo import heldout
from logo.errors import DataError
from logo.evaluation.comparison import compare
from logo.evaluation.jobs import declared_metric
from logo.evaluation.metrics import KINDS, measure, measures, official_kind, recorded_kind
from logo.evaluation.runs import read_run
from test_engine import engine

DEMO = ("--base-model", "demo", "--gpu", "-1")


def write_rows(folder: Path, **tasks: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def record(folder: Path, name: str = "run.json") -> Any:
    return json.loads((folder / name).read_text())


# -- training rows --------------------------------------------------------------------------------------------------


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
    expected = f"dataset 'antonym': {shared} of its {5 + shared} training rows are test rows too"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run([*command, "--method", method, "--shots", "2", "--max-new-tokens", "2"]) == 0
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


def test_the_metric_of_the_command_comes_before_that_of_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", mine=heldout()["antonym"][:2])
    (tmp_path / "rows" / "mine.yaml").write_text("metric: bleu")
    assert record(evaluated(tmp_path, "--metric", "rouge"))["metric"] == "rouge"


def test_runs_of_different_metrics_are_not_compared(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", mine=heldout()["antonym"][:2])
    one = evaluated(tmp_path, folder="one").parent
    other = evaluated(tmp_path, "--metric", "bleu", folder="other").parent
    with pytest.raises(DataError, match=r"dataset 'mine': expected one metric in both runs, found em in .* and bleu"):
        compare(read_run(one), read_run(other))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("metric: rogue", r"mine.yaml: expected a metric \(em, .*\), found 'rogue' \(did you mean 'rouge'\?\)"),
        ("metric: [em]", r"mine.yaml: expected a metric"),
        ("metrics: em", r"mine.yaml: expected 'metric: NAME' and nothing else, found \"{'metrics': 'em'}\""),
        ("- em", r"mine.yaml: expected 'metric: NAME' and nothing else"),
        ("a: b: c", r"mine.yaml: expected 'metric: NAME', found what is no YAML"),
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


def test_every_command_takes_as_many_adapters_as_suit_the_demos_pool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three, where nobody says a number; the folder's name says so too. The preset's number is the script's."""
    assert LoGo.from_pretrained("demo").settings.k == 3
    capsys.readouterr()
    for command in (["select", "hot ->"], ["generate", "hot ->", "--max-new-tokens", "1"]):
        assert run([*command, "--json", *DEMO]) == 0
        assert len(json.loads(capsys.readouterr().out)["adapters"]) == 3, command
    write_rows(tmp_path / "rows", antonym=heldout()["antonym"][:2])
    folder = evaluated(tmp_path)
    assert folder.parent.name == "demo_selection_norm_n_3_seed_0"
    assert {len(names) for names in record(folder, "selected_loras.json")} == {3}
    assert record(folder)["options"]["k"] == 3
    swept = ["sweep", *DEMO, "--rows", str(tmp_path / "rows"), "--max-new-tokens", "1", "-o", str(tmp_path / "sweep")]
    assert run([*swept, "--grid", "signal=norm,norm_z"]) == 0
    found = [record(file.parent, "selected_loras.json") for file in (tmp_path / "sweep").rglob("run.json")]
    assert len(found) == 2 and {len(names) for rows in found for names in rows} == {3}
    official = evaluated(tmp_path, "--preset", "official", folder="official")
    assert official.parent.name == "demo_selection_norm_n_20_seed_0"
    assert {len(names) for names in record(official, "selected_loras.json")} == {16}


def test_another_pool_is_asked_for_twenty_or_all_it_has(llama: nn.Module, adapters: Path) -> None:
    """Without a warning, which would be an error here; and what is asked for is what one gets."""
    few = AdapterPool.from_directory(adapters)
    assert engine(llama, adapters, signal="norm", k=None, unscorable="skip").settings.k == len(few) < 20
    assert few.default_k == few.subset("tasks/*").default_k == 20
    few.default_k = 2
    assert SelectionSettings().k_of(few) == SelectionSettings().k_of(few.subset("tasks/*")) == 2
    assert SelectionSettings(k=4).k_of(few) == 4
