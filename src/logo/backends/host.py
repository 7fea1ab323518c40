"""What runs in a process of `logo.backends.ray`, and what goes to it and comes back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from logo.errors import LoGoError


@dataclass(frozen=True)
class Shared:
    """A value that many items have as an argument. Each node is sent it once, and each process reads it once."""

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


# What this process has read of shared values, the latest last: one dataset comes after the other, and each has two.
_READ: dict[str, Any] = {}
_KEPT = 8


@dataclass(frozen=True)
class Refused:
    """An error that a user can mend, as a result: it is no reason to try again elsewhere."""

    error: LoGoError


@dataclass(frozen=True)
class Answer:
    """What a process answers, and what it has warned of meanwhile, each once."""

    value: Any
    warnings: tuple[str, ...]


class Host:
    """What runs in a process."""

    def __init__(self, open_: Callable[[], Any]) -> None:
        self._open = open_
        self._held: Any = None

    def call(self, what: Callable[..., Any], *args: Any) -> Answer:
        """`what(held, *args)`."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                if self._held is None:
                    self._held = self._open()
                value = what(self._held, *args)
            except LoGoError as error:
                value = Refused(error.with_traceback(None))
        said = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))
        return Answer(value, tuple(said))
