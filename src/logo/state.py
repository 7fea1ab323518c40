"""`EngineState`: a pool and what an engine has computed for it, as one value."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from logo.adapters.pool import AdapterPool
from logo.selection.scorer import Scorer


@dataclass(frozen=True)
class EngineState:
    """What an engine knows at one moment. A change makes another value, and a call keeps the one that it began with.

    Attributes:
        pool: as it was given, without adapters that do not fit.
        fitted: the same adapters, matched to the base model.
        weights: the stamp of the base model's weights from which all this was computed (`models.WeightWatch`).
        probes_all: whether all that the model reads of a conversation is probed.
        scorers: by signal, of this pool.
        earlier: by signal, of an earlier pool; the next scorer of that signal reuses what is still valid of it.
        carried: the adapters that the last prompt selected, for `probe_context="carry"`; None: there was none.
    """

    pool: AdapterPool
    fitted: AdapterPool
    weights: Hashable
    probes_all: bool
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    earlier: Mapping[str, Scorer] = field(default_factory=dict)
    carried: tuple[str, ...] | None = None

    def with_scorer(self, signal: str, scorer: Scorer) -> EngineState:
        """The same state with a scorer of a signal."""
        earlier = {name: other for name, other in self.earlier.items() if name != signal}
        return replace(self, scorers={**self.scorers, signal: scorer}, earlier=earlier)

    def following(self, before: EngineState) -> EngineState:
        """This state in the place of another one, whose scorers become earlier ones unless the weights have changed."""
        scorers = {**before.earlier, **before.scorers} if before.weights == self.weights else {}
        earlier = {signal: scorer for signal, scorer in scorers.items() if signal not in self.scorers}
        return replace(self, earlier=earlier, carried=before.carried)

    def with_weights(self, weights: Hashable) -> EngineState:
        """The same pool on these weights of the base model; if they are others, nothing is computed from them yet."""
        return self if weights == self.weights else replace(self, weights=weights, scorers={}, earlier={})
