"""The mapping in which vLLM's handlers look up `model`: vLLM's adapters, and the mixture of the current request.

A mixture is not registered. Its name has a meaning only in the task that answers its request, so there is nothing to
guess, to list or to clean up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_mixture: ContextVar[tuple[str, Any] | None] = ContextVar("logo_mixture", default=None)


@contextmanager
def meaning(name: str, request: Any) -> Iterator[None]:
    """Inside the block, and in tasks begun there, `name` is the mixture of this `LoRARequest`."""
    token = _mixture.set((name, request))
    try:
        yield
    finally:
        _mixture.reset(token)


class Names(dict[str, Any]):
    """vLLM's `lora_requests`, and the mixture that `meaning` has set for the current task."""

    def _own(self, name: object) -> Any:
        found = _mixture.get()
        return found[1] if found is not None and found[0] == name else None

    def __contains__(self, name: object) -> bool:
        return self._own(name) is not None or super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        own = self._own(name)
        return super().__getitem__(name) if own is None else own

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`."""
        own = self._own(name)
        return super().get(name, default) if own is None else own
