"""The router's metrics, in the registry that vLLM shows under `/metrics`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from logo.adapters.activation import NotInvoked
from logo.selection import Selection

log = logging.getLogger("vllm.logo")  # below vLLM's own, so that its lines look like theirs

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
        self._again = prometheus_client.Counter(
            "logo:probes_again",
            "Prompts that were probed a second time: their cached prefix had no known responses, or the pool changed.",
        )
        self._answers = prometheus_client.Counter("logo:answers", "Answers by how their mixture was made.", ["form"])
        self._adapters = prometheus_client.Counter("logo:adapter_selected", "Selections with an adapter.", ["adapter"])
        self._silent = prometheus_client.Counter(
            "logo:not_invoked", "Adapters that were to answer a prompt without their invocation tokens."
        )
        self._prefixes = prometheus_client.Counter(
            "logo:prefix_tokens", "Tokens of prompts that were read once, found or dropped too early.", ["state"]
        )
        self._known = NotInvoked()

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

    def again(self) -> None:
        """Counts a prompt that has to be probed once more."""
        self._again.inc()

    def not_invoked(self, names: Sequence[str]) -> None:
        """Counts adapters that do nothing, since a prompt lacks their invocation tokens; warns of each once."""
        self._silent.inc(len(names))
        if (text := self._known.new(names)) is not None:
            log.warning("LoGo: %s", text)

    def read(self, found: int, missed: int) -> None:
        """Counts tokens read by a probe that an answer has found in the KV cache, and those that were gone by then."""
        self._prefixes.labels("found").inc(found)
        self._prefixes.labels("missed").inc(missed)

    def answered(self, form: str) -> None:
        """Counts an answer: `gate`, `merge` or `base`."""
        self._answers.labels(form).inc()
