"""`Calls`: the methods of every engine. A subclass runs the model, in this process or inside vLLM.

prompts -> (read, options checked) -> selections -> answers, pieces or scores
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from logo.adapters.activation import check_forced
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, CurrentPool
from logo.adapters.write import write_mixture
from logo.completions import encoded
from logo.decoder import Decoding, Generation
from logo.decoding import Prompts, check_batch_size, check_streamable
from logo.errors import PoolError, UsageError, check_type, listed
from logo.generation import check_stops
from logo.prompts import Prompt, several
from logo.scoring import Scored
from logo.selecting import CallOptions, CallSettings, Outcome, Selecting, for_each, take_call_options
from logo.selection.selector import Forced, Selection, forced
from logo.selection.settings import SelectionSettings
from logo.stops import cut_pieces

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer
    from typing_extensions import Unpack

    from logo.prompts import OnePrompt


class Calls(ABC):
    """An engine that selects, generates and scores. Its properties are recorded with its results.

    Attributes:
        model: the base model; without weights if another process has them.
        tokenizer: its tokenizer.
        pool: the adapters.
        settings: how prompts are read, scored and selected.
        prompts: turns prompts into token ids.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pool: CurrentPool
    settings: SelectionSettings
    prompts: Prompts
    _layout: BaseLayout
    _selecting: Selecting
    _lock: AbstractContextManager[Any]

    @property
    @abstractmethod
    def fitted(self) -> AdapterPool:
        """The pool fitted to the base model, without adapters that do not fit (`on_bad_adapter="skip"`)."""

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in use, in pool order."""
        return self.fitted.names

    @property
    @abstractmethod
    def k(self) -> int:
        """Adapters per prompt: the setting, or the default of the pool as it is now."""

    @property
    @abstractmethod
    def points(self) -> tuple[str, ...]:
        """The points where prompts are read, such as `"4.v_proj"`. The pool is calibrated first if necessary."""

    @property
    @abstractmethod
    def folding(self) -> dict[str, Any]:
        """The settings by which the form of a mixture is chosen, for JSON."""

    @property
    @abstractmethod
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that compute."""

    @property
    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of libraries that run the model, beside PyTorch and transformers."""

    @property
    def engine_options(self) -> Mapping[str, Any]:
        """Options of what runs the model, as the user gave them, on which results depend; none in this process."""
        return {}

    # -- selecting ----------------------------------------------------------------------------------------------

    @overload
    def select(  # type: ignore[overload-overlap]
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
                `role` and `content`), token ids or a BatchEncoding; see `logo.prompts`.
            max_new_tokens: as in `generate`, so that a long prompt is cut in the same place.
            batch_size: prompts per probe; fewer if they are long, and one with `probe_context="carry"`.
            **options: `k`, `signal`, `weighting` and `candidates` for this call; see `CallOptions`.

        Raises:
            UsageError: a prompt that is empty or cannot be read, an answer that alone would fill the context, or an
                option that cannot be used.
            PoolError: a candidate that is not in the pool, or adapters that the call's signal cannot score.
        """
        given, alone = several(prompts)
        call = self.call_settings(**options)
        rows = self.prompts.read(given, room=self.prompts.room(max_new_tokens))
        selections = self.select_ids(rows, call, batch_size=batch_size)
        return selections[0] if alone else selections

    def call_settings(self, **options: Unpack[CallOptions]) -> CallSettings:
        """Checks the options of one call; errors as `select`."""
        self._sync()
        return self._selecting.call_settings(options)

    def select_ids(
        self,
        rows: Sequence[Prompt | Sequence[int]],
        calls: CallSettings | Sequence[CallSettings] | None = None,
        *,
        batch_size: int = 8,
    ) -> list[Selection]:
        """`select` for prompts that were read, or token ids with special tokens included, which are not cut; `calls`
        are the settings of all rows, or of each."""
        check_batch_size(batch_size)
        with self._attempt():
            every = calls or CallSettings(self.settings)
            each = [every] * len(rows) if isinstance(every, CallSettings) else every
            return self._selecting([Prompt.of(row) for row in rows], each, batch_size)

    def outcomes_ids(
        self, rows: Sequence[Prompt | Sequence[int]], calls: Sequence[CallSettings], batch_size: int
    ) -> list[Outcome]:
        """`select_ids`, where a prompt whose scores give an error has that error in place of its selection."""
        with self._attempt():
            return self._selecting.outcomes([Prompt.of(row) for row in rows], calls, batch_size)

    def reselect(self, scores: Selection | Mapping[str, float], **options: Unpack[CallOptions]) -> Selection:
        """The selection that the scores of an earlier one give with other options.

        Args:
            scores: the earlier selection; or its scores alone, which are taken for those of the call's signal.
            **options: options of `select`; the signal of an earlier selection cannot be changed.

        Raises:
            UsageError: a selection of another signal than the call's, or one without scores, which was forced.
            PoolError: scores of adapters that are not in the pool.
        """
        if isinstance(scores, Selection):
            made_by, asked = scores.signal, options.get("signal")
            if made_by is not None and asked not in (None, made_by):
                raise UsageError(
                    f"signal {asked!r}: the selection has the scores of {made_by!r}, which are no scores of another "
                    "signal; leave signal out, or select again"
                )
            options["signal"], scores = made_by or asked, scores.scores
        if not scores:
            raise UsageError("reselect: expected the scores of a selection, found none; a forced selection has none")
        call = self.call_settings(**options)
        unknown = [repr(name) for name in scores if name not in self._selecting.pool]
        if unknown:
            raise PoolError(f"reselect: expected scores of adapters in the pool, found those of {listed(unknown, 5)}")
        # If its scorer is not there yet, the signal is calibrated now, once no mixture is active any more. Otherwise a
        # loop over an open stream, which holds the lock, need not wait.
        return self._selecting.choose(torch.tensor(list(scores.values())), list(scores), call)

    def restart(self) -> None:
        """Forgets earlier prompts, on which `probe_context="carry"` depends."""
        with self._lock:
            self._selecting.restart()

    # -- generating ---------------------------------------------------------------------------------------------

    @overload
    def generate(
        self,
        prompts: OnePrompt,
        *,
        adapters: Forced | Sequence[Forced | None] | None = ...,
        max_new_tokens: int | None = ...,
        batch_size: int = ...,
        generation_config: GenerationConfig | None = ...,
        stop_at_newline: bool | str = ...,
        stop: Sequence[str] = ...,
        streamer: BaseStreamer | None = ...,
        activation: str | None = ...,
        **options: Any,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[OnePrompt],
        *,
        adapters: Forced | Sequence[Forced | None] | None = ...,
        max_new_tokens: int | None = ...,
        batch_size: int = ...,
        generation_config: GenerationConfig | None = ...,
        stop_at_newline: bool | str = ...,
        stop: Sequence[str] = ...,
        streamer: BaseStreamer | None = ...,
        activation: str | None = ...,
        **options: Any,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompts: OnePrompt | Sequence[OnePrompt],
        *,
        adapters: Forced | Sequence[Forced | None] | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        generation_config: GenerationConfig | None = None,
        stop_at_newline: bool | str = False,
        stop: Sequence[str] = (),
        streamer: BaseStreamer | None = None,
        activation: str | None = None,
        **options: Any,
    ) -> Generation | list[Generation]:
        """Answers each prompt with its own mixture; rows with different mixtures share a batch.

        Args:
            prompts: one prompt, or several (list in, list out, same order); of the kinds that `select` takes.
            adapters: instead of selecting: `{"name": weight, ...}`, or a `Selection`; `{}` is the base model alone.
                A list gives each prompt its own (None: select).
            max_new_tokens: default: that of the generation config, else the smaller of 256 and half of the context.
            batch_size: prompts per forward pass.
            generation_config: of transformers; default: the engine's own, which is greedy unless it was given another.
                What it leaves open is greedy, too: of the checkpoint's config only end tokens and stop texts count.
            stop_at_newline: end each answer after its first line; `"official"`: by the rule of the official code.
            stop: end each answer before the first of these texts.
            streamer: a streamer of transformers (`TextStreamer`, ...) that gets each token, for a single prompt.
            activation: where all adapters act in this call: `"everywhere"`, `"last:N"` or `"invocation"`; None: as the
                engine's settings say, else where each was trained to act.
            **options: options of `select`, and of `GenerationConfig`, such as `do_sample=True, temperature=0.7`.

        Raises:
            UsageError: a prompt that is empty or cannot be read, an option that does not exist or cannot be used.
            PoolError: as `select`; a forced adapter that is not in the pool, or not among the candidates.
        """
        given, alone = several(prompts)
        check_batch_size(batch_size)
        call = self.call_settings(**take_call_options(options, adapters))
        config = self.prompts.generation_config(generation_config, max_new_tokens, options)
        decoding = self._asked(config, stop_at_newline, stop, activation)
        with self._attempt():
            rows = self.prompts.read(given, room=config.max_new_tokens)
            if streamer is not None:
                check_streamable(len(rows), config)
            wanted = for_each(adapters, len(rows))
            answers: dict[int, Generation] = {}
            for part in self._parts([len(row) for row in rows], batch_size):
                with self._holding():
                    started, some = time.perf_counter(), [rows[i] for i in part]
                    selections = self._selecting.mixtures(some, [wanted[i] for i in part], call, batch_size)
                    probed = (time.perf_counter() - started) / len(part)
                    ids = [row.ids for row in some]
                    made = self._answers(ids, selections, decoding, probed, batch_size, streamer)
                    answers |= zip(part, made, strict=True)
        return answers[0] if alone else [answers[i] for i in range(len(rows))]

    def stream(
        self,
        prompt: OnePrompt,
        *,
        adapters: Forced | None = None,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        stop_at_newline: bool | str = False,
        stop: Sequence[str] = (),
        activation: str | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yields the answer to one prompt in pieces, which together are `generate(prompt).text`.

        Leaving the loop ends the generation. Arguments as `generate`.
        """
        call = self.call_settings(**take_call_options(options, adapters))
        config = self.prompts.generation_config(generation_config, max_new_tokens, options)
        decoding = self._asked(config, stop_at_newline, stop, activation)
        check_streamable(1, config)
        with self._attempt():
            [row] = self.prompts.read([prompt], room=config.max_new_tokens)
            with self._holding():
                [selection] = self._selecting.mixtures([row], adapters, call, 1)
                pieces = self._pieces(row.ids, selection, decoding)
        return cut_pieces(pieces, decoding.stop)

    def _asked(
        self, config: GenerationConfig, stop_at_newline: bool | str, stop: Sequence[str], activation: str | None
    ) -> Decoding:
        """How to continue prompts, from the arguments of a call."""
        stop = check_stops(stop, stop_at_newline)
        check_forced(activation)
        return self._decoding(Decoding(config, stop_at_newline, stop, activation))

    def score(
        self, prompt: OnePrompt, completion: str, mixtures: Sequence[Forced | None], **options: Unpack[CallOptions]
    ) -> list[Scored]:
        """Scores a gold completion under each of several mixtures, teacher-forced; see `logo.scoring`.

        Args:
            mixtures: as `adapters` of `generate`: `{}` is the base model alone, None is the prompt's own selection.
                Equal ones are computed once.
            **options: options of `select`.

        Raises:
            UsageError: an empty prompt, a completion without tokens or too long, or no list of mixtures.
            PoolError: as `generate`.
        """
        check_type("mixtures", mixtures, (list, tuple), "a list of mixtures")
        call = self.call_settings(**options)
        with self._attempt():
            row, gold = encoded(self.prompts, prompt, completion)
            with self._holding():
                chosen = self._selecting.mixtures([row] * len(mixtures), mixtures, call, 1)
                return self._score(row.ids, gold, [one.mixture for one in chosen])

    def score_pairs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapters: Sequence[Forced], *, batch_size: int = 8
    ) -> list[Scored]:
        """Scores completions, each after its own prompt and under its own mixture; rows share batches.

        Args:
            pairs: token ids of a prompt, special tokens included, and of its completion.
            adapters: one entry for each pair, as `adapters` of `generate`.
            batch_size: rows per forward pass.

        Raises:
            UsageError: a pair with an empty side or too long for the context, an adapter that is not in the pool.
        """
        check_batch_size(batch_size)
        with self._lock:
            self._sync()
            mixtures = [forced(entry, self.fitted).mixture for entry in adapters]
            return self._score_pairs(pairs, mixtures, batch_size)

    def save_mixture(self, mixture: Forced, folder: str | Path) -> Path:
        """Writes a mixture as one plain PEFT adapter; see `logo.adapters.write`.

        Args:
            mixture: a `Selection`, or `{"name": weight, ...}`.
            folder: must not exist yet, or be empty.

        Raises:
            PoolError, UsageError: an adapter that is not in the pool, an empty mixture, or a folder that is in use.
            StorageError: the folder cannot be written.
        """
        pool = self.fitted
        parts = [(pool[name], weight) for name, weight in forced(mixture, pool).mixture.items()]
        return write_mixture(parts, Path(folder), self._layout.shapes, self.model.config.name_or_path or None)

    # -- what an engine does ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends processes that the engine has started, without which it cannot answer. The local engine has none, so it
        releases nothing and still answers."""
        return

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Holds the lock, for selections from the pool as it is now, which leave no trace if the block fails."""
        with self._lock:
            self._sync()
            with self._selecting.attempt():
                yield

    @abstractmethod
    def _sync(self) -> None:
        """Follows changes of the pool."""

    def _parts(self, lengths: Sequence[int], batch_size: int) -> Iterable[Sequence[int]]:
        """The indices of prompts in parts, which are selected for and answered one after the other."""
        return [range(len(lengths))]

    def _holding(self) -> AbstractContextManager[Any]:
        """Inside the block, what selecting has read stays cached for answering."""
        return nullcontext()

    def _decoding(self, decoding: Decoding) -> Decoding:
        """Checks how a call is decoded, and returns it.

        Raises:
            UsageError: this engine does not have an option.
        """
        return decoding

    @abstractmethod
    def _answers(
        self,
        rows: Sequence[Sequence[int]],
        selections: Sequence[Selection],
        decoding: Decoding,
        probed: float,
        batch_size: int,
        streamer: BaseStreamer | None,
    ) -> list[Generation]:
        """One answer for each row of token ids, in order; see `generate`.

        Args:
            probed: seconds per row that selecting took.
        """

    @abstractmethod
    def _pieces(self, row: Sequence[int], selection: Selection, decoding: Decoding) -> Generator[str]:
        """See `stream`."""

    @abstractmethod
    def _score(self, row: Sequence[int], gold: Sequence[int], mixtures: Sequence[Mapping[str, float]]) -> list[Scored]:
        """One completion of one prompt under each mixture."""

    @abstractmethod
    def _score_pairs(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        mixtures: Sequence[Mapping[str, float]],
        batch_size: int,
    ) -> list[Scored]:
        """Many completions, each after its own prompt and under its own mixture; errors as `continued_rows`."""
