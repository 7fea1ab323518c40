"""`BaseReader`: what the base model reads of texts before it scores adapters for prompts, and the adapters' indices.

texts -> Reading -> Calibration -> whitenings -> ExamplesRead        these are the Background
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from logo.adapters.adapter import Adapter
from logo.files import Store, cache_folder
from logo.prefix_cache import PrefixCache
from logo.selection.calibration import Calibration, Reading, TextRunner, calibrate, read_texts, whitenings
from logo.selection.encoder import EncodedExamples
from logo.selection.evidence import KINDS, Kind
from logo.selection.examples import Examples, examples_of
from logo.selection.index import IndexRequest, ScoringIndex, Tell, read_indices
from logo.selection.plan import Plan, described_points
from logo.selection.points import Point
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal
from logo.selection.texts import EVERYDAY, NEUTRAL, REQUESTS, Texts
from logo.selection.whitening import Whitening

# Texts, the tokens with which each has to end, and whether the forms of conversations vary -> token ids.
Encode = Callable[[Sequence[str], Sequence[int], bool], list[list[int]]]


@dataclass(frozen=True)
class BaseReader:
    """What reads the texts of calibrations and the prompts of one base model.

    Attributes:
        model: the base model; with `run`, it may be a skeleton on the meta device.
        encode: as prompts are encoded (`logo.prompts.Prompts.texts`).
        run: runs texts; None: `model` itself does. If it raises, what was read before is in the store, and
            `logo.selection.scorer.Scorer.open` may be called again with the same one.
        device: where scores are computed; None: on the device of the hidden vectors.
        store: where calibrations are; None: that of an earlier scorer, or a new one in the folder of the settings.
        prefix_cache: for a pool whose adapters act only from a position on (`AdapterPool.read_once`); None: such a
            pool is probed like any other, but its prompts are read whole.
        text_of: the text of token ids, which a text encoder reads; None: no text encoder is used here.
    """

    model: nn.Module
    encode: Encode
    run: TextRunner | None = None
    device: torch.device | None = None
    store: Store | None = None
    prefix_cache: PrefixCache | None = None
    text_of: Callable[[Sequence[int]], str] | None = None

    @property
    def runner(self) -> TextRunner:
        """What runs texts."""
        return self.run or partial(read_texts, self.model)

    def encoded(
        self, signal: Signal, texts: Sequence[str], endings: Sequence[Sequence[int]], *, varied: bool = False
    ) -> list[list[int]]:
        """The token ids of texts as a signal reads them, cut to its window: all behind the first ending, and so on;
        `varied` as in `Prompts.texts`."""
        rows = [row for ending in endings for row in self.encode(texts, ending, varied)]
        return [list(signal.windowed(row)) for row in rows]

    def device_at(self, point: Point) -> torch.device:
        """Where scores of a point are computed; of a model that is offloaded or a skeleton, on the CPU."""
        layer = self.model.get_submodule(point.layer_path)
        device = self.device or next(layer.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def background(
        self, signal: Signal, plan: Plan, settings: SelectionSettings, earlier: Reading | None = None
    ) -> Background:
        """What a signal compares the responses of a plan's adapters with; what is not stored is read now.

        Args:
            earlier: of an earlier state of the pool.
        """
        if signal.scale == "raw":
            return Background(plan.points)
        reading = self._reading(signal, settings, earlier)
        calibration = replace(
            calibrate(reading, plan, self.runner),
            endings=tuple(endings_of(plan.adapters, signal)),
            ending_count=len(signal.endings),
        )
        spaces = whitenings(reading, calibration.points, self.runner)
        examples = self._examples(reading, settings, plan.adapters)
        reading.store.release(reading.key)
        return Background(calibration.points, reading, calibration, spaces, examples)

    def _reading(self, signal: Signal, settings: SelectionSettings, earlier: Reading | None) -> Reading:
        """What is read for the calibration of a signal; the texts of an earlier reading, if it has the same signal."""
        store = self.store or (Store(cache_folder(settings.cache)) if earlier is None else earlier.store)
        if earlier is not None and earlier.signal == signal:
            return replace(earlier, model=self.model, store=store)
        requests: list[list[int]] = []
        if signal.chosen:
            requests = self.encoded(signal, settings.calibration_prompts or REQUESTS, signal.endings)
        neutral = self.encoded(signal, NEUTRAL, signal.endings, varied=True)
        return Reading.of(self.model, signal, Texts(neutral, requests), store)

    def _examples(self, reading: Reading, settings: SelectionSettings, adapters: Sequence[Adapter]) -> ExamplesRead:
        """What is known of the example prompts of adapters, and of their descriptions."""
        encoded = self.encoded_examples(reading.signal, settings, adapters, reading.store)
        points = described_points(self.model, settings, reading.signal)
        if not points or not any(adapter.examples for adapter in adapters):
            return ExamplesRead(encoded=encoded)
        rows = self._example_rows(reading.signal, adapters)
        ordinary = self._ordinary(reading.signal)
        described = examples_of(reading, ordinary, rows, points, self.device_at(points[0]), self.runner)
        return ExamplesRead(points, described, encoded)

    def encoded_examples(
        self, signal: Signal, settings: SelectionSettings, adapters: Sequence[Adapter], store: Store
    ) -> EncodedExamples | None:
        """The example prompts and descriptions of adapters as the text encoder of the settings reads them, which the
        store keeps; None if there is no encoder, or if the signal or the settings use no examples."""
        if settings.encoder is None or self.text_of is None or not described_points(self.model, settings, signal):
            return None
        said: list[list[str]] = []
        for adapter, rows in zip(adapters, self._example_rows(signal, adapters), strict=True):
            description = [] if adapter.description is None else [adapter.description]
            said.append([*map(self.text_of, rows), *description])
        ordinary = list(map(self.text_of, self._ordinary(signal)))
        return EncodedExamples.of(settings.encoder, self.text_of, said, ordinary, store)

    def _ordinary(self, signal: Signal) -> list[list[int]]:
        """The texts with which those of adapters are compared."""
        neutral = self.encoded(signal, NEUTRAL, signal.endings, varied=True)
        return [*neutral, *self.encoded(signal, EVERYDAY, signal.endings)]

    def _example_rows(self, signal: Signal, adapters: Sequence[Adapter]) -> list[list[list[int]]]:
        """The example prompts of each adapter, which end as prompts do on which it acts."""
        return [
            self.encoded(signal, adapter.examples, [signal.endings[number]]) if adapter.examples else []
            for adapter, number in zip(adapters, endings_of(adapters, signal), strict=True)
        ]

    def indices(
        self,
        adapters: Sequence[Adapter],
        background: Background,
        earlier: Sequence[ScoringIndex] = (),
        tell: Tell | None = None,
    ) -> list[ScoringIndex]:
        """One index for each point at which adapters are scored, of those that touch it.

        Args:
            earlier: indices of the same signal, for an earlier state of the pool, of which all is reused that is still
                valid.
            tell: as in `read_indices`.
        """
        earlier_at = {index.point: index for index in earlier}
        requests = [
            IndexRequest(
                adapters=[adapter for adapter in adapters if point.module in adapter.modules],
                point=point,
                device=self.device_at(point),
                whitening=background.spaces.get(point.module),
                before=earlier_at.get(point),
            )
            for point in background.points
        ]
        reading = background.reading
        if reading is None:
            return read_indices(requests, tell)
        return read_indices(requests, tell, reading.store, f"{reading.key}/rows")


def endings_of(adapters: Sequence[Adapter], signal: Signal) -> list[int]:
    """Which of the signal's endings the texts have on which each adapter acts; those that need none act on all."""
    numbers = {tokens: number for number, tokens in enumerate(signal.endings)}
    return [numbers.get(adapter.activation.tokens, 0) for adapter in adapters]


