"""`Scoring`: the scorers of one state of a pool, in a worker that cannot run its model by itself.

A calibration needs texts to be run, and only the router can have them run. So a signal is opened in two steps: the
first says which texts are needed, and the second finds what the taps have kept of them.

    open(signal) -> texts, often none -> (the router has them run) -> calibrate(signal, keys) -> ready
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from logo.adapters.activation import earliest
from logo.adapters.pool import AdapterPool
from logo.backends.vllm.options import Options
from logo.backends.vllm.taps import Taps
from logo.decoding import Prompts
from logo.errors import ModelError
from logo.selection.plan import plan, told
from logo.selection.points import Point
from logo.selection.scorer import Scorer
from logo.selection.scorers import Scorers
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal
from logo.selection.texts import Texts


class _TextsNeeded(Exception):
    """A calibration that is not in the cache: texts have to be run first."""


class Scoring:
    """The scorers of one state of a pool.

    Args:
        skeleton: the base model without its weights.
        pool: fitted to it.
        options: what LoGo was told.
        taps: keep the hidden vectors of texts, and score by what is ready once `install` was called.
        prompts: read the texts.
        device: where scores are computed.
        before: of an earlier state of the pool; what is still true is taken over.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        pool: AdapterPool,
        options: Options,
        taps: Taps,
        prompts: Prompts,
        device: torch.device,
        before: Scoring | None = None,
    ) -> None:
        self._skeleton, self._pool, self._options, self._taps = skeleton, pool, options, taps
        self._kept: Any = None  # hidden vectors of the texts of the calibration at hand
        self._ready: dict[str, Scorer] = {}
        self._scorers: Scorers = Scorers(
            skeleton,
            pool,
            options.settings,
            prompts.texts,
            prompts.tokenizer.bos_token_id,
            None if before is None else before._scorers,
            device=device,
            listening=self._listening,
        )

    def open(self, signal: str) -> dict[str, Any]:
        """Makes ready to score by a signal.

        Returns:
            `texts`: those that have to be run first, as token ids, for `calibrate`: often none; `names`: the adapters
            that are scored; `points`: where prompts are read.
        """
        settings = self._settings(signal)
        try:
            scorer = self._scorers.get(settings)
        except _TextsNeeded as needed:
            self._taps.listen(plan(self._skeleton, self._pool, settings).points, settings.reading)
            return {"texts": list(needed.args[0]), "names": [], "points": []}
        finally:
            self._kept = None
        self._ready[signal] = scorer
        return {"texts": [], "names": list(scorer.names), "points": [point.name for point in scorer.points]}

    def calibrate(self, signal: str, keys: Sequence[str]) -> dict[str, Any]:
        """`open` after its texts were run under these keys.

        Raises:
            ModelError: one of them was not read whole.
        """
        failed = self._taps.failed(keys)
        if failed:
            raise ModelError(f"calibration text {next(iter(failed))}: {next(iter(failed.values()))}")
        self._kept = self._taps.kept_vectors(keys)
        return self.open(signal)

    @property
    def names(self) -> dict[str, list[str]]:
        """The adapters that each signal scores."""
        return {signal: list(scorer.names) for signal, scorer in self._ready.items()}

    def install(self) -> None:
        """Scores by this state from now on."""
        for signal, scorer in self._ready.items():
            self._taps.score(signal, scorer, self._settings(signal))

    def _settings(self, signal: str) -> SelectionSettings:
        return told(self._options.settings.asked(signal=signal), self._pool)

    def _listening(self, points: Sequence[Point], texts: Texts, signal: Any) -> Any:
        if self._kept is None:
            raise _TextsNeeded([list(row) for row in texts.rows])
        acted = _acted(texts, signal) if signal.token == "tail" else None
        return (replace(heard, acted=acted) for heard in self._kept(points))


def _acted(texts: Texts, signal: Signal) -> Tensor:
    """(vectors,) bool: on which of the tokens of texts that are read adapters act."""
    found = []
    for row in texts.rows:
        read = torch.arange(int(row[0] == texts.bos and len(row) > 1), len(row))
        found.append(read >= earliest(signal.activations, row))
    return torch.cat(found)
