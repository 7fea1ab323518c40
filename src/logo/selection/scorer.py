"""`Scorer`: from token ids to a score of every adapter, by one signal, for one state of a pool."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from logo.adapters.activation import earliest
from logo.adapters.adapter import Adapter
from logo.adapters.pool import AdapterPool
from logo.errors import UsageError
from logo.prefix_cache import PrefixCache
from logo.selection.base_reader import Background, BaseReader, ExamplesRead
from logo.selection.calibration import Calibration, Reading
from logo.selection.encoder import NO_TEXTS, Embedded
from logo.selection.evidence import Kind, Similarities, together
from logo.selection.index import PointGroup, ScoringIndex, Tell, side_by_side
from logo.selection.plan import plan
from logo.selection.points import Point
from logo.selection.probe import Probe, pick
from logo.selection.reference import LATE_WEIGHT, Reference, both_means, emphasis, factors, finished, row_means
from logo.selection.selector import EXAMPLES, RESPONSES, Selector, relative_sizes
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal

# Responses whose logarithms differ less over all texts are rounding errors.
_CONSTANT = 1e-4
# How many standard deviations of the adapters' scores of one text are a unit: about as many as the best one leads by
# on a text that none of them was made for.
USUAL_MARGIN = 1.7
# The least unit, as a share of the standard deviation of all scores: those of a single adapter, or of copies of one, do
# not lie apart.
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class Scorer:
    """Scores the adapters of one state of a pool for batches of prompts, by one signal.

    Attributes:
        signal: the registered signal with the window and the activations of the pool.
        indices: one per point that is read, of the adapters that touch it.
        groups: the same rows in fewer indices, with one product for all points that read the same vectors.
        probe: reads the hidden vectors of these points.
        calibration: what responses are compared with; None for signals of the scale `"raw"`.
        examples: what is known of example prompts.
        selector: makes selections from these scores, and names the adapters that are scored.
        reading: what the calibration read; None without one.
        prefix_cache: of prompts that are read once, in whose prefill the probe is; None: they are read twice.
        responses: whether responses count: always, unless a study asks what other evidence is worth alone.
    """

    signal: Signal
    indices: tuple[ScoringIndex, ...]
    groups: tuple[PointGroup, ...]
    probe: Probe
    calibration: Calibration | None
    examples: ExamplesRead
    selector: Selector
    reading: Reading | None
    prefix_cache: PrefixCache | None
    responses: bool = True

    @classmethod
    def open(
        cls,
        base: BaseReader,
        pool: AdapterPool,
        settings: SelectionSettings,
        signal: str,
        *,
        before: Scorer | None = None,
        tell: Tell | None = None,
    ) -> Scorer:
        """The scorer of a signal: plan, calibrate (what is not stored), whiten, describe examples, index.

        The caller holds the model's lock, and no mixture is active: a calibration with adapters mixed in would be wrong
        for ever.

        Args:
            pool: fitted to the base model.
            before: the scorer of the same signal for an earlier state of the pool, whose valid parts are reused.
            tell: called with 0 and the number of adapters first, and then as by `logo.selection.index.read_indices`.

        Raises PoolError, UsageError or ModelError: the pool cannot be scored as the settings ask; AdapterError.
        """
        pool_signal = settings.signal_for(pool, signal)
        planned = plan(base.model, pool, settings, signal)
        if tell is not None:
            tell(0, len(planned.adapters))
        earlier_reading = None if before is None else before.reading
        background = base.background(pool_signal, planned, settings, earlier_reading)
        earlier_indices = before.indices if before is not None and before.signal == pool_signal else ()
        indices = base.indices(planned.adapters, background, earlier_indices, tell)
        indices, groups = _grouped(indices, pool_signal)
        prefix_cache = base.prefix_cache if pool_signal.activations else None
        probe = Probe(
            model=base.model,
            points=(*background.points, *background.examples.points),
            read=pool_signal.input,
            run=None if prefix_cache is None else prefix_cache.forward,
        )
        return cls(
            signal=pool_signal,
            indices=tuple(indices),
            groups=tuple(groups),
            probe=probe,
            calibration=background.calibration,
            examples=background.examples,
            selector=_selector(pool, planned.adapters, indices, background),
            reading=background.reading,
            prefix_cache=prefix_cache,
        )

    def only(self, kinds: Collection[Kind]) -> Scorer:
        """The same scorer by some kinds of evidence alone, which reads only what they need. Without responses, adapters
        that lack evidence get the scores of those whose examples are not like the prompt.

        Raises UsageError: none of the pool's adapters has a kind of evidence, or the signal has scores without a scale.
        """
        there = () if self.calibration is None else ("responses", *self.examples.kinds)
        for kind in kinds:
            if kind not in there:
                raise UsageError(f"evidence {kind!r}: {self._why_lacking(kind)}")
        responses = "responses" in kinds
        scored_points = self.points[: self.described.start] if responses else ()
        examples = self.examples.only(kinds)
        evidence = EXAMPLES if examples.kinds else RESPONSES
        return replace(
            self,
            probe=self.probe.at((*scored_points, *examples.points)),
            examples=examples,
            selector=replace(self.selector, evidence=evidence),
            responses=responses,
        )

    def _why_lacking(self, kind: Kind) -> str:
        """Why there is no evidence of a kind, and what to do."""
        if self.calibration is None:
            return "the scores of this signal have no scale; use 'calibrated'"
        if kind == "examples" or not self.examples.kinds:
            return "expected example prompts of adapters, found none; give them some with `logo pool examples`"
        return "expected a text encoder, found none; name one with --encoder (Python: encoder=...)"

    @property
    def points(self) -> tuple[Point, ...]:
        """Where prompts are read: where adapters are scored, and then where prompts are described."""
        return self.probe.points

    @cached_property
    def described(self) -> range:
        """The numbers of the points at which prompts are described, to be compared with example prompts."""
        return range(len(self.probe.points) - len(self.examples.points), len(self.probe.points))

    @cached_property
    def _cells(self) -> Tensor:
        """(responses,): where each response of `per_point` belongs in the flattened (adapters, readings)."""
        adapters_of_readings = [index.adapters for index in self.indices] * self.signal.readings
        readings = len(adapters_of_readings)
        first_cells = {name: number * readings for number, name in enumerate(self.selector.names)}
        return torch.tensor(
            [
                first_cells[adapter.name] + reading
                for reading, adapters in enumerate(adapters_of_readings)
                for adapter in adapters
            ]
        )

    @cached_property
    def _reference(self) -> Reference | None:
        if self.calibration is None:
            return None
        neutral, requests = self.calibration.reference_texts
        if self.signal.scale == "whitened":  # logarithms; what never changes, as behind an invocation, says nothing
            constant = neutral.std(dim=2) < _CONSTANT
            neutral = neutral.masked_fill(constant[:, :, None], torch.nan)
        weights = neutral.new_ones(neutral.shape[1])
        weights[len(self.indices) :] = LATE_WEIGHT
        return Reference.of(neutral, requests, weights)

    @cached_property
    def _usual_spread(self) -> float:
        """The unit of scores of responses: `USUAL_MARGIN` standard deviations of the adapters' scores of one text, over
        the texts of the calibration. With the training, the ranks and the modules of adapters, it grows as their scores
        of their own prompts do. What all adapters have in common on a text says nothing about which is right."""
        assert self.calibration is not None and self._reference is not None
        texts = torch.cat(self.calibration.reference_texts, dim=2)
        scores = self._reference.compare(texts)  # (texts, adapters)
        apart = scores - scores.mean(dim=1, keepdim=True)
        variance = float(apart.square().sum()) / (len(scores) * max(1, scores.shape[1] - 1))
        return max(USUAL_MARGIN * math.sqrt(variance), _LEAST_SHARE * float(scores.std()), 1e-6)

    def calibrated(self, text: int, tokens: int) -> list[float]:
        """The scores of the adapters for one neutral text of the calibration, of which so many tokens are read, from
        its stored responses and without example prompts."""
        assert self.calibration is not None
        responses = self.calibration.neutral[:, :, text].flatten()[self._cells]
        scores: list[float] = self.score_responses([responses[None]], [], torch.tensor([tokens]))[0].tolist()
        return scores

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        among: Sequence[Collection[str] | None] = (),
        embedded: Embedded = NO_TEXTS,
        *,
        alone: bool = True,
    ) -> Tensor:
        """Scores (rows, adapters), float32 on the CPU, of prompts as token ids, cut to the signal's window.

        Args:
            among: the names of the adapters that may be selected in each row (None: all of them), whose scores are
                right; those of others may not be. Empty: all in every row.
            embedded: what the text encoder has read already of these prompts, by their texts.
            alone: whether the base model is probed alone, with no adapter active.
        """
        signal = self.signal
        # Plugins may need gradients of their own, and pages that are kept must not be inference tensors.
        outlive = signal.plugin is not None or self.prefix_cache is not None
        with torch.no_grad() if outlive else torch.inference_mode():
            encoded = None if self.examples.encoded is None else self.examples.encoded.similarities(rows, embedded)
            if not self.probe.points:  # the text encoder alone
                return self.score_responses([], [], torch.tensor([len(row) for row in rows]), among, encoded)
            if self.prefix_cache is None:
                hidden, owners = self.probe.read(rows, list(map(signal.begin, rows)), may_pack=alone)
            else:
                hidden, owners = self._read_with_cache(rows, self.prefix_cache)
            weights, sums = emphasis(owners, len(rows))
            device = self.indices[0].stacked.device
            descriptions = [both_means(hidden[point].to(device), owners, weights, sums) for point in self.described]
            per_point: list[Tensor] = []
            if self.responses:
                responses = [signal(group.index, hidden[group.first]).to(device) for group in self.groups]
                response_means = both_means(torch.cat(responses, dim=1), owners, weights, sums)[:, : signal.readings]
                per_point = [finished(response_means.flatten(1), signal.scale)]
            tokens = sums[:, 0]  # each has weight 1 in the even mean
            return self.score_responses(per_point, descriptions, tokens, among, encoded)

    def _read_with_cache(self, rows: Sequence[Sequence[int]], prefix_cache: PrefixCache) -> tuple[list[Tensor], Tensor]:
        """As `Probe.read`, of prompts whose keys and values are kept."""
        # Tokens on which adapters act are never cached.
        ends = [earliest(self.signal.activations, row) for row in rows]
        read: tuple[list[Tensor], Tensor] = prefix_cache.extend(rows, ends, partial(self._read_uncached, rows))
        return read

    def _read_uncached(
        self, rows: Sequence[Sequence[int]], ids: Tensor, mask: Tensor, cache: DynamicCache, options: dict[str, Any]
    ) -> tuple[list[Tensor], Tensor]:
        """Reads what is not cached of rows; see `PrefixCache.extend`. Returns hidden vectors and their owners."""
        width = ids.shape[1]
        cached_counts = mask[:, : mask.shape[1] - width].sum(dim=1).tolist()
        begins = [self.signal.begin(row) - cached for row, cached in zip(rows, cached_counts, strict=True)]
        ends = [len(row) - cached for row, cached in zip(rows, cached_counts, strict=True)]
        picked, owners = pick(begins, ends, range(0, len(rows) * width, width))
        return self.probe(ids, mask, picked.to(ids.device), cache, options), owners

    def score_responses(
        self,
        per_point: Sequence[Tensor],
        descriptions: Sequence[Tensor],
        tokens: Tensor,
        among: Sequence[Collection[str] | None] = (),
        encoded: Similarities | None = None,
    ) -> Tensor:
        """Scores (rows, adapters), float32 on the CPU, from responses that were read elsewhere.

        Args:
            per_point: `a` (rows, adapters that touch the point) of the even readings of all points, then of the late
                ones if the signal has them, or these side by side in fewer tensors; none if responses do not count.
            descriptions: (rows, 2, d) of each point in `described`: even and late means of the hidden vectors.
            tokens: (rows,), how many were read of each prompt.
            among: as in `__call__`.
            encoded: the similarities that a text encoder sees; None: there is none.
        """
        names = self.selector.names
        selectable = None
        if any(allowed is not None for allowed in among):
            selectable = torch.tensor([[allowed is None or name in allowed for name in names] for allowed in among])
        if self._reference is None:
            return self._raw_scores(per_point)
        if self.responses:
            scores = self._compared(per_point, self._reference, selectable)
        else:
            scores = torch.zeros(len(tokens), len(names))
        evidence: list[Similarities] = []
        if self.examples.described is not None and descriptions:
            evidence.append(self.examples.described.similarities(descriptions))
        elif encoded is not None:  # then no adapter has examples, and what they would say is estimated
            evidence.append(Similarities.none(len(tokens), len(names)))
        if encoded is not None:
            evidence.append(encoded)
        if evidence:
            return together(scores, evidence, selectable)
        if self.signal.token == "each" and not self.examples.kinds:
            scores = scores * factors(tokens)[:, None]
        return scores

    def _compared(self, per_point: Sequence[Tensor], reference: Reference, selectable: Tensor | None) -> Tensor:
        """Scores (rows, adapters) of responses beside those to the texts of the calibration, in the pool's own unit."""
        responses = torch.cat(list(per_point), dim=1).cpu().T  # (responses, rows)
        adapters = len(self.selector.names)
        readings = len(self.indices) * self.signal.readings
        by_cell = torch.full((adapters * readings, responses.shape[1]), torch.nan, dtype=torch.float32)
        by_cell[self._cells] = responses
        by_adapter = by_cell.view(adapters, readings, -1)
        return reference.compare(by_adapter, selectable) / self._usual_spread

    def _raw_scores(self, per_point: Sequence[Tensor]) -> Tensor:
        """Scores (rows, adapters) of a signal without a calibration: the means of its responses, which show one that is
        not a number, for the selector to refuse."""
        responses = torch.cat(list(per_point), dim=1).cpu().T  # (responses, rows)
        readings = len(self.indices) * self.signal.readings
        return row_means(responses, self._cells // readings, len(self.selector.names)).T


def _grouped(indices: list[ScoringIndex], signal: Signal) -> tuple[list[ScoringIndex], list[PointGroup]]:
    """The indices of points, and the same rows in as few indices as the signal can score."""
    # A plugin's signal may need whole responses, which an index of several points does not have.
    if signal.plugin is None and len(indices) > 1:
        return side_by_side(indices)
    return indices, [PointGroup(number, index) for number, index in enumerate(indices)]


def _selector(
    pool: AdapterPool, adapters: Sequence[Adapter], indices: Sequence[ScoringIndex], background: Background
) -> Selector:
    """The selector of the adapters of a pool that are scored; without a calibration, scores have no scale."""
    names = tuple(adapter.name for adapter in adapters)
    calibration = background.calibration
    if calibration is None:
        return Selector(names, pool.default_k, None)
    touched = torch.tensor([[point.module in adapter.modules for point in calibration.points] for adapter in adapters])
    sizes = relative_sizes([index.updates for index in indices], calibration.weight_norms, touched).tolist()
    evidence = EXAMPLES if background.examples.kinds else RESPONSES
    return Selector(names, pool.default_k, evidence, dict(zip(names, sizes, strict=True)))
