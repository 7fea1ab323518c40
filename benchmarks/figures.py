"""Statistics of answers: rates, percentiles and errors by kind. All functions are pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clients import Answer


@dataclass(frozen=True)
class Summary:
    """The answers of one arm.

    Attributes:
        requests: number of requests sent.
        ok: complete answers. Tokens and end-to-end times count only these.
        errors: number of errors by kind, most frequent first.
        seconds: wall time of the load.
        requests_per_second, output_tokens_per_second, prompt_tokens_per_second: rates of the complete answers.
        first_token, inter_token, end_to_end: the 50th, 90th and 99th percentile, in seconds. The first two are those of
            streams; None without any.
    """

    requests: int
    ok: int
    errors: dict[str, int]
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    first_token: tuple[float, ...] | None
    inter_token: tuple[float, ...] | None
    end_to_end: tuple[float, ...] | None

    @classmethod
    def of(cls, answers: Sequence[Answer], seconds: float) -> Summary:
        """The summary of a load that took this many seconds."""
        whole = [answer for answer in answers if not answer.error]
        return cls(
            requests=len(answers),
            ok=len(whole),
            errors=dict(Counter(answer.error for answer in answers if answer.error).most_common()),
            seconds=seconds,
            requests_per_second=len(whole) / seconds,
            output_tokens_per_second=sum(answer.tokens for answer in whole) / seconds,
            prompt_tokens_per_second=sum(answer.prompt_tokens for answer in whole) / seconds,
            first_token=percentiles(answer.first for answer in answers if answer.first is not None),
            inter_token=percentiles(gap for answer in answers for gap in answer.gaps),
            end_to_end=percentiles(answer.seconds for answer in whole),
        )


def percentiles(values: Iterable[float]) -> tuple[float, ...] | None:
    """The 50th, 90th and 99th percentile, interpolated linearly; None if there are no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    found = []
    for share in (0.5, 0.9, 0.99):
        place = share * (len(ordered) - 1)
        below = int(place)
        low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
        found.append(min(high, low + (high - low) * (place - below)))  # rounding must not carry it past its neighbour
    return tuple(found)


def metric(text: str, name: str) -> float | None:
    """The value of a metric in Prometheus' text format, summed over its labels; None if it is missing."""
    found = None
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        if head == name or head.startswith(name + "{"):
            found = (found or 0.0) + float(value)
    return found
