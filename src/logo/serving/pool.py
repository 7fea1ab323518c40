"""The pool of a server: what requests may use of it now, and how it changes under way.

Everything but reading is called by the one thread that selects, so that no prompt is scored by half of a change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import Any

from logo.adapters.format import Adapter, open_adapter
from logo.engine import LoGo
from logo.errors import LoGoError, PoolError, UsageError
from logo.protocol import Card, Patterns
from logo.serving.keys import usable


class ServedPool:
    """An engine's pool, calibrated for every signal that requests may ask for.

    Args:
        logo: the engine.
        signals: the engine's own, and those that requests may ask for besides.
        paused: inside its block nothing is generated, so that a calibration may run the model.

    Attributes:
        adapters: those that requests may use now, by name; replaced as a whole.
        cards: what is shown of each.
        refused: signals that cannot score the pool as it is now, with the reason.

    Raises:
        PoolError: adapters that one of the signals cannot score.
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
        self._list()

    def usable(self, patterns: Patterns | None) -> Mapping[str, Any]:
        """The adapters that an API key may use now, by name; None: all of them."""
        if patterns is None:
            return self.adapters
        known_names = self._usable  # another one takes its place when the pool changes
        if patterns not in known_names:
            known_names[patterns] = dict.fromkeys(usable(self.adapters, patterns))
        return known_names[patterns]

    def add(self, folder: Path, name: str, replaced: bool) -> Adapter:
        """Opens an adapter folder and adds it; all of it or nothing. Errors as `Service.add`."""
        pool = self._logo.pool
        adapter = open_adapter(folder, name)
        adapter.read()  # finds what is not finite
        before = pool.remove(name) if replaced and name in pool else None
        pool.add(adapter)
        try:
            self._take_note()
            if name not in self.adapters:  # an engine that leaves out what does not fit says nothing by itself
                raise next(error for error in self._logo.fitted.refused if error.name == name)
        except Exception:
            pool.remove(name)
            if before is not None:
                pool.add(before)
            self._take_note()
            raise
        return adapter

    def remove(self, name: str) -> None:
        """Takes an adapter out. Errors as `Service.remove`."""
        pool = self._logo.pool
        pool[name]  # raises with a did-you-mean
        if len(pool) == 1:
            raise UsageError(f"adapter {name!r} is the only one left: a pool needs one")
        adapter = pool.remove(name)
        try:
            self._take_note()
        except Exception:
            pool.add(adapter)
            raise

    def _take_note(self) -> None:
        """Indexes what is new in the pool now, so that no request has to wait for it."""
        with self._paused():
            self.refused = {}
            for signal in self._signals:
                try:
                    self._logo.calibrate(signal)
                except LoGoError as error:
                    if signal == self._logo.settings.signal:
                        raise
                    self.refused[signal] = copy(error)  # for whoever asks for this signal
        self._list()

    def _list(self) -> None:
        """Notes which adapters there are. Each file is looked at once: it may be gone when the list is asked for."""
        before, adapters = self.adapters, {adapter.name: adapter for adapter in self._logo.fitted}
        known = {name for name, one in adapters.items() if name in before and before[name].file is one.file}
        self.cards = {
            name: self.cards[name] if name in known else Card.of(adapter) for name, adapter in adapters.items()
        }
        self.adapters = adapters
        self._usable = dict[Patterns, dict[str, None]]()
