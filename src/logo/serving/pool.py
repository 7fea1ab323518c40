"""`ServedPool`: the pool of a server, which may change while it runs.

Changes are made by the thread that selects, so that no prompt is scored in the middle of a change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logo.adapters.adapter import Adapter, open_adapter
from logo.adapters.pool import AdapterPool
from logo.engine import LoGo
from logo.errors import LoGoError, PoolError, UsageError
from logo.protocol import Card, Patterns
from logo.serving.keys import usable


@dataclass(frozen=True)
class Change:
    """A change of a pool.

    Attributes:
        name: of the adapter.
        folder: of the adapter; None: it is removed.
        replace: whether it may replace an adapter of this name.
    """

    name: str
    folder: Path | None = None
    replace: bool = False


class ServedPool:
    """An engine's pool, calibrated for every signal that requests may use.

    Args:
        logo: the engine.
        signals: the engine's own, and others that requests may use.
        paused: generation pauses inside its block, so that a calibration may run the model.

    Attributes:
        adapters: the adapters that requests may use now, by name; replaced as a whole.
        cards: the card of each adapter.
        refused: signal -> why it cannot score the present pool.

    Raises:
        PoolError: a signal cannot score some adapters.
    """

    def __init__(self, logo: LoGo, signals: Sequence[str], paused: Callable[[], AbstractContextManager[None]]) -> None:
        self._logo, self._signals, self._paused = logo, signals, paused
        for signal in signals:
            try:
                logo.calibrate(signal)
            except PoolError as error:
                raise PoolError(f"signal {signal!r}: {error}") from error
        self.refused: dict[str, LoGoError] = {}
        self.adapters: dict[str, Adapter] = {}
        self.cards: dict[str, Card] = {}
        self._show(*self._listed(logo.fitted))

    def usable(self, patterns: Patterns | None) -> Mapping[str, Any]:
        """The adapters that match an API key's patterns, by name; None: all."""
        if patterns is None:
            return self.adapters
        known_names = self._usable  # replaced when the pool changes
        if patterns not in known_names:
            known_names[patterns] = dict.fromkeys(usable(self.adapters, patterns))
        return known_names[patterns]

    def change(self, change: Change) -> Adapter | None:
        """Changes the pool when the new one is opened, checked and indexed; returns the new adapter.

        Raises:
            LoGoError: the adapter cannot be used or the pool has one of that name; there is none of that name, or it is
                the last one.
        """
        later, adapter = self._logo.pool.value, None
        if change.folder is None:
            later[change.name]  # raises with a did-you-mean
            if len(later) == 1:
                raise UsageError(f"adapter {change.name!r} is the last one of the pool and cannot be removed")
            later = later.remove(change.name)
        else:
            adapter = open_adapter(change.folder, change.name)
            adapter.verify()  # finds what is not finite
            if change.replace and change.name in later:
                later = later.remove(change.name)
            later = later.add(adapter)
        refused: dict[str, LoGoError] = {}
        with self._paused():
            prepared = self._logo.prepared(later)
            for signal in self._signals:
                try:
                    self._logo.calibrate(signal, prepared=prepared)
                except LoGoError as error:
                    if signal == self._logo.settings.signal:
                        raise
                    refused[signal] = copy(error)  # raised for requests with this signal
        if adapter is not None and change.name not in prepared.fitted:
            # An engine that skips adapters that do not fit raises no error.
            raise next(error for error in prepared.fitted.refused if error.name == change.name)
        shown = self._listed(prepared.fitted)  # reads files, so it may still fail
        with self._paused():
            self._logo.take(prepared)
        self.refused = refused
        self._show(*shown)
        return adapter

    def _listed(self, fitted: AdapterPool) -> tuple[dict[str, Adapter], dict[str, Card]]:
        """Adapters and their cards, which are made once, since files may be removed later."""
        before, adapters = self.adapters, {adapter.name: adapter for adapter in fitted}
        known = {name for name, one in adapters.items() if name in before and before[name].file is one.file}
        cards = {name: self.cards[name] if name in known else Card.of(adapter) for name, adapter in adapters.items()}
        return adapters, cards

    def _show(self, adapters: dict[str, Adapter], cards: dict[str, Card]) -> None:
        self.adapters, self.cards = adapters, cards
        self._usable = dict[Patterns, dict[str, None]]()
