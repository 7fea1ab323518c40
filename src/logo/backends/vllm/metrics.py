"""The router's metrics, in the registry that vLLM shows under `/metrics`."""

from __future__ import annotations

import os

from logo.core import Selection

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Counts:
    """Selections and answers, as `logo:*` metrics."""

    def __init__(self) -> None:
        import prometheus_client

        self._probes = prometheus_client.Histogram(
            "logo:probe_seconds", "From a prompt to its selection.", buckets=_SECONDS
        )
        self._confidence = prometheus_client.Histogram(
            "logo:selection_confidence",
            "The probability that the pool holds an adapter made for the prompt.",
            buckets=[tenth / 10 for tenth in range(1, 11)],
        )
        self._answers = prometheus_client.Counter("logo:answers", "Answers by how their mixture was made.", ["form"])
        self._adapters = prometheus_client.Counter("logo:adapter_selected", "Selections with an adapter.", ["adapter"])

    def selected(self, selection: Selection, seconds: float) -> None:
        """Counts a selection."""
        self._probes.observe(seconds)
        if selection.confidence is not None:
            self._confidence.observe(selection.confidence)
        for name in selection.adapters:
            self._adapters.labels(name).inc()

    @property
    def chosen(self) -> dict[str, int]:
        """Adapter -> the number of selections that contained it, over all processes that answer HTTP."""
        from prometheus_client import CollectorRegistry, multiprocess

        found = self._adapters.collect()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # vLLM has set it: this process's values are in files there
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            found = [metric for metric in registry.collect() if metric.name == "logo:adapter_selected"]
        samples = [sample for metric in found for sample in metric.samples if sample.name.endswith("_total")]
        return {sample.labels["adapter"]: int(sample.value) for sample in samples}

    def answered(self, form: str) -> None:
        """Counts an answer: `gate` or `base`."""
        self._answers.labels(form).inc()
