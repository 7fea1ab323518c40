"""`Scoring`: the scorers of one state of a pool, in a vLLM worker, which cannot start forward passes of its own.

A calibration needs the hidden vectors of texts, and only the router can run texts. A signal is therefore opened in
steps: each step returns the texts that are needed next, and the following step uses what the taps have recorded. The
first texts are those of the calibration, then the example prompts of adapters, if there are any.

    open(signal) -> texts, often none -> (the router has them run) -> calibrate(signal, texts, keys) -> texts, or ready
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from logo.adapters.activation import earliest
from logo.adapters.pool import AdapterPool
from logo.backends.vllm.options import VllmOptions
from logo.backends.vllm.taps import Taps
from logo.files import Store, cache_folder
from logo.prompts import Prompts
from logo.selection.calibration import HiddenVectors
from logo.selection.points import Point
from logo.selection.scorer import Scorer
from logo.selection.signals import Signal
from logo.selection.texts import Texts


class _TextsNeeded(Exception):
    """Hidden vectors are missing, so that the model has to run texts first.

    Attributes:
        points: where the texts are read.
        rows: the texts to run, as token ids.
        signal: how they are read.
    """

    def __init__(self, points: Sequence[Point], rows: Sequence[Sequence[int]], signal: Signal) -> None:
        super().__init__()
        self.points, self.rows, self.signal = tuple(points), rows, signal


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
        options: VllmOptions,
        taps: Taps,
        prompts: Prompts,
        device: torch.device,
        before: Scoring | None = None,
    ) -> None:
        self._skeleton, self._pool, self._settings, self._taps = skeleton, pool, options.settings, taps
        self._prompts, self._device = prompts, device
        self._earlier: Mapping[str, Scorer] = {} if before is None else before._ready
        # Until a pool is replaced, also of what the cache folder does not take.
        self._store: Store = Store(cache_folder(options.settings.cache)) if before is None else before._store
        # Until a signal is open: text -> place in vLLM's model -> hidden vectors (tokens, d).
        self._kept: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._ready: dict[str, Scorer] = {}

    def open(self, signal: str) -> dict[str, Any]:
        """Makes the scorer of a signal, or says which texts the model has to run before.

        Returns:
            `texts`: texts to run and then pass to `calibrate`, as token ids, often none; if there are none, what other
            processes need to know of the scorer (`logo.backends.vllm.core.Opened`).
        """
        before, run = self._ready.get(signal) or self._earlier.get(signal), self._hidden_vectors
        given = self._skeleton, self._pool, self._settings, signal, self._prompts.texts
        try:
            scorer = Scorer.open(*given, run=run, device=self._device, before=before, store=self._store)
        except _TextsNeeded as needed:
            self._taps.start_calibration(needed.points, needed.signal)
            return {"texts": [list(row) for row in needed.rows]}
        except BaseException:
            self._kept = {}
            raise
        self._kept, self._ready[signal] = {}, scorer
        return _told(scorer)

    def calibrate(self, signal: str, texts: Sequence[Sequence[int]], keys: Sequence[str]) -> dict[str, Any]:
        """Calls `open` again, after the texts that it returned were run as probes with these keys. A worker that asked
        for no texts ignores them.

        Raises:
            ModelError: a text was not read whole.
        """
        for text, vectors in zip(texts, self._taps.end_calibration(keys), strict=True):
            self._kept.setdefault(tuple(text), {}).update(vectors)
        return self.open(signal)

    @property
    def scored(self) -> dict[str, dict[str, Any]]:
        """For each opened signal, the result of `open` without texts."""
        return {signal: _told(scorer) for signal, scorer in self._ready.items()}

    def install(self) -> None:
        """Makes the taps score by this state of the pool from now on."""
        for signal, scorer in self._ready.items():
            self._taps.score(signal, scorer)

    def _hidden_vectors(self, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
        """A `TextRunner`: the hidden vectors of texts that vLLM has run.

        Raises:
            _TextsNeeded: it has to run them first.
        """
        rows = [self._kept.get(tuple(row), {}) for row in texts.rows]
        places = [self._taps.place_of(point, signal.input) for point in points]
        if any(place not in row for row in rows for place in places):
            raise _TextsNeeded(points, texts.rows, signal)
        acted = _acted(texts.rows, signal) if signal.token == "tail" else None
        joined = {}
        for place in dict.fromkeys(places):
            parts = [row[place].mean(dim=0, keepdim=True) if signal.token == "mean" else row[place] for row in rows]
            counts = torch.tensor([len(part) for part in parts])
            owners = torch.arange(len(parts)).repeat_interleave(counts)
            joined[place] = HiddenVectors(torch.cat(parts), owners, acted)
        return (joined[place] for place in places)


def _told(scorer: Scorer) -> dict[str, Any]:
    points = [point.name for point in scorer.points]
    return {"texts": [], "points": points, "selector": asdict(scorer.selector)}


def _acted(rows: Sequence[Sequence[int]], signal: Signal) -> Tensor:
    """(vectors,) bool: whether adapters act on each token of the texts that is read."""
    return torch.cat([torch.arange(int(len(row) > 1), len(row)) >= earliest(signal.activations, row) for row in rows])
