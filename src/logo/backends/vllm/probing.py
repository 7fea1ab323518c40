"""Selecting with vLLM's offline engine: each prompt is run as a probe that generates one token, and vLLM's workers
score the adapters while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from logo.adapters.pool import AdapterPool
from logo.backends.vllm.core import new_key, outcomes, scores_of, texts_of, window_of
from logo.backends.vllm.marks import probing
from logo.backends.vllm.requests import Requests
from logo.prompts import Prompt
from logo.selecting import CallSettings, Outcome, Selecting
from logo.selection.confidence import EXAMPLES, Evidence
from logo.selection.plan import plan
from logo.selection.settings import SelectionSettings
from logo.selection.window import WHOLE, Window

# The most prompts that are probed together; less than the number whose scores vLLM's workers keep.
_PROBED = 2048

# Token ids, the signal that scores them, the names of the adapters that may be selected (None: all), and the window.
_Asked = tuple[Sequence[int], str, Collection[str] | None, Window]


class InWorkers(Selecting):
    """Selects by probes in vLLM's workers.

    Args:
        model: the base model without its weights.
        pool: fitted to it.
        settings: how to select, unless a call has other options.
        requests: of the engine.
        lock: of the engine, whose workers do one thing at a time.
        call: calls one of `logo.backends.vllm.calls.CALLS` on every worker, and returns the values.
    """

    def __init__(
        self,
        model: Any,
        pool: AdapterPool,
        settings: SelectionSettings,
        requests: Requests,
        lock: AbstractContextManager[Any],
        call: Callable[..., list[Any]],
    ) -> None:
        super().__init__(pool, settings)
        self._model, self._requests, self._lock, self._call = model, requests, lock, call
        self._opened: dict[str, dict[str, Any]] = {}  # signal -> the result of `Scoring.open`

    def open(self, settings: SelectionSettings) -> dict[str, Any]:
        """Opens the signal of these settings in the workers, and calibrates the pool for it if necessary. Returns the
        result of `Scoring.open`.

        Raises:
            LoGoError: it cannot score this pool.
        """
        signal = settings.signal
        if signal not in self._opened:
            with self._lock:
                plan(self._model, self.pool, settings)  # raises the errors of the workers here
                opened = self._call("logo_signal", signal)
                while texts := texts_of(opened):
                    keys = self._run([(text, "", None, WHOLE) for text in texts])
                    opened = self._call("logo_calibrate", signal, texts, keys)
                self._opened[signal] = opened[0]
        return self._opened[signal]

    def outcomes(
        self, rows: Sequence[Prompt], calls: Sequence[CallSettings], batch_size: int, *, answering: bool = False
    ) -> list[Outcome]:
        """One selection or error per row; see `Selecting`."""
        names = [self.open(one.settings)["names"] for one in calls]
        signals = [one.settings.signal for one in calls]
        among = [one.candidates for one in calls]
        windows = [window_of(one.settings, self.pool) for one in calls]
        found = self._scores([*zip(self.probed_ids(rows), signals, among, windows, strict=True)])
        return [self.outcome(torch.tensor(row), who, one) for row, who, one in zip(found, names, calls, strict=True)]

    def evidence(self, settings: SelectionSettings) -> Evidence | None:
        """See `Choosing`; the workers know example prompts."""
        return EXAMPLES if self.open(settings)["described"] else super().evidence(settings)

    def sizes(self, settings: SelectionSettings) -> Mapping[str, float]:
        """See `Choosing`; the workers have read the adapters."""
        sizes: Mapping[str, float] = self.open(settings)["sizes"]
        return sizes

    def restart(self) -> None:
        """Does nothing, since no selection depends on earlier prompts."""

    def _scores(self, rows: Sequence[_Asked]) -> list[list[float]]:
        """The scores of prompts.

        Raises:
            NotFinite: a score overflowed.
            ModelError: a prompt could not be scored.
        """
        found: list[list[float]] = []
        for start in range(0, len(rows), _PROBED):
            keys = self._run(rows[start : start + _PROBED])
            taken = outcomes(self._call("logo_scores", keys))
            for key in keys:
                scores = scores_of(taken[key])
                assert scores is not None  # the pool does not change
                found.append(scores)
        return found

    def _run(self, rows: Sequence[_Asked]) -> list[str]:
        """Runs prompts as probes, and returns the keys of their results."""
        from vllm import SamplingParams

        keys = [new_key() for _ in rows]
        with self._requests.together() as group:
            for key, (ids, signal, among, window) in zip(keys, rows, strict=True):
                with probing(key, signal, among, window):
                    group.start(ids, SamplingParams(max_tokens=1, temperature=0.0, detokenize=False))
            group.wait()
        return keys
