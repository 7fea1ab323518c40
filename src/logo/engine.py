"""`LoGo`: a base model, a pool of adapters, and for every prompt the mixture that answers it.

The only place that knows adapters, mixing and selection together. A prompt walks straight through:

    tokenize -> probe -> signal -> selector -> Selection -> working set -> gates -> model.generate -> Generation
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, OnBadAdapter
from logo.decoder import Decoder, Generation
from logo.decoding import Prompts, Truncation, batches_by_length, check_batch_size, input_device, reads_prompts
from logo.errors import UsageError
from logo.mixing import EXACT, Merge, Mixer
from logo.mixing.working_set import dtype_of
from logo.models import context_length, default_pool, load_base
from logo.prompts import Prompt, several
from logo.scoring import Scored, completion_ids, continued_rows, score_continued, score_mixtures
from logo.selection.calibration import Calibration
from logo.selection.scorer import Scorer, Scorers
from logo.selection.selector import Forced, Selection, forced
from logo.selection.settings import SelectionSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from logo.prompts import OnePrompt


class LoGo:
    """Selects and mixes adapters per prompt on one base model.

    Args:
        model: a Hugging Face causal LM, in eval mode. Its weights are never changed.
        tokenizer: the model's, with a pad token.
        pool: the adapters. May change later (`pool.add`, `pool.remove`); the engine notices before the next call.
        settings: how prompts are read, scored and selected.
        truncation: what to do with prompts that are too long.
        adapter_cache_gb: host memory (10⁹ bytes) for the tensors of adapters that were used last.
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
        truncation: Truncation | None = None,
        adapter_cache_gb: float = 4.0,
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
            model.generation_config,
            self.settings.probe_text,
            model.get_input_embeddings().weight.shape[0],
        )
        self._on_bad_adapter = on_bad_adapter
        self._layout = BaseLayout.of(model)
        self._mixer = Mixer(model, dtype_of(model), int(adapter_cache_gb * 1e9), fold)
        self._decoder = Decoder(model, self.prompts, self._mixer)
        self._lock = threading.RLock()  # a mixture is active on the whole model, so calls take turns
        self.merge = merge
        self._carried: tuple[str, ...] | None = None
        self._fit_pool()

    @classmethod
    def from_pretrained(
        cls,
        base_model: str,
        pool: AdapterPool | str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        device_map: str | dict[str, Any] | None = None,
        model_dir: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        truncation: Truncation | None = None,
        adapter_cache_gb: float = 4.0,
        fold: bool | None = None,
        merge: Merge | str = EXACT,
        on_bad_adapter: OnBadAdapter = "error",
        **settings: Any,
    ) -> LoGo:
        """Loads a base model and puts the pool on it.

        Args:
            base_model: a Hub id, a folder, a short name (`"Llama-3.1-8B"`) or `"demo"`.
            pool: an `AdapterPool`, or a folder to open as one. Default: the base model's own, where it has one (the
                demo's, or the authors' published adapters for the three official models).
            device: `"auto"`, `"cpu"`, `"cuda:0"`, ...; `device_map="auto"` instead spreads over several devices.
            dtype: `"auto"`: the checkpoint's own on an accelerator, float32 on the CPU.
            **settings: the fields of `SelectionSettings`: `signal`, `k`, `probe_context`, ...

        Raises:
            ModelError, HubError: the base model cannot be loaded.
            PoolError, AdapterError: the pool cannot be used on it.
            UsageError: a setting that does not exist or cannot be used.
        """
        chosen = SelectionSettings.of(**settings)
        if pool is None:
            pool = default_pool(base_model, model_dir, on_bad_adapter=on_bad_adapter, cache=chosen.cache)
        elif not isinstance(pool, AdapterPool):
            pool = AdapterPool.from_directory(pool, on_bad_adapter=on_bad_adapter, cache=chosen.cache)
        model, tokenizer = load_base(
            base_model,
            device=device,
            dtype=dtype,
            device_map=device_map,
            model_dir=model_dir,
            revision=revision,
            token=token,
        )
        logo = cls(
            model,
            tokenizer,
            pool,
            settings=chosen,
            truncation=truncation,
            adapter_cache_gb=adapter_cache_gb,
            fold=fold,
            merge=merge,
            on_bad_adapter=on_bad_adapter,
        )
        logo.calibrate()
        return logo

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
        return self._scorers.k if self.settings.k is None else self.settings.k

    @property
    def scorer(self) -> Scorer:
        """How prompts are read and adapters scored, for the pool as it is now; calibrated, if it was not yet."""
        with self._lock:
            self._sync()
            return self._scorers.get(self.settings)

    def calibrate(self) -> Calibration | None:
        """Makes ready to select: calibrates adapters that are not known yet, and indexes all. The first call does too.

        Returns:
            Where prompts are read, and how that was chosen; None for signals without calibration.

        Raises:
            AdapterError: an adapter that cannot be read.
        """
        return self.scorer.calibration

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
        self, prompts: OnePrompt, *, max_new_tokens: int | None = ..., batch_size: int = ...
    ) -> Selection: ...
    @overload
    def select(
        self, prompts: Sequence[OnePrompt], *, max_new_tokens: int | None = ..., batch_size: int = ...
    ) -> list[Selection]: ...
    def select(
        self, prompts: OnePrompt | Sequence[OnePrompt], *, max_new_tokens: int | None = None, batch_size: int = 8
    ) -> Selection | list[Selection]:
        """Which adapters would answer, with their weights and the scores of all.

        Args:
            prompts: one prompt, or several (list in, list out): a string, a conversation (a list of messages with
                `role` and `content`), token ids or a BatchEncoding; see `logo.prompts`.
            max_new_tokens: as in `generate`: a prompt that leaves no room for them is cut in the same place.
            batch_size: prompts per probe. `probe_context="carry"` always takes them one by one, in order.

        Raises:
            UsageError: a prompt that is empty or cannot be read, or an answer that alone would fill the context.
        """
        given, alone = several(prompts)
        rows = self.prompts.read(given, room=self.prompts.room(max_new_tokens))
        selections = self.select_ids(rows, batch_size=batch_size)
        return selections[0] if alone else selections

    def select_ids(self, rows: Sequence[Prompt | Sequence[int]], *, batch_size: int = 8) -> list[Selection]:
        """`select` for prompts that have been read, or are token ids with special tokens included; none is cut."""
        check_batch_size(batch_size)
        with self._lock:
            self._sync()
            return self._select([Prompt.of(row) for row in rows], batch_size)

    def _select(self, rows: Sequence[Prompt], batch_size: int, *, answering: bool = False) -> list[Selection]:
        if self.settings.probe_context == "carry":
            return [self._select_carried(row) for row in rows]
        selections: dict[int, Selection] = {}
        for batch in batches_by_length([len(row) for row in rows], batch_size):
            active = self._fitted.names if self.settings.probe_context == "pool" else ()
            found = self._probe([rows[i] for i in batch], active)
            if answering:  # their tensors are read while the next batch is probed
                self._mixer.prefetch(self._fitted, [name for selection in found for name in selection.adapters])
            selections |= zip(batch, found, strict=True)
        return [selections[i] for i in range(len(rows))]

    def _select_carried(self, row: Prompt) -> Selection:
        """As the official code runs: what the last prompt selected is still active, at full scale, while probing."""
        [selection] = self._probe([row], self._fitted.names if self._carried is None else self._carried)
        self._carried = selection.adapters
        return selection

    def _probe(self, rows: Sequence[Prompt], active: tuple[str, ...]) -> list[Selection]:
        with self._mixer.active(self._fitted, [dict.fromkeys(active, 1.0)], merge=EXACT):
            return self._scorers.select(*self.prompts.pad_probed(rows, input_device(self.model)), self.settings)

    def reselect(
        self, scores: Mapping[str, float], *, k: int | None = None, candidates: Collection[str] | None = None
    ) -> Selection:
        """The selection that scores from before give where another number may answer, or only some adapters may."""
        settings = self.settings if k is None else replace(self.settings, k=k)
        self._sync()
        return self._scorers.choose(torch.tensor(list(scores.values())), list(scores), settings, candidates)

    def restart(self) -> None:
        """Forgets the prompts before, where the next one would depend on them: `carry`, and a running baseline."""
        with self._lock:
            self._carried = None
            self._scorers.restart()

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
        **options: Any,
    ) -> Generation | list[Generation]:
        """Answers each prompt with its own mixture; rows with different mixtures share a batch.

        Args:
            prompts: one prompt, or several (list in, list out, same order); of the kinds that `select` takes.
            adapters: instead of selecting: `{"name": weight, ...}`, or a `Selection`; `{}` is the base model alone.
                A list gives each prompt its own (None: select).
            max_new_tokens: default: the generation config's, else 256 or half of the context, whichever is less.
            batch_size: prompts per forward pass.
            generation_config: any transformers config; default: greedy, whatever the checkpoint's own asks for.
            stop_at_newline: end each answer at its first line; `"official"`: by the official code's rule.
            stop: end each answer before the first of these texts.
            **options: options of `GenerationConfig`, such as `do_sample=True, temperature=0.7`; no others.

        Raises:
            UsageError: a prompt that is empty or cannot be read, a forced adapter that is not in the pool, an option
                that does not exist or cannot be used.
        """
        given, alone = several(prompts)
        check_batch_size(batch_size)
        stop = tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text)
        config = self.prompts.generation_config(generation_config, max_new_tokens, options)
        with self._lock:
            self._sync()
            rows = self.prompts.read(given, room=config.max_new_tokens)
            started = time.perf_counter()
            selections = self._selections(rows, adapters, batch_size)
            probed = (time.perf_counter() - started) / len(rows)
            answers: dict[int, Generation] = {}
            padded = not reads_prompts(config)
            decode = functools.partial(self._decoder, self._fitted, config, stop_at_newline, stop, probed)
            for batch in batches_by_length([len(row) for row in rows], batch_size, padded=padded):
                answers |= zip(batch, decode([rows[i].ids for i in batch], [selections[i] for i in batch]), strict=True)
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
        config = self.prompts.generation_config(generation_config, max_new_tokens, options)
        with self._lock:
            self._sync()
            [row] = self.prompts.read([prompt], room=config.max_new_tokens)
            [selection] = self._selections([row], adapters, 1)
        return self._decoder.stream(self._fitted, row.ids, selection.mixture, config, self._lock)

    def score(self, prompt: OnePrompt, completion: str, mixtures: Sequence[Forced]) -> list[Scored]:
        """What a gold completion is worth under each of several mixtures, teacher-forced; see `logo.scoring`.

        Args:
            mixtures: as `adapters` of `generate`; `{}` is the base model alone. Equal ones are computed once.

        Raises:
            UsageError: no prompt, a completion without tokens or too long, an adapter that is not in the pool.
        """
        with self._lock:
            self._sync()
            wanted = [forced(entry, self._fitted).mixture for entry in mixtures]
            [whole] = self.prompts.read([prompt], room=None)
            text = self.tokenizer.decode(whole.ids) if whole.text is None else whole.text
            gold = completion_ids(self.tokenizer, text, completion, self.prompts.context)
            [row] = self.prompts.read([whole], room=len(gold))
            active = functools.partial(self._mixer.active, self._fitted)
            return score_mixtures(
                self.model, row.ids, gold, wanted, active, len(self.tokenizer), input_device(self.model)
            )

    def score_pairs(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        adapters: Sequence[Forced],
        *,
        batch_size: int = 8,
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
            rows = continued_rows(pairs, mixtures, self.prompts.context)
            active = functools.partial(self._mixer.active, self._fitted)
            pad = functools.partial(self.prompts.pad, side="right", device=input_device(self.model))
            scored: dict[int, Scored] = {}
            for batch in batches_by_length([len(row.ids) for row in rows], batch_size):
                scored |= score_continued(self.model, [rows[i] for i in batch], active, pad, len(self.tokenizer))
        return [scored[number] for number in range(len(pairs))]

    def _selections(
        self, rows: Sequence[Prompt], adapters: Forced | Sequence[Forced | None] | None, batch_size: int
    ) -> list[Selection]:
        """Selects for the rows for which nothing is forced."""
        if adapters is None or isinstance(adapters, (Mapping, Selection)):
            wanted: list[Forced | None] = [adapters] * len(rows)
        else:
            wanted = list(adapters)
            if len(wanted) != len(rows):
                raise UsageError(f"adapters: expected one entry for each of {len(rows)} prompts, found {len(wanted)}")
        open_rows = [i for i, entry in enumerate(wanted) if entry is None]
        chosen = dict(
            zip(open_rows, self._select([rows[i] for i in open_rows], batch_size, answering=True), strict=True)
        )
        return [chosen[i] if entry is None else forced(entry, self._fitted) for i, entry in enumerate(wanted)]

    def _fit_pool(self) -> None:
        version = self.pool.version
        fitted = self.pool.fit(self._layout, on_bad_adapter=self._on_bad_adapter)
        before, bos = getattr(self, "_scorers", None), self.tokenizer.bos_token_id
        scorers = Scorers(self.model, fitted, self.settings, self.prompts.texts, bos, before)
        if before is not None:
            scorers.get(self.settings)
        # All or nothing: a pool that cannot be used is refused again at the next call, never half taken over.
        self._fitted, self._scorers, self._seen = fitted, scorers, version

    def _sync(self) -> None:
        """Takes note of adapters that were added to or removed from the pool."""
        if self.pool.version == self._seen:
            return
        with self._lock:
            self._fit_pool()
            self._mixer.forget()
            if self._carried is not None:
                self._carried = tuple(name for name in self._carried if name in self._fitted)
