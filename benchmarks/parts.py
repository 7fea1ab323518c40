"""The parts of answering a prompt, each beside the base model alone and PEFT."""

from __future__ import annotations

import inspect
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache, GenerationConfig

from logo import AdapterPool, LoGo, SelectionSettings
from peft_arm import PeftArm
from rounds import Timed, side_by_side, timed
from synthetic import Sizes, prompts, random_mixtures, related_mixtures

# The cost of decoding is the difference between generations of _BEFORE tokens and of _DECODED more. The shorter one has
# more than one token, because mixtures for a single token may be computed in other ways.
_BEFORE, _DECODED = 2, 16
# Reading once: the adapters act on the last tokens of the prompt, which open the answer, as in many public pools.
ACTIVATION = "last:4"

# Tokens of the long prompts.
LONG = (1000, 4000)

Mixtures = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Lengths:
    """How many tokens and rows are measured.

    Attributes:
        prompt: tokens of a prompt that is selected for or prefilled.
        asked, new: tokens of a prompt that is answered, and of its answer.
        known, rest: tokens of the cached beginning, and of the user's own part, for *read once*.
        batch: rows of a batch.
    """

    prompt: int = 256
    asked: int = 64
    new: int = 32
    known: int = 500
    rest: int = 50
    batch: int = 16


