"""`Scorer`: token ids in, a score of every adapter out, by one signal. `Scorers` makes one when a signal is asked for.

plan -> calibrate (cached) -> index (cached) -> Scorer          prompts -> scores
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from logo.adapters.format import Adapter
from logo.adapters.pool import AdapterPool
from logo.cache import cache_folder
from logo.selection.baseline import Baseline
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import Calibration, Listening, calibrate, whitenings
from logo.selection.index import ScoringIndex, Wanted, device_of, read_indices
from logo.selection.index_file import index_name, keep_index, load_index
from logo.selection.plan import plan
from logo.selection.points import Point
from logo.selection.prefixes import Prefixes, reusable
from logo.selection.probe import Probe
from logo.selection.reader import Reader
from logo.selection.selector import check_k
from logo.selection.settings import SelectionSettings
from logo.selection.texts import NEUTRAL, REQUESTS, Texts
from logo.selection.whitening import Whitening

Encode = Callable[[Sequence[str]], list[list[int]]]

# Prompts that a running baseline remembers; neutral texts are the first of them.
_REMEMBERED = 256


class Scorer:
    """Scores the adapters of a pool for batches of prompts, by one signal.

    Args:
        adapters: those that are scored, in pool order.
        indices: one per point that is read, of the adapters that touch it.
        reader: responses to prompts at these points.
        calibration: what responses are compared with; None for signals without one.
        cache: of the calibration.
        running: compare with the last prompts that came, too.

    Attributes:
        points: where prompts are read.
        names: of the adapters.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        indices: Sequence[ScoringIndex],
        reader: Reader,
        calibration: Calibration | None = None,
        cache: CalibrationCache | None = None,
        running: bool = False,
    ) -> None:
        self.indices = tuple(indices)
        self.points = tuple(index.point for index in indices)
        self.names = tuple(adapter.name for adapter in adapters)
        self.calibration = calibration
        self.cache = cache
        self._reader = reader
        self._running = running
        # (adapters, points)
        self._touched = torch.tensor([[point.module in a.modules for point in self.points] for a in adapters])
        self.restart()

    def restart(self) -> None:
        """Forgets the prompts that a running baseline remembers."""
        # (adapters, points, texts): what a running baseline is computed from
        self._remembered = self.calibration.neutral if self.calibration and self._running else None
        self._baseline = self._of_calibration()

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(rows, adapters) float32 on the CPU, of right-padded prompts (rows, length)."""
        return self.scores(self._reader(input_ids, attention_mask))

    def scores(self, per_point: Sequence[Tensor]) -> Tensor:
        """(rows, adapters) float32 on the CPU of responses `a` (rows, adapters that touch the point) per point."""
        # (adapters, points, rows)
        responses = torch.full((*self._touched.shape, len(per_point[0])), torch.nan)
        for at, response in enumerate(per_point):
            responses[self._touched[:, at], at] = response.T.cpu()
        if self._baseline is None:
            return self._mean_over_points(responses)
        scores = self._baseline.scores(responses)
        if self._remembered is not None:
            # A prompt that overflowed is an error of its own and must not silence adapters for those to come.
            usable = responses[:, :, (responses.isfinite() | ~self._baseline.heard[:, :, None]).all(dim=0).all(dim=0)]
            self._remembered = torch.cat([self._remembered, usable], dim=2)[:, :, -_REMEMBERED:]
            self._baseline = self._of_calibration()
        return scores

    @property
    def index_bytes(self) -> int:
        """Memory of the scoring indices."""
        return sum(index.bytes for index in self.indices)

    def _of_calibration(self) -> Baseline | None:
        if self.calibration is None:
            return None
        texts = self.calibration.neutral if self._remembered is None else self._remembered
        return Baseline.of(texts, self.calibration.requests)

    def _mean_over_points(self, responses: Tensor) -> Tensor:
        """(rows, adapters) of (adapters, points, rows): over the points that each adapter touches."""
        # Not nanmean: a response that is not a number has to be seen.
        sums = torch.where(self._touched[:, :, None], responses, torch.zeros(())).sum(dim=1)
        return (sums / self._touched.sum(dim=1, keepdim=True)).T


class Scorers:
    """The scorers of one state of a pool, one per signal, each made when it is first asked for.

    Args:
        model: the base model.
        pool: adapters fitted to it.
        settings: what to read and how to score; other signals may be asked for besides.
        encode: texts to token ids, as prompts are encoded; for the texts of a calibration.
        bos: the token that begins every text, if there is one.
        before: those of an earlier state of the pool, from which is taken over what is still true. A pool that changes
            once will change again: its indices are not kept on disk.
        device: where scores are computed; None: where the model computes what is read.
        listening: runs the base model for a calibration; None: `model` itself runs. With it, `model` may be a skeleton
            on the meta device.

    Raises:
        PoolError, UsageError, ModelError: the pool cannot be scored as the settings ask.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: AdapterPool,
        settings: SelectionSettings,
        encode: Encode,
        bos: int | None,
        before: Scorers | None = None,
        device: torch.device | None = None,
        listening: Listening | None = None,
    ) -> None:
        self._device, self._listening = device, listening
        self._plan = plan(model, pool, settings)
        count = len(self._plan.adapters)
        self.k = min(pool.default_k, count) if settings.k is None else check_k(settings.k, count)
        self._model, self._pool, self._settings, self._encode, self._bos = model, pool, settings, encode, bos
        self._known: dict[str, Scorer] = {}  # by signal
        self._earlier: dict[str, Scorer] = {} if before is None else before._earlier | before._known
        self._keep = before is None
        self._prefixes, budget = None, int(settings.prefix_cache_gb * 1e9)
        if budget and settings.probe_context == "base" and reusable(model):
            self._prefixes = Prefixes(budget)

    def get(self, settings: SelectionSettings) -> Scorer:
        """The scorer of a signal. A calibration runs the base model, which has no adapter active then."""
        if settings.signal not in self._known:
            self._known[settings.signal] = self._open(settings)
            self._earlier.pop(settings.signal, None)
        return self._known[settings.signal]

    def _open(self, settings: SelectionSettings) -> Scorer:
        """Plans, calibrates and indexes, as far as that is not known."""
        model, earlier = self._model, self._earlier.get(settings.signal)
        planned = self._plan if settings.signal == self._settings.signal else plan(model, self._pool, settings)
        adapters, points = planned.adapters, planned.points
        cache = self._cache(settings) if earlier is None else earlier.cache
        folder = cache_folder(settings.cache) if self._keep else None
        name = None if folder is None else index_name(adapters, points, planned.most, cache, model)
        found = None if folder is None or name is None else load_index(folder / name, adapters, points, model, cache)
        if found is not None:
            indices, calibration = list(found[0]), found[1]
        else:
            calibration, whitened = None, dict[str, Whitening]()
            if cache is not None:
                calibration = calibrate(model, adapters, points, planned.most, settings, cache, self._listening)
                points = calibration.points
                whitened = whitenings(model, points, settings, cache, self._listening)
            indices = self._indices(adapters, points, whitened, () if earlier is None else earlier.indices)
            if folder is not None and name is not None:
                keep_index(folder, name, adapters, indices, calibration, cache)
        signal = settings.reading
        probe = Probe(model, [index.point for index in indices], signal.input, signal.token, self._bos)
        reader = Reader(probe, indices, signal, settings.signal, self._prefixes)
        return Scorer(adapters, indices, reader, calibration, cache, settings.baseline == "running")

    def _cache(self, settings: SelectionSettings) -> CalibrationCache | None:
        """Where calibrations of this signal are kept; None for signals without one."""
        signal = settings.reading
        if signal.scale == "raw":
            return None
        requests = self._encode(settings.calibration_prompts or REQUESTS) if signal.chosen else []
        texts = Texts(self._encode(NEUTRAL), requests, self._bos)
        return CalibrationCache.of(self._model, texts, signal, cache_folder(settings.cache))

    def _indices(
        self,
        adapters: Sequence[Adapter],
        points: Sequence[Point],
        whitened: Mapping[str, Whitening],
        earlier: Sequence[ScoringIndex],
    ) -> list[ScoringIndex]:
        """One index per point, with rows taken over from earlier ones of this signal and from what others read."""
        others = (index for scorer in self._known.values() for index in scorer.indices if index.offset is None)
        held = {(index.point, index.offset is None): index for index in (*others, *earlier)}
        wanted = []
        for point in points:
            touching = [adapter for adapter in adapters if point.module in adapter.modules]
            device, whitening = self._device or device_of(self._model, point), whitened.get(point.module)
            before = held.get((point, whitening is None))
            wanted.append(Wanted(touching, point, device, whitening, before))
        return read_indices(wanted)

    def restart(self) -> None:
        """Forgets the prompts that came, where a baseline depends on them."""
        for scorer in self._known.values():
            scorer.restart()
