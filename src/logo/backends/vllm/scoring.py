"""`Scoring`: the scorers of one state of a pool, in a vLLM worker, which cannot start forward passes of its own.

A calibration needs the hidden vectors of texts, and only the router can run texts. A signal is therefore opened in
steps: each step returns the texts that are needed next, and the following step uses what the taps have recorded. The
first texts are those of the calibration, then the example prompts of adapters, if there are any.

    open(signal) -> texts, often none -> (the router has them run) -> calibrate(signal, texts, keys) -> texts, or ready
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from logo.adapters.activation import earliest
from logo.adapters.pool import AdapterPool
from logo.backends.vllm.options import Options
from logo.backends.vllm.taps import Taps
from logo.decoding import Prompts
from logo.selection.calibration import HiddenVectors
from logo.selection.plan import plan, with_activations
from logo.selection.points import Point
from logo.selection.scorer import Scorer
from logo.selection.scorers import Scorers
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal
from logo.selection.texts import Texts


class _TextsNeeded(Exception):
    """Hidden vectors are missing from the cache, so that the model has to run texts first.

    Attributes:
        points: where the texts are read.
        texts: the texts to run.
    """

    def __init__(self, points: Sequence[Point], texts: Texts) -> None:
        super().__init__()
        self.points, self.texts = tuple(points), texts


class Scoring:
    """The scorers of one state of a pool.

    Args:
        skeleton: the base model without its weights.
        pool: fitted to it.
        options: LoGo's options.
        taps: record the hidden vectors of texts, and score with the installed scorers.
        prompts: read the texts.
        device: where scores are computed.
        before: of an earlier state of the pool, whose valid parts are reused.
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
        self._kept: Mapping[tuple[int, ...], Mapping[str, Tensor]] = {}  # text of this step -> place -> hidden vectors
        self._ready: dict[str, Scorer] = {}
        self._scorers: Scorers = Scorers(
            skeleton,
            pool,
            options.settings,
            prompts.texts,
            None if before is None else before._scorers,
            device=device,
            run_texts=self._hidden_vectors,
        )

    def open(self, signal: str) -> dict[str, Any]:
        """Makes the scorer of a signal, or says which texts the model has to run before.

        Returns:
            `texts`: texts to run and then pass to `calibrate`, as token ids, often none; `names`: the adapters that are
            scored; `points`: where prompts are read; `described`: whether example prompts contribute to scores;
            `sizes`: the relative size of each adapter by name.
        """
        settings = self._settings(signal)
        try:
            scorer = self._scorers.get(settings)
        except _TextsNeeded as needed:
            # A calibration asks for its candidates in groups, and caches nothing before the last group was read. So all
            # of them are recorded at once.
            texts = self._scorers.texts(settings)
            calibrating = texts is not None and all(row in texts.rows for row in needed.texts.rows)
            points = plan(self._skeleton, self._pool, settings).points if calibrating else needed.points
            self._taps.start_calibration(points, settings.reading)
            return {"texts": [list(row) for row in needed.texts.rows], **_told(None)}
        finally:
            self._kept = {}
        self._ready[signal] = scorer
        return {"texts": [], **_told(scorer)}

    def calibrate(self, signal: str, texts: Sequence[Sequence[int]], keys: Sequence[str]) -> dict[str, Any]:
        """Calls `open` again, after the texts that it returned were run as probes with these keys. A worker that asked
        for no texts ignores them.

        Raises:
            ModelError: a text was not read whole.
        """
        self._kept = dict(zip(map(tuple, texts), self._taps.end_calibration(keys), strict=True))
        return self.open(signal)

    @property
    def scored(self) -> dict[str, dict[str, Any]]:
        """For each opened signal, the result of `open` without texts."""
        return {signal: _told(scorer) for signal, scorer in self._ready.items()}

    def install(self) -> None:
        """Makes the taps score by this state of the pool from now on."""
        for signal, scorer in self._ready.items():
            self._taps.score(signal, scorer, self._settings(signal))

    def _settings(self, signal: str) -> SelectionSettings:
        return with_activations(self._options.settings.for_call(signal=signal), self._pool)

    def _hidden_vectors(self, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
        """A `TextRunner`: the hidden vectors of texts that vLLM has run."""
        rows = [self._kept.get(tuple(row), {}) for row in texts.rows]
        places = [self._taps.place_of(point, signal.input) for point in points]
        if any(place not in row for row in rows for place in places):
            raise _TextsNeeded(points, texts)
        acted = _acted(texts, signal) if signal.token == "tail" else None
        joined = {}
        for place in dict.fromkeys(places):
            parts = [row[place].mean(dim=0, keepdim=True) if signal.token == "mean" else row[place] for row in rows]
            counts = torch.tensor([len(part) for part in parts])
            owners = torch.arange(len(parts)).repeat_interleave(counts)
            joined[place] = HiddenVectors(torch.cat(parts), owners, acted)
        return (joined[place] for place in places)


def _told(scorer: Scorer | None) -> dict[str, Any]:
    """The facts about a scorer that other processes need, without values if it is not ready (None)."""
    if scorer is None:
        return {"names": [], "points": [], "described": False, "sizes": {}}
    points, described = [point.name for point in scorer.points], scorer.signatures is not None
    return {"names": list(scorer.names), "points": points, "described": described, "sizes": dict(scorer.sizes)}


def _acted(texts: Texts, signal: Signal) -> Tensor:
    """(vectors,) bool: whether adapters act on each token of the texts that is read."""
    found = []
    for row in texts.rows:
        read = torch.arange(int(len(row) > 1), len(row))
        found.append(read >= earliest(signal.activations, row))
    return torch.cat(found)
