"""The table of a study in the literature's form: each signal, method and mixture relative to the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from logo.evaluation.tables import Cell, Column, Table, number, numbers, row, words

WIDTH = 118
# Heading, part of the table, key, digits.
COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("own in pool\nmean of\nratios", "own", "of_oracle", 1),
    ("own in pool\nratio of\nmeans", "own", "of_oracle_pooled", 1),
    ("own removed\nmean of\nratios", "left_out", "of_oracle", 1),
    ("own removed\nratio of\nmeans", "left_out", "of_oracle_pooled", 1),
    ("unseen\nscore", "unseen", "value", 1),
    ("unseen\nNLL", "unseen", "nll", 2),
)
_ENCODER = "Styxxxx/lora_retriever"  # LoraRetriever's own


def field_table(report: Mapping[str, Any]) -> Table:
    """Signals, methods and fixed mixtures as rows, the best with the own adapter in the pool first: method / oracle, as
    the mean of the tasks' ratios and as the ratio of their means."""
    found = report["relative"]
    methods = report["settings"].get("methods", {})
    rows = []
    for kind, name in _rows(found):
        entries = {part: (found[part] or {}).get(kind, {}).get(name, {}) for _, part, _, _ in COLUMNS}
        cells = [_cell(entries[part], key, digits) for _, part, key, digits in COLUMNS]
        said = methods.get(name, {}) if kind == "methods" else {}
        read = looks_at(kind, name, said, report["settings"].get("methods_signal"))
        rows.append(row(name, *cells, Cell(read, emphasis="faint")))
    ends = any(cell is not None and cell.ends is not None for one in rows for cell in one.cells)
    columns = (*words(""), *numbers(*(heading for heading, _, _, _ in COLUMNS)))
    columns += (Column("input", numeric=False, wraps=True),)
    return Table(columns, tuple(rows), note=_caption(found, report, intervals=ends))


def looks_at(kind: str, name: str, method: Mapping[str, Any], signal: str | None = None) -> str:
    """The input of a signal, a mixture or a method, in a few words.

    Args:
        method: the options of a method.
        signal: the signal of the engine that methods get, if one of them may select by it.
    """
    if kind == "signals":
        return "prompt, weights"
    if kind == "mixtures":
        return {"oracle": "the answer key"}.get(name, "nothing")
    encoder = method.get("embedding_model")
    by = "" if encoder is None else f"; encoder {PurePath(encoder).name}"
    if method["method"] == "loraretriever" and encoder != _ENCODER:
        by += ", not its own"
    texts: dict[str, str] = {
        "lorahub": f"up to {method.get('rows')} labelled rows a task",
        "best-single": f"up to {method.get('rows')} labelled rows a task",
        "loraretriever": "prompt, samples per adapter",
        **dict.fromkeys(("base", "uniform", "random"), "nothing"),
        "oracle": "the answer key",
        "logo": "prompt, weights",
    }
    plugin = "not known (a plugin)" if signal is None else f"not known (a plugin; signal {signal})"
    return texts.get(method["method"], plugin) + by


def _rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kinds and names of all that was compared, the best with the own adapter in the pool first."""
    parts = [part for part in (found["own"], found["left_out"], found["unseen"]) if part]
    every = dict.fromkeys((kind, name) for part in parts for kind in ("signals", "methods", "mixtures")
                          for name in part.get(kind, {}))  # fmt: skip

    def worth(row: tuple[str, str]) -> float:
        for part, key in (("own", "of_oracle"), ("left_out", "of_oracle"), ("unseen", "value")):
            value = (found[part] or {}).get(row[0], {}).get(row[1], {}).get(key)
            if value is not None:
                return -float(value)
        return 0.0

    return sorted(every, key=worth)


def _cell(entry: Mapping[str, Any], key: str, digits: int) -> Cell | None:
    if entry.get(key) is None:
        return None
    return number(entry[key], f".{digits}f", entry["intervals"].get(key), scale=1 if key == "nll" else 100)


def _caption(found: Mapping[str, Any], report: Mapping[str, Any], *, intervals: bool) -> str:
    settings = report["settings"]
    judged = f"answers of up to {settings['generate']} tokens" if "generate" in settings else "gold answers, forced"
    said = [f"In percent, {judged}; 95 % intervals over tasks below." if intervals else f"In percent, {judged}."]
    own = found["own"] or found["left_out"]
    if own and own["without_oracle"]:
        said.append(f"{len(own['without_oracle'])} of {own['tasks']} tasks have no ratio: their oracle scores 0.")
    if "so_far" in settings:
        said.append(f"So far: {settings['so_far']} rows.")
    return " ".join(said)
