"""`Metrics` for Prometheus: vLLM's metrics under `logo:`, and further ones of this server.

Labels are reasons, forms, and adapters of the pool. Texts of clients never become labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from logo.protocol import SelectedMixture
    from logo.serving.service import Service

FailureReason = Literal["queue_full", "unsure", "timeout", "error", "left"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """Counters and histograms of one server, in a registry of their own.

    Args:
        service: the engine whose state the gauges show.
    """

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"logo:{name}", text, buckets=tuple(buckets), registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"logo:{name}", text, labels, registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens that were read.")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated.")
        self.success = counter("request_success", "Answers that ended, by reason.", "finished_reason")
        self._failures = counter("request_failure", "Answers that did not end, by reason.", "reason")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SHORT)
        self.inter_token = histogram("inter_token_latency_seconds", "Between the tokens of an answer.", _SHORT)
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG)
        self.queue = histogram("request_queue_time_seconds", "From arrival to being probed.", _SHORT)
        self.probe = histogram("probe_seconds", "Probing, together with others.", _SHORT)
        self.prompt_length = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_length = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.adapters_per_request = histogram(
            "adapters_per_request", "Adapters of a mixture.", (0, 1, 2, 5, 10, 20, 50)
        )
        self.confidence = histogram(
            "selection_confidence",
            "The probability that the pool holds an adapter made for the prompt.",
            [tenth / 10 for tenth in range(1, 11)],
        )
        self.registry.register(_State(service))
        ProcessCollector(registry=self.registry)

    def chosen(self, chosen: SelectedMixture) -> None:
        """Counts one selection."""
        self.queue.observe(chosen.queue_ms / 1e3)
        if chosen.probe_ms:
            self.probe.observe(chosen.probe_ms / 1e3)
        self.adapters_per_request.observe(len(chosen.selection.adapters))
        if chosen.selection.confidence is not None:
            self.confidence.observe(chosen.selection.confidence)

    def failed(self, reason: FailureReason, answers: int) -> None:
        """Counts answers that did not end."""
        self._failures.labels(reason).inc(answers)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _State(Collector):
    """The state of the service, read when metrics are collected."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service, now = self._service, self._service.figures
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Answers that are being generated.", now.running),
            "num_requests_waiting": ("Requests that wait to be probed or generated.", now.waiting),
            "kv_tokens_used": ("Tokens whose keys and values are in memory.", now.kv_used),
            "kv_tokens": ("The most tokens whose keys and values may be.", now.kv_total),
            "kv_cache_usage_perc": ("Share of these tokens in use, 1 is all.", now.kv_used / now.kv_total),
            "prefix_cache_bytes": ("Memory of what prompts begin with, where they are read once.", now.prefix_bytes),
            "pool_adapters": ("Adapters in the pool.", len(service.pool.adapters)),
            "adapters_stacked": ("Adapters whose tensors are ready to be mixed.", now.adapters),
            "adapter_bytes": ("Memory of their columns.", now.adapter_bytes),
            "adapter_memory_usage_perc": (
                "The same as a share of what adapters may have, 1 is all.",
                now.adapter_bytes / max(1, now.adapter_budget),
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"logo:{name}", text, value=value)
        selected = CounterMetricFamily("logo:adapter_selected", "Answers an adapter had a part in.", labels=["adapter"])
        for adapter in list(service.pool.adapters):
            selected.add_metric([adapter], service.selected.get(adapter, 0))
        yield selected
        steps = CounterMetricFamily("logo:steps", "Forward passes, with some mixture or none.", labels=["form"])
        for form, count in now.steps.items():
            steps.add_metric([form], count)
        yield steps
        once = CounterMetricFamily(
            "logo:prefix_tokens", "Tokens of prompts that were read once, found or dropped too early.", labels=["state"]
        )
        for state, count in now.prefix_tokens.items():
            once.add_metric([state], count)
        yield once
        silent = "Adapters that were to answer a prompt without their invocation tokens."
        yield CounterMetricFamily("logo:not_invoked", silent, value=now.not_invoked)
