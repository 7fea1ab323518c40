"""`Traffic`: what the logs of a server say about a pool: which adapters win, never win, always tie, or have changed.

    lines of logs (logo serve --log-json) -> Reading (one pass, a sample of prompts) -> Traffic

It reads the lines that `logo.serving.logged` writes.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logo.errors import DataError, StorageError

# The two best adapters tie if the second has at least this share of the first one's score.
NEARLY = 0.95
# A pair always ties if it does in more than this share of the prompts that either wins, and in at least so many.
MOST, OFTEN = 0.5, 5
# Wins have changed between the halves if their shares differ by so many standard errors.
CLEAR = 3.0
# The most prompts in the uniform sample of prompts that no adapter serves.
KEPT = 1000
# The most characters that are kept of a prompt.
_LONGEST = 2000
_NOBODY = -1

Places = NDArray[Any]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Adapter:
    """The traffic of one adapter.

    Attributes:
        wins: the number of prompts in which it was the first.
        halves: the share of the first and of the second half of all prompts that it won.
        moved: whether these shares differ by more than chance.
        parts: the number of prompts in whose mixture it was.
        weight: its mean weight in those.
        confidence: the mean over the prompts that it won; None without such prompts, or without confidences.
    """

    name: str
    wins: int
    halves: tuple[float, float]
    moved: bool
    parts: int
    weight: float
    confidence: float | None


@dataclass(frozen=True)
class Tie:
    """Two adapters that lead together, with nearly equal scores, in `tied` of the `won` prompts that either won."""

    adapters: tuple[str, str]
    tied: int
    won: int


@dataclass(frozen=True)
class Traffic:
    """The content of logs.

    Attributes:
        prompts: the number of prompts with a selection.
        forced: the number of prompts whose requests named adapters.
        known: the number of prompts with a confidence.
        unsure: of these, the number for which no adapter seems to be made.
        unsure_halves: their share of the known prompts in either half.
        unsure_moved: whether these shares differ by more than chance.
        confidence: the number of known prompts with a confidence in each tenth.
        hours: from the first prompt to the last.
        adapters: by wins: all of the pool, and those that won before they were removed.
        pool_known: whether the logs name the pool; if not, `adapters` are those of the selections.
        ties: by number of prompts.
        unserved: a sample of the unsure prompts in the logs, in their order.
        logged: the number of unsure prompts in the logs.
        bad: the number of lines that are no JSON objects or not this server's.
        first_bad: the first of them, as `FILE:LINE`.
    """

    prompts: int
    forced: int
    known: int
    unsure: int
    unsure_halves: tuple[float, float]
    unsure_moved: bool
    confidence: tuple[int, ...]
    hours: float
    adapters: tuple[Adapter, ...]
    pool_known: bool
    ties: tuple[Tie, ...]
    unserved: tuple[str, ...]
    logged: int
    bad: int
    first_bad: str | None


def read_traffic(files: Sequence[Path]) -> Traffic:
    """Reads the logs in these files, in any order.

    Raises:
        StorageError: a file cannot be read.
        DataError: a file is empty or no log of this server, or no adapter was selected in any.
    """
    reading = Reading()
    expected = "expected the log of a server (logo serve --log-json 2> FILE)"
    for file in files:
        before, lines = reading.ours, 0
        reading.begin_file()
        try:
            with file.open(encoding="utf-8", errors="replace") as text:
                for lines, line in enumerate(text, start=1):
                    reading.take(line, f"{file}:{lines}")
        except OSError as error:
            raise StorageError(f"{file}: {expected}, found a file that cannot be read: {error.strerror}") from error
        if reading.ours == before:
            found = "an empty file" if not lines else f"none of its JSON objects (lines: {lines})"
            raise DataError(f"{file}: {expected}, found {found}")
    if not reading.entries:
        names = ", ".join(map(str, files))
        raise DataError(f"{names}: no adapter was selected or named for any prompt yet; send the server some requests")
    return reading.traffic()


@dataclass(frozen=True)
class _Entry:
    """One selection of a line; see `logo.serving.logged.entry`.

    Attributes:
        best: the names and scores of the two best adapters, fewer if fewer were scored; none if adapters were forced.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    best: tuple[tuple[str, float], ...]
    confidence: float
    unsure: bool
    prompt: str | None

    @classmethod
    def of(cls, value: Any) -> _Entry:
        """Parses a JSON value.

        Raises:
            ValueError, TypeError, KeyError: it is no entry.
        """
        adapters, weights, confidence = value["adapters"], value["weights"], value.get("confidence")
        prompt = value.get("prompt")
        if not all(isinstance(name, str) for name in adapters) or not isinstance(value["scores"], dict):
            raise ValueError("names and scores")
        numbers = [float(weight) for weight in weights]
        sure = math.nan if confidence is None else float(confidence)
        if len(numbers) != len(adapters) or not all(map(math.isfinite, numbers)) or sure < 0 or sure > 1:
            raise ValueError("weights and confidence")
        scores = [(_whole(name), float(score)) for name, score in value["scores"].items()]
        if not all(math.isfinite(score) for _, score in scores):
            raise ValueError("scores")
        text = _whole(prompt[:_LONGEST]) if isinstance(prompt, str) else None
        names = tuple(map(_whole, adapters))
        unsure = value.get("unsure") is True and confidence is not None
        return cls(names, tuple(numbers), tuple(nlargest(2, scores, key=itemgetter(1))), sure, unsure, text)


