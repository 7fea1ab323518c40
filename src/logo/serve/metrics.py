"""`Metrics` for Prometheus: vLLM's metrics under `logo:`, and further ones of this server.

Labels are reasons and adapters of the pool. Texts of clients never become labels.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from logo.core import FinishReason
from logo.serve.selecting import Selecting
from logo.serve.service import Service

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics(Collector):
    """Counters and histograms of one server, in a registry of their own, and gauges of what it generates (`watch`)."""

    def __init__(self, selecting: Selecting) -> None:
        self._selecting = selecting
        self.registry = CollectorRegistry()
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens that were read.")
        self.failure = self._counter("request_failure", "Requests that failed, by code.", "reason")
        self._probe = self._histogram("probe_seconds", "Probing, together with others.")
        self._confidence = self._histogram(
            "selection_confidence", "That the pool has an adapter for the prompt.", _TENTHS
        )
        self._shadow = self._counter("shadow", "Prompts that were to be selected for beside their answers.", "outcome")
        self._generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self._success = self._counter("request_success", "Answers that ended.", "finished_reason")
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._inter_token = self._histogram("inter_token_latency_seconds", "Between the tokens of an answer.")
        self._end_to_end = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def watch(self, service: Service) -> None:
        """Adds gauges that show the state of a service that generates."""
        batching = service.batching
        adapter_cache = service.logo.adapter_cache
        for name, text, value in (
            ("num_requests_running", "Answers that are being generated.", lambda: batching.running),
            ("num_requests_waiting", "Requests that wait to be probed or generated.", lambda: service.waiting),
            ("kv_tokens_used", "Tokens whose keys and values are in memory.", lambda: batching.kv_tokens[0]),
            ("kv_tokens", "The most tokens whose keys and values may be.", lambda: batching.kv_tokens[1]),
            ("adapter_bytes", "Memory of adapters.", lambda: adapter_cache.bytes),
        ):
            Gauge(f"logo:{name}", text, registry=self.registry).set_function(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"logo:{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SHORT) -> Histogram:
        return Histogram(f"logo:{name}", text, buckets=buckets, registry=self.registry)

    def observe_selection(self, confidence: float | None, probe_seconds: float) -> None:
        """Counts a selection, its confidence (None: unknown) and how long its probe took (0: there was none)."""
        if confidence is not None:
            self._confidence.observe(confidence)
        if probe_seconds:
            self._probe.observe(probe_seconds)

    def count_shadow(self, outcome: str) -> None:
        """Counts a prompt whose request named its adapters, by what its shadow has come to."""
        self._shadow.labels(outcome).inc()

    def observe_tokens(self, count: int, are_first: bool, since_arrival: float, since_last: float) -> None:
        """Counts new tokens of an answer, which came so many seconds after its request and after its last tokens."""
        self._generation_tokens.inc(count)
        if count and are_first:
            self._first_token.observe(since_arrival)
        elif count:
            for _ in range(count):
                self._inter_token.observe(since_last / count)

    def observe_end(self, reason: FinishReason, since_arrival: float) -> None:
        """Counts an answer that has ended."""
        self._success.labels(reason).inc()
        self._end_to_end.observe(since_arrival)

    def collect(self) -> Iterator[Metric]:
        """How often each adapter of the pool was selected."""
        family = CounterMetricFamily("logo:adapter_selected", "Selections with an adapter.", labels=["adapter"])
        for name in list(self._selecting.adapters):
            family.add_metric([name], self._selecting.selected[name])
        yield family
