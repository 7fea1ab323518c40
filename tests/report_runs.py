"""Result folders for tests of comparisons and reports, as a run writes them, of any content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logo.evaluation.metrics import measure, metric_kind
from logo.evaluation.results import OFFICIAL, RUN, Partial, official_files

LEFT, RIGHT = "m_selection_norm_n_2_seed_0", "m_selection_calibrated_n_2_seed_0"


def write_result(
    folder: Path,
    answers: Sequence[str],
    golds: Sequence[str | list[str]],
    *,
    official: bool = False,
    more: Mapping[str, Any] | None = None,
    **columns: Sequence[Any],
) -> Path:
    """The result of one dataset, whose name is the folder's, judged by its metric.

    Args:
        official: write the six files of the official script only.
        more: of `run.json`.
        columns: of `rows.jsonl`, instead of the simplest ones.
    """
    kind = metric_kind(folder.name)
    records = [
        {"index": index, "prompt": f"question {index}", "completion": gold, "references": None, "target": None}
        | {"prediction": answer, "value": measure(kind, answer, gold), "error": None, "selected": ["a", "b"]}
        | {"weights": [0.75, 0.25], "scores": {"a": 3.0, "b": 1.0}, "confidence": 0.5, "form": "weights"}
        | {"seconds": {"inference": 0.1}, **{name: values[index] for name, values in columns.items()}}
        for index, (answer, gold) in enumerate(zip(answers, golds, strict=True))
    ]
    files = official_files(records, "norm", 1.0, sorted({name for one in records for name in one["scores"]}))
    if official:
        folder.mkdir(parents=True)
        for name in OFFICIAL:
            (folder / f"{name}.json").write_text(json.dumps(files[f"{name}.json"]))
        return folder
    identity = {"base_model": "m", "seed": 0, "metric": kind}
    partial = Partial(folder, identity)
    partial.add(records)
    partial.finish(
        {**files, RUN: {"identity": identity, "dataset": {"name": folder.name}, "metric": kind, **(more or {})}}
    )
    partial.close()
    return folder


def two_runs(root: Path, **more: Any) -> tuple[Path, Path]:
    """B is right on all rows of bbh.one and on half of bbh.two, A on two rows of each; their translations are alike."""
    golds = ["yes", "no"] * 4
    for name, one, two in ((LEFT, 2, 2), (RIGHT, 8, 4)):
        write_result(root / name / "bbh.one", golds[:one] + ["maybe"] * (8 - one), golds, **more)
        write_result(root / name / "bbh.two", golds[:two] + ["maybe"] * (8 - two), golds, **more)
        write_result(root / name / "wmt16.en-de", ["das ist ein kleines Haus"], ["das ist ein Haus"], **more)
    return root / LEFT, root / RIGHT
