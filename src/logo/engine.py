"""`LoGo`: a base model, a pool of adapters, and for every prompt the mixture that answers it.

The only place that knows adapters, mixing and selection together. A prompt walks straight through:

    text, chat, ids -> probe -> signal -> selector -> Selection -> store -> gates -> model.generate -> Generation
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from logo.adapters.export import write_mixture
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, OnBadAdapter
from logo.completions import CompletionScorer
from logo.decoder import Decoder, Generation
from logo.decoding import Prompts, Truncation, batches_by_length, check_batch_size, check_streamable, reads_prompts
from logo.mixing import EXACT, Merge, Mixer
from logo.mixing.store import adapter_store
from logo.models import context_length
from logo.opening import FromPretrained
from logo.prompts import Prompt, several
from logo.scoring import Scored
from logo.selecting import Asked, CallOptions, Selecting, take_call_options
from logo.selection.calibration import Calibration
from logo.selection.scorer import Scorer
from logo.selection.selector import Forced, Selection, forced
from logo.selection.settings import SelectionSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer
    from typing_extensions import Unpack

    from logo.prompts import OnePrompt


class LoGo(FromPretrained):
    """Selects and mixes adapters per prompt on one base model.

    Args:
        model: a Hugging Face causal LM, in eval mode. Its weights are never changed.
        tokenizer: the model's, with a pad token.
        pool: the adapters. May change later (`pool.add`, `pool.remove`); the engine notices before the next call.
        settings: how prompts are read, scored and selected.
        generation_config: what a call decodes with that names none; None: greedily.
        truncation: what to do with prompts that are too long.
        adapter_memory_gb: memory (10⁹ bytes) for adapters where the model computes; None: a share of what is free
            there, see `logo.mixing.placement`.
        adapter_cache_gb: host memory for adapter files, beside an accelerator; None: as much as `adapter_memory_gb`.
        fold: add the mixture into a copy of the weights it acts on where all rows of a batch share it, so that
            decoding costs what the base model costs. None: when that pays and would not round it to half precision;
            see `logo.mixing.costs`.
        merge: how selected adapters are combined, a kind by name or a `Merge` with its options; see
            `logo.mixing.merges`. May be changed later (`logo.merge = "ties"`).
        on_bad_adapter: what to do with adapters that do not fit the base model.

    Raises:
        PoolError: an adapter does not fit, or cannot be scored (see `SelectionSettings.unscorable`).
        UsageError: a merge that does not exist.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pool: AdapterPool,
        *,
        settings: SelectionSettings | None = None,
        generation_config: GenerationConfig | None = None,
        truncation: Truncation | None = None,
        adapter_memory_gb: float | None = None,
        adapter_cache_gb: float | None = None,
        fold: bool | None = None,
        merge: Merge | str = EXACT,
        on_bad_adapter: OnBadAdapter = "error",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pool = pool
        self.settings = settings or SelectionSettings()
        self.prompts = Prompts(
            tokenizer,
            context_length(model),
            truncation or Truncation(),
            checkpoint=model.generation_config,
            default=generation_config,
            probe_text=self.settings.probe_text,
            vocabulary=model.get_input_embeddings().weight.shape[0],
        )
        self._on_bad_adapter = on_bad_adapter
        self._layout = BaseLayout.of(model)
        self.store = adapter_store(model, adapter_memory_gb, adapter_cache_gb)
        self._mixer = Mixer(model, self.store, fold)
        self._decoder = Decoder(model, self.prompts, self._mixer)
        self._completions = CompletionScorer(model, self.prompts, self._mixer)
        self._lock = threading.RLock()  # a mixture is active on the whole model, so calls take turns
        self.merge = merge
        self._selecting = Selecting(model, self.prompts, self._mixer, self.settings)
        self._fit_pool()

    @property
    def fitted(self) -> AdapterPool:
        """The pool, matched to the base model, less what does not fit it (`on_bad_adapter="skip"`)."""
        self._sync()
        return self._fitted

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in use, in pool order."""
        return self.fitted.names

    @property
    def k(self) -> int:
        """Adapters per prompt: as asked for, else as many as suit the pool as it is now."""
        self._sync()
        return self._selecting.scorers.k if self.settings.k is None else self.settings.k

    @property
    def scorer(self) -> Scorer:
        """How prompts are read and adapters scored, for the pool as it is now; calibrated, if it was not yet."""
        with self._lock:
            self._sync()
            return self._selecting.scorer()

    def calibrate(self, signal: str | None = None) -> Calibration | None:
        """Makes ready to select: calibrates adapters that are not known yet, and indexes all. The first call does too.

        Args:
            signal: another one than the engine's own.

        Returns:
            Where prompts are read, and how that was chosen; None for signals without calibration.

        Raises:
            AdapterError: an adapter that cannot be read.
            PoolError: adapters that another signal cannot score.
        """
        with self._lock:
            self._sync()
            return self._selecting.scorer(signal).calibration

    @property
    def folding(self) -> dict[str, Any]:
        """What decides whether a mixture is folded into the weights, for JSON; see `logo.mixing.costs`."""
        return self._mixer.folding

    @property
    def merge(self) -> Merge:
        """How selected adapters are combined when they answer or are scored; probing always sums them exactly."""
        return self._mixer.merge

    @merge.setter
    def merge(self, merge: Merge | str) -> None:
        with self._lock:
            self._mixer.merge = merge if isinstance(merge, Merge) else Merge(merge)

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
        asked = self.asked(**options)
        rows = self.prompts.read(given, room=self.prompts.room(max_new_tokens))
        selections = self.select_ids(rows, asked, batch_size=batch_size)
        return selections[0] if alone else selections

    def asked(self, **options: Unpack[CallOptions]) -> Asked:
        """The options of one call, checked: errors as `select`."""
        self._sync()
        return self._selecting.asked(options)

    def select_ids(
        self,
        rows: Sequence[Prompt | Sequence[int]],
        asked: Asked | Sequence[Asked] | None = None,
        *,
        batch_size: int = 8,
    ) -> list[Selection]:
        """`select` for prompts that have been read, or are token ids with special tokens included; none is cut.

        Args:
            asked: of all of them, or of each.
        """
        check_batch_size(batch_size)
        with self._lock:
            self._sync()
            every = asked or Asked(self.settings)
            each = [every] * len(rows) if isinstance(every, Asked) else every
            return self._selecting([Prompt.of(row) for row in rows], each, batch_size)

    def reselect(self, scores: Mapping[str, float], **options: Unpack[CallOptions]) -> Selection:
        """The selection that scores from before give for other options; the scores are those of the options' signal."""
        return self._selecting.choose(torch.tensor(list(scores.values())), list(scores), self.asked(**options))

    def restart(self) -> None:
        """Forgets the prompts before, where the next one would depend on them: `carry`, and a running baseline."""
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
            **options: of the selection, as `select`, and of `GenerationConfig`, such as `do_sample=True,
                temperature=0.7`; no others.

        Raises:
            UsageError: a prompt that is empty or cannot be read, an option that does not exist or cannot be used.
            PoolError: as `select`; a forced adapter that is not in the pool, or not among the candidates.
        """
        given, alone = several(prompts)
        check_batch_size(batch_size)
        stop = tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text)
        asked = self.asked(**take_call_options(options, adapters))
        config = self.prompts.generation_config(generation_config, max_new_tokens, options)
        with self._lock:
            self._sync()
            rows = self.prompts.read(given, room=config.max_new_tokens)
            if streamer is not None:
                check_streamable(len(rows), config)
            started = time.perf_counter()
            selections = self._selecting.mixtures(rows, adapters, asked, batch_size)
            probed = (time.perf_counter() - started) / len(rows)
            answers: dict[int, Generation] = {}
            padded = not reads_prompts(config)
            for batch in batches_by_length([len(row) for row in rows], batch_size, padded=padded):
                ids, chosen = [rows[i].ids for i in batch], [selections[i] for i in batch]
                made = self._decoder(self._fitted, config, stop_at_newline, stop, probed, ids, chosen, streamer)
                answers |= zip(batch, made, strict=True)
        ordered = [answers[i] for i in range(len(rows))]
        return ordered[0] if alone else ordered

    def stream(
        self,
        prompt: OnePrompt,
        *,
        adapters: Forced | None = None,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Answers one prompt piece by piece; the pieces joined are `generate(prompt).text`.

        Leaving the loop early ends the generation. Arguments as `generate`.
        """
        asked = self.asked(**take_call_options(options, adapters))
        config = self.prompts.generation_config(generation_config, max_new_tokens, options)
        with self._lock:
            self._sync()
            [row] = self.prompts.read([prompt], room=config.max_new_tokens)
            [selection] = self._selecting.mixtures([row], adapters, asked, 1)
        return self._decoder.stream(self._fitted, row.ids, selection.mixture, config, self._lock)

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
        asked = self.asked(**options)
        with self._lock:
            self._sync()
            [whole] = self.prompts.read([prompt], room=None)
            gold = self._completions.ids(whole, completion)
            [row] = self.prompts.read([whole], room=len(gold))
            chosen = self._selecting.mixtures([row] * len(mixtures), mixtures, asked, 1)
            return self._completions.mixtures(self._fitted, row.ids, gold, [one.mixture for one in chosen])

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
            mixtures = [forced(entry, self._fitted).mixture for entry in adapters]
            return self._completions.pairs(self._fitted, pairs, mixtures, batch_size)

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

    def _fit_pool(self) -> None:
        version = self.pool.version
        fitted = self.pool.fit(self._layout, on_bad_adapter=self._on_bad_adapter)
        # All or nothing: a pool that cannot be used is refused again at the next call, never half taken over.
        self._selecting.fit(fitted)
        self._fitted, self._seen = fitted, version

    def _sync(self) -> None:
        """Takes note of adapters that were added to or removed from the pool."""
        if self.pool.version == self._seen:
            return
        with self._lock:
            self._fit_pool()
            self._mixer.forget(self._fitted)