def _whole(text: str) -> str:
    """The text without halves of surrogate pairs, which cannot be printed."""
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass
class _File:
    """The pool in one file of a log.

    Attributes:
        began, ended: the times of its first and last line.
        listed: the time of the last list of the pool.
        pool: that list; None if there is none.
    """

    began: float = math.inf
    ended: float = -math.inf
    listed: float = -math.inf
    pool: frozenset[str] | None = None

    def take(self, time: float, pool: frozenset[str] | None) -> None:
        """Adds a line."""
        self.began, self.ended = min(self.began, time), max(self.ended, time)
        if pool is not None and time >= self.listed:
            self.listed, self.pool = time, pool


def _last_pool(files: Sequence[_File]) -> frozenset[str] | None:
    """The adapters in the pools of the servers at the end; None if no file lists any.

    A file that ended before another one began was that server's before it was rotated; files of other times overlap.
    """
    listing = [file for file in files if file.pool is not None]
    last = [file.pool for file in listing if file.pool and not any(other.began > file.ended for other in listing)]
    return frozenset[str]().union(*last) if listing else None


@dataclass
class Reading:
    """Reads lines once. Of each prompt the winner, the confidence and the time are kept, in 21 bytes.

    Attributes:
        entries: the number of selections so far.
        ours: the number of lines of this server.
    """

    entries: int = 0
    ours: int = 0
    _forced: int = 0
    _bad: int = 0
    _first_bad: str | None = None
    _files: list[_File] = field(default_factory=lambda: [_File()])
    _numbers: dict[str, int] = field(default_factory=dict)
    _winners: array[int] = field(default_factory=lambda: array("i"))
    _sure: array[float] = field(default_factory=lambda: array("d"))
    _times: array[float] = field(default_factory=lambda: array("d"))
    _unsure: array[int] = field(default_factory=lambda: array("b"))
    _parts: Counter[str] = field(default_factory=Counter)
    _weights: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _tied: Counter[tuple[str, str]] = field(default_factory=Counter)
    _unserved: list[tuple[int, str]] = field(default_factory=list)
    _logged: int = 0
    _random: Random = field(default_factory=lambda: Random(0))

    def begin_file(self) -> None:
        """The next lines are those of another file."""
        self._files.append(_File())

    def take(self, line: str, place: str) -> None:
        """Reads a line; malformed ones are counted."""
        if not line.strip():
            return
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError("no object")
            ours = str(found.get("logger")).split(".")[0] == "logo"
            self.ours += ours
            listed, selections = found.get("pool") if ours else None, found.get("selections")
            if listed is None and selections is None:
                return  # another route, or no request
            time = datetime.fromisoformat(found["time"]).timestamp()
            pool = None if listed is None else frozenset(_whole(str(name)) for name in listed)
            entries = [_Entry.of(one) for one in selections or ()]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError):
            self._bad += 1
            self._first_bad = self._first_bad or place
            return
        self._files[-1].take(time, pool)
        for entry in entries:
            self._add(entry, time)

    def _add(self, entry: _Entry, time: float) -> None:
        self.entries += 1
        if not entry.best:
            self._forced += 1
            return
        winner = _NOBODY
        if entry.adapters:
            winner = self._numbers.setdefault(entry.adapters[0], len(self._numbers))
        self._winners.append(winner)
        self._sure.append(entry.confidence)
        self._times.append(time)
        self._unsure.append(entry.unsure)
        for name, weight in zip(entry.adapters, entry.weights, strict=True):
            self._parts[name] += 1
            self._weights[name] += weight
        if entry.adapters and len(entry.best) > 1:
            (one, first), (other, second) = entry.best
            if second >= NEARLY * first > 0:
                self._tied[one, other] += 1
        if entry.unsure and entry.prompt is not None:
            self._keep(entry.prompt)

    def _keep(self, prompt: str) -> None:
        """Adds a prompt to the sample (Vitter's algorithm R)."""
        self._logged += 1
        if len(self._unserved) < KEPT:
            self._unserved.append((self._logged, prompt))
        elif (place := self._random.randrange(self._logged)) < KEPT:
            self._unserved[place] = (self._logged, prompt)

    def traffic(self) -> Traffic:
        """The traffic of the lines so far."""
        times, sure, unsure = np.array(self._times), np.array(self._sure), np.array(self._unsure, dtype=bool)
        order, prompts = np.argsort(times, kind="stable"), len(times)
        halves = order[: prompts // 2], order[prompts // 2 :]
        known = np.isfinite(sure)
        winners = np.array(self._winners)
        sorted_by_winner = np.argsort(winners, kind="stable")
        edges = np.searchsorted(winners[sorted_by_winner], np.arange(len(self._numbers) + 1))
        won = {name: sorted_by_winner[edges[n] : edges[n + 1]] for name, n in self._numbers.items()}
        pool = _last_pool(self._files)
        names = {*won, *(self._parts if pool is None else pool)}
        late = np.zeros(prompts, dtype=bool)
        late[halves[1]] = True
        adapters = [self._adapter(name, won.get(name, np.arange(0)), sure, late) for name in names]
        of = tuple(int(known[half].sum()) for half in halves)
        doubts = tuple(int(unsure[half].sum()) for half in halves)
        return Traffic(
            prompts=prompts,
            forced=self._forced,
            known=int(known.sum()),
            unsure=int(unsure.sum()),
            unsure_halves=(doubts[0] / max(1, of[0]), doubts[1] / max(1, of[1])),
            unsure_moved=_differ((doubts[0], doubts[1]), (of[0], of[1])),
            confidence=tuple(np.histogram(sure[known], bins=10, range=(0.0, 1.0))[0].tolist()),
            hours=float(np.ptp(times)) / 3600 if prompts else 0.0,
            adapters=tuple(sorted(adapters, key=lambda one: (-one.wins, -one.parts, one.name))),
            pool_known=pool is not None,
            ties=tuple(self._ties({name: len(places) for name, places in won.items()})),
            unserved=tuple(prompt for _, prompt in sorted(self._unserved)),
            logged=self._logged,
            bad=self._bad,
            first_bad=self._first_bad,
        )

    def _adapter(self, name: str, won: Places, sure: Numbers, late: Places) -> Adapter:
        """The traffic of an adapter, from its wins, all confidences, and which prompts are in the second half."""
        second = int(late.sum())
        wins = (len(won) - int(late[won].sum()), int(late[won].sum()))
        found = sure[won][np.isfinite(sure[won])]
        parts = self._parts[name]
        return Adapter(
            name=name,
            wins=len(won),
            halves=(wins[0] / max(1, len(late) - second), wins[1] / max(1, second)),
            moved=_differ(wins, (len(late) - second, second)),
            parts=parts,
            weight=self._weights[name] / parts if parts else 0.0,
            confidence=float(found.mean()) if len(found) else None,
        )

    def _ties(self, wins: Mapping[str, int]) -> Iterator[Tie]:
        pairs: Counter[tuple[str, str]] = Counter()
        for (one, other), count in self._tied.items():
            pairs[(one, other) if one < other else (other, one)] += count
        for (one, other), tied in sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0])):
            won = wins.get(one, 0) + wins.get(other, 0)
            if tied >= OFTEN and tied > MOST * won:
                yield Tie((one, other), tied, won)


def _differ(counts: tuple[int, int], of: tuple[int, int]) -> bool:
    """Whether two shares differ by more than chance."""
    if not min(of):
        return False
    share = sum(counts) / sum(of)
    error = math.sqrt(share * (1 - share) * (1 / of[0] + 1 / of[1]))
    return abs(counts[0] / of[0] - counts[1] / of[1]) > CLEAR * error > 0
