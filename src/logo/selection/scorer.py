"""`Scorer`: from token ids to a score of every adapter, by one signal, for one state of a pool."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from logo.adapters.activation import earliest
from logo.adapters.pool import AdapterPool
from logo.files import Store, cache_folder
from logo.models import input_device, padded
from logo.prefix_cache import PrefixCache
from logo.selection.calibration import Calibration, Reading, TextRunner, calibrate, read_texts, whitenings
from logo.selection.examples import Examples, examples_of
from logo.selection.index import ScoringIndex, Tell, Wanted, joined, read_indices
from logo.selection.points import Point, plan
from logo.selection.probe import Probe, pick
from logo.selection.reference import LATE_WEIGHT, Reference, both_means, emphasis, finished, row_means
from logo.selection.selector import EXAMPLES, RESPONSES, Selector, relative_sizes
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal
from logo.selection.texts import NEUTRAL, REQUESTS, WHOLE, Texts, windowed
from logo.selection.whitening import Whitening

# Texts, the tokens with which each has to end, and whether the forms of conversations vary -> token ids.
Encode = Callable[[Sequence[str], Sequence[int], bool], list[list[int]]]

# Responses whose logarithms differ less over all texts are rounding errors.
_CONSTANT = 1e-4


@dataclass(frozen=True)
class Scorer:
    """Scores the adapters of one state of a pool for batches of prompts, by one signal.

    Attributes:
        signal: the registered signal with the window and the activations of the pool.
        indices: one per point that is read, of the adapters that touch it.
        joined: fewer indices with the same rows, each with the number of its first point.
        probe: reads the hidden vectors of these points.
        calibration: what responses are compared with; None for signals of the scale `"raw"`.
        examples: described example prompts; None: no adapter has any, or they are not used.
        selector: makes selections from these scores, and names the adapters that are scored.
        reading: what the calibration read; None without one.
        prefix_cache: of prompts that are read once, in whose prefill the probe is; None: they are read twice.
    """

    signal: Signal
    indices: tuple[ScoringIndex, ...]
    joined: tuple[tuple[int, ScoringIndex], ...]
    probe: Probe
    calibration: Calibration | None
    examples: Examples | None
    selector: Selector
    reading: Reading | None
    prefix_cache: PrefixCache | None

    @classmethod
    def open(
        cls,
        model: nn.Module,
        pool: AdapterPool,
        settings: SelectionSettings,
        signal: str,
        encode: Encode,
        *,
        run: TextRunner | None = None,
        device: torch.device | None = None,
        prefix_cache: PrefixCache | None = None,
        before: Scorer | None = None,
        store: Store | None = None,
        tell: Tell | None = None,
    ) -> Scorer:
        """The scorer of a signal: plan, calibrate (what is not stored), whiten, describe examples, index.

        The caller holds the model's lock, and no mixture is active: a calibration with adapters mixed in would be wrong
        for ever.

        Args:
            model: the base model, to which the pool is fitted; with `run`, it may be a skeleton on the meta device.
            encode: as prompts are encoded (`logo.prompts.Prompts.texts`).
            run: runs texts; None: `model` itself does. If it raises, what was read before is in the store, and `open`
                may be called again with the same one.
            device: where scores are computed; None: on the device of the hidden vectors.
            prefix_cache: for a pool whose adapters act only from a position on (`AdapterPool.read_once`); None: such a
                pool is probed like any other, but its prompts are read whole.
            before: the scorer of the same signal for an earlier state of the pool, whose valid parts are reused.
            store: where calibrations are; None: that of `before`, or a new one in the folder of the settings.
            tell: called with 0 and the number of adapters first, and then as by `logo.selection.index.read_indices`.

        Raises PoolError, UsageError or ModelError: the pool cannot be scored as the settings ask; AdapterError.
        """
        how, planned = settings.reading(pool, signal), plan(model, pool, settings, signal)
        adapters, points = planned.adapters, planned.points
        alike = before if before is not None and before.signal == how else None
        earlier = None if before is None else before.reading
        if tell is not None:
            tell(0, len(adapters))

        def encoded(texts: Sequence[str], varied: bool = False) -> list[list[int]]:
            ending = next((one.tokens for one in how.activations if one.tokens), ())
            return [list(windowed(row, how.window)) for row in encode(texts, ending, varied)]

        run = run or partial(read_texts, model)
        reading, calibration, examples, whitened = None, None, None, dict[str, Whitening]()
        if how.scale != "raw":
            store = store or (earlier.store if earlier else Store(cache_folder(settings.cache)))
            if alike is not None and earlier:  # a template may write the time: texts are encoded once
                reading = replace(earlier, model=model, store=store)
            else:
                requests = encoded(settings.calibration_prompts or REQUESTS) if how.chosen else []
                reading = Reading.of(model, how, Texts(encoded(NEUTRAL, varied=True), requests), store)
            calibration = calibrate(reading, planned, run)
            points = calibration.points
            whitened = whitenings(reading, points, run)
        devices = [device or next(model.get_submodule(p.layer_path).parameters()).device for p in points]
        devices = [torch.device("cpu") if one.type == "meta" else one for one in devices]  # offloaded, or a skeleton
        if reading is not None and how.scale == "whitened" and settings.examples == "use":
            rows = [encoded(prompts) if (prompts := adapter.examples) else [] for adapter in adapters]
            examples = examples_of(reading, rows, points, devices, run)
        if reading is not None:
            reading.store.release(reading.key)
        known = {} if alike is None else {index.point: index for index in alike.indices}
        wanted = [
            Wanted([a for a in adapters if p.module in a.modules], p, at, whitened.get(p.module), known.get(p))
            for p, at in zip(points, devices, strict=True)
        ]
        kept = (None, "") if reading is None else (reading.store, f"{reading.key}/rows")
        indices, names, sizes = read_indices(wanted, tell, *kept), tuple(adapter.name for adapter in adapters), {}
        every = list(enumerate(indices))
        if how.plugin is None and len(indices) > 1:
            indices, every = joined(indices)
        if calibration is not None:
            touched = torch.tensor([[point.module in a.modules for point in points] for a in adapters])
            found = relative_sizes([index.updates for index in indices], calibration.weight_norms, touched)
            sizes = dict(zip(names, found.tolist(), strict=True))
        evidence = None if calibration is None else RESPONSES if examples is None else EXAMPLES
        selector = Selector(names, pool.default_k, evidence, sizes)
        once = prefix_cache if how.activations else None
        probe = Probe(model, points, how.input, None if once is None else once.forward)
        return cls(how, tuple(indices), tuple(every), probe, calibration, examples, selector, reading, once)

    @property
    def points(self) -> tuple[Point, ...]:
        """Where prompts are read."""
        return self.probe.points

    @property
    def described(self) -> tuple[int, ...]:
        """The numbers of the points at which prompts are described, to be compared with example prompts; () without."""
        return () if self.examples is None else self.examples.points

    @cached_property
    def _cells(self) -> Tensor:
        """(responses,): where each response of `per_point` belongs in the flattened (adapters, readings)."""
        columns = [index.adapters for index in self.indices] * self.signal.readings
        starts = {name: i * len(columns) for i, name in enumerate(self.selector.names)}
        return torch.tensor([starts[adapter.name] + at for at, some in enumerate(columns) for adapter in some])

    @cached_property
    def _reference(self) -> Reference | None:
        if self.calibration is None:
            return None
        neutral, requests = self.calibration.neutral, self.calibration.requests
        if self.signal.scale == "whitened":  # logarithms; what never changes, as behind an invocation, says nothing
            constant = torch.cat([neutral, requests], dim=2).std(dim=2) < _CONSTANT
            neutral = neutral.masked_fill(constant[:, :, None], torch.nan)
        weights = neutral.new_ones(neutral.shape[1])
        weights[len(self.indices) :] = LATE_WEIGHT
        return Reference.of(neutral, requests, weights)

    def calibrated(self, text: int, tokens: int) -> list[float]:
        """The scores of the adapters for one neutral text of the calibration, of which so many tokens are read, from
        its stored responses and without example prompts."""
        assert self.calibration is not None
        responses = self.calibration.neutral[:, :, text].flatten()[self._cells]
        found: list[float] = self.scores([responses[None]], [], torch.tensor([tokens]))[0].tolist()
        return found

    def __call__(self, rows: Sequence[Sequence[int]], among: Sequence[Collection[str] | None] = ()) -> Tensor:
        """Scores (rows, adapters), float32 on the CPU, of prompts as token ids; each is cut to the window here.

        Args:
            among: the names of the adapters that may be selected in each row (None: all of them), whose scores are
                right; those of others may not be. Empty: all in every row.
        """
        signal, most = self.signal, math.inf if self.signal.window == WHOLE else sum(self.signal.window)
        # Plugins may need gradients of their own, and pages that are kept must not be inference tensors.
        kept = signal.plugin is not None or self.prefix_cache is not None
        with torch.no_grad() if kept else torch.inference_mode():
            if self.prefix_cache is None:
                rows = [row if len(row) <= most else windowed(row, signal.window) for row in rows]
                ids, mask = padded(rows, input_device(self.probe.model))
                picked, owners = pick(list(map(signal.begin, rows)), list(map(len, rows)), ids.shape[1])
                hidden = self.probe(ids, mask, picked.to(ids.device))
            else:  # tokens on which adapters act are never cached
                ends, read = [earliest(signal.activations, row) for row in rows], partial(self._read_rest, rows)
                hidden, owners = self.prefix_cache.extend(rows, ends, read, fresh=signal.token == "mean")
            if signal.token == "mean":
                means = {id(vectors): row_means(vectors, owners, len(rows)) for vectors in hidden}
                hidden, owners = [means[id(vectors)] for vectors in hidden], torch.arange(len(rows))
            (weights, sums), at = emphasis(owners, len(rows)), self.indices[0].device
            columns = [signal(index, hidden[point]).to(at) for point, index in self.joined]
            columns = [torch.cat(columns, dim=1), *(hidden[point].to(at) for point in self.described)]
            responses, *descriptions = [both_means(column, owners, weights, sums) for column in columns]
            per_point = finished(responses[:, : signal.readings].flatten(1), signal.scale)
            return self.scores([per_point], descriptions, sums[:, 0], among)

    def _read_rest(
        self, rows: Sequence[Sequence[int]], ids: Tensor, mask: Tensor, cache: DynamicCache, options: dict[str, Any]
    ) -> tuple[list[Tensor], Tensor]:
        """Reads what is not cached of rows; see `PrefixCache.extend`. Returns hidden vectors and their owners."""
        width, begins, ends = ids.shape[1], [], []
        for row, count in zip(rows, mask[:, : mask.shape[1] - width].sum(dim=1).tolist(), strict=True):
            begins.append(max(0, self.signal.begin(row) - count))
            ends.append(len(row) - count)
        picked, owners = pick(begins, ends, width)
        return self.probe(ids, mask, picked.to(ids.device), cache, options), owners

    def scores(
        self,
        per_point: Sequence[Tensor],
        descriptions: Sequence[Tensor],
        tokens: Tensor,
        among: Sequence[Collection[str] | None] = (),
    ) -> Tensor:
        """Scores (rows, adapters), float32 on the CPU, from responses that were read elsewhere.

        Args:
            per_point: `a` (rows, adapters that touch the point) of the even readings of all points, then of the late
                ones if the signal has them, or these side by side in fewer tensors.
            descriptions: (rows, 2, d) of each point in `described`: even and late means of the hidden vectors.
            tokens: (rows,), how many were read of each prompt.
            among: as in `__call__`.
        """
        responses = torch.cat(list(per_point), dim=1).cpu().T  # (responses, rows)
        known, columns = self.selector.names, len(self.indices) * self.signal.readings
        if self._reference is None:  # a response that is not a number has to be seen
            return row_means(responses, self._cells // columns, len(known)).T
        asked, count = None, len(known)
        if any(names is not None for names in among):
            asked = torch.tensor([[names is None or name in names for name in known] for names in among])
        every = torch.full((count * columns, responses.shape[1]), torch.nan, dtype=torch.float32)
        every[self._cells] = responses
        scores = self._reference.scores(every.view(count, columns, -1), asked)
        if self.examples is not None and descriptions:
            return self.examples.scores(descriptions, scores, asked)
        if self.signal.token == "each" and self.examples is None:
            scores = scores * self._reference.factors(tokens)[:, None]
        return scores
