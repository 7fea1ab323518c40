"""Options of `logo eval run`, and all that one evaluation was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from logo.adapters.pool import DEFAULT_K
from logo.adapters.sources import default_k, pool_sources
from logo.cli.choices import Context, Preset
from logo.cli.opening import asked_k
from logo.cli.options import OFFICIAL_SIGNAL, PROBE, EngineOptions, RunnerOptions, rare, usual

if TYPE_CHECKING:
    from logo.baselines import Method


def as_evaluated(engine: EngineOptions) -> EngineOptions:
    """The options with the defaults of evaluations."""
    return replace(engine, signal=engine.signal or OFFICIAL_SIGNAL)


@dataclass(frozen=True)
class RunOptions:
    """Options for the rows of an evaluation, how they are answered, and where results are written."""

    dataset: str = usual("", "Name, list `a,b` or pattern `bbh.*`; empty: all in the data folder.")
    data_dir: str = usual("./data", "Rows are read from DIR/main/sub/test.jsonl.", metavar="DIR")
    rows: str | None = usual(None, "Or a folder of NAME.jsonl, one dataset each.", "none", metavar="DIR")
    train_rows: str | None = rare(
        None,
        "Folder of NAME.jsonl with training rows, for methods that learn from them.",
        "train.jsonl beside test.jsonl",
        metavar="DIR",
    )
    metric: str | None = rare(
        None,
        "How answers are judged, for all datasets: `em`, `em_multi`, `em_first`, `bleu`, `rouge` or a plugin's "
        "metric; `em_first` is exact match with the first gold text, `em` and `em_multi` with any of them.",
        "from NAME.yaml beside NAME.jsonl, else from the dataset's name",
        metavar="METRIC",
    )
    limit: int | None = usual(None, "Only the first rows of each dataset.", "all")
    batch_size: int = usual(1, "Prompts per forward pass.", min=1)
    max_new_tokens: int = usual(256, "Longest answer, in tokens.", min=1)
    generation_early_stop: bool = rare(False, "Stop generating at the first newline.")
    overwrite: bool = usual(False, "Start again, replacing finished rows and a result of another run.")
    result_dir: str = usual("results", "Folder for result folders.", metavar="DIR")
    seed: int = usual(0, "Random seed; part of the result folder's name.", min=0)
    probe_context: Context | None = rare(
        None,
        "Adapters active while probing: none, the whole pool, or as the official script runs.",
        "base; --preset official: carry",
        panel=PROBE,
    )
    run_name: str | None = rare(
        None, "Added to the result folder's name, to keep several runs beside each other.", "none", metavar="NAME"
    )
    save_dir: str = rare("", "Accepted for the official command line; not used.")
    preset: Preset | None = usual(None, "Use the defaults of the authors' script.")


@dataclass(frozen=True)
class Asked:
    """The options of one evaluation; `command` is the command line that is written beside its results."""

    engine: EngineOptions
    runner: RunnerOptions
    run: RunOptions
    method: Method | None
    base_model: str
    command: Mapping[str, Any]

    @property
    def official(self) -> bool:
        """Whether the defaults are those of the authors' script."""
        return self.run.preset == "official"

    @property
    def carries(self) -> bool:
        """Whether each row is probed with the adapters of the one before."""
        probed = self.run.probe_context
        return self.official if probed is None else probed == "carry"

    @property
    def k(self) -> int:
        """Adapters per prompt: the method's own number, else the user's, else the pool's."""
        if self.method is not None and self.method.picks is not None:
            return self.method.picks
        sources = pool_sources(self.engine.adapters, self.base_model, self.engine.model_dir)
        return asked_k(self.engine, self.run.preset) or default_k(sources, DEFAULT_K)
