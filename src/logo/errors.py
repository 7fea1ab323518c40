"""The errors a user can meet.

Every message is one line that names the thing, what was expected, what was found and what to do. Each class is
also the built-in error a caller would expect, so `except ValueError` and `except OSError` keep working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoGoError(Exception):
    """Base of everything this package raises on purpose; shown to the user as one line."""


class UsageError(LoGoError, ValueError):
    """An option or argument that cannot be used (command line: exit code 2)."""


class AdapterError(LoGoError, ValueError):
    """One adapter that cannot be read, is of a kind that cannot be mixed, or does not fit the base model.

    Attributes:
        name: the adapter's name in its pool.
        reason: why it is refused, without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"adapter {name!r}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[AdapterError], tuple[str, str]]:
        return type(self), (self.name, self.reason)  # so that it can be copied and sent to another process


class LeftOut(AdapterError):
    """An adapter that is not taken though nothing is wrong with it: no reason to refuse its pool."""


class PoolError(LoGoError, ValueError):
    """A pool that is empty, has two adapters of one name, or lacks the adapter asked for."""


class ModelError(LoGoError, ValueError):
    """A base model that cannot be loaded, or in which a module that is needed cannot be found."""


class StoreFull(LoGoError, RuntimeError):
    """The adapters that are in use at one time need more memory than adapters may have."""


class NotFinite(ModelError, ArithmeticError):
    """What was computed is NaN or infinite, so that nothing can be made of it."""


class TrainingError(LoGoError, RuntimeError):
    """Adapters that could not be trained, or not all of them."""


class Unsure(PoolError):
    """No adapter of the pool seems to be made for a prompt, and the user wants no answer then."""


class DataError(LoGoError, ValueError):
    """A dataset that does not exist, or a row that is malformed (names the file and the line)."""


class StorageError(LoGoError, OSError):
    """A file or folder that cannot be read or written."""


class HubError(LoGoError, OSError):
    """The Hugging Face Hub refused, could not be reached, or does not have what was asked for."""


def closest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a name that resembles a known one, else nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
