"""`Calls`: the methods that every engine offers its callers. A subclass runs the model, in this process or inside vLLM.

    prompts -> (read, options checked) -> selections -> answers, pieces or scores

Knows how prompts are read and what calls may say; knows nothing about how a model is run.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from logo.adapters.activation import check_forced
from logo.adapters.export import write_mixture
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool
from logo.decoder import Decoding, Generation
from logo.decoding import Prompts, check_batch_size, check_streamable
from logo.mixing import Merge
from logo.prompts import Prompt, several
from logo.scoring import Scored, completion_ids
from logo.selecting import CallOptions, CallSettings, Selecting, for_each, take_call_options
from logo.selection.selector import Forced, Selection, forced
from logo.selection.settings import SelectionSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer
    from typing_extensions import Unpack

    from logo.prompts import OnePrompt


class Calls(ABC):
    """An engine, as its callers see it.

    Attributes:
        model: the base model; perhaps without its weights, where another process has them.
        tokenizer: its tokenizer.
        pool: the adapters.
        settings: how prompts are read, scored and selected.
        prompts: turns prompts into token ids.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pool: AdapterPool
    settings: SelectionSettings
    prompts: Prompts
    _layout: BaseLayout
    _selecting: Selecting
    _lock: AbstractContextManager[Any]

    @property
    @abstractmethod
    def fitted(self) -> AdapterPool:
        """The pool, matched to the base model, less what does not fit it (`on_bad_adapter="skip"`)."""

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in use, in pool order."""
        return self.fitted.names

    @property
    @abstractmethod
    def k(self) -> int:
        """Adapters per prompt: as asked for, else as many as suit the pool as it is now."""

    @property
    @abstractmethod
    def points(self) -> tuple[str, ...]:
        """Where prompts are read, such as `"4.v_proj"`. The pool is calibrated, if it was not yet."""

    @property
    @abstractmethod
    def folding(self) -> dict[str, Any]:
        """What decides in which form mixtures act, for JSON."""

    @property
    @abstractmethod
    def devices(self) -> tuple[torch.device, ...]:
        """Those that compute."""

    @property
    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of what runs the model beside PyTorch and transformers, by name."""

    @property
    @abstractmethod
    def merge(self) -> Merge:
        """How selected adapters are combined when they answer or are scored; probing always sums them exactly."""

    @merge.setter
    @abstractmethod
    def merge(self, merge: Merge | str) -> None: ...

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
        """Which adapters would answer, with their weights and the scores of all.

        Args:
            prompts: one prompt, or several (list in, list out): a string, a conversation (a list of messages with
                `role` and `content`), token ids or a BatchEncoding; see `logo.prompts`.
            max_new_tokens: as in `generate`: a prompt that leaves no room for them is cut in the same place.
            batch_size: prompts per probe, fewer where they are long. `probe_context="carry"` always takes them one by
                one, in order.
            **options: `k`, `signal`, `weighting`, `keep_mass` and `candidates` for this call; see `CallOptions`.

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
        """The options of one call, checked: errors as `select`."""
        self._sync()
        return self._selecting.call_settings(options)

    def select_ids(
        self,
        rows: Sequence[Prompt | Sequence[int]],
        calls: CallSettings | Sequence[CallSettings] | None = None,
        *,
        batch_size: int = 8,
    ) -> list[Selection]:
        """`select` for prompts that have been read, or are token ids with special tokens included; none is cut.

        Args:
            calls: of all of them, or of each.
        """
        check_batch_size(batch_size)
        with self._lock:
            self._sync()
            every = calls or CallSettings(self.settings)
            each = [every] * len(rows) if isinstance(every, CallSettings) else every
            return self._selecting([Prompt.of(row) for row in rows], each, batch_size)

    def reselect(self, scores: Mapping[str, float], **options: Unpack[CallOptions]) -> Selection:
        """The selection that scores from before give for other options; the scores are those of the options' signal."""
        return self._selecting.choose(torch.tensor(list(scores.values())), list(scores), self.call_settings(**options))

    def restart(self) -> None:
        """Forgets the prompts before, where the next one would depend on them: `carry`, and a running reference."""
        with self._lock:
            self._selecting.restart()

    # -- generating ---------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: OnePrompt, **options: Any) -> Generation: ...
    @overload
    def generate(self, prompts: Sequence[OnePrompt], **options: Any) -> list[Generation]: ...
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
            max_new_tokens: default: the generation config's, else 256 or half of the context, whichever is less.
            batch_size: prompts per forward pass.
            generation_config: any transformers config; default: the engine's own, which is greedy unless it was given
                another, whatever the checkpoint's asks for.
            stop_at_newline: end each answer at its first line; `"official"`: by the official code's rule.
            stop: end each answer before the first of these texts.
            streamer: one of transformers' (`TextStreamer`, ...), of a single prompt; it is told each token.
            activation: where all adapters act in this call: `"everywhere"`, `"last:N"` or `"invocation"`; None: as the
                engine's settings say, and if they say nothing, each where it was trained to act.
            **options: of the selection, as `select`, and of `GenerationConfig`, such as `do_sample=True,
                temperature=0.7`; no others.

        Raises:
            UsageError: a prompt that is empty or cannot be read, an option that does not exist or cannot be used.
            PoolError: as `select`; a forced adapter that is not in the pool, or not among the candidates.
        """
        given, alone = several(prompts)
        check_batch_size(batch_size)
        stop = tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text)
        call = self.call_settings(**take_call_options(options, adapters))
        config = self.prompts.generation_config(generation_config, max_new_tokens, options)
        check_forced(activation)
        decoding = Decoding(config, self.model.generation_config, stop_at_newline, stop, activation)
        decoding = self._decoding(decoding)
        with self._lock:
            self._sync()
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
        activation: str | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Answers one prompt piece by piece; the pieces joined are `generate(prompt).text`.

        Leaving the loop early ends the generation. Arguments as `generate`.
        """
        call = self.call_settings(**take_call_options(options, adapters))
        config = self.prompts.generation_config(generation_config, max_new_tokens, options)
        decoding = self._decoding(Decoding(config, self.model.generation_config, activation=check_forced(activation)))
        with self._lock:
            self._sync()
            [row] = self.prompts.read([prompt], room=config.max_new_tokens)
            [selection] = self._selecting.mixtures([row], adapters, call, 1)
        return self._pieces(row.ids, selection, decoding)

    def score(
        self, prompt: OnePrompt, completion: str, mixtures: Sequence[Forced | None], **options: Unpack[CallOptions]
    ) -> list[Scored]:
        """What a gold completion is worth under each of several mixtures, teacher-forced; see `logo.scoring`.

        Args:
            mixtures: as `adapters` of `generate`: `{}` is the base model alone, None is what the prompt selects. Equal
                ones are computed once.
            **options: of the selection, as `select`.

        Raises:
            UsageError: no prompt, a completion without tokens or too long.
            PoolError: as `generate`.
        """
        call = self.call_settings(**options)
        with self._lock:
            self._sync()
            [whole] = self.prompts.read([prompt], room=None)
            text = self.tokenizer.decode(whole.ids) if whole.text is None else whole.text
            gold = completion_ids(self.tokenizer, text, completion, self.prompts.context)
            [row] = self.prompts.read([whole], room=len(gold))
            with self._holding():
                chosen = self._selecting.mixtures([row] * len(mixtures), mixtures, call, 1)
                return self._score(row.ids, gold, [one.mixture for one in chosen])

    def score_pairs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapters: Sequence[Forced], *, batch_size: int = 8
    ) -> list[Scored]:
        """What completions are worth, each after its own prompt and under its own mixture; rows share batches.

        Args:
            pairs: token ids of a prompt, special tokens included, and of what continues it.
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
        """Writes a mixture as one plain PEFT adapter that answers with the same tokens; see `logo.adapters.export`.

        Args:
            mixture: a `Selection`, or `{"name": weight, ...}`. Weights are the exact mixture's, whatever `merge` is.
            folder: must not exist yet, or be empty.

        Raises:
            PoolError, UsageError: an adapter that is not in the pool, a mixture of nothing, a folder that is in use.
            StorageError: the folder cannot be written.
        """
        pool = self.fitted
        parts = [(pool[name], weight) for name, weight in forced(mixture, pool).mixture.items()]
        return write_mixture(parts, Path(folder), self._layout.shapes, self.model.config.name_or_path or None)

    # -- what an engine does ------------------------------------------------------------------------------------

    def close(self) -> None:  # noqa: B027
        """Ends what the engine has started outside of this object. Nothing can be asked afterwards."""

    def _sync(self) -> None:  # noqa: B027
        """Takes note of adapters that were added to or removed from the pool."""

    def _parts(self, lengths: Sequence[int], batch_size: int) -> Iterable[Sequence[int]]:
        """Prompts, by number, in parts that are selected for and answered one after the other."""
        return [range(len(lengths))]

    def _holding(self) -> AbstractContextManager[Any]:
        """Inside, what was read to select is kept to answer."""
        return nullcontext()

    def _decoding(self, decoding: Decoding) -> Decoding:
        """How a call is decoded, unless the engine cannot do that.

        Raises:
            UsageError: an option that another engine has.
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
            probed: seconds that selecting took, per row.
        """

    @abstractmethod
    def _pieces(self, row: Sequence[int], selection: Selection, decoding: Decoding) -> Iterator[str]:
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
