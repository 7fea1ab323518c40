"""`LoGo`: selects and mixes adapters for every prompt.

prompts.read -> Prompt -> Scorer -> scores -> Selector -> Selection -> Mixer.active -> Decoder -> Generation
"""

from __future__ import annotations

import inspect
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from logo.adapters.activation import EVERYWHERE
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, CurrentPool, warn_of_bad
from logo.adapters.sources import OnBadAdapter
from logo.adapters.write import write_mixture
from logo.core import Forced, Generation, Options, Prompt, Selection
from logo.decoding import (
    Batch,
    Decoder,
    Decoding,
    batches_by_length,
    call_config,
    check_batch_size,
    check_streamable,
    ended_by_errors,
    reads_prompts,
)
from logo.endings import cut_pieces
from logo.errors import LoGoError, PoolError, Unsure, UsageError, check_choice, check_type, listed
from logo.mixing.cache import AdapterCache, bytes_of
from logo.mixing.mixer import Mixer, Mixture
from logo.models import check_mode, context_length, devices, droppers, lock_of, without_autocast
from logo.opening import Preset, opened
from logo.prefix_cache import PrefixCache, reusable
from logo.prompts import Prompts, Truncation, several
from logo.scoring import MAX_TOKENS, Scored, encoded, score_pairs
from logo.selection.calibration import Calibration
from logo.selection.index import Tell
from logo.selection.scorer import BaseReader, Scorer
from logo.selection.selector import for_each, forced
from logo.selection.settings import OPTIONS, ProbeContext, SelectionSettings, check_context
from logo.selection.texts import WHOLE

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from logo.prompts import OnePrompt


