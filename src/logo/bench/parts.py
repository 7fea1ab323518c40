"""The parts of answering a prompt, each beside the base model alone and PEFT."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from logo.adapters.pool import AdapterPool
from logo.bench.peft_arm import PeftArm
from logo.bench.probe import prefill
from logo.bench.rounds import Timed, resident, side_by_side, timed
from logo.bench.synthetic import Sizes, prompts, random_mixtures, related_mixtures
from logo.engine import LoGo
from logo.generation import greedy_config
from logo.selection.settings import SelectionSettings
from logo.selection.texts import NEUTRAL

# The cost of decoding is the difference between generations of _BEFORE tokens and of _DECODED more. The shorter one has
# more than one token, because mixtures for a single token are grouped and folded in other ways.
_BEFORE, _DECODED = 9, 32


@dataclass(frozen=True)
class MeasuredPart:
    """One measured part.

    Attributes:
        name: what was measured.
        arms: the arms by name.
        counts: prompts and tokens of one pass of an arm, for seconds per unit.
    """

    name: str
    arms: Mapping[str, Timed]
    counts: Mapping[str, int] = field(default_factory=dict)

    def ratio(self, arm: str, to: str) -> float:
        """Seconds of one arm divided by those of another."""
        return self.arms[arm].seconds / self.arms[to].seconds


@dataclass
class Bench:
    """What is measured.

    Attributes:
        logo: the engine, with its model and pool.
        open: opens the pool again, with a cache folder; "" disables the cache.
        in_memory: whether the pool has no files, so that nothing can be cached.
        k: adapters per prompt.
        prompts: (number, length in tokens) -> new prompts.
        rounds: measured rounds.
        say: called with the name of every part when it begins.
    """

    logo: LoGo
    open: Callable[[str], AdapterPool]
    k: int
    prompts: Callable[[int, int], list[str]]
    rounds: int
    say: Callable[[str], None] = lambda part: None
    in_memory: bool = False

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self.logo.model.device
        return device

    def opening(self) -> tuple[MeasuredPart, int]:
        """From a pool to an engine that can select, without and with a cache; and the memory that this takes."""
        self.say("open pool")
        model, tokenizer = self.logo.model, self.logo.tokenizer

        def opened(cache: str) -> LoGo:
            settings = SelectionSettings(signal="norm", k=self.k, cache=cache)
            logo = LoGo(model, tokenizer, self.open(cache), settings=settings)
            logo.calibrate()
            return logo

        with tempfile.TemporaryDirectory() as cache:
            opened(cache)
            arms = {"cold": lambda: opened("")}
            if not self.in_memory:
                arms["known"] = lambda: opened(cache)
            before = resident()
            kept = opened(cache)
            held = resident() - before
            del kept
            return MeasuredPart("open pool", side_by_side(arms, self.rounds, device=self.device)), held

    def selecting(self, tokens: int) -> MeasuredPart:
        """Probe, score and select, by both signals, beside a plain prefill of the same prompt."""
        self.say("select")
        logo = self.logo
        arms: dict[str, Callable[[], object]] = {}
        [prompt] = self.prompts(1, tokens)
        rows = logo.prompts.encode([prompt])
        arms["prefill"] = lambda: prefill(logo.model, rows)
        for signal in ("norm", "calibrated"):
            logo.calibrate(signal)
            # A new prompt each time: cached results of an earlier one would make the comparison unfair.
            arms[signal] = lambda signal=signal: logo.select(  # type: ignore[misc]
                self.prompts(1, tokens)[0], signal=signal
            )
        return MeasuredPart("select", side_by_side(arms, self.rounds, device=self.device), {"tokens": tokens})

    def prefix(self, shared: int, own: int) -> MeasuredPart:
        """The second prompt with a prefix beside the first, for the calibrated and the official signal."""
        self.say("shared prefix")
        logo = self.logo
        arms: dict[str, Callable[[], object]] = {}
        for signal in ("norm", "calibrated"):
            logo.calibrate(signal)
            state: dict[str, str] = {}

            def first(signal: str = signal, state: dict[str, str] = state) -> None:
                [state["prefix"], end] = self.prompts(1, shared) + self.prompts(1, own)
                logo.select(f"{state['prefix']} {end}", signal=signal)

            def second(signal: str = signal, state: dict[str, str] = state) -> None:
                logo.select(f"{state['prefix']} {self.prompts(1, own)[0]}", signal=signal)

            arms |= {f"{signal}, first": first, f"{signal}, second": second}
        return MeasuredPart(
            "shared prefix", side_by_side(arms, self.rounds, device=self.device), {"tokens": shared + own}
        )

    def decoding(self, batch: int, tokens: int, mixtures: Mapping[str, Sequence[Mapping[str, float]]]) -> MeasuredPart:
        """Seconds per decoding step of a batch: the base model, and LoGo with these mixtures (a set of rows each)."""
        self.say(f"decode, batch {batch}")
        texts = self.prompts(batch, tokens)
        arms = {
            f"{name}, {steps}": self._generating(texts, rows, steps)
            for name, rows in {"base": [{}] * batch, **mixtures}.items()
            for steps in (_BEFORE, _BEFORE + _DECODED)
        }
        found = side_by_side(arms, self.rounds, device=self.device)
        steps = {}
        for name in ("base", *mixtures):
            short, long = found[f"{name}, {_BEFORE}"], found[f"{name}, {_BEFORE + _DECODED}"]
            spent = [(b - a) / _DECODED for a, b in zip(short.rounds, long.rounds, strict=True)]
            steps[name] = Timed(statistics.median(spent), tuple(spent), long.peak_bytes)
        return MeasuredPart(f"decode, batch {batch}", steps, {"rows": batch})

    def prefilling(self, tokens: int) -> MeasuredPart:
        """One prompt and one token, with a mixture and without; the mixture's tensors are already loaded."""
        self.say("prefill")
        texts = self.prompts(1, tokens)
        mixture = random_mixtures(self.logo.names, 1, self.k)
        arms = {"base": self._generating(texts, [{}], 1), "mixture": self._generating(texts, mixture, 1)}
        return MeasuredPart("prefill", side_by_side(arms, self.rounds, device=self.device), {"tokens": tokens})

    def first_tokens(self, batch: int, tokens: int) -> MeasuredPart:
        """From the selection of a batch to its first tokens; the base arm is a plain prefill of the batch.

        The *new* arms have other mixtures in every round, the *again* arms those of the batch before.
        """
        self.say(f"first token, batch {batch}")
        texts, seeds = self.prompts(batch, tokens), itertools.count()
        arms = {"base": self._generating(texts, [{}] * batch, 1)}
        for name, made in (("random", random_mixtures), ("related", related_mixtures)):
            last: list[Callable[[], object]] = []

            def new(made: Any = made, last: list[Callable[[], object]] = last) -> object:
                last[:] = [self._generating(texts, made(self.logo.names, batch, self.k, seed=next(seeds)), 1)]
                return last[0]()

            arms |= {f"{name}, new": new, f"{name}, again": lambda last=last: last[0]()}  # type: ignore[misc]
        return MeasuredPart(
            f"first token, batch {batch}", side_by_side(arms, self.rounds, device=self.device), {"rows": batch}
        )

    def end_to_end(self, batch: int, tokens: int, new: int, peft: PeftArm | None) -> MeasuredPart:
        """From prompts to answers of this many new tokens, per batch, with new prompts each time.

        The selections of a random model are arbitrary. For related rows, the prompts are selected for as usual, and
        then answered with `related_mixtures` instead.
        """
        self.say(f"end to end, batch {batch}")
        config, logo = _config(new), self.logo
        logo.calibrate("calibrated")
        arms: dict[str, Callable[[], object]] = {
            "base": lambda: logo.generate(
                self.prompts(batch, tokens), adapters={}, generation_config=config, batch_size=batch
            ),
            "norm": lambda: logo.generate(self.prompts(batch, tokens), generation_config=config, batch_size=batch),
            "calibrated": lambda: logo.generate(
                self.prompts(batch, tokens), signal="calibrated", generation_config=config, batch_size=batch
            ),
        }
        if batch > 1:
            seeds = itertools.count()

            def related() -> object:
                texts = self.prompts(batch, tokens)
                logo.select(texts, signal="calibrated", batch_size=batch)
                mixtures = related_mixtures(logo.names, batch, self.k, seed=next(seeds))
                return logo.generate(texts, adapters=mixtures, generation_config=config, batch_size=batch)

            arms["calibrated, related"] = related
        if peft is not None:
            arms["PEFT"] = lambda: [peft.answer(prompt, config) for prompt in self.prompts(batch, tokens)]
            if batch > 1:
                arms["PEFT, one batch"] = lambda: peft.answer_batch(self.prompts(batch, tokens), config)
            else:
                arms["PEFT, all active"] = lambda: peft.answer_active(self.prompts(1, tokens)[0], config)
        return MeasuredPart(
            f"end to end, batch {batch}", side_by_side(arms, self.rounds, device=self.device), {"new": new}
        )

    def _generating(self, texts: list[str], mixtures: Sequence[Mapping[str, float]], new: int) -> Callable[[], object]:
        return lambda: answering(self.logo, texts, new, mixtures)


