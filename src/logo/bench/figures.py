"""Statistics of answers: rates, percentiles, errors by kind, and the drift of a number. All functions are pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logo.bench.wire import Answer


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of some values, in the unit of the values."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles | None:
        """The percentiles; None if there are no values."""
        ordered = sorted(values)
        return cls(*(percentile(ordered, share) for share in (0.5, 0.9, 0.99))) if ordered else None


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which this share of the (ascending) values is, interpolated linearly."""
    place = share * (len(ordered) - 1)
    below = int(place)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    return min(high, low + (high - low) * (place - below))  # rounding must not carry it past its neighbour


@dataclass(frozen=True)
class Summary:
    """The answers of one arm.

    Attributes:
        requests: number of requests sent.
        ok: complete answers. Tokens and end-to-end times count only these.
        errors: number of errors by kind, most frequent first.
        hung_up: requests that the client ended on purpose.
        seconds: wall time of the load.
        requests_per_second, output_tokens_per_second, prompt_tokens_per_second: rates of the complete answers.
        first_token, inter_token, end_to_end: seconds. The first two are those of streams, also of ended ones; None
            without any.
    """

    requests: int
    ok: int
    errors: Mapping[str, int]
    hung_up: int
    seconds: float
    output_tokens: int
    prompt_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    first_token: Percentiles | None
    inter_token: Percentiles | None
    end_to_end: Percentiles | None

    @classmethod
    def of(cls, answers: Sequence[Answer], seconds: float) -> Summary:
        """The summary of a load.

        Args:
            seconds: duration, above 0, or 0 if there are no answers.
        """
        whole = [answer for answer in answers if answer.outcome == "ok"]
        errors = Counter(answer.kind for answer in answers if answer.outcome == "error")
        output = sum(answer.output_tokens for answer in whole)
        prompt = sum(answer.prompt_tokens for answer in whole)
        per_second = 1 / seconds if seconds > 0 else 0.0
        return cls(
            requests=len(answers),
            ok=len(whole),
            errors=dict(errors.most_common()),
            hung_up=sum(answer.outcome == "hung up" for answer in answers),
            seconds=seconds,
            output_tokens=output,
            prompt_tokens=prompt,
            requests_per_second=len(whole) * per_second,
            output_tokens_per_second=output * per_second,
            prompt_tokens_per_second=prompt * per_second,
            first_token=Percentiles.of(answer.first for answer in answers if answer.first is not None),
            inter_token=Percentiles.of(gap for answer in answers for gap in answer.gaps),
            end_to_end=Percentiles.of(answer.seconds for answer in whole),
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of the least-squares line through the points (x, y); None if it is undetermined."""
    if len(points) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return None if spread == 0 else sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def second_half(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of the second half of the time, when caches are full and memory that still grows is a leak."""
    if not points:
        return []
    middle = (points[0][0] + points[-1][0]) / 2
    return [point for point in points if point[0] >= middle]


def metric(text: str, name: str) -> float | None:
    """The value of a metric in Prometheus' text format, summed over its labels; None if it is missing."""
    found = None
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        if head == name or head.startswith(name + "{"):
            found = (found or 0.0) + float(value)
    return found
