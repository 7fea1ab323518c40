"""Rows of many tasks in one dataset of the Hub, an adapter for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from logo import DataError, UsageError
from logo.cli.contests import tasks_of
from logo.evaluation.sources import many
from logo.evaluation.sources.many import hub_tasks, named_like
from logo.evaluation.sources.places import Place
from logo.evaluation.study import Task, cut
from logo.rows import Row
from test_baselines import sentences  # noqa: F401 - a fixture

F1 = Path(__file__).parent / "data" / "golden" / "F1"
PAGE = Path(__file__).parent.parent / "docs" / "reproduce-the-paper.md"
TASKS = {"anli_r1_10templates": "em", "common_gen": "rouge", "wmt16_translate_deen_10templates": "bleu"}


def rows(count: int = 4) -> list[dict[str, Any]]:
    """As LoraRetriever's evaluation set has them."""
    return [
        {"inputs": f"{task} question {i}", "targets": f"answer {i}", "task": task, "domain": "some", "metric": metric}
        for i in range(count)
        for task, metric in TASKS.items()
    ]


def write_dataset(folder: Path, found: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    file = folder / "data" / "test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), file)
    return folder


@pytest.fixture
def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts rows where a download would have put them."""

    def put(found: list[dict[str, Any]]) -> None:
        root = write_dataset(tmp_path / "dataset", found)
        name = "data/test-00000-of-00001.parquet"
        monkeypatch.setattr(many, "fetch", lambda hub, layout, splits: Place(root, {"test": [name]}))

    return put


def test_rows_are_sorted_into_tasks(placed: Any) -> None:
    placed(rows())
    found = hub_tasks("Styxxxx/LoraRetriever_EvalSet", prompt_end="\n\n")
    assert [(task.name, len(task.rows), task.metric) for task in found] == [
        ("anli_r1", 4, "em"),
        ("common_gen", 4, "rouge"),
        ("wmt16_translate_deen", 4, "bleu"),
    ]
    assert found[0].rows[1] == Row("anli_r1_10templates question 1\n\n", "answer 1")
    assert [task.name for task in hub_tasks("Styxxxx/x", "wmt*,common_gen")] == ["common_gen", "wmt16_translate_deen"]
    with pytest.raises(DataError, match=r"task 'anli_r2': no such task in 'Styxxxx/x' .did you mean 'anli_r1'"):
        hub_tasks("Styxxxx/x", "anli_r2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ""}, r"Styxxxx/x: .*row 1: expected .* found 'completion' is empty"),
        ({"task": None}, r"row 1: expected the column task to name the row's task, found None"),
        ({"metric": "bleurt"}, r"Styxxxx/x: task 'anli_r1': expected a metric .* found 'bleurt'"),
    ],
)
def test_rows_that_are_not_as_they_should_be(change: dict[str, Any], message: str, placed: Any) -> None:
    first, *others = rows()
    placed([first | change, *others])
    with pytest.raises((DataError, UsageError), match=message):
        hub_tasks("Styxxxx/x")


def test_other_columns_are_named(placed: Any) -> None:
    placed([{"question": "a", "answer": "b", "task": "c"}])
    with pytest.raises(DataError, match="expected columns inputs and targets"):
        hub_tasks("Styxxxx/x")


def test_tasks_are_called_like_their_adapters() -> None:
    tasks = [Task(name, Path("x"), ()) for name in ("anli_r1", "glue", "qqp", "piqa")]
    adapters = ["llama2_7b_lora-anli_r1", "org/repo/glue", "a-qqp", "b-qqp", "notpiqa"]
    named = [task.name for task in named_like(tasks, adapters)]
    assert named == ["llama2_7b_lora-anli_r1", "org/repo/glue", "qqp", "piqa"]


def test_held_out_rows_are_the_last_ones() -> None:
    some = tuple(Row(f"w{i}", "w9") for i in range(6))
    [asked], held = cut([Task("t", Path("x"), some)], 3, 2)
    assert asked.rows == some[:3] and held == {"t": some[4:]}
    [asked], held = cut([Task("t", Path("x"), some)], None, 2)
    assert asked.rows == some[:4]
    assert cut([asked], None, 0) == ([asked], {})
    with pytest.raises(UsageError, match="hold-out 6: task 't' has 6 rows, expected more"):
        cut([Task("t", Path("x"), some)], None, 6)
    with pytest.raises(UsageError, match="--prompt-end is only for datasets of the Hub, and"):
        tasks_of(str(F1), "", "x", lambda: ())
