"""`Scorers`: makes the scorer of a signal when it is first asked for.

plan -> calibrate (cached) -> index -> Scorer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from logo.adapters.adapter import Adapter
from logo.adapters.pool import AdapterPool
from logo.files import cache_folder
from logo.models import lock_of
from logo.selection.beginnings import Beginnings
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import HiddenVectors, TextRunner, calibrate, read_texts, whitenings
from logo.selection.examples import signatures_of
from logo.selection.index import ScoringIndex, Tell, Wanted, device_of, read_indices
from logo.selection.once import OnceReader
from logo.selection.plan import plan, with_activations
from logo.selection.points import Point
from logo.selection.prefixes import Prefixes, reusable
from logo.selection.probe import Probe
from logo.selection.responses import ResponseReader
from logo.selection.scorer import Scorer
from logo.selection.selector import check_k
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal
from logo.selection.texts import NEUTRAL, REQUESTS, Texts
from logo.selection.whitening import Whitening

# Texts, the tokens with which each has to end, and whether the forms of conversations vary -> token ids; see
# `logo.decoding.Prompts.texts`.
Encode = Callable[[Sequence[str], Sequence[int], bool], list[list[int]]]


class Scorers:
    """The scorers of one state of a pool, one per signal, each made when it is first asked for.

    Args:
        model: the base model.
        pool: adapters fitted to it.
        settings: what to read and how to score; other signals may be asked for besides.
        encode: texts to token ids, as prompts are encoded; for the texts of a calibration.
        before: the scorers of an earlier state of the pool, whose indices and calibrations are reused.
        device: where scores are computed; None: on the device of the hidden vectors.
        run_texts: runs the base model for a calibration; None: `model` itself runs. With it, `model` may be a skeleton
            on the meta device.
        beginnings: the cache of prompt beginnings, for a pool whose adapters act from a position on only.

    Attributes:
        k: adapters per prompt.
        read_once: the probe is the prefill, too: it reads whole prompts and caches their keys and values.

    Raises:
        PoolError, UsageError, ModelError: the pool cannot be scored as the settings ask.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: AdapterPool,
        settings: SelectionSettings,
        encode: Encode,
        before: Scorers | None = None,
        device: torch.device | None = None,
        run_texts: TextRunner | None = None,
        beginnings: Beginnings | None = None,
    ) -> None:
        self._pool, settings = pool, with_activations(settings, pool)
        self._activations = settings.activations
        self._beginnings = beginnings if self._activations else None
        self._device, self._run_texts = device, run_texts
        self._plan = plan(model, pool, settings)
        count = len(self._plan.adapters)
        self.k = min(pool.default_k, count) if settings.k is None else check_k(settings.k, count)
        self._model, self._settings, self._encode = model, settings, encode
        self._known: dict[str, Scorer] = {}  # scorers by signal
        self._caches: dict[str, CalibrationCache] = {}  # by signal; they stay if opening a scorer fails
        # Calibrations of a pool whose adapters act elsewhere were read at other tokens.
        alike = before is not None and before._activations == self._activations
        self._earlier: dict[str, Scorer] = before._earlier | before._known if before is not None and alike else {}
        self._encoded: dict[tuple[tuple[str, ...], bool], list[list[int]]] = {}
        self._prefixes, budget = None, int(settings.prefix_cache_gb * 1e9)
        self.read_once = self._beginnings is not None and settings.probe_context == "base"
        if budget and settings.probe_context == "base" and reusable(model) and not self.read_once:
            self._prefixes = Prefixes(budget)

    def get(self, settings: SelectionSettings, tell: Tell | None = None) -> Scorer:
        """The scorer of a signal. If it has to be calibrated, the base model runs, and no adapter may be active.

        Args:
            tell: called with 0 and the number of adapters before the pool is calibrated and indexed, and then as
                `logo.selection.index.read_indices` calls it.
        """
        settings = with_activations(settings, self._pool)
        if settings.signal not in self._known:
            with lock_of(self._model).running():  # a calibration with adapters mixed in would be wrong for ever
                if settings.signal not in self._known:
                    self._known[settings.signal] = self._open(settings, tell)
                    self._earlier.pop(settings.signal, None)
        return self._known[settings.signal]

    def reading(self, settings: SelectionSettings) -> Signal:
        """The signal of these settings, adjusted to where the adapters of this pool act."""
        return with_activations(settings, self._pool).reading

    def _open(self, settings: SelectionSettings, tell: Tell | None) -> Scorer:
        """Makes the scorer of a signal from a plan, a calibration and indices."""
        model, earlier = self._model, self._earlier.get(settings.signal)
        planned = self._plan if settings.signal == self._settings.signal else plan(model, self._pool, settings)
        adapters, points = planned.adapters, planned.points
        cache = self._cache(settings)
        calibration, whitened = None, dict[str, Whitening]()
        if tell is not None:
            tell(0, len(adapters))
        if cache is not None:
            calibration = calibrate(model, adapters, points, planned.most, settings, cache, self._run_texts)
            points = calibration.points
            whitened = whitenings(model, points, settings, cache, self._run_texts)
        signatures, signal = None, settings.reading
        if cache is not None and signal.scale == "whitened" and settings.examples == "use":
            signatures = signatures_of(adapters, points, signal, cache, self._run, self._texts, self._device_at)
        before = () if earlier is None else earlier.indices
        indices = read_indices(self._wanted(adapters, points, whitened, before), tell)
        probe = Probe(model, points, signal.input, signal.token, signal.activations, whole=self.read_once)
        describing = () if signatures is None else signatures.points
        reader: ResponseReader | OnceReader
        if self.read_once and self._beginnings is not None:
            reader = OnceReader(probe, indices, signal, self._beginnings, describing)
        else:
            reader = ResponseReader(probe, indices, signal, settings.signal, self._prefixes, describing)
        scaled = signal.token == "each" and signatures is None
        return Scorer(adapters, indices, reader, calibration, cache, signatures, scaled)

    def _run(self, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
        if self._run_texts is not None:
            return self._run_texts(points, texts, signal)
        return read_texts(self._model, points, texts, signal)

    def texts(self, settings: SelectionSettings) -> Texts | None:
        """The texts on which adapters are calibrated for a signal; None for signals without a calibration."""
        cache = self._cache(settings)
        return None if cache is None else cache.texts

    def _cache(self, settings: SelectionSettings) -> CalibrationCache | None:
        """The calibration cache of a signal; None for signals without a calibration."""
        signal = settings.reading
        if signal.scale == "raw":
            return None
        if settings.signal in self._earlier:
            return self._earlier[settings.signal].cache
        if settings.signal not in self._caches:
            requests = self._texts(settings.calibration_prompts or REQUESTS) if signal.chosen else []
            texts = Texts(self._texts(NEUTRAL, varied=True), requests)
            folder = cache_folder(settings.cache)
            self._caches[settings.signal] = CalibrationCache(self._model, texts, signal, folder)
        return self._caches[settings.signal]

    def _texts(self, texts: Sequence[str], varied: bool = False) -> list[list[int]]:
        """Token ids of texts, each of which ends with the invocation tokens of the adapters if they have any."""
        key = (tuple(texts), varied)
        if key not in self._encoded:  # a template may write the time, and texts are compared later
            ending = next((one.tokens for one in self._activations if one.tokens), ())
            self._encoded[key] = self._encode(texts, ending, varied)
        return self._encoded[key]

    def _wanted(
        self,
        adapters: Sequence[Adapter],
        points: Sequence[Point],
        whitened: Mapping[str, Whitening],
        earlier: Sequence[ScoringIndex],
    ) -> list[Wanted]:
        """One index per point, which reuses rows of earlier indices and of those of other signals."""
        others = (index for scorer in self._known.values() for index in scorer.indices if index.offset is None)
        held = {(index.point, index.offset is None): index for index in (*others, *earlier)}
        wanted = []
        for point in points:
            touching = [adapter for adapter in adapters if point.module in adapter.modules]
            whitening = whitened.get(point.module)
            before = held.get((point, whitening is None))
            wanted.append(Wanted(touching, point, self._device_at(point), whitening, before))
        return wanted

    def _device_at(self, point: Point) -> torch.device:
        """The device on which scores at a point are computed."""
        return self._device or device_of(self._model, point)