def answering(
    logo: LoGo, texts: list[str], new: int, mixtures: Sequence[Mapping[str, float]] | None = None
) -> list[object]:
    """Answers a batch with this many new tokens, with these mixtures or with the selected ones."""
    adapters = None if mixtures is None else list(mixtures)
    answers = logo.generate(texts, adapters=adapters, generation_config=_config(new), batch_size=len(texts))
    return [*answers]


def peft_opened(make: Callable[[], PeftArm]) -> tuple[PeftArm, Timed]:
    """PEFT with every adapter loaded, and the duration; once, since it takes a minute."""
    made: list[PeftArm] = []
    spent = timed(lambda: made.append(make()))
    return made[0], Timed(spent, (spent,), None)


def endless(sizes: Sizes, seed: int) -> Callable[[int, int], list[str]]:
    """Synthetic prompts that never repeat."""
    numbers = itertools.count(seed)
    return lambda count, tokens: prompts(sizes, count, tokens, next(numbers))


def real_prompts(logo: LoGo, seed: int) -> Callable[[int, int], list[str]]:
    """Prompts of real text for a real model: random arrangements of a few dozen short texts."""
    generator = torch.Generator().manual_seed(seed)

    def make(count: int, tokens: int) -> list[str]:
        made = []
        for _ in range(count):
            text, number = "", 0
            while number < tokens:
                text += NEUTRAL[int(torch.randint(len(NEUTRAL), (), generator=generator))] + "\n"
                number = len(logo.prompts.encode([text])[0])
            made.append(logo.tokenizer.decode(logo.prompts.encode([text])[0][:tokens], skip_special_tokens=True))
        return made

    return make


def mixtures_of(names: tuple[str, ...], batch: int, k: int) -> dict[str, list[dict[str, float]]]:
    """The mixtures of a batch that is decoded."""
    return {"related": related_mixtures(names, batch, k), "random": random_mixtures(names, batch, k)}


def _config(new: int) -> Any:
    return greedy_config(max_new_tokens=new, min_new_tokens=new)
