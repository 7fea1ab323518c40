"""The differences between runs: short labels, differing options, and times by stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logo.evaluation.runner import summed
from logo.evaluation.runs import Run

# Options that are not listed as differences: they change no answer, or are shown elsewhere.
_UNTOLD = frozenset(
    {
        "dataset",
        "data_dir",
        "result_dir",
        "save_dir",
        "model_dir",
        "cache",
        "adapter_memory_gb",
        "prefix_cache_gb",
    }
    | {
        "base_model",
        "method",
        "signal",
        "selection_strategy",
        "k",
        "n_selected_modules",
        "seed",
        "gpu",
        "device",
        "run_name",
        "command",
    }
)
_VARIES = "differs between its datasets"


@dataclass(frozen=True)
class Seconds:
    """The times of a run.

    Attributes:
        loading: model and pool; datasets of one process share it.
        stages: of answering, by name; `other` is the rest of the wall time.
        instances: number of answered instances.
    """

    loading: float
    stages: Mapping[str, float]
    instances: int

    @property
    def total(self) -> float:
        """Everything together."""
        return self.loading + sum(self.stages.values())


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run, all different: the method, and what sets it apart from others of that method."""
    found = [_method(run) for run in runs]
    if len({run.base for run in runs}) > 1:
        found = [f"{text} · {run.base}" for text, run in zip(found, runs, strict=True)]
    own = {name: tuple(getattr(run, name) for run in runs) for name in ("name", "k", "seed")}
    apart = {name: tuple("" if v is None else str(v) for v in values) for name, values in own.items()}
    apart |= differing(runs)
    for name, values in apart.items():
        alike = [text for text in found if found.count(text) > 1]
        varying = dict.fromkeys(
            text for text in alike if len({v for t, v in zip(found, values, strict=True) if t == text}) > 1
        )
        found = [f"{t} · {name} {v}" if t in varying and v else t for t, v in zip(found, values, strict=True)]
    unclear = [text for text in found if found.count(text) > 1]
    found = [f"{text} · {run.folder}" if text in unclear else text for text, run in zip(found, runs, strict=True)]
    return [text if found.count(text) == 1 else f"{text} ({number})" for number, text in enumerate(found, start=1)]


def differing(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """The options that are not the same in all runs: name -> a value per run, as text. The signal is one of them, and
    the first, if a plugin's method may have selected by it."""
    every = (name for run in runs for result in run.results.values() for name in result.options)
    names = [name for name in dict.fromkeys(every) if name not in _UNTOLD]
    if any(run.by_plugin for run in runs):
        names.insert(0, "signal")
    found = {name: tuple(_option(run, name) for run in runs) for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1 or _VARIES in values}


def seconds(run: Run) -> Seconds:
    """The times of a run."""
    results = run.results.values()
    inference = sum(result.seconds.get("inference", 0.0) for result in results)
    stages = summed(
        {name: value for name, value in result.seconds.items() if name not in ("loading", "inference")}
        for result in results
    )
    rest = inference - sum(stages.values())
    # Stages and the whole are measured separately; a rest that rounding explains is not shown as a stage.
    if rest > 0.001 * inference or not stages:
        stages["other" if stages else "inference"] = max(0.0, rest)
    loading = sum({result.seconds.get("loading", 0.0) for result in results})
    return Seconds(loading, stages, sum(len(result) for result in results))


def _method(run: Run) -> str:
    return run.method or run.folder.resolve().name


def _option(run: Run, name: str) -> str:
    values = {_text(result.options.get(name)) for result in run.results.values()}
    return values.pop() if len(values) == 1 else _VARIES


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value)
