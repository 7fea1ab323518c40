"""`Selecting`: a selection for each of many prompts, probed in batches.

Puts the scorers of a pool and the mixer together; knows nothing about answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from logo.adapters.pool import AdapterPool
from logo.decoding import Prompts, batches_by_length, input_device
from logo.errors import UsageError
from logo.mixing import EXACT, Mixer
from logo.prompts import Prompt
from logo.selection.scorer import Asked, Scorers
from logo.selection.selector import Forced, Selection, forced
from logo.selection.settings import CallOptions, ProbeContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Selecting:
    """Selects for prompts that were read.

    Args:
        model: the base model.
        prompts: pads them.
        mixer: makes adapters active while probing.
        context: which ones; see `SelectionSettings.probe_context`.
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts, mixer: Mixer, context: ProbeContext) -> None:
        self._model, self._prompts, self._mixer, self._context = model, prompts, mixer, context
        self._carried: tuple[str, ...] | None = None  # what the last prompt selected

    def __call__(
        self,
        pool: AdapterPool,
        scorers: Scorers,
        rows: Sequence[Prompt],
        asked: Sequence[Asked],
        batch_size: int,
        *,
        answering: bool = False,
    ) -> list[Selection]:
        """One selection per row.

        Args:
            pool: fitted; the one that the scorers score.
            rows: prompts that were read.
            asked: parallel to `rows`; those of one signal are probed together.
            batch_size: prompts per probe; with the context `carry` they are taken one by one, in order.
            answering: start to read the tensors of what is selected.
        """
        if self._context == "carry":
            return [self._select_carried(pool, scorers, row, one) for row, one in zip(rows, asked, strict=True)]
        selections: dict[int, Selection] = {}
        active = pool.names if self._context == "pool" else ()
        for signal in dict.fromkeys(one.settings.signal for one in asked):
            members = [i for i, one in enumerate(asked) if one.settings.signal == signal]
            for part in batches_by_length([len(rows[i]) for i in members], batch_size):
                batch = [members[i] for i in part]
                found = self._probe(pool, scorers, [rows[i] for i in batch], [asked[i] for i in batch], active)
                if answering:  # their tensors are read while the next batch is probed
                    self._mixer.prefetch(pool, [name for selection in found for name in selection.adapters])
                selections |= zip(batch, found, strict=True)
        return [selections[i] for i in range(len(rows))]

    def mixtures(
        self,
        pool: AdapterPool,
        scorers: Scorers,
        rows: Sequence[Prompt],
        adapters: Forced | Sequence[Forced | None] | None,
        asked: Asked,
        batch_size: int,
    ) -> list[Selection]:
        """What answers each row: what is forced, and a selection where nothing is.

        Args:
            adapters: for all rows, or a list with an entry for each.

        Raises:
            UsageError: a list of another length.
            PoolError: a forced adapter that is not in the pool, or not among the candidates.
        """
        if adapters is None or isinstance(adapters, (Mapping, Selection)):
            wanted: list[Forced | None] = [adapters] * len(rows)
        else:
            wanted = list(adapters)
            if len(wanted) != len(rows):
                raise UsageError(f"adapters: expected one entry for each of {len(rows)} prompts, found {len(wanted)}")
        done = {i: forced(entry, pool, asked.candidates) for i, entry in enumerate(wanted) if entry is not None}
        open_rows = [i for i, entry in enumerate(wanted) if entry is None]
        each = [asked] * len(open_rows)
        found = self(pool, scorers, [rows[i] for i in open_rows], each, batch_size, answering=True)
        done |= zip(open_rows, found, strict=True)
        return [done[i] for i in range(len(rows))]

    def restart(self) -> None:
        """Forgets the prompts before."""
        self._carried = None

    def _select_carried(self, pool: AdapterPool, scorers: Scorers, row: Prompt, asked: Asked) -> Selection:
        """As the official code runs: what the last prompt selected is still active, at full scale, while probing."""
        active = pool.names if self._carried is None else tuple(name for name in self._carried if name in pool)
        [selection] = self._probe(pool, scorers, [row], [asked], active)
        self._carried = selection.adapters
        return selection

    def _probe(
        self,
        pool: AdapterPool,
        scorers: Scorers,
        rows: Sequence[Prompt],
        asked: Sequence[Asked],
        active: tuple[str, ...],
    ) -> list[Selection]:
        padded = self._prompts.pad_probed(rows, input_device(self._model))
        # A calibration that this call brings about reads the base model alone.
        scorers.get(asked[0].settings)
        with self._mixer.active(pool, [dict.fromkeys(active, 1.0)], merge=EXACT):
            return scorers.select(*padded, asked)


def take_call_options(options: dict[str, Any], adapters: Forced | Sequence[Forced | None] | None) -> CallOptions:
    """Takes the options of the selection out of all those of a call.

    Raises:
        UsageError: one that selects, beside a mixture that is forced on every prompt.
    """
    taken: Any = {name: options.pop(name) for name in CallOptions.__annotations__ if name in options}
    for name, value in taken.items():
        if value is not None and name != "candidates" and isinstance(adapters, (Mapping, Selection)):
            raise UsageError(f"{name} says how to select, and `adapters` says what is mixed: leave out one of the two")
    return taken  # type: ignore[no-any-return]
