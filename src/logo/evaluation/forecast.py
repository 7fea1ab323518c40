"""The estimate of a run: downloads, memory, rows and time.

Sizes come from file listings and configurations, without reading weights. Time is extrapolated from rows that are
answered for the estimate (`timed`), which needs the model on this machine. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logo.evaluation.jobs import Job

if TYPE_CHECKING:
    from logo.baselines.method import Answering
    from logo.evaluation.session import Session

TIMED = 8  # rows that are timed, or three batches if these are more


@dataclass(frozen=True)
class Download:
    """Attributes:
    source: a folder or a Hub repository.
    total, missing: bytes of all files, and of those still to be fetched; None: not known, see `reason`.
    """

    source: str
    total: int | None = None
    missing: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        parameters: of the base model, and `dtype` in which they are computed.
        weights: of the base model.
        keys_and_values: of one batch of `rows` rows of at most `tokens` tokens, prompt and answer.
        exact: whether `tokens` are counted; if not, they are an upper bound.
        adapters: those that stay where the model computes; None: their sizes are not known.
        mixed: adapters that one batch can need at once, at most; None: as above.
    """

    parameters: int
    dtype: str
    weights: int
    keys_and_values: int
    rows: int
    tokens: int
    exact: bool
    adapters: int | None
    mixed: int | None

    @property
    def total(self) -> int:
        """The sum of all parts whose size is known."""
        return self.weights + self.keys_and_values + (self.adapters or 0) + (self.mixed or 0)


@dataclass(frozen=True)
class Hours:
    """Attributes:
    loading: seconds of opening base model and pool.
    learning: seconds that the method prepares for each dataset, measured on one.
    row: seconds per row, from `timed` rows.
    seconds: of the whole run.
    once: seconds that the method prepares once for all datasets; a part of `learning` if there is only one.
    """

    loading: float
    learning: float
    row: float
    timed: int
    seconds: float
    once: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """Attributes:
    rows: to be answered, by dataset.
    memory, hours: None if unknown; then `memory_reason` or `hours_reason` says why.
    """

    rows: Mapping[str, int]
    base_model: Download
    adapters: Download
    memory: Memory | None
    hours: Hours | None
    memory_reason: str = ""
    hours_reason: str = ""


def memory_of(
    config: Any, dtype: str, *, rows: int, tokens: int, exact: bool, adapters: Sequence[int], budget: int | None, k: int
) -> Memory:
    """The memory of a base model with this configuration, and of its adapters.

    Args:
        config: the transformers configuration.
        dtype: a torch dtype's name.
        rows: of a batch, each of `tokens` tokens.
        adapters: bytes of each adapter's weights; none: not known.
        budget: bytes that adapters may take where the model computes; None: as many as they need.
        k: adapters per prompt.
    """
    import torch

    from logo.models import cached_heads, skeleton

    parameters = sum(parameter.numel() for parameter in skeleton(config).parameters())
    heads, size = cached_heads(config)
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    return Memory(
        parameters=parameters,
        dtype=dtype,
        weights=parameters * width,
        keys_and_values=2 * config.get_text_config().num_hidden_layers * heads * size * rows * tokens * width,
        rows=rows,
        tokens=tokens,
        exact=exact,
        adapters=min(sum(adapters), sum(adapters) if budget is None else budget) if adapters else None,
        mixed=sum(sorted(adapters, reverse=True)[: k * rows]) if adapters else None,
    )


def timed(session: Session, jobs: Sequence[Job]) -> Hours:
    """Answers a few rows and extrapolates to all. If a method prepares for each dataset, the rows are those of the
    first one that has some. If no job has rows (a superfluous shard), nothing is timed.

    The first batch warms up and is not counted, unless it is the only one. A method may find out something once for all
    datasets, such as LoRAuter's tables: what it takes longer for the first dataset than for the second counts once.
    """
    asked = [job for job in jobs if job.places]
    if not asked:
        return Hours(session.loading, 0.0, 0.0, 0, session.loading)
    some = asked if session.method is None else asked[:1]
    prompts = [job.rows[place].prompt for job in some for place in job.places]
    count = min(len(prompts), max(TIMED, 3 * session.batch_size))
    chosen = [prompts[i * len(prompts) // count] for i in range(count)]
    engine, first = _prepared(session, some[0])
    # A method that learns from the rows of each dataset learns nothing that others use.
    shares = session.method is not None and not session.learns and len(asked) > 1
    learning = min(first, _prepared(session, asked[1])[1]) if shares else first
    once = first - learning
    spent = []
    for start in range(0, count, session.batch_size):
        batch = chosen[start : start + session.batch_size]
        began = time.perf_counter()
        engine.generate(batch, max_new_tokens=session.max_new_tokens, batch_size=session.batch_size)
        spent.append((time.perf_counter() - began, len(batch)))
    counted = spent[1:] or spent
    rows = sum(size for _, size in counted)
    row = sum(seconds for seconds, _ in counted) / rows
    everything = sum(len(job.places) for job in jobs)
    seconds = session.loading + once + learning * len(jobs) + row * everything
    return Hours(session.loading, learning, row, rows, seconds, once)


def _prepared(session: Session, job: Job) -> tuple[Session | Answering, float]:
    """What answers a dataset, and the seconds that its method took to prepare."""
    started = time.perf_counter()
    engine = session.answering(job)
    return engine, 0.0 if session.method is None else time.perf_counter() - started
