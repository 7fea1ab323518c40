"""`learn_examples`: example prompts for adapters that have none, from logged prompts.

    prompts -> selections -> the surest prompts of each adapter -> selections with these as examples -> ... -> examples

An adapter's own prompts resemble each other (`logo.selection.signature`), while the responses of adapters to single
prompts vary. So the prompts that select an adapter with high confidence show what its other prompts look like. This is
self-training (Yarowsky, ACL 1995): it uses no label, so it does not correct a selection that is sure and wrong.

No prompt is compared with itself: in the second round, each half of the prompts is compared with the examples that the
other half gave.

Prompts whose requests named an adapter are labels: they become its examples as they are, and examples of no other one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from logo.adapters.examples import is_learned, named_examples, read_examples
from logo.adapters.files import EXAMPLES
from logo.adapters.pool import AdapterPool
from logo.errors import DataError, UsageError
from logo.selecting import CallSettings

if TYPE_CHECKING:
    from logo.engine import LoGo
    from logo.prompts import Prompt
    from logo.selection import Selection
    from logo.selection.settings import SelectionSettings

# The most prompts that are read, so that a month of logs takes as long as a day; of more, a random sample.
READ = 2000
# A prompt becomes an example if it selects the adapter with this confidence.
SURE = 0.8
# The most examples of an adapter. Its surest prompts are its own; further ones may be those of a relative.
MOST = 8
# The least. One or two sure prompts of a whole day may be accidents, and one or two named adapters may be trials.
LEAST = 3
# Prompts between two reports of progress.
_TOGETHER = 64


@dataclass(frozen=True)
class Example:
    """A prompt, and the confidence of the selection from which it was learned; 1 if its request named the adapter."""

    prompt: str
    confidence: float
    named: bool = False


@dataclass(frozen=True)
class Learned:
    """The example prompts that were found, and how many prompts were read for that.

    Attributes:
        examples: adapter name -> its examples, the surest first: none, or `LEAST` to `MOST`; for each adapter that may
            learn.
        read: how many prompts were read, without those that had been learned before and those that are labels.
        left_out: how many more do not fit into the base model's context.
        named: how many new prompts were used as labels, including those that were not stored because `MOST` were.
        unknown: name -> how many prompts name it, of names that no adapter of the pool has.
    """

    examples: Mapping[str, tuple[Example, ...]]
    read: int
    left_out: int
    named: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)


def check_learning(settings: SelectionSettings, sure: float) -> None:
    """Checks that selections with these settings use examples, and that `sure` is a confidence.

    Raises:
        UsageError: they do not, or it is none.
    """
    if settings.reading.scale != "whitened":
        raise UsageError(
            f"signal {settings.signal!r}: expected 'calibrated', since examples are learned from its selections, and "
            "then count in its scores"
        )
    if settings.examples == "ignore":
        raise UsageError(
            "examples 'ignore': expected 'use', since the second round compares prompts with what the first one learned"
        )
    if not 0 < sure < 1:
        raise UsageError(f"confidence {sure:g}: expected a number between 0 and 1, such as {SURE}")


def learnable(pool: AdapterPool) -> list[str]:
    """The adapters that may learn: those that have no example prompts, or only learned ones.

    Raises:
        DataError: a file of examples cannot be read, so that it is not known whose they are.
        UsageError: no adapter may learn, the pool has only one, or two are in one folder.
    """
    places: dict[Path, str] = {}
    for adapter in pool:
        if (folder := adapter.folder.resolve()) in places:
            raise UsageError(
                f"adapters {places[folder]!r} and {adapter.name!r} are in one folder; leave out one of them"
            )
        places[folder] = adapter.name
        try:
            with suppress(FileNotFoundError):
                read_examples(adapter.folder / EXAMPLES)
        except DataError as error:
            raise DataError(f"{error}; repair the file or remove it") from error
    names = [adapter.name for adapter in pool if not adapter.examples or is_learned(adapter.folder)]
    if not names:
        raise UsageError(f"nothing to learn: each of the {len(pool)} adapters has example prompts of its own")
    if len(pool) == 1:
        raise UsageError(
            f"adapter {names[0]!r} is alone in its pool, so no selection is sure: give it examples yourself "
            "(logo pool examples)"
        )
    return names


def learn_examples(
    engine: LoGo,
    prompts: Sequence[str],
    named: Mapping[str, Sequence[str]] | None = None,
    *,
    ignore_names: bool = False,
    sure: float = SURE,
    tell: Callable[[int, int], None] | None = None,
) -> Learned:
    """Finds example prompts for the adapters of a pool that have none, or only learned ones.

    Nothing is written (`logo.adapters.examples.write_examples` does that), and the engine does not change.

    Args:
        engine: with a calibrated signal that uses examples. It need not be calibrated yet.
        prompts: without labels. Empty ones, copies and those that do not fit into the base model's context are left
            out, and of more than `READ`, a random sample is read, always the same. What was learned before is read
            again.
        named: adapter name -> prompts whose requests named this adapter alone. If it may learn, and they are `LEAST` or
            more, or it has examples of this kind from earlier runs, up to `MOST` of both become its examples. Which
            ones depends on the prompts only. Otherwise they are read like prompts without labels, and so are prompts
            under several names or unknown ones.
        ignore_names: read all prompts, also those of earlier runs, as if they named no adapter.
        sure: the least confidence of an example, in (0, 1).
        tell: called with how many prompts were read so far, and how many will be.

    Raises:
        UsageError, DataError: as `check_learning` and `learnable`; or the adapters act on the last tokens only, and are
            read at every token, where examples do not count.
    """
    check_learning(engine.settings, sure)
    names = learnable(engine.fitted)
    if ignore_names:
        prompts, labels = [*prompts, *chain.from_iterable((named or {}).values())], _Labels()
    else:
        labels = _Labels.of(engine, names, named or {})
    student = _Student(engine, [name for name in names if name not in labels.examples], labels.examples)
    open_prompts = [prompt for prompt in (*prompts, *labels.others) if _key(prompt) not in labels.claimed]
    new, left_out = _fitting(engine, _sample(open_prompts) if student.names else [])
    learned = [text for name in student.names for text in engine.fitted[name].examples]
    known = {*labels.claimed, *map(_key, new)}
    again = [text for text in _different(learned) if _key(text) not in known]
    rows = list({**new, **_fitting(engine, again)[0]}.items())
    # By their digests, so that what was learned is in the same half as before, whatever is read beside it.
    halves = [[row for row in rows if _digest(row[0])[0] % 2 == half] for half in (0, 1)]
    done = 0

    def surest(half: Sequence[tuple[str, Prompt]]) -> dict[str, tuple[Example, ...]]:
        nonlocal done
        selections: list[Selection] = []
        for first in range(0, len(half), _TOGETHER):
            part = [row for _, row in half[first : first + _TOGETHER]]
            selections += student.select(part)
            done += len(part)
            if tell is not None:
                tell(done, 2 * len(rows))
        return _surest([prompt for prompt, _ in half], selections, student.names, sure)

    first_round = [surest(half) for half in halves]
    found = dict.fromkeys(student.names, tuple[Example, ...]())
    for half, taught in zip(halves, reversed(first_round), strict=True):
        student.learn(taught)
        found = {name: (*found[name], *examples) for name, examples in surest(half).items()}
    enough = {name: _best(examples) if len(examples) >= LEAST else () for name, examples in found.items()}
    enough |= {name: tuple(Example(text, 1.0, True) for text in texts) for name, texts in labels.examples.items()}
    examples = {name: enough[name] for name in names if name in enough}
    return Learned(examples, len(new), left_out + labels.left_out, labels.count, labels.unknown)


@dataclass(frozen=True)
class _Labels:
    """Prompts whose requests named adapters; see `learn_examples`.

    Attributes:
        examples: adapter name -> the prompts that become its examples.
        claimed: the `_key` of each prompt that is known to belong to one adapter, so that no other one learns from it.
        others: the prompts whose names do not count; they are read like prompts without a name.
        count, unknown: `named` and `unknown` of `Learned`.
        left_out: how many do not fit into the base model's context.
    """

    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    claimed: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()
    count: int = 0
    left_out: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: LoGo, names: Collection[str], named: Mapping[str, Sequence[str]]) -> _Labels:
        """Those of this run and of earlier ones.

        Args:
            names: the adapters that may learn.
        """
        asked = {name: _different(prompts) for name, prompts in named.items()}
        before = {name: named_examples(engine.fitted[name].folder) for name in names}
        both = {name: _different([*before.get(name, ()), *asked.get(name, ())]) for name in {*before, *asked}}
        whose = Counter(_key(prompt) for prompts in both.values() for prompt in prompts)
        alone = {name: [p for p in prompts if whose[_key(p)] == 1] for name, prompts in both.items()}
        examples, left_out = dict[str, tuple[str, ...]](), 0
        for name in names:
            fitting, too_long = _first_fitting(engine, sorted(alone[name], key=lambda prompt: _digest(_key(prompt))))
            left_out += too_long
            if fitting and (before[name] or len(fitting) >= LEAST):
                examples[name] = tuple(fitting)
        known = {*examples, *(name for name in engine.fitted.names if name not in names)}
        claimed = frozenset(_key(prompt) for name in known for prompt in alone.get(name, ()))
        others = tuple(p for prompts in asked.values() for p in prompts if _key(p) not in claimed)
        used = sum(whose[_key(p)] == 1 for name in examples for p in asked.get(name, ()))
        unknown = {name: len(prompts) for name, prompts in asked.items() if name not in engine.fitted and prompts}
        return cls(examples, claimed, others, used, left_out, unknown)


class _Student:
    """An engine beside another one, on the same pool, in which some adapters have no examples but those it learns.

    Args:
        engine: stays as it is.
        names: adapters that may learn.
        labelled: adapter name -> example prompts that stay, of others.

    Attributes:
        names: those of them that are scored.
    """

    def __init__(self, engine: LoGo, names: Collection[str], labelled: Mapping[str, tuple[str, ...]]) -> None:
        from logo.engine import LoGo

        # Nothing is mixed here, so that adapters which can only answer alone are no reason for a warning.
        self._settings = replace(engine.settings, k=1, when_unsure="mix")
        self._pool, given = engine.pool, (engine.model, engine.tokenizer)
        self.names, self._labelled = list(names), dict(labelled)
        self._engine = LoGo(*given, self._with({}), settings=self._settings, on_bad_adapter="skip")
        self.names = [name for name in names if name in self._engine.scorer.names]

    def _with(self, examples: Mapping[str, Sequence[Example]]) -> AdapterPool:
        """The pool in which the adapters that may learn have these examples and no others."""
        texts = self._labelled | {name: tuple(one.prompt for one in examples.get(name, ())) for name in self.names}
        adapters = [replace(one, given_examples=texts.get(one.name, one.given_examples)) for one in self._pool]
        return AdapterPool(adapters, self._pool.refused, default_k=self._pool.default_k)

    def learn(self, examples: Mapping[str, Sequence[Example]]) -> None:
        """Replaces what was learned before.

        Raises:
            UsageError: examples do not count in the scores.
        """
        self._engine.take(self._engine.prepared(self._with(examples)))

    def select(self, rows: Sequence[Prompt]) -> list[Selection]:
        """The selections of prompts that were read."""
        return self._engine.select_ids(rows, CallSettings(self._settings))


def _different(prompts: Iterable[str]) -> list[str]:
    """The prompts in their order, without empty ones, and without those that differ from an earlier one in case or
    blanks only."""
    found: dict[str, str] = {}
    for prompt in prompts:
        found.setdefault(_key(prompt), prompt)
    return [prompt for key, prompt in found.items() if key]


def _key(prompt: str) -> str:
    """The prompt in lower case with single blanks; two prompts with the same key count as one."""
    return " ".join(prompt.split()).casefold()


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def _sample(prompts: Sequence[str]) -> list[str]:
    different = _different(prompts)
    return different if len(different) <= READ else Random(0).sample(different, READ)


def _fitting(engine: LoGo, prompts: Sequence[str]) -> tuple[dict[str, Prompt], int]:
    """The prompts that fit into the base model's context, as they are read; and how many more do not."""
    rows = dict(zip(prompts, engine.prompts.read(prompts, room=None), strict=True))
    room = engine.prompts.context
    fitting = {prompt: row for prompt, row in rows.items() if room is None or len(row) < room}
    return fitting, len(rows) - len(fitting)


def _first_fitting(engine: LoGo, prompts: Sequence[str]) -> tuple[list[str], int]:
    """The first `MOST` prompts that fit into the base model's context; and how many before them do not."""
    found: list[str] = []
    too_long = 0
    for prompt in prompts:
        if len(found) == MOST:
            break
        found += (fitting := _fitting(engine, [prompt])[0])
        too_long += not fitting
    return found, too_long


def _surest(
    prompts: Sequence[str], selections: Sequence[Selection], names: Collection[str], sure: float
) -> dict[str, tuple[Example, ...]]:
    """The surest prompts of each of these adapters, `MOST` at most."""
    found = defaultdict[str, list[Example]](list)
    for prompt, one in zip(prompts, selections, strict=True):
        best = max(one.scores, key=one.scores.__getitem__)
        if one.confidence is not None and one.confidence >= sure:
            found[best].append(Example(prompt, one.confidence))
    return {name: _best(found[name]) for name in names}


def _best(examples: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(sorted(examples, key=lambda one: -one.confidence)[:MOST])
