"""`learn_examples`: example prompts for adapters that have none, from prompts without labels, such as those of a log.

    prompts -> selections -> the surest prompts of each adapter are its examples -> selections with these -> ...

An adapter's own prompts resemble each other (`logo.selection.signature`), while the responses of adapters to single
prompts vary. So the prompts that select an adapter with high confidence say what its other prompts look like. This is
self-training, as in Yarowsky (ACL 1995): no label is used, and a selection that is sure and wrong is not corrected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from logo.adapters.examples import is_learned
from logo.adapters.pool import AdapterPool
from logo.errors import UsageError
from logo.selecting import CallSettings

if TYPE_CHECKING:
    from logo.engine import LoGo
    from logo.selection import Selection

# The most prompts that are read; of more, a random sample.
READ = 2000
# A prompt becomes an example if it selects the adapter with this confidence.
SURE = 0.8
# The most examples of an adapter. Its surest prompts are its own; further ones may be those of a relative.
MOST = 8
# In the second round, the examples of the first one count, so that more prompts are sure.
_ROUNDS = 2
_TOGETHER = 64


@dataclass(frozen=True)
class Example:
    """A prompt, and the confidence of the selection from which it was learned."""

    prompt: str
    confidence: float


def learnable(pool: AdapterPool) -> list[str]:
    """The adapters that have no example prompts, or only learned ones."""
    return [adapter.name for adapter in pool if not adapter.examples or is_learned(adapter.folder)]


def _sample(prompts: Sequence[str]) -> list[str]:
    different = list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))
    if len(different) <= READ:
        return different
    chosen = sorted(Random(0).sample(range(len(different)), READ))
    return [different[i] for i in chosen]


def learn_examples(
    engine: LoGo, prompts: Sequence[str], *, sure: float = SURE, tell: Callable[[int, int], None] | None = None
) -> dict[str, list[Example]]:
    """Finds example prompts for the adapters of a pool that have none, or only learned ones.

    Files do not change (`logo.adapters.examples.write_examples` stores examples). The engine has the pool that it had.

    Args:
        engine: its signal is a calibrated one to which examples contribute, and it uses examples.
        prompts: unlabelled. Empty ones and copies are left out, and of more than `READ` a random sample is read, always
            the same. What was learned before is read again.
        sure: the least confidence of an example, in (0, 1).
        tell: called with how many prompts were read so far, and how many will be.

    Returns:
        Adapter name -> the examples found, the surest first, `MOST` at most. Adapters without any are left out, so are
        those with examples of their own.

    Raises:
        UsageError: the engine does not use examples, all adapters have examples of their own, or `sure` is out of
            range.
    """
    settings = engine.settings
    if settings.examples == "ignore" or settings.reading.scale != "whitened":
        raise UsageError("examples are learned for a signal that uses them: expected 'calibrated', with examples 'use'")
    if not 0 < sure < 1:
        raise UsageError(f"confidence {sure:g}: expected a number between 0 and 1")
    before, names = engine.pool, set(learnable(engine.fitted))
    if not names:
        raise UsageError(f"nothing to learn: each of the {len(before)} adapters has example prompts of its own")
    earlier = [prompt for adapter in engine.fitted if adapter.name in names for prompt in adapter.examples]
    read = _sample([*prompts, *earlier])
    rows = engine.prompts.read(read, room=engine.prompts.room(None))
    call = CallSettings(replace(settings, when_unsure="mix"))
    found: dict[str, list[Example]] = {}
    try:
        for number in range(_ROUNDS):
            _teach(engine, before, {name: tuple(one.prompt for one in found.get(name, ())) for name in names})
            if found and engine.scorer.signatures is None:
                raise UsageError("the signal does not use example prompts of adapters that act on the last tokens only")
            scored: list[Selection] = []
            for first in range(0, len(rows), _TOGETHER):
                scored += engine.select_ids(rows[first : first + _TOGETHER], call)
                if tell is not None:
                    tell(number * len(rows) + len(scored), _ROUNDS * len(rows))
            found = _surest(read, scored, names, sure)
            if not found:
                break
    finally:
        engine.take(engine.prepared(before))
    return found


def _teach(engine: LoGo, pool: AdapterPool, examples: Mapping[str, tuple[str, ...]]) -> None:
    """Gives the engine the adapters of a pool with these examples; others keep theirs."""
    taught = [replace(adapter, learned=examples.get(adapter.name, adapter.learned)) for adapter in pool]
    engine.take(engine.prepared(AdapterPool(taught, pool.refused, default_k=pool.default_k)))


def _surest(
    prompts: Sequence[str], selections: Sequence[Selection], names: Collection[str], sure: float
) -> dict[str, list[Example]]:
    """The surest prompts of each of these adapters, `MOST` at most."""
    found = defaultdict[str, list[Example]](list)
    for prompt, one in zip(prompts, selections, strict=True):
        best = max(one.scores, key=one.scores.__getitem__)
        if best in names and (one.confidence or 0.0) >= sure:
            found[best].append(Example(prompt, one.confidence or 0.0))
    return {name: sorted(found[name], key=lambda one: -one.confidence)[:MOST] for name in sorted(found)}