@dataclass(frozen=True)
class ExamplesRead:
    """What is known of the example prompts of a pool, if its adapters have some and they are used.

    Attributes:
        points: where prompts are described, to be compared with the examples.
        described: as the base model reads them.
        encoded: as a text encoder reads them, if there is one.
    """

    points: tuple[Point, ...] = ()
    described: Examples | None = None
    encoded: EncodedExamples | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of evidence that there are beside responses."""
        there = {"examples": self.described, "encoder": self.encoded}
        return tuple(kind for kind in KINDS if there.get(kind) is not None)

    def only(self, kinds: Collection[Kind]) -> ExamplesRead:
        """What is known by these kinds of evidence."""
        encoded = self.encoded if "encoder" in kinds else None
        return replace(self, encoded=encoded) if "examples" in kinds else ExamplesRead(encoded=encoded)


@dataclass(frozen=True)
class Background:
    """What a signal compares the responses of adapters with; for signals of the scale `"raw"`, the points alone.

    Attributes:
        points: where adapters are scored.
        reading: what the base model read for the calibration.
        calibration: the responses of the adapters to neutral texts and requests.
        spaces: the whitenings by modules of points; empty if the signal does not whiten.
        examples: what is known of example prompts.
    """

    points: tuple[Point, ...]
    reading: Reading | None = None
    calibration: Calibration | None = None
    spaces: Mapping[str, Whitening] = field(default_factory=dict)
    examples: ExamplesRead = ExamplesRead()  # a value