class LoGo:
    """Selects and mixes adapters per prompt on one base model.

    Args:
        model: a Hugging Face causal LM, in eval mode. Its weights are never changed.
        tokenizer: the model's, with a pad token.
        pool: the adapters. It may be changed later (`logo.pool.add`, `logo.pool.remove`), which the next call sees.
        settings: how prompts are read, scored and selected.
        generation_config: how calls decode that give no config; None: greedily.
        truncation: how prompts are cut that are too long.
        probe_context: the adapters that are active while probing; other than `"base"` for the paper's signals alone.
        adapter_memory_gb: memory (10⁹ bytes) for adapters on the devices of the model; None: a share of the free
            memory. Half of it is for loaded adapters, half for the copies that a batch multiplies.
        prefix_cache_gb: memory for what the base model reads before adapters act that act from a position on only.
        merge: add a mixture that all rows of a batch share to a copy of the weights, so that decoding costs what the
            base model costs. None: for long answers, unless that rounds to half precision; see `logo.mixing.mixer`.
        on_bad_adapter: what to do with adapters that do not fit the base model.

    Raises:
        PoolError: an adapter does not fit.
        UsageError: something else than a pool, or a model with layers of PEFT or with dropout in training mode.

    Attributes:
        model, tokenizer, pool, settings, probe_context, merge: the same.
        prompts, adapter_cache: token ids of prompts; the adapters on the devices of the model.
        prefix_cache: None: the model keeps more than keys and values, so that prompts are read under their mixtures.
        versions: of libraries that run the model, beside PyTorch and transformers.
        engine_options: of what runs the model, as the user gave them, on which results depend; none in this process.
    """

    versions: Mapping[str, str] = MappingProxyType({})
    engine_options: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pool: AdapterPool | CurrentPool,
        *,
        settings: SelectionSettings | None = None,
        generation_config: GenerationConfig | None = None,
        truncation: Truncation | None = None,
        probe_context: ProbeContext = "base",
        adapter_memory_gb: float | None = None,
        prefix_cache_gb: float = 0.25,
        merge: bool | None = None,
        on_bad_adapter: OnBadAdapter = "error",
    ) -> None:
        pool = pool.value if isinstance(pool, CurrentPool) else pool
        check_type("pool", pool, AdapterPool, "an AdapterPool, such as AdapterPool.open(SOURCE)")
        prefix_cache_bytes = bytes_of("prefix_cache_gb", prefix_cache_gb)
        self._droppers = droppers(model)
        self.model, self.tokenizer, self.settings = model, tokenizer, settings or SelectionSettings()
        self.pool = CurrentPool(pool)
        check_type("truncation", truncation or Truncation(), Truncation, "a logo.prompts.Truncation")
        check_choice("on_bad_adapter", on_bad_adapter, OnBadAdapter)
        self.probe_context, self.merge = probe_context, merge
        check_context(probe_context, self.settings.signal)
        self._turns = lock_of(model)
        self._lock: threading.RLock = self._turns.lock
        with self._lock:  # an answer of another engine sets the checkpoint's config aside
            self._checkpoint = model.generation_config
        vocabulary = model.get_input_embeddings().weight.shape[0]
        limits = (context_length(model), truncation or Truncation(), self.settings.probe_text, vocabulary)
        self.prompts = Prompts(tokenizer, *limits)
        self._generation_config, self._on_bad_adapter = generation_config, on_bad_adapter
        self._layout = BaseLayout.of(model)
        self.adapter_cache = AdapterCache.of(model, self._layout, adapter_memory_gb)
        self._mixer = Mixer(model, self.adapter_cache, merge)
        # Where it is entered, a caller's `torch.autocast` is off: scores are compared with what a calibration keeps.
        self._exact = without_autocast(model)
        self.prefix_cache = PrefixCache(model, prefix_cache_bytes) if reusable(model) else None
        # Some recurrent models read padding; with long-rope, the longest row of a batch sets the angles of all.
        self._alike = not reusable(model)
        decoder = Decoder(model, self.prompts, self._mixer, self.prefix_cache)
        self._decode: Callable[[Batch, BaseStreamer | None], list[Generation]] = decoder
        self._pieces: Callable[[Batch], Generator[str]] = decoder.stream
        self._carried: tuple[str, ...] | None = None  # the adapters that the last prompt selected
        self._scorers: dict[str, Scorer] = {}  # by signal, of the pool as it is
        self._earlier: dict[str, Scorer] = {}  # of an earlier pool, whose responses are reused
        self.take(self.prepared(pool))
        warn_of_bad(self._fitted.refused)

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | os.PathLike[str],
        pool: AdapterPool | str | Path | Sequence[str | Path] | None = None,
        *,
        engine: str = "local",
        preset: Preset | None = None,
        **options: Any,
    ) -> LoGo:
        """Loads a base model, opens a pool for it, and calibrates the pool if its responses are not cached.

        Args:
            base_model: a Hub id, a folder, a short name (`"Llama-3.1-8B"`) or `"demo"`.
            pool: an `AdapterPool`, or what `AdapterPool.open` takes: a folder, a Hub repository, a manifest, or several
                of these. Default: the pool of the base model, for the bundled and the three official models.
            engine: `"local"` runs the model in this process; `"vllm"` runs vLLM's offline engine (docs/vllm.md), and
                returns an engine with the same methods.
            preset: `"official"` changes defaults to those of the authors' script, as `logo evaluate --preset official`
                does: signal `norm`, k 20, `probe_context="carry"`, prompts cut at their end to 2048 tokens, float32,
                and the checkpoint's own generation config.
            trust_remote_code: not supported; True is an error.
            **options: `model_dir`, `revision`, `token`, `device`, `dtype`, `device_map`, `attn_implementation`,
                `quantization_config`, `model_kwargs` of `logo.models.load_base`; those of `LoGo`; and the fields of
                `SelectionSettings`: `signal`, `k`, `window`, ...

        Raises:
            ModelError, HubError: the base model cannot be loaded.
            PoolError, AdapterError: the pool cannot be used on it.
            UsageError: a setting that does not exist or cannot be used.
        """
        return opened(cls, base_model, pool, engine=engine, preset=preset, **options)

    # -- the pool, and what is known of it -------------------------------------------------------------------------

    @property
    def fitted(self) -> AdapterPool:
        """The pool as it is now, fitted to the base model, without adapters that do not fit (`on_bad_adapter="skip"`).

        Raises:
            PoolError, AdapterError: it was changed, and cannot be used any more; calls before used the old one.
        """
        check_mode(self._droppers)
        if self.pool.value is not self._seen:
            with self._lock:
                pool = self.pool.value
                if pool is not self._seen:
                    prepared = self.prepared(pool)
                    if self.settings.signal in self._scorers:  # a pool that cannot be scored changes nothing
                        self.calibrate(prepared=prepared)
                    self.take(prepared, pool)
                    warn_of_bad(prepared.fitted.refused[len(pool.refused) :])
        return self._fitted

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in use, in pool order."""
        return self.fitted.names

    @property
    def scorer(self) -> Scorer:
        """The scorer of the engine's signal, for the pool as it is now, which is calibrated first if necessary."""
        self.fitted  # noqa: B018
        return self._scorer(self.settings.signal)

    @property
    def k(self) -> int:
        """Adapters per prompt: the setting, or the default of the pool as it is now."""
        return self.settings.k or min(self.fitted.default_k, len(self.scorer.selector.names))

    @property
    def points(self) -> tuple[str, ...]:
        """Where prompts are read, such as `"4.v_proj"`; calibrates first if necessary."""
        return tuple(point.name for point in self.scorer.points)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that compute."""
        return devices(self.model)

    def calibrate(
        self, signal: str | None = None, tell: Tell | None = None, prepared: Fitted | None = None
    ) -> Calibration | None:
        """Calibrates adapters that are not cached, and indexes all, which the first selection would do otherwise.

        Args:
            signal: another signal than the engine's own.
            tell: called now and then with the numbers of adapters in the index so far and in all.
            prepared: a pool that is not in use yet.

        Returns:
            The calibration, which says where prompts are read; None for signals without one.

        Raises:
            AdapterError, PoolError: an adapter that cannot be read, or that the signal cannot score.
        """
        with self._lock:
            signal = signal or self.settings.signal
            if prepared is None:
                self.fitted  # noqa: B018
                return self._scorer(signal, tell).calibration
            with self._turns.running():
                prepared.scorers[signal] = self._opened(prepared.fitted, signal, tell)
            return prepared.scorers[signal].calibration

    def prepared(self, pool: AdapterPool) -> Fitted:
        """Fits another pool while this one is in use: nothing changes before `take`. Errors as `LoGo`."""
        with self._lock:
            how: dict[str, Any] = {"on_bad_adapter": self._on_bad_adapter, "activation": self.settings.activation}
            fitted = pool.fit(self._layout, model=self.model, **how)
            plain = [adapter.name for adapter in fitted if adapter.activation.everywhere]
            if plain and len(plain) < len(fitted):
                found = f"{len(plain)} of {len(fitted)} adapters act on every token ({listed(plain)}), so the pool is"
                once = "reading prompts once needs activation in all of its adapters"
                warnings.warn(f"{found} probed like a plain one: {once}", UserWarning, stacklevel=3)
            return Fitted(pool.without(fitted.refused), fitted, {})

    def take(self, prepared: Fitted, instead_of: AdapterPool | None = None) -> None:
        """Replaces the pool by a prepared one; a change of the pool `instead_of` which it comes is kept."""
        with self._lock:
            before = self._earlier | self._scorers
            self._earlier = {signal: one for signal, one in before.items() if signal not in prepared.scorers}
            self._fitted, self._seen, self._scorers = prepared.fitted, prepared.pool, dict(prepared.scorers)
            self.pool.put(prepared.pool, instead_of)
            # An invocation usually opens the assistant's turn, and the answer reuses what the probe has read.
            asked = self.settings.probe_text
            invoked = self._fitted.read_once and self._fitted.invoked
            self._probes_all = asked == "all" or (asked is None and invoked)
            self._mixer.forget(self._fitted)

    def _opened(self, pool: AdapterPool, signal: str, tell: Tell | None = None) -> Scorer:
        before = self._scorers.get(signal) or self._earlier.get(signal)
        cache = self.prefix_cache if self.probe_context == "base" else None
        base = BaseReader(self.model, self.prompts.texts, prefix_cache=cache)
        with self._exact():
            return Scorer.open(base, pool, self.settings, signal, before=before, tell=tell)

    def _scorer(self, signal: str, tell: Tell | None = None) -> Scorer:
        """The scorer of a signal. If it has to be calibrated, the base model runs, and no adapter may be active."""
        how = self.settings.reading(self._fitted, signal)  # which changes if another signal takes the name
        if signal not in self._scorers or self._scorers[signal].signal != how:
            with self._turns.running():  # a calibration with adapters mixed in would be wrong for ever
                if signal not in self._scorers or self._scorers[signal].signal != how:
                    self._scorers[signal] = self._opened(self._fitted, signal, tell)
                    self._earlier.pop(signal, None)
        return self._scorers[signal]

    # -- selecting -------------------------------------------------------------------------------------------------

    @overload
    def select(self, prompts: OnePrompt, **options: Any) -> Selection: ...
    @overload
    def select(self, prompts: Sequence[OnePrompt], **options: Any) -> list[Selection]: ...
    def select(
        self,
        prompts: OnePrompt | Sequence[OnePrompt],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> Selection | list[Selection]:
        """Selects the adapters that would answer, with their weights and the scores of all.

        Args:
            prompts: one prompt, or several (list in, list out): a string, a conversation (a list of messages with
                `role` and `content`) or token ids; see `logo.prompts`.
            max_new_tokens: as in `generate`, so that a long prompt is cut in the same place.
            batch_size: prompts per probe; fewer if they are long, and one with `probe_context="carry"`.
            **options: `k`, `signal`, `weighting` and `candidates` for this call; see `logo.core.Options`.

        Raises:
            UsageError: a prompt or an option that cannot be used, or an answer that alone would fill the context.
            PoolError: a candidate that is not in the pool, or adapters that the call's signal cannot score.
        """
        given, alone = several(prompts, self.tokenizer)
        check_batch_size(batch_size)
        with self._call() as pool:
            call = self.settings.options(pool, options)
            usual = getattr(self._generation_config, "max_new_tokens", None)
            rows = self.prompts.read(given, self.prompts.room(usual if max_new_tokens is None else max_new_tokens))
            selections = self._mixtures(pool, rows, [None] * len(rows), call, batch_size)
        return selections[0] if alone else selections

    def options(self, **options: Any) -> Options:
        """Checks the options of one call, for `outcomes`; errors as `select`."""
        return self.settings.options(self.fitted, options)

    def outcomes(
        self, rows: Sequence[Prompt], options: Sequence[Options], batch_size: int = 8
    ) -> list[Selection | LoGoError]:
        """One selection for each prompt that was read, by its own `options`, or the error that its scores give."""
        with self._call() as pool:
            return self._outcomes(pool, rows, options, batch_size)

    def _outcomes(
        self, pool: AdapterPool, rows: Sequence[Prompt], options: Sequence[Options], batch_size: int
    ) -> list[Selection | LoGoError]:
        found: dict[int, Selection | LoGoError] = {}
        groups: dict[Any, list[int]] = {}  # rows of one signal, each alone if it depends on the one before
        for i, call in enumerate(options):
            groups.setdefault((call.signal, self.probe_context == "carry" and i), []).append(i)
        for (signal, _), members in groups.items():
            if self.probe_context != "base":
                check_context(self.probe_context, signal)
            scorer, among = self._scorer(signal), [options[i].candidates for i in members]
            scores = self._scores(pool, scorer, [rows[i] for i in members], among, batch_size)
            silent = {i: pool.silent(rows[i].ids) for i in members}
            each = zip(members, scores, strict=True)
            found |= {i: scorer.selector.outcome(row, options[i], silent[i]) for i, row in each}
            last = found[members[-1]]
            self._carried = last.adapters if isinstance(last, Selection) else self._carried
        return [found[i] for i in range(len(rows))]

    def reselect(self, scores: Selection | Mapping[str, float], **options: Any) -> Selection:
        """The selection that the scores of an earlier one give with other options of `select`.

        Args:
            scores: the earlier selection; or its scores alone, which are taken for those of the call's signal.

        Raises:
            UsageError: a selection of another signal than the call's, or one without scores, which was forced.
            PoolError: scores of adapters that are not in the pool.
        """
        silent: tuple[str, ...] = ()
        if isinstance(scores, Selection):
            made_by, asked, silent = scores.signal, options.get("signal"), scores.silent
            if made_by is not None and asked not in (None, made_by):
                raise UsageError(
                    f"signal {asked!r}: the selection has the scores of {made_by!r}, which are no scores of another "
                    "signal; leave signal out, or select again"
                )
            options["signal"], scores = made_by or asked, scores.scores
        check_type("reselect", scores, Mapping, "a selection or scores by name")
        if not scores:
            raise UsageError("reselect: expected the scores of a selection, found none; a forced selection has none")
        call, pool = self.options(**options), self.fitted
        unknown = [repr(name) for name in scores if name not in pool]
        if unknown:
            raise PoolError(f"reselect: expected scores of adapters in the pool, found those of {listed(unknown, 5)}")
        for name, score in scores.items():
            check_type(f"reselect: the score of {name!r}", score, Real, "a number")
        # A loop over an open stream, which holds the lock, waits only if the signal has to be calibrated first.
        selector = replace(self._scorer(call.signal).selector, names=tuple(scores))
        return selector(torch.tensor([float(score) for score in scores.values()], dtype=torch.float64), call, silent)

    def restart(self) -> None:
        """Forgets earlier prompts, on which `probe_context="carry"` depends."""
        with self._lock:
            self._carried = None

    def _scores(
        self, pool: AdapterPool, scorer: Scorer, rows: Sequence[Prompt], among: Sequence[Any], batch_size: int
    ) -> Tensor:
        """Scores (rows, adapters) of prompts, which are probed in batches."""
        active = pool.names if self.probe_context != "base" else ()
        if self.probe_context == "carry" and self._carried is not None:
            active = tuple(name for name in self._carried if name in pool)
        probed, window = [row.ids if self._probes_all else row.probed for row in rows], scorer.signal.window
        scores = torch.empty(len(rows), len(scorer.selector.names), dtype=torch.float32)
        lengths = [len(row) if window == WHOLE else min(len(row), sum(window)) for row in probed]
        for batch in batches_by_length(lengths, batch_size, padded=not self._alike, tokens=MAX_TOKENS):
            with self._mixer.active(pool, [Mixture(dict.fromkeys(active, 1.0))]), self._exact():
                scores[batch] = scorer([probed[i] for i in batch], [among[i] for i in batch])
        return scores

    # -- answering -------------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: OnePrompt, **options: Any) -> Generation: ...
    @overload
    def generate(self, prompts: Sequence[OnePrompt], **options: Any) -> list[Generation]: ...
    def generate(
        self,
        prompts: OnePrompt | Sequence[OnePrompt],
        *,
        adapters: Forced | Sequence[Forced | None] | None = None,
        batch_size: int = 8,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> Generation | list[Generation]:
        """Answers each prompt with its own mixture; rows with different mixtures share a batch.

        Args:
            prompts: one prompt, or several (list in, list out, same order); of the kinds that `select` takes.
            adapters: instead of selecting: `{"name": weight, ...}`, or a `Selection`; `{}` is the base model alone.
                A list gives each prompt its own (None: select).
            batch_size: prompts per forward pass.
            streamer: a streamer of transformers (`TextStreamer`, ...) that gets each token, for a single prompt.
            **options: options of `select`; of `GenerationConfig`, such as `do_sample=True, temperature=0.7`; and

                max_new_tokens: default: that of the generation config, else the smaller of 256 and half of the context.
                generation_config: of transformers; default: the engine's own, which is greedy unless it was given
                    another. What it leaves open is greedy, too, but for the checkpoint's end tokens and stop texts.
                stop_at_newline: end each answer after its first line; `"official"`: by the rule of the official code.
                stop: end each answer before the first of these texts.

        Raises:
            UsageError: a prompt that is empty or cannot be read, an option that does not exist or cannot be used.
            PoolError: as `select`; a forced adapter that is not in the pool, or not among the candidates.
        """
        with ended_by_errors(streamer), self._call() as pool:
            given, alone = several(prompts, self.tokenizer)
            check_batch_size(batch_size)
            call, decoding = self._checked(pool, adapters, options)
            rows = self.prompts.read(given, decoding.config.max_new_tokens)
            if streamer is not None:
                check_streamable(len(rows), decoding.config)
            wanted, probed = for_each(adapters, len(rows), pool, call.candidates), 0.0
            # All before the first answer: `carry` follows the order of prompts, and a refused one costs no answers.
            if self.probe_context == "carry" or call.when_unsure == "refuse":
                started = time.perf_counter()
                wanted = [*self._mixtures(pool, rows, wanted, call, batch_size)]
                probed = (time.perf_counter() - started) / len(rows)
            answers: dict[int, Generation] = {}
            for batch in self._batches(rows, batch_size, decoding):
                with self._held(pool):
                    started, some = time.perf_counter(), [rows[i] for i in batch]
                    chosen = self._mixtures(pool, some, [wanted[i] for i in batch], call, batch_size)
                    each = probed + (time.perf_counter() - started) / len(batch)
                    made = self._decode(Batch(pool, [row.ids for row in some], chosen, decoding), streamer)
                made = [replace(one, seconds={"probe": each} | one.seconds) for one in made]
                answers |= zip(batch, made, strict=True)
        return answers[0] if alone else [answers[i] for i in range(len(rows))]

    def stream(self, prompt: OnePrompt, *, adapters: Forced | None = None, **options: Any) -> Iterator[str]:
        """Yields the answer to one prompt in pieces, which together are `generate(prompt).text`; arguments as there.
        Leaving the loop ends the generation."""
        with self._call() as pool:
            call, decoding = self._checked(pool, adapters, options)
            check_streamable(1, decoding.config)
            [row] = self.prompts.read([prompt], decoding.config.max_new_tokens)
            with self._held(pool):
                wanted = for_each(adapters, 1, pool, call.candidates)
                [selection] = self._mixtures(pool, [row], wanted, call, 1)
                pieces = self._pieces(Batch(pool, [row.ids], [selection], decoding))
        return cut_pieces(pieces, decoding.stop)

    def score(
        self, prompt: OnePrompt, completion: str, mixtures: Sequence[Forced | None], **options: Any
    ) -> list[Scored]:
        """Scores a gold completion under each of several mixtures, teacher-forced; see `logo.scoring`.

        Args:
            mixtures: as `adapters` of `generate`, each computed once: `{}` is the base model, None the own selection.
            **options: options of `select`.

        Raises:
            UsageError: an empty prompt, a completion without tokens or too long, or no list of mixtures.
            PoolError: as `generate`.
        """
        check_type("mixtures", mixtures, (list, tuple), "a list of mixtures")
        with self._call() as pool:
            call = self.settings.options(pool, options)
            row, gold = encoded(self.prompts, prompt, completion)
            wanted = for_each(mixtures, len(mixtures), pool, call.candidates)
            chosen = self._mixtures(pool, [row] * len(mixtures), wanted, call, 1)
            pairs = [(row.ids, gold)] * len(mixtures)
            return self._scored(pool, pairs, [one.mixture for one in chosen], max(1, len(mixtures)))

    def score_pairs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapters: Sequence[Forced], *, batch_size: int = 8
    ) -> list[Scored]:
        """Scores completions, each after its own prompt and under its own mixture; errors as `score`.

        Args:
            pairs: token ids of a prompt, special tokens included, and of its completion.
            adapters: one entry for each pair, as `adapters` of `generate`.
            batch_size: rows per forward pass.
        """
        check_batch_size(batch_size)
        with self._call() as pool:
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

    def close(self) -> None:
        """Ends processes that the engine has started, without which it cannot answer; the local engine has none."""

    @contextmanager
    def _call(self) -> Iterator[AdapterPool]:
        """Holds the lock, for a call on the pool as it is now, which leaves no trace if it fails."""
        with self._lock:
            carried = self._carried
            try:
                yield self.fitted
                carried = self._carried
            finally:
                self._carried = carried

    def _held(self, pool: AdapterPool) -> AbstractContextManager[Any]:
        """Inside the block, what the probe has read stays cached for the answer."""
        cache = self.prefix_cache
        return nullcontext() if cache is None or pool.activations == (EVERYWHERE,) else cache.held()

    def _checked(
        self, pool: AdapterPool, adapters: Forced | Sequence[Forced | None] | None, options: dict[str, Any]
    ) -> tuple[Options, Decoding]:
        """The options of a call that answers, checked; errors as `generate`."""
        options = dict(options)
        asked = {name: options.pop(name) for name in OPTIONS if name in options}
        for name, value in asked.items():
            if value is not None and name != "candidates" and isinstance(adapters, (Mapping, Selection)):
                raise UsageError(f"{name} selects adapters, but `adapters` fixes the mixture: leave out one of the two")
        call = self.settings.options(pool, asked)
        config, most = options.pop("generation_config", None), options.pop("max_new_tokens", None)
        ends = (options.pop("stop_at_newline", False), options.pop("stop", ()))
        config = call_config(self.prompts, config or self._generation_config, options, most, self._checkpoint)
        return call, Decoding.of(config, *ends)

    def _mixtures(
        self,
        pool: AdapterPool,
        rows: Sequence[Prompt],
        wanted: Sequence[Selection | None],
        call: Options,
        batch_size: int,
    ) -> list[Selection]:
        """The mixture of each row: the forced one, or a selection. Raises the first error that scores give."""
        done = {i: one for i, one in enumerate(wanted) if one is not None}
        left = [i for i in range(len(rows)) if i not in done]
        found = self._outcomes(pool, [rows[i] for i in left], [call] * len(left), batch_size)
        for i, one in zip(left, found, strict=True):
            if isinstance(one, Unsure) and rows[0] is not rows[-1]:
                one.reason = f"prompt {i + 1}: {one.reason}"
            if isinstance(one, LoGoError):
                raise one
            done[i] = one
        return [done[i] for i in range(len(rows))]

    def _batches(self, rows: Sequence[Prompt], batch_size: int, decoding: Decoding) -> Iterable[Sequence[int]]:
        """The indices of rows that are answered together."""
        counted = "position_ids" in inspect.signature(self.model.forward).parameters  # else padding counts as tokens
        alike = self._alike or not counted or reads_prompts(decoding.config)
        return batches_by_length([len(row.ids) for row in rows], batch_size, padded=not alike)

    def _scored(
        self,
        pool: AdapterPool,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        mixtures: Sequence[Mapping[str, float]],
        batch_size: int,
    ) -> list[Scored]:
        """Many completions, each after its own prompt and under its own mixture; errors as `continued_rows`."""
        return score_pairs(self.model, self.prompts, self._mixer, pool, pairs, mixtures, batch_size)


@dataclass(frozen=True)
class Fitted:
    """A pool that an engine can take at once."""

    pool: AdapterPool  # as it was given, without adapters that do not fit
    fitted: AdapterPool  # matched to the base model
    scorers: dict[str, Scorer]  # by the signals for which `LoGo.calibrate` has calibrated it
