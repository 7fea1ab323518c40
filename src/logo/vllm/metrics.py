"""Metrics of the selection, in the registry that vLLM shows under `/metrics`."""

from __future__ import annotations

from collections import Counter

from logo.core import Selection

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Counts:
    """Selections and answers, as `logo:*` metrics; `chosen`: the number of selections that contained each adapter."""

    def __init__(self) -> None:
        from prometheus_client import Counter as Count
        from prometheus_client import Histogram

        tenths = [tenth / 10 for tenth in range(1, 11)]
        confidence = "The probability that the pool holds an adapter made for the prompt."
        self.chosen: Counter[str] = Counter()
        self._probes = Histogram("logo:probe_seconds", "From prompt to selection.", buckets=_SECONDS)
        self._confidence = Histogram("logo:selection_confidence", confidence, buckets=tenths)
        self._answers = Count("logo:answers", "Answers by how their mixture was made.", ["form"])
        self._shadow = Count("logo:shadow", "Prompts that were to be selected for beside their answers.", ["outcome"])
        self._adapters = Count("logo:adapter_selected", "Selections with an adapter.", ["adapter"])

    def selected(self, selection: Selection, seconds: float) -> None:
        """Counts a selection."""
        self._probes.observe(seconds)
        if selection.confidence is not None:
            self._confidence.observe(selection.confidence)
        self.chosen.update(selection.adapters)
        for name in selection.adapters:
            self._adapters.labels(name).inc()

    def unsure(self, confidence: float) -> None:
        """Counts the confidence of a prompt that is refused, since no adapter seems to be made for it."""
        self._confidence.observe(confidence)

    def shadow(self, outcome: str) -> None:
        """Counts a prompt whose request named its adapters, by what its shadow has come to."""
        self._shadow.labels(outcome).inc()

    def answered(self, selection: Selection) -> None:
        """Counts an answer."""
        self._answers.labels("gate" if any(selection.weights) else "base").inc()
