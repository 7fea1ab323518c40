"""`Router`: token ids in, one `Selection` per row out. Puts probe, scoring indices, signal and selector together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from logo.adapters.pool import AdapterPool
from logo.errors import PoolError, UsageError
from logo.selection.calibration import Baseline
from logo.selection.calibrator import plan
from logo.selection.index import ScoringIndex
from logo.selection.indexed import IndexedPool
from logo.selection.listening import Texts
from logo.selection.neutral import NEUTRAL
from logo.selection.points import Point
from logo.selection.prefixes import Prefixes, reusable
from logo.selection.probe import Probe
from logo.selection.reader import Reader
from logo.selection.requests import REQUESTS
from logo.selection.selector import Selection, Selector, check_k
from logo.selection.settings import SelectionSettings

Encode = Callable[[Sequence[str]], list[list[int]]]

# Prompts that a running baseline remembers; neutral texts are the first of them.
_REMEMBERED = 256


class Router:
    """Scores every adapter of a pool for a batch of prompts and selects.

    Args:
        model: the base model.
        pool: adapters fitted to it.
        settings: what to read and how to score.
        encode: texts to token ids, as prompts are encoded; for the texts of a calibration.
        bos: the token that begins every text, if there is one.
        before: the router of an earlier state of the pool, from which is taken over what is still true.

    Attributes:
        points: where prompts are read.
        names: the adapters that are scored.
        calibrated: how the points were chosen; None for signals without calibration.

    Raises:
        PoolError: adapters that do not touch what is probed, unless `settings.unscorable` is `"skip"`.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: AdapterPool,
        settings: SelectionSettings,
        encode: Encode,
        bos: int | None,
        before: Router | None = None,
    ) -> None:
        self.signal = signal = settings.reading
        planned = plan(model, pool, settings)
        self.names = _scorable(pool, planned.points, settings, all_points=planned.all_points)
        adapters = [pool[name] for name in self.names]
        texts = None
        if signal.scale != "raw":
            requests = encode(settings.calibration_prompts or REQUESTS) if signal.chosen else []
            texts = Texts(encode(NEUTRAL), requests, bos)
        earlier = None if before is None else before._indexed
        indexed = IndexedPool.of(model, adapters, planned, texts, settings, earlier)
        self._indexed: IndexedPool = indexed
        self.points, self.calibrated = indexed.points, indexed.calibrated
        self.selector = Selector(
            min(pool.default_k, len(self.names)) if settings.k is None else check_k(settings.k, len(self.names)),
            signal.weighting,
            settings.weight_temperature,
            settings.keep_mass,
        )
        probe = Probe(model, self.points, signal.input, signal.token, bos)
        prefixes = None
        if settings.probe_context == "base" and reusable(model):
            prefixes = Prefixes(int(settings.prefix_cache_gb * 1e9))
        self._reader = Reader(probe, indexed.indices, signal, prefixes)
        self._columns = indexed.columns
        self._touched = torch.tensor([[point.module in a.modules for point in self.points] for a in adapters])
        # (adapters, points, texts): what a running baseline is computed from
        self._remembered = self.calibrated.neutral if self.calibrated and settings.baseline == "running" else None
        self._baseline = self._of_calibration()
        if signal.input == "residual":
            self._check_widths(model)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> list[Selection]:
        """One selection per row of right-padded prompts (rows, length)."""
        scores = self.scores(input_ids, attention_mask)
        return [self.selector(row, self.names) for row in scores]

    def reselect(self, scores: Mapping[str, float], without: Collection[str] = (), k: int | None = None) -> Selection:
        """The selection that these scores give when some adapters are left out, or another number may answer."""
        left = [name for name in scores if name not in without]
        if not left:
            return Selection((), (), {})
        selector = self.selector if k is None else replace(self.selector, k=k)
        return selector(torch.tensor([scores[name] for name in left]), left)

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(rows, adapters) float32 on the CPU."""
        per_point = self._reader(input_ids, attention_mask)
        rows = len(input_ids)
        responses = torch.full((len(self.names), len(self.points), rows), torch.nan)
        for at, (columns, response) in enumerate(zip(self._columns, per_point, strict=True)):
            responses[columns, at] = response.T.cpu()
        if self._baseline is None:
            return self._mean_over_points(responses)
        scores = self._baseline.scores(responses)
        if self._remembered is not None:
            # A prompt that overflowed is an error of its own and must not silence adapters for those to come.
            usable = responses[:, :, (responses.isfinite() | ~self._baseline.heard[:, :, None]).all(dim=0).all(dim=0)]
            self._remembered = torch.cat([self._remembered, usable], dim=2)[:, :, -_REMEMBERED:]
            self._baseline = self._of_calibration()
        return scores

    def _of_calibration(self) -> Baseline | None:
        if self.calibrated is None:
            return None
        texts = self.calibrated.neutral if self._remembered is None else self._remembered
        return Baseline.of(texts, self.calibrated.requests)

    @property
    def indices(self) -> tuple[ScoringIndex, ...]:
        """One per point."""
        return self._indexed.indices

    @property
    def index_bytes(self) -> int:
        """Memory of the scoring indices."""
        return self._indexed.bytes

    def _mean_over_points(self, responses: Tensor) -> Tensor:
        """(rows, adapters) of (adapters, points, rows): over the points that each adapter touches."""
        # Not nanmean: a response that is not a number has to be seen.
        sums = torch.where(self._touched[:, :, None], responses, torch.zeros(())).sum(dim=1)
        return (sums / self._touched.sum(dim=1, keepdim=True)).T

    def _check_widths(self, model: nn.Module) -> None:
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        for point, index in zip(self.points, self._indexed.indices, strict=True):
            if index.width not in (None, width):
                raise UsageError(
                    f"probe module {point.module} takes {index.width} features, the residual stream has {width}; "
                    "use probe_input 'projection'"
                )


def _scorable(
    pool: AdapterPool, points: Sequence[Point], settings: SelectionSettings, *, all_points: bool
) -> tuple[str, ...]:
    """Adapters that touch the points: all of them, or any where a signal scores over the points an adapter has."""
    modules = {point.module for point in points}
    lacking = [a.name for a in pool if not (modules <= set(a.modules) if all_points else modules & set(a.modules))]
    if lacking and (settings.unscorable == "error" or len(lacking) == len(pool)):
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        listed = sorted(modules)
        where = f"the probed module {', '.join(listed)}" if len(listed) <= 4 else f"any of {len(listed)} probed modules"
        raise PoolError(
            f"{len(lacking)} of {len(pool)} adapters do not touch {where} and "
            f"cannot be scored: {shown}; probe another module (--probe_module) or leave them out (--unscorable skip)"
        )
    return tuple(adapter.name for adapter in pool if adapter.name not in set(lacking))
