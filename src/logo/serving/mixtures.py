"""`HeldMixture`: the mixture of one sequence, whose adapters are held in the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from logo.adapters.activation import earliest
from logo.adapters.pool import AdapterPool
from logo.mixing import NEVER, begins
from logo.mixing.packed import Mixture
from logo.mixing.store import AdapterStore
from logo.selection import Selection


@dataclass(frozen=True)
class HeldMixture:
    """A `logo.protocol.SelectedMixture` whose adapters are loaded and held.

    Attributes:
        selection: names, weights, scores.
        mixture: the held adapters.
        queue_ms: how long the prompt waited to be probed.
        probe_ms: how long the probe took, which prompts may share; 0 if nothing was selected.
        release: to be called when the mixture is no longer needed, so that its adapters may be evicted. The garbage
            collector does so otherwise.
    """

    selection: Selection
    mixture: Mixture
    queue_ms: float
    probe_ms: float
    release: Callable[[], object] = field(repr=False)


def mixed(store: AdapterStore, pool: AdapterPool, selection: Selection, prompt: Sequence[int]) -> tuple[Mixture, int]:
    """Loads and holds the adapters of a selection; also returns how many of them the prompt does not invoke.

    The caller has to release `Mixture.hold`.

    Args:
        pool: fitted to the model.
        prompt: token ids.

    Raises:
        UsageError: see `logo.mixing.activated.begins`.
        LoGoError: an adapter that cannot be read, or no room for it.
    """
    weights = {name: weight for name, weight in selection.mixture.items() if weight}
    places = begins(pool, weights, prompt)
    used = [(pool[name], weights[name], begin) for name, begin in places.items() if begin != NEVER]
    hold = store.hold([store.source(adapter) for adapter, *_ in used])
    mixture = Mixture(
        hold,
        tuple(weight for _, weight, _ in used),
        tuple(begin for *_, begin in used),
        earliest(pool.activations, prompt),
    )
    return mixture, len(places) - len(used)
