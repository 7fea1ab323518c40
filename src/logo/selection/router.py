"""`Router`: token ids in, one `Selection` per row out. Puts probe, scoring indices, signal and selector together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from logo.adapters.pool import AdapterPool
from logo.errors import PoolError, UsageError, closest
from logo.selection.index import ScoringIndex
from logo.selection.points import Point, find_points
from logo.selection.probe import Probe, ProbeInput, ProbeToken
from logo.selection.selector import Selection, check_k, select
from logo.selection.signals import get_signal

ProbeContext = Literal["base", "pool", "carry"]
Unscorable = Literal["error", "skip"]


@dataclass(frozen=True)
class SelectionSettings:
    """How prompts are read, scored and selected. Defaults are ours; `official()` is what the authors' code does.

    Attributes:
        signal: `"norm"` or `"entropy"`, or any other registered signal.
        k: adapters per prompt.
        probe_context: which adapters are active while probing: `"base"` none · `"pool"` all, unscaled · `"carry"` as
            the official code really runs: all for the first prompt, then those the prompt before selected.
        probe_input: `"residual"` (entering the layer, before its norm) or `"projection"` (what the module receives).
        probe_token: `"last"` prompt token, or the `"mean"` over all of them.
        probe_layer: `"last"`, an index, or several (scores are averaged over them).
        probe_module: the module to read, by name; default: the query projection.
        unscorable: adapters that do not touch the probed module: `"error"` refuses the pool, `"skip"` never selects
            them (they can still be forced).
    """

    signal: str = "norm"
    k: int = 20
    probe_context: ProbeContext = "base"
    probe_input: ProbeInput = "residual"
    probe_token: ProbeToken = "last"
    probe_layer: int | str | Sequence[int | str] = "last"
    probe_module: str | None = None
    unscorable: Unscorable = "error"

    def __post_init__(self) -> None:
        get_signal(self.signal)
        if self.k <= 0:
            raise UsageError(f"number of selected adapters (k): expected 1 or more, found {self.k}")
        choices = (
            ("probe_context", ProbeContext),
            ("probe_input", ProbeInput),
            ("probe_token", ProbeToken),
            ("unscorable", Unscorable),
        )
        for name, choice in choices:
            value, allowed = getattr(self, name), get_args(choice)
            if value not in allowed:
                raise UsageError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")

    @classmethod
    def of(cls, **settings: Any) -> SelectionSettings:
        """Settings by keyword, with a did-you-mean for unknown ones."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise UsageError(f"unknown setting {name!r}{closest(name, known)}; known: {', '.join(known)}")
        return cls(**settings)


class Router:
    """Scores every adapter of a pool for a batch of prompts and selects.

    Args:
        model: the base model.
        pool: adapters fitted to it.
        settings: what to read and how to score.

    Raises:
        PoolError: adapters that do not touch a probed module, unless `settings.unscorable` is `"skip"`.
    """

    def __init__(self, model: nn.Module, pool: AdapterPool, settings: SelectionSettings) -> None:
        self.points = find_points(model, settings.probe_layer, settings.probe_module)
        self.names = _scorable(pool, self.points, settings.unscorable)
        self.k = check_k(settings.k, len(self.names))
        self._signal = get_signal(settings.signal)
        self._probe = Probe(model, self.points, settings.probe_input, settings.probe_token)
        self._indices = [_index(model, pool, self.names, point) for point in self.points]
        if settings.probe_input == "residual":
            self._check_widths(model)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> list[Selection]:
        """One selection per row of right-padded prompts (rows, length)."""
        scores = self.scores(input_ids, attention_mask)
        return [select(row, self.names, self.k) for row in scores]

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(rows, adapters) float32 on the CPU: the signal, averaged over the points."""
        hidden = self._probe(input_ids, attention_mask)
        per_point = [self._signal(index, h).cpu() for index, h in zip(self._indices, hidden, strict=True)]
        return torch.stack(per_point).mean(dim=0)

    def _check_widths(self, model: nn.Module) -> None:
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        for point, index in zip(self.points, self._indices, strict=True):
            if index.width not in (None, width):
                raise UsageError(
                    f"probe module {point.module} takes {index.width} features, the residual stream has {width}; "
                    "use probe_input 'projection'"
                )


def _scorable(pool: AdapterPool, points: Sequence[Point], unscorable: Unscorable) -> tuple[str, ...]:
    modules = {point.module for point in points}
    lacking = [adapter.name for adapter in pool if not modules <= set(adapter.modules)]
    if lacking and (unscorable == "error" or len(lacking) == len(pool)):
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise PoolError(
            f"{len(lacking)} of {len(pool)} adapters do not touch the probed module {', '.join(sorted(modules))} and "
            f"cannot be scored: {shown}; probe another module (--probe_module) or leave them out (--unscorable skip)"
        )
    return tuple(adapter.name for adapter in pool if adapter.name not in set(lacking))


def _index(model: nn.Module, pool: AdapterPool, names: Sequence[str], point: Point) -> ScoringIndex:
    factors = []
    for name in names:
        weights = pool[name].read([point.module])[point.module]
        b = weights.scaled_b()
        factors.append((weights.A, b if point.rows is None else b[list(point.rows)]))
    device = next(model.get_submodule(point.layer_path).parameters()).device
    return ScoringIndex(factors, torch.device("cpu") if device.type == "meta" else device)
