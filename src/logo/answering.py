"""`AnsweringEngine`: what every engine does with prompts: it selects, generates, streams and scores.

prompts.read -> Prompt -> scores -> Selector -> Selection -> Batch -> Generation
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from logo.adapters.activation import EVERYWHERE
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, CurrentPool
from logo.adapters.write import write_mixture
from logo.core import AnswerOptions, CallOptions, Forced, Generation, Options, Prompt, Selection
from logo.decoding import (
    Batch,
    Decoding,
    call_config,
    check_batch_size,
    check_streamable,
    ended_by_errors,
)
from logo.errors import LoGoError, PoolError, Unsure, UsageError, check_type, listed
from logo.models import ModelLock
from logo.prefix_cache import PrefixCache
from logo.prompts import Prompts, several
from logo.scoring import Pair, Scored, encoded
from logo.selection.encoder import NO_TEXTS, Embedded
from logo.selection.selector import for_each, forced
from logo.selection.settings import OPTIONS, ProbeContext, SelectionSettings, check_context
from logo.state import EngineState
from logo.streams import Stream

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer
    from typing_extensions import Unpack

    from logo.prompts import OnePrompt


class AnsweringEngine(ABC):
    """Selects and mixes adapters per prompt; how scores and answers are computed is left to the two engines.

    Attributes: see `logo.engine.LoGo`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pool: CurrentPool
    settings: SelectionSettings
    prompts: Prompts
    prefix_cache: PrefixCache | None
    probe_context: ProbeContext
    merge: bool | None
    versions: Mapping[str, str] = MappingProxyType({})
    engine_options: Mapping[str, Any] = MappingProxyType({})
    _state: EngineState
    _turns: ModelLock
    _layout: BaseLayout
    _checkpoint: GenerationConfig
    _generation_config: GenerationConfig | None
    _decode: Callable[[Batch, BaseStreamer | None], list[Generation]]  # answers a batch; a streamer is for one row
    _stream: Callable[[Batch], Stream]  # answers one row in pieces
    # Scores completions, each under its own mixture; the last argument is the batch size. Errors as `score_pairs`.
    _scored: Callable[[AdapterPool, Sequence[Pair], Sequence[Mapping[str, float]], int], list[Scored]]

    # -- what an engine is -----------------------------------------------------------------------------------------

    @abstractmethod
    def _current(self) -> EngineState:
        """The state for the pool as it is now; errors as `fitted`."""

    @abstractmethod
    def _scorer(self, state: EngineState, signal: str) -> Any:
        """The scorer of a signal, which is calibrated first if necessary: it has `points` and a `selector`."""

    @abstractmethod
    def _scores(
        self,
        state: EngineState,
        scorer: Any,
        probed: Sequence[Sequence[int]],
        candidates: Sequence[Collection[str] | None],
        batch_size: int,
        embedded: Embedded,
    ) -> Tensor:
        """Scores (rows, adapters) of token ids; those of adapters that are no candidates may be wrong. `embedded` as in
        `outcomes`."""

    def _batches(self, rows: Sequence[Prompt], batch_size: int, decoding: Decoding) -> Iterable[Sequence[int]]:
        """The indices of rows that are answered together."""
        return [range(len(rows))]

    # -- the pool --------------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> AdapterPool:
        """The pool as it is now, fitted to the base model, without adapters that do not fit (`on_bad_adapter="skip"`).

        Raises:
            PoolError, AdapterError: it was changed, and cannot be used any more; calls before used the old one.
        """
        return self._current().fitted

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in use, in pool order."""
        return self.fitted.names

    @property
    def k(self) -> int:
        """Adapters per prompt: the setting, or the default of the pool as it is now."""
        if self.settings.k is not None:
            return self.settings.k
        state = self._current()
        scored_names = self._scorer(state, self.settings.signal).selector.names
        return min(state.fitted.default_k, len(scored_names))

    # -- selecting -------------------------------------------------------------------------------------------------

    @overload
    def select(  # type: ignore[overload-overlap]  # a text is a sequence of texts
        self,
        prompts: OnePrompt,
        *,
        max_new_tokens: int | None = ...,
        batch_size: int = ...,
        **options: Unpack[CallOptions],
    ) -> Selection: ...
    @overload
    def select(
        self,
        prompts: Sequence[OnePrompt],
        *,
        max_new_tokens: int | None = ...,
        batch_size: int = ...,
        **options: Unpack[CallOptions],
    ) -> list[Selection]: ...
    def select(
        self,
        prompts: OnePrompt | Sequence[OnePrompt],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        **options: Unpack[CallOptions],
    ) -> Selection | list[Selection]:
        """Selects the adapters that would answer, with their weights and the scores of all.

        Args:
            prompts: one prompt, or several (list in, list out): a string, a conversation (a list of messages with
                `role` and `content`) or token ids; see `logo.prompts`.
            max_new_tokens: as in `generate`, so that a long prompt is cut in the same place.
            batch_size: prompts per probe; fewer if they are long, and one with `probe_context="carry"`.
            **options: `k`, `signal`, `weighting`, `candidates`, `prior` and `when_unsure` for this call; see
                `logo.core.CallOptions`.

        Raises:
            UsageError: a prompt or an option that cannot be used, or an answer that alone would fill the context.
            PoolError: a candidate that is not in the pool, or adapters that the call's signal cannot score.
            Unsure: no adapter seems to be made for a prompt, and `when_unsure` is `"refuse"`.
        """
        listed_prompts, single = several(prompts)
        check_batch_size(batch_size)
        with self._call() as state:
            call = self.settings.options(state.fitted, options)
            if max_new_tokens is None:
                max_new_tokens = getattr(self._generation_config, "max_new_tokens", None)
            rows = self.prompts.read(listed_prompts, self.prompts.room(max_new_tokens))
            selections = self._mixtures(state, rows, [None] * len(rows), call, batch_size)
        return selections[0] if single else selections

    def options(self, **options: Unpack[CallOptions]) -> Options:
        """Checks the options of one call, for `outcomes`; errors as `select`."""
        return self.settings.options(self.fitted, options)

    def outcomes(
        self, rows: Sequence[Prompt], options: Sequence[Options], batch_size: int = 8, embedded: Embedded = NO_TEXTS
    ) -> list[Selection | LoGoError]:
        """One selection for each prompt that was read, by its own `options`, or the error that its scores give.

        Args:
            embedded: what a text encoder has read already of these prompts (`LoGo.embedded`).
        """
        with self._call() as state:
            return self._outcomes(state, rows, options, batch_size, embedded)

    def _outcomes(
        self,
        state: EngineState,
        rows: Sequence[Prompt],
        options: Sequence[Options],
        batch_size: int,
        embedded: Embedded = NO_TEXTS,
    ) -> list[Selection | LoGoError]:
        in_turn = self.probe_context == "carry"  # each row depends on the one before
        groups: dict[tuple[str, int], list[int]] = {}  # the numbers of rows that are scored together
        for i, call in enumerate(options):
            groups.setdefault((call.signal, i if in_turn else 0), []).append(i)
        outcomes: dict[int, Selection | LoGoError] = {}
        for (signal, _), members in groups.items():
            if self.probe_context != "base":
                check_context(self.probe_context, signal)
            scorer = self._scorer(state, signal)
            candidates = [options[i].candidates for i in members]
            probed = [rows[i].ids if state.probes_all else rows[i].probed for i in members]
            scores = self._scores(state, scorer, probed, candidates, batch_size, embedded)
            for i, row_scores in zip(members, scores, strict=True):
                outcomes[i] = scorer.selector.outcome(row_scores, options[i], state.fitted.silent(rows[i].ids))
            last = outcomes[members[-1]]
            if in_turn and isinstance(last, Selection):
                self._put(replace(self._state, carried=last.adapters))
        return [outcomes[i] for i in range(len(rows))]

    def reselect(self, scores: Selection | Mapping[str, float], **options: Unpack[CallOptions]) -> Selection:
        """The selection that the scores of an earlier one give with other options of `select`.

        Args:
            scores: the earlier selection; or its scores alone, which are taken for those of the call's signal.

        Raises:
            UsageError: a selection of another signal than the call's, or one without scores, which was forced.
            PoolError: scores of adapters that are not in the pool, or of none of the candidates.
        """
        silent: tuple[str, ...] = ()
        if isinstance(scores, Selection):
            signal = options.get("signal")
            if scores.signal is not None and signal not in (None, scores.signal):
                raise UsageError(
                    f"signal {signal!r}: the selection has the scores of {scores.signal!r}, which are no scores of "
                    "another signal; leave signal out, or select again"
                )
            options["signal"] = scores.signal or signal
            silent = scores.silent
            scores = scores.scores
        state = self._current()
        _check_scores(scores, state.fitted)
        call = self.settings.options(state.fitted, options)
        if call.candidates is not None and call.candidates.isdisjoint(scores):
            raise PoolError(
                f"reselect: expected the score of a candidate, found those of {len(scores)} other adapters: select "
                "again with these candidates"
            )
        # A loop over an open stream, which holds the lock, waits only if the signal has to be calibrated first.
        selector = replace(self._scorer(state, call.signal).selector, names=tuple(scores))
        numbers = torch.tensor([float(score) for score in scores.values()], dtype=torch.float64)
        selection: Selection = selector(numbers, call, silent)
        return selection

    def restart(self) -> None:
        """Forgets earlier prompts, on which `probe_context="carry"` depends."""
        with self._turns.lock:
            self._put(replace(self._state, carried=None))

    # -- answering -------------------------------------------------------------------------------------------------

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: OnePrompt,
        *,
        adapters: Forced | Sequence[Forced | None] | None = ...,
        batch_size: int = ...,
        streamer: BaseStreamer | None = ...,
        **options: Unpack[AnswerOptions],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[OnePrompt],
        *,
        adapters: Forced | Sequence[Forced | None] | None = ...,
        batch_size: int = ...,
        streamer: BaseStreamer | None = ...,
        **options: Unpack[AnswerOptions],
    ) -> list[Generation]: ...
    def generate(
        self,
        prompts: OnePrompt | Sequence[OnePrompt],
        *,
        adapters: Forced | Sequence[Forced | None] | None = None,
        batch_size: int = 8,
        streamer: BaseStreamer | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Generation | list[Generation]:
        """Answers each prompt with its own mixture; rows with different mixtures share a batch.

        Args:
            prompts: one prompt, or several (list in, list out, same order); of the kinds that `select` takes.
            adapters: instead of selecting: `{"name": weight, ...}`, or a `Selection`; `{}` is the base model alone.
                A list gives each prompt its own (None: select).
            batch_size: prompts per forward pass.
            streamer: a streamer of transformers (`TextStreamer`, ...) that gets each token, for a single prompt.
            **options: `k`, `signal`, `weighting`, `candidates`, `prior` and `when_unsure` for the selection, see
                `logo.core.CallOptions`; and for the answer, see `logo.core.AnswerOptions`: `max_new_tokens`,
                `generation_config`, `stop`, `stop_at_newline`, and all options of transformers' `GenerationConfig`,
                such as `do_sample=True, temperature=0.7`.

        Raises:
            UsageError: a prompt that is empty or cannot be read, an option that does not exist or cannot be used.
            PoolError: as `select`; a forced adapter that is not in the pool, or not among the candidates.
        """
        with ended_by_errors(streamer), self._call() as state:
            listed_prompts, single = several(prompts)
            check_batch_size(batch_size)
            call, decoding = self._checked(state, adapters, options)
            rows = self.prompts.read(listed_prompts, decoding.config.max_new_tokens)
            if streamer is not None:
                check_streamable(len(rows), decoding.config)
            mixtures = for_each(adapters, len(rows), state.fitted, call.candidates)
            probed_before = 0.0  # seconds per row
            # All before the first answer: `carry` follows the order of prompts, and a refused one costs no answers.
            if self.probe_context == "carry" or call.when_unsure == "refuse":
                started = time.perf_counter()
                mixtures = [*self._mixtures(state, rows, mixtures, call, batch_size)]
                probed_before = (time.perf_counter() - started) / len(rows)
            answers: dict[int, Generation] = {}
            for numbers in self._batches(rows, batch_size, decoding):
                batch = [rows[i] for i in numbers]
                started = time.perf_counter()
                with self._held(state.fitted):
                    selections = self._mixtures(state, batch, [mixtures[i] for i in numbers], call, batch_size)
                    seconds = probed_before + (time.perf_counter() - started) / len(batch)
                    ids = [row.ids for row in batch]
                    answered = self._decode(Batch(state.fitted, ids, selections, decoding), streamer)
                for i, answer in zip(numbers, answered, strict=True):
                    answers[i] = replace(answer, seconds={"probe": seconds} | answer.seconds)
        return answers[0] if single else [answers[i] for i in range(len(rows))]

    def stream(self, prompt: OnePrompt, *, adapters: Forced | None = None, **options: Unpack[AnswerOptions]) -> Stream:
        """The answer to one prompt in pieces, which together are `generate(prompt).text`; arguments as there.

        It is generated while the pieces are read. Closing the stream, or leaving a loop over an unnamed one, ends that;
        see `logo.streams.Stream`. Errors as `generate`.
        """
        with self._call() as state:
            call, decoding = self._checked(state, adapters, options)
            check_streamable(1, decoding.config)
            [row] = self.prompts.read([prompt], decoding.config.max_new_tokens)
            mixtures = for_each(adapters, 1, state.fitted, call.candidates)
            with self._held(state.fitted):
                selections = self._mixtures(state, [row], mixtures, call, 1)
                return self._stream(Batch(state.fitted, [row.ids], selections, decoding))

    def score(
        self, prompt: OnePrompt, completion: str, mixtures: Sequence[Forced | None], **options: Unpack[CallOptions]
    ) -> list[Scored]:
        """Scores a gold completion under each of several mixtures, teacher-forced; see `logo.scoring`.

        Args:
            mixtures: as `adapters` of `generate`, each computed once: `{}` is the base model, None the own selection.
            **options: options of `select`: `k`, `signal`, `weighting`, `candidates`, `prior`, `when_unsure`.

        Raises:
            UsageError: an empty prompt, a completion without tokens or too long, or no list of mixtures.
            PoolError: as `generate`.
        """
        check_type("mixtures", mixtures, (list, tuple), "a list of mixtures")
        with self._call() as state:
            call = self.settings.options(state.fitted, options)
            _check_fixed(mixtures, options)
            row, gold = encoded(self.prompts, prompt, completion)
            fixed = for_each(mixtures, len(mixtures), state.fitted, call.candidates)
            selections = self._mixtures(state, [row] * len(mixtures), fixed, call, 1)
            pairs = [(row.ids, gold)] * len(mixtures)
            weights = [selection.mixture for selection in selections]
            return self._scored(state.fitted, pairs, weights, max(1, len(mixtures)))

    def score_pairs(self, pairs: Sequence[Pair], adapters: Sequence[Forced], *, batch_size: int = 8) -> list[Scored]:
        """Scores completions, each after its own prompt and under its own mixture; errors as `score`.

        Args:
            pairs: token ids of a prompt, special tokens included, and of its completion.
            adapters: one entry for each pair, as `adapters` of `generate`.
            batch_size: rows per forward pass.
        """
        check_batch_size(batch_size)
        with self._call() as state:
            pool = state.fitted
            return self._scored(pool, pairs, [forced(entry, pool).mixture for entry in adapters], batch_size)

    def save_mixture(self, mixture: Forced, folder: str | Path) -> Path:
        """Writes a mixture as one plain PEFT adapter to a new or empty folder; see `logo.adapters.write`.

        Raises:
            PoolError, UsageError: an adapter that is not in the pool, an empty mixture, or a folder that is in use.
            StorageError: the folder cannot be written.
        """
        pool = self.fitted
        parts = [(pool[name], weight) for name, weight in forced(mixture, pool).mixture.items()]
        return write_mixture(parts, Path(folder), self._layout.shapes, self.model.config.name_or_path or None)

    def close(self) -> None:  # noqa: B027
        """Ends the processes that the engine has started, if any, without which it cannot answer."""

    @contextmanager
    def _call(self) -> Iterator[EngineState]:
        """Holds the lock, for a call on the pool as it is now, which leaves no trace if it fails."""
        with self._turns.lock:
            state = self._with_present_weights(self._current())
            try:
                yield state
            except BaseException:
                self._put(replace(self._state, carried=state.carried))
                raise

    def _with_present_weights(self, state: EngineState) -> EngineState:
        """The state without what was computed from weights that the base model no longer has. The lock is held."""
        return state

    def _put(self, state: EngineState) -> EngineState:
        """Puts another state in the place of the present one, and returns it. The lock is held."""
        self._state = state
        return state

    def _held(self, pool: AdapterPool) -> AbstractContextManager[Any]:
        """Inside the block, what the probe has read stays cached for the answer."""
        cache = self.prefix_cache
        return nullcontext() if cache is None or pool.activations == (EVERYWHERE,) else cache.held()

    def _checked(self, state: EngineState, adapters: object, options: AnswerOptions) -> tuple[Options, Decoding]:
        """The checked options of a call: those of its selections, and how answers are decoded."""
        decoding: dict[str, Any] = dict(options)
        selecting = {name: decoding.pop(name) for name in OPTIONS if name in decoding}
        _check_fixed(adapters, selecting)
        call = self.settings.options(state.fitted, selecting)
        stop = decoding.pop("stop", ())
        stop_at_newline = decoding.pop("stop_at_newline", False)
        max_new_tokens = decoding.pop("max_new_tokens", None)
        config = decoding.pop("generation_config", None)
        config = self._generation_config if config is None else config
        complete = call_config(self.prompts, config, decoding, max_new_tokens, self._checkpoint)
        return call, Decoding.of(complete, stop_at_newline, stop)

    def _mixtures(
        self,
        state: EngineState,
        rows: Sequence[Prompt],
        fixed: Sequence[Selection | None],
        call: Options,
        batch_size: int,
    ) -> list[Selection]:
        """The mixture of each row: a fixed one, or a selection. Raises the first error that scores give."""
        mixtures = dict(enumerate(fixed))
        left = [i for i, mixture in mixtures.items() if mixture is None]
        outcomes = self._outcomes(state, [rows[i] for i in left], [call] * len(left), batch_size)
        for i, outcome in zip(left, outcomes, strict=True):
            if isinstance(outcome, Unsure) and rows[0] is not rows[-1]:
                outcome.reason = f"prompt {i + 1}: {outcome.reason}"
            if isinstance(outcome, LoGoError):
                raise outcome
            mixtures[i] = outcome
        return [mixture for mixture in mixtures.values() if mixture is not None]


def _check_fixed(adapters: object, selecting: Mapping[str, Any]) -> None:
    """Raises UsageError for options that would have no effect, since the mixture of all prompts is fixed."""
    each = adapters if isinstance(adapters, (list, tuple)) else [adapters]
    if any(entry is None for entry in each):
        return
    for name, value in selecting.items():
        if value is not None and name != "candidates":
            raise UsageError(f"{name} selects adapters, but `adapters` fixes the mixture: leave out one of the two")


def _check_scores(scores: Any, pool: AdapterPool) -> None:
    """Raises UsageError unless scores are numbers by name, and PoolError if one is of an adapter that is not there."""
    check_type("reselect", scores, Mapping, "a selection or scores by name")
    if not scores:
        raise UsageError("reselect: expected the scores of a selection, found none; a forced selection has none")
    for name, score in scores.items():
        check_type(f"reselect: the score of {name!r}", score, Real, "a number")
        if not math.isfinite(score):
            raise UsageError(f"reselect: expected finite scores, found {score} for {name!r}")
    unknown = [repr(name) for name in scores if name not in pool]
    if unknown:
        raise PoolError(f"reselect: expected scores of adapters in the pool, found those of {listed(unknown, 5)}")
    for name, score in scores.items():
        check_type(f"reselect: the score of {name!r}", score, Real, "a number")