@dataclass(frozen=True)
class MeasuredPart:
    """One measured part.

    Attributes:
        counts: prompts and tokens of one pass of an arm, for seconds per unit.
    """

    name: str
    arms: Mapping[str, Timed]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        logo: the engine, with its model and pool; its signal is `norm`.
        folder: the pool's folder.
        sizes: of the model and the adapters.
        k: adapters per prompt.
        lengths: of prompts, answers and batches.
        rounds: measured rounds.
        seeds: of prompts, so that none is measured twice.
    """

    logo: LoGo
    folder: Path
    sizes: Sizes
    k: int
    lengths: Lengths
    rounds: int
    seeds: itertools.count[int]

    def prompts(self, count: int, tokens: int) -> list[str]:
        """New prompts."""
        return prompts(self.sizes, count, tokens, next(self.seeds))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts."""
        return [list(prompt.ids) for prompt in self.logo.prompts.read(texts)]

    def opening(self) -> MeasuredPart:
        """From a folder to an engine that can select, with an empty cache and with one that knows the pool."""

        def opened(cache: str) -> None:
            with patch.dict(os.environ, {"LOGO_CACHE": cache}):
                pool = AdapterPool.open(self.folder)
                settings = SelectionSettings(signal="norm", k=self.k)
                LoGo(self.logo.model, self.logo.tokenizer, pool, settings=settings).calibrate()

        def cold() -> None:
            with tempfile.TemporaryDirectory() as cache:
                opened(cache)

        with tempfile.TemporaryDirectory() as cache:
            time.sleep(2)  # digests of files that were just written are not kept, since they may still change
            opened(cache)
            return self._part("open pool", {"cold": cold, "known": lambda: opened(cache)})

    def selecting(self) -> MeasuredPart:
        """Probe, score and select, by both signals, beside a plain prefill of a prompt as long."""
        logo = self.logo
        tokens = self.lengths.prompt
        rows = self.ids(self.prompts(1, tokens))
        arms: dict[str, Callable[[], object]] = {"prefill": lambda: prefill(logo.model, rows[0])}
        for signal in ("norm", "calibrated"):
            logo.calibrate(signal)
            # A new prompt each time: cached results of an earlier one would make the comparison unfair.
            arms[signal] = lambda signal=signal: logo.select(  # type: ignore[misc]
                self.prompts(1, tokens)[0], signal=signal
            )
        return self._part("select", arms, tokens=tokens)

    def long(self, tokens: int) -> MeasuredPart:
        """A long prompt: selecting beside a plain prefill, and answering beside the base model alone."""
        logo = self.logo
        new = self.lengths.new
        logo.calibrate("calibrated")

        def row() -> list[int]:
            return self.ids(self.prompts(1, tokens))[0][:tokens]

        return self._part(
            long_name(tokens),
            {
                "prefill": lambda: prefill(logo.model, row()),
                "select": lambda: logo.select([row()], signal="calibrated", max_new_tokens=new),
                "base": lambda: answering(logo, [row()], new, [{}]),
                "answered": lambda: answering(logo, [row()], new, signal="calibrated"),
            },
            tokens=tokens,
        )

    def prefilling(self) -> MeasuredPart:
        """One prompt and one token, with a mixture and without; the mixture's tensors are already loaded."""
        texts = self.prompts(1, self.lengths.prompt)
        mixture = random_mixtures(self.logo.names, 1, self.k)
        arms = {"base": self._generating(texts, [{}], 1), "mixture": self._generating(texts, mixture, 1)}
        return self._part("prefill", arms, tokens=self.lengths.prompt)

    def decoding(self, batch: int, *, related: bool = True, name: str | None = None) -> MeasuredPart:
        """Seconds per decoding step of a batch: the base model, and LoGo with mixtures that rows share or do not."""
        mixtures: dict[str, Mixtures] = {"base": [{}] * batch}
        if batch == 1:
            mixtures["mixture"] = random_mixtures(self.logo.names, 1, self.k)
        else:
            if related:
                mixtures["related"] = related_mixtures(self.logo.names, batch, self.k)
            mixtures["random"] = random_mixtures(self.logo.names, batch, self.k)
        # Short prompts, since only the steps behind them are measured.
        texts = self.prompts(batch, _DECODED)
        arms = {
            f"{name}, {steps}": self._generating(texts, rows, steps)
            for name, rows in mixtures.items()
            for steps in (_BEFORE, _BEFORE + _DECODED)
        }
        generations = side_by_side(arms, self.rounds, self.logo.model.device)
        steps = {}
        for arm in mixtures:
            short = generations[f"{arm}, {_BEFORE}"]
            long = generations[f"{arm}, {_BEFORE + _DECODED}"]
            per_step = [(after - before) / _DECODED for before, after in zip(short.rounds, long.rounds, strict=True)]
            steps[arm] = Timed(statistics.median(per_step), tuple(per_step), long.peak_bytes)
        return MeasuredPart(name or f"decode, batch {batch}", steps, {"rows": batch})

    def reading_once(self) -> LoGo:
        """A calibrated engine on the same model and pool whose adapters act on the last tokens only."""
        settings = replace(self.logo.settings, signal="calibrated", activation=ACTIVATION)
        once = LoGo(self.logo.model, self.logo.tokenizer, self.logo.pool, settings=settings)
        once.calibrate()
        return once

    def once_prefill(self, once: LoGo) -> MeasuredPart:
        """From a prompt to its first token: by the base model alone, with selection and mixture, and both for a prompt
        whose beginning is cached. Every arm gets new prompts, but for that beginning.
        """
        plain = self.logo
        model = plain.model
        tokens = self.lengths.prompt
        prefix_tokens = self.lengths.known
        new_tokens = self.lengths.rest
        long = prefix_tokens + new_tokens
        [prefix] = self.prompts(1, prefix_tokens)
        cache = DynamicCache()
        cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        prefill(model, self.ids([prefix])[0][:prefix_tokens], **{cache_name: cache})

        def cached_prefill() -> None:
            new = self.ids(self.prompts(1, new_tokens))[0][:new_tokens]
            prefill(model, new, **{cache_name: cache})
            cache.crop(-len(new))

        arms: dict[str, Callable[[], object]] = {
            "prefill": lambda: answering(plain, self.prompts(1, tokens), 1, [{}]),
            "once": lambda: answering(once, self.prompts(1, tokens), 1),
            "long prefill": lambda: answering(plain, self.prompts(1, long), 1, [{}]),
            "long, once": lambda: answering(once, self.prompts(1, long), 1),
            "cached, once": lambda: answering(once, [f"{prefix} {self.prompts(1, new_tokens)[0]}"], 1),
            "cached prefill": cached_prefill,
        }
        return self._part("read once", arms, tokens=tokens, prefix=prefix_tokens)

    def once_end_to_end(self, once: LoGo, batch: int) -> MeasuredPart:
        """From prompts to answers, as `end_to_end`, by the engine that reads prompts once."""
        tokens = self.lengths.asked
        new = self.lengths.new
        arms: dict[str, Callable[[], object]] = {
            "base": lambda: answering(self.logo, self.prompts(batch, tokens), new, [{}] * batch),
            "once": lambda: answering(once, self.prompts(batch, tokens), new),
        }
        if batch > 1:
            arms["once, related"] = self._related(once)
        return self._part(f"read once, batch {batch}", arms, new=new)

    def end_to_end(self, batch: int, peft: PeftArm | None) -> MeasuredPart:
        """From prompts to answers, per batch, with new prompts each time."""
        logo = self.logo
        tokens = self.lengths.asked
        new = self.lengths.new
        logo.calibrate("calibrated")
        arms: dict[str, Callable[[], object]] = {
            "base": lambda: answering(logo, self.prompts(batch, tokens), new, [{}] * batch),
            "norm": lambda: answering(logo, self.prompts(batch, tokens), new),
            "calibrated": lambda: answering(logo, self.prompts(batch, tokens), new, signal="calibrated"),
        }
        if batch > 1:
            arms["calibrated, related"] = self._related(logo)
        part = f"end to end, batch {batch}"
        theirs = {} if peft is None else self._by_peft(peft, batch)
        if batch == 1:
            return self._part(part, {**arms, **theirs}, new=new)
        # PEFT answers a batch once, since that takes as long as everything else. Single prompts have warmed it up.
        ours = self._part(part, arms, new=new)
        spent = {name: timed(run, logo.model.device) for name, run in theirs.items()}
        once = {name: Timed(seconds, (seconds,), None) for name, seconds in spent.items()}
        return replace(ours, arms={**ours.arms, **once})

    def _by_peft(self, peft: PeftArm, batch: int) -> dict[str, Callable[[], object]]:
        """The arms in which PEFT answers the prompts of `end_to_end`."""
        tokens = self.lengths.asked
        config = exactly(self.lengths.new)
        one_by_one = {"PEFT": lambda: [peft.answer(prompt, config) for prompt in self.prompts(batch, tokens)]}
        if batch > 1:
            return {**one_by_one, "PEFT, one batch": lambda: peft.answer_batch(self.prompts(batch, tokens), config)}
        return {**one_by_one, "PEFT, all active": lambda: peft.answer_active(self.prompts(1, tokens)[0], config)}

    def _part(self, name: str, arms: Mapping[str, Callable[[], object]], **counts: int) -> MeasuredPart:
        return MeasuredPart(name, side_by_side(arms, self.rounds, self.logo.model.device), counts)

    def _generating(self, texts: list[str], mixtures: Mixtures, new: int) -> Callable[[], object]:
        return lambda: answering(self.logo, texts, new, mixtures)

    def _related(self, logo: LoGo) -> Callable[[], object]:
        """Selects for a batch, but answers with `related_mixtures`: a random model's selections are arbitrary."""
        batch = self.lengths.batch
        seeds = itertools.count()

        def related() -> object:
            texts = self.prompts(batch, self.lengths.asked)
            logo.select(texts, signal="calibrated", batch_size=batch)
            return answering(
                logo, texts, self.lengths.new, related_mixtures(logo.names, batch, self.k, seed=next(seeds))
            )

        return related


def answering(
    logo: LoGo, texts: Sequence[Any], new: int, mixtures: Mixtures | None = None, *, signal: str | None = None
) -> object:
    """Answers a batch with this many new tokens, with these mixtures or with the selected ones."""
    adapters: Any = None if mixtures is None else list(mixtures)
    options: Any = {"signal": signal, "generation_config": exactly(new), "batch_size": len(texts)}
    return logo.generate(list(texts), adapters=adapters, **options)


def exactly(new: int) -> GenerationConfig:
    """Greedy decoding of this many tokens."""
    return GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new)


def long_name(tokens: int) -> str:
    """The name of the part with prompts of so many tokens."""
    return f"{tokens:,} tokens"


@torch.no_grad()
def prefill(model: Any, row: Sequence[int], **options: Any) -> None:
    """Runs a prompt as `generate` begins: all tokens at once, with a cache, and logits of the last token only."""
    device = model.get_input_embeddings().weight.device
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    model(input_ids=torch.tensor([row], device=device), use_cache=True, **options)
