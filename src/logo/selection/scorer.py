"""`Scorer`: from token ids to a score of every adapter, by one signal, for one state of a pool."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from logo.adapters.format import Adapter
from logo.adapters.pool import AdapterPool
from logo.selection.beginnings import Beginnings as PrefixCache
from logo.selection.calibration import Calibration, TextRunner
from logo.selection.index import ScoringIndex, Tell
from logo.selection.points import Point
from logo.selection.selector import Selector
from logo.selection.settings import SelectionSettings
from logo.selection.signals import Signal

# Texts, the tokens with which each has to end, and whether the forms of conversations vary -> token ids.
Encode = Callable[[Sequence[str], Sequence[int], bool], list[list[int]]]


@dataclass(frozen=True)
class Scorer:
    """Scores the adapters of one state of a pool for batches of prompts, by one signal.

    Attributes:
        signal: how prompts are read: the registered signal with the window and the activations of the pool.
        adapters: those that are scored, in pool order.
        indices: one per point that is read, of the adapters that touch it.
        calibration: what responses are compared with; None for signals of the scale `"raw"`.
        selector: makes selections from these scores.
    """

    signal: Signal
    adapters: tuple[Adapter, ...]
    indices: tuple[ScoringIndex, ...]
    calibration: Calibration | None
    selector: Selector

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
        tell: Tell | None = None,
    ) -> Scorer:
        """The scorer of a signal: plan, calibrate (cached), whiten, describe examples, index.

        The caller holds the model's lock, and no mixture is active: a calibration with adapters mixed in would be wrong
        for ever.

        Args:
            model: the base model; with `run`, it may be a skeleton on the meta device.
            pool: adapters fitted to it.
            settings: how to read and to score.
            signal: the name of any registered signal.
            encode: texts to token ids, as prompts are encoded (`logo.decoding.Prompts.texts`); for the texts of a
                calibration and for example prompts.
            run: runs texts through the base model; None: `model` itself runs. If it raises, what was read before is in
                the calibration cache, if there is a folder for it, and `open` may be called again.
            device: where scores are computed; None: on the device of the hidden vectors.
            prefix_cache: for a pool whose adapters act only from a position on (`AdapterPool.read_once`): its prompts
                are read whole, and their keys and values are kept. None: such a pool is probed like any other, but
                whole.
            before: the scorer of the same signal for an earlier state of the pool, of which is reused what belongs to
                the same adapters by their content.
            tell: called with 0 and the number of adapters before the pool is calibrated and indexed, and then as
                `logo.selection.index.read_indices` calls it.

        Raises:
            PoolError, UsageError, ModelError: the pool cannot be scored as the settings ask.
            AdapterError: an adapter cannot be read.
        """
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are scored, in pool order."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def points(self) -> tuple[Point, ...]:
        """Where prompts are read."""
        return tuple(index.point for index in self.indices)

    @property
    def described(self) -> tuple[int, ...]:
        """The numbers of the points at which prompts are described, to be compared with example prompts; () without."""
        raise NotImplementedError

    @property
    def read_once(self) -> bool:
        """Whether the probe is the prefill, too: it reads whole prompts and keeps their keys and values."""
        raise NotImplementedError

    def __call__(self, rows: Sequence[Sequence[int]], among: Sequence[Collection[str] | None] = ()) -> Tensor:
        """Scores (rows, adapters), float32 on the CPU, of prompts as token ids; each is cut to the window here.

        Args:
            among: the names of the adapters that may be selected in each row (None: all of them), whose scores are
                right; those of others may not be. Empty: all in every row.
        """
        raise NotImplementedError

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
                ones if the signal has them (`signal.readings`); see `logo.selection.reference`.
            descriptions: (rows, 2, d) of each point in `described`: even and late means of the hidden vectors.
            tokens: (rows,), how many were read of each prompt.
            among: as in `__call__`.
        """
        raise NotImplementedError
