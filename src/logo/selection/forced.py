"""What the user asks for instead of what the model would choose."""

from __future__ import annotations

from collections.abc import Mapping

from logo.adapters.pool import AdapterPool
from logo.errors import UsageError
from logo.selection.selector import Selection

Forced = Mapping[str, float] | Selection


def forced(entry: Forced, pool: AdapterPool) -> Selection:
    """The selection that a user names: adapter -> weight, or a selection from before.

    Raises:
        PoolError: an adapter is not in the pool.
        UsageError: a weight that is not a finite number.
    """
    selection = entry if isinstance(entry, Selection) else Selection.forced(entry)
    for name, weight in zip(selection.adapters, selection.weights, strict=True):
        pool[name]  # raises with a did-you-mean
        if not -1e6 < weight < 1e6:
            raise UsageError(f"weight of adapter {name!r}: expected a finite number, found {weight}")
    return selection
