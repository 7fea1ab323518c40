"""`Metrics` for Prometheus: vLLM's metrics under `logo:`, and further ones of this server.

Labels are reasons and adapters of the pool. Texts of clients never become labels.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from logo.serve.service import Service

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics(Collector):
    """Counters, histograms and gauges of one server, in a registry of their own; the gauges show the state of
    `service`."""

    def __init__(self, service: Service) -> None:
        self._service, self.registry = service, CollectorRegistry()
        of = self.registry
        self.prompt_tokens = Counter("logo:prompt_tokens", "Prompt tokens that were read.", registry=of)
        self.generation_tokens = Counter("logo:generation_tokens", "Tokens that were generated.", registry=of)
        self.success = Counter("logo:request_success", "Answers that ended.", ["finished_reason"], registry=of)
        self.failure = Counter("logo:request_failure", "Requests that failed, by code.", ["reason"], registry=of)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SHORT) -> Histogram:
            return Histogram(f"logo:{name}", text, buckets=buckets, registry=of)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token = histogram("inter_token_latency_seconds", "Between the tokens of an answer.")
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG)
        self.probe = histogram("probe_seconds", "Probing, together with others.")
        self.confidence = histogram("selection_confidence", "That the pool has an adapter for the prompt.", _TENTHS)
        batching, adapters = service.batching, service.logo.adapter_cache
        for name, text, value in (
            ("num_requests_running", "Answers that are being generated.", lambda: batching.running),
            ("num_requests_waiting", "Requests that wait to be probed or generated.", lambda: service.waiting),
            ("kv_tokens_used", "Tokens whose keys and values are in memory.", lambda: batching.kv_tokens[0]),
            ("kv_tokens", "The most tokens whose keys and values may be.", lambda: batching.kv_tokens[1]),
            ("adapter_bytes", "Memory of adapters.", lambda: adapters.bytes),
        ):
            Gauge(f"logo:{name}", text, registry=of).set_function(value)
        of.register(self)
        ProcessCollector(registry=of)

    def collect(self) -> Iterator[Metric]:
        """How often each adapter of the pool was selected."""
        found = CounterMetricFamily("logo:adapter_selected", "Answers an adapter had a part in.", labels=["adapter"])
        for name in list(self._service.adapters):
            found.add_metric([name], self._service.selected[name])
        yield found
