"""The code in a process of `logo.backends.ray`, and the values sent to it and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from logo import plugins
from logo.errors import LoGoError


@dataclass(frozen=True)
class Shared:
    """A value that is an argument of many items. It is sent to each node once, and each process reads it once."""

    reference: Any

    def get(self) -> Any:
        """The value, in any process."""
        key = self.reference.hex()
        if key not in _READ:
            import ray

            _READ[key] = ray.get(self.reference)
            while len(_READ) > _KEPT:
                del _READ[next(iter(_READ))]
        return _READ[key]


# The shared values that this process has read, the latest last. Datasets follow each other, and each has two values.
_READ: dict[str, Any] = {}
_KEPT = 8


@dataclass(frozen=True)
class Refused:
    """An error that the user has to fix, returned as a result so that no other process tries the item."""

    error: LoGoError


@dataclass(frozen=True)
class Answer:
    """The answer of a process, and its warnings since the last one, each once."""

    value: Any
    warnings: tuple[str, ...]


class Host:
    """The Ray actor that each process runs."""

    def __init__(self, open_: Callable[[], Any]) -> None:
        self._open = open_
        self._held: Any = None

    def call(self, what: Callable[..., Any], *args: Any) -> Answer:
        """Runs `what(held, *args)`, after opening `held` in the first call; a `LoGoError` is returned as `Refused`."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                if self._held is None:
                    plugins.load_installed()
                    self._held = self._open()
                value = what(self._held, *args)
            except LoGoError as error:
                value = Refused(error.with_traceback(None))
        said = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))
        return Answer(value, tuple(said))
