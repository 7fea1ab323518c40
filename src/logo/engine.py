"""`LoGo`: selects and mixes adapters for every prompt, with a base model in this process."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, CurrentPool, warn_of_bad
from logo.adapters.sources import OnBadAdapter
from logo.answering import AnsweringEngine
from logo.core import Options, Prompt
from logo.decoding import (
    Batch,
    Decoder,
    Decoding,
    batches_by_length,
    reads_prompts,
)
from logo.errors import PoolError, UsageError, check_choice, check_type, listed
from logo.mixing.cache import AdapterCache, bytes_of
from logo.mixing.mixer import Mixer, Mixture
from logo.models import WeightWatch, check_mode, context_length, devices, droppers, lock_of, without_autocast
from logo.opening import Preset, opened
from logo.prefix_cache import PrefixCache, reusable
from logo.prompts import Prompts, Truncation
from logo.scoring import MAX_TOKENS, score_pairs
from logo.selection.base_reader import BaseReader
from logo.selection.calibration import Calibration
from logo.selection.encoder import NO_TEXTS, Embedded, embed_by_text, load_encoder
from logo.selection.evidence import Kind
from logo.selection.index import Tell
from logo.selection.scorer import Scorer
from logo.selection.settings import ProbeContext, SelectionSettings, check_context
from logo.state import EngineState
from logo.streams import Stream

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class LoGo(AnsweringEngine):
    """Selects and mixes adapters per prompt on one base model.

    Args:
        model: a Hugging Face causal LM, in eval mode. Its weights are never changed. If the caller changes them between
            two calls, as by `load_state_dict`, the next call calibrates the pool anew; `logo.models.WeightWatch` says
            which changes are noticed.
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
        settings = SelectionSettings() if settings is None else settings
        truncation = Truncation() if truncation is None else truncation
        check_type("pool", pool, AdapterPool, "an AdapterPool, such as AdapterPool.open(SOURCE)")
        check_type("settings", settings, SelectionSettings, "a SelectionSettings, such as SelectionSettings(k=5)")
        check_type("truncation", truncation, Truncation, "a logo.prompts.Truncation")
        check_choice("on_bad_adapter", on_bad_adapter, OnBadAdapter)
        check_context(probe_context, settings.signal)
        prefix_cache_bytes = bytes_of("prefix_cache_gb", prefix_cache_gb)
        if settings.encoder is not None:
            load_encoder(settings.encoder)  # one that cannot be loaded is refused before a pool is read
        self._droppers = droppers(model)
        self._weights = WeightWatch(model)
        self._turns = lock_of(model)
        with self._turns.lock:  # an answer of another engine sets the checkpoint's config aside
            self._checkpoint = model.generation_config

        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.probe_context = probe_context
        self.merge = merge
        self._generation_config = generation_config
        self._evidence: tuple[Kind, ...] | None = None  # all that there is
        self._on_bad_adapter = on_bad_adapter
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.prompts = Prompts(tokenizer, context_length(model), truncation, settings.probe_text, vocabulary)
        self._layout = BaseLayout.of(model)
        self.adapter_cache = AdapterCache.of(model, self._layout, adapter_memory_gb)
        self._mixer = Mixer(model, self.adapter_cache, merge)
        # Where it is entered, a caller's `torch.autocast` is off: scores are compared with what a calibration keeps.
        self._exact = without_autocast(model)
        self.prefix_cache = PrefixCache(model, prefix_cache_bytes) if reusable(model) else None
        # Some recurrent models read padding; with long-rope, the longest row of a batch sets the angles of all.
        self._alike = not reusable(model)
        self._decoder = Decoder(model, self.prompts, self._mixer, self.prefix_cache)
        self._decode = self._decoder
        self._scored = partial(score_pairs, model, self.prompts, self._mixer)

        with self._turns.lock:
            self._state = self._fit(pool)
        self.pool = CurrentPool(self._state.pool)
        warn_of_bad(self._state.fitted.refused)

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
    def scorer(self) -> Scorer:
        """The scorer of the engine's signal, for the pool as it is now, which is calibrated first if necessary."""
        return self._scorer(self._current(), self.settings.signal)

    @property
    def points(self) -> tuple[str, ...]:
        """Where prompts are read, such as `"4.v_proj"`; calibrates first if necessary."""
        return tuple(point.name for point in self.scorer.points)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that compute."""
        return devices(self.model)

    def only(self, evidence: Collection[Kind]) -> LoGo:
        """An engine on the same model and pool that selects by some kinds of evidence alone, for studies:
        `"responses"`, `"examples"`, `"encoder"`. Its first selection raises UsageError for a kind that is lacking."""
        if isinstance(evidence, str) or not evidence:
            raise UsageError(f"only: expected some of {', '.join(get_args(Kind))}, found {evidence!r}")
        engine = copy.copy(self)
        engine._evidence = tuple(evidence)
        state = self._current()
        engine._state = replace(state, scorers={}, earlier={**state.earlier, **state.scorers})
        return engine

    def calibrate(self, signal: str | None = None, tell: Tell | None = None) -> Calibration | None:
        """Calibrates adapters that are not cached, and indexes all, which the first selection would do otherwise.

        Args:
            signal: another signal than the engine's own.
            tell: called now and then with the numbers of adapters in the index so far and in all.

        Returns:
            The calibration, which says where prompts are read; None for signals without one.

        Raises:
            AdapterError, PoolError: an adapter that cannot be read, or that the signal cannot score.
        """
        with self._call() as state:
            return self._scorer(state, signal or self.settings.signal, tell).calibration

    def prepared(self, pool: AdapterPool | None = None) -> EngineState:
        """Fits another pool (None: the present one) while this one is in use: nothing changes before `take`. Errors as
        `LoGo`."""
        with self._turns.lock:
            return self._current() if pool is None else self._fit(pool).following(self._state)

    def calibrated(self, state: EngineState, signal: str, tell: Tell | None = None) -> EngineState:
        """The same state with a scorer of a signal, which `take` puts in use; arguments and errors as `calibrate`."""
        if self._has_scorer(state, signal):
            return state
        prefix_cache = self.prefix_cache if self.probe_context == "base" else None
        base = BaseReader(self.model, self.prompts.texts, prefix_cache=prefix_cache, text_of=self.prompts.text_of)
        # A calibration with adapters mixed in, or of other weights than it is kept for, would be wrong for ever.
        with self._turns.running(), self._exact():
            state = state.with_weights(self._weights.stamp())
            before = state.scorers.get(signal) or state.earlier.get(signal)
            scorer = Scorer.open(base, state.fitted, self.settings, signal, before=before, tell=tell)
        if self._evidence is not None:
            scorer = scorer.only(self._evidence)
        return state.with_scorer(signal, scorer)

    def take(self, prepared: EngineState, instead_of: AdapterPool | None = None) -> None:
        """Replaces the pool by a prepared one; a change of the pool `instead_of` which it comes is kept."""
        with self._turns.lock:
            self._put(prepared.following(self._state))
            self.pool.put(prepared.pool, instead_of)
            self._mixer.forget(prepared.fitted)

    def _fit(self, pool: AdapterPool) -> EngineState:
        """The state of a pool of which nothing is computed yet. The lock is held."""
        if not len(pool):
            raise PoolError("the pool has no adapter: expected one or more; add one, as with logo.pool.add(FOLDER)")
        activation = self.settings.activation
        fitted = pool.fit(self._layout, model=self.model, on_bad_adapter=self._on_bad_adapter, activation=activation)
        plain = [adapter.name for adapter in fitted if adapter.activation.everywhere]
        if plain and len(plain) < len(fitted):
            everywhere = f"{len(plain)} of {len(fitted)} adapters act on every token ({listed(plain)})"
            warnings.warn(
                f"{everywhere}, so the pool is probed like a plain one: reading prompts once needs activation in all "
                "of its adapters",
                UserWarning,
                stacklevel=3,
            )
        probe_text = self.settings.probe_text
        if probe_text is None and fitted.read_once and fitted.invoked:
            # An invocation usually opens the assistant's turn, and the answer reuses what the probe has read.
            probe_text = "all"
        return EngineState(pool.without(fitted.refused), fitted, self._weights.stamp(), probe_text == "all")

    def _current(self) -> EngineState:
        """The state for the pool as it is now, which is fitted first if it has changed; errors as `fitted`."""
        check_mode(self._droppers)
        if self.pool.value is self._state.pool:
            return self._state
        with self._turns.lock:
            pool = self.pool.value
            if pool is not self._state.pool:
                prepared = self.prepared(pool)
                if self.settings.signal in self._state.scorers:  # a pool that cannot be scored changes nothing
                    prepared = self.calibrated(prepared, self.settings.signal)
                self.take(prepared, pool)
                warn_of_bad(prepared.fitted.refused[len(pool.refused) :])
            return self._state

    def _scorer(self, state: EngineState, signal: str, tell: Tell | None = None) -> Scorer:
        """The scorer of a signal. If it has to be calibrated, the base model runs, and no adapter may be active."""
        if self._has_scorer(state, signal):
            return state.scorers[signal]
        with self._turns.running():
            if self._state.fitted is not state.fitted:  # the pool has changed since the call began
                return self.calibrated(state, signal, tell).scorers[signal]
            return self._put(self.calibrated(self._state, signal, tell)).scorers[signal]

    def _has_scorer(self, state: EngineState, signal: str) -> bool:
        """Whether the state has a scorer of a signal; not if a plugin has registered another one by its name since."""
        scorer = state.scorers.get(signal)
        return scorer is not None and scorer.signal == self.settings.signal_for(state.fitted, signal)

    def _with_present_weights(self, state: EngineState) -> EngineState:
        """The state without what was computed from weights that the base model no longer has. The lock is held."""
        if self._turns.mixed:  # a call within an answer, whose mixture may be merged
            return state
        weights = self._weights.stamp()
        return state if weights == state.weights else self._put(state.with_weights(weights))

    def _stream(self, batch: Batch) -> Stream:
        # Weights may have changed by the time at which the first piece is read.
        return self._decoder.stream(batch, lambda: self._with_present_weights(self._current()))

    def _put(self, state: EngineState) -> EngineState:
        """Puts another state in the place of the present one, and drops what is cached of other weights than its own.
        The lock is held."""
        if state.weights != self._state.weights:
            self._mixer.forget(state.fitted)
            if self.prefix_cache is not None:
                self.prefix_cache.clear()
        return super()._put(state)

    def embedded(self, rows: Sequence[Prompt], options: Sequence[Options]) -> Embedded:
        """What the text encoder reads of prompts, all of them together; nothing if there is no encoder. With it,
        `outcomes` needs the base model alone. Arguments as there; errors as `logo.selection.encoder.embed`."""
        encoder = self.settings.encoder
        if encoder is None:
            return NO_TEXTS
        state = self._current()
        texts = []
        for row, call in zip(rows, options, strict=True):
            scorer = self._scorer(state, call.signal)
            if scorer.examples.encoded is not None:
                probed = row.ids if state.probes_all else row.probed
                texts.append(self.prompts.text_of(scorer.signal.windowed(probed)))
        return embed_by_text(texts, encoder)

    # -- how scores and answers are computed -----------------------------------------------------------------------

    def _scores(
        self,
        state: EngineState,
        scorer: Scorer,
        probed: Sequence[Sequence[int]],
        candidates: Sequence[Collection[str] | None],
        batch_size: int,
        embedded: Embedded,
    ) -> Tensor:
        pool = state.fitted
        active: Sequence[str] = () if self.probe_context == "base" else pool.names
        carried = self._state.carried
        if self.probe_context == "carry" and carried is not None:
            active = [name for name in carried if name in pool]
        mixture = Mixture(dict.fromkeys(active, 1.0))
        windows = [scorer.signal.windowed(ids) for ids in probed]
        lengths = [len(window) for window in windows]
        scores = torch.empty(len(windows), len(scorer.selector.names), dtype=torch.float32)
        for batch in batches_by_length(lengths, batch_size, padded=not self._alike, tokens=MAX_TOKENS):
            with self._mixer.active(pool, [mixture]), self._exact():
                texts = [windows[i] for i in batch]
                among = [candidates[i] for i in batch]
                scores[batch] = scorer(texts, among, embedded, alone=not mixture.weights)
        return scores

    def _batches(self, rows: Sequence[Prompt], batch_size: int, decoding: Decoding) -> Iterable[Sequence[int]]:
        counted = "position_ids" in inspect.signature(self.model.forward).parameters  # else padding counts as tokens
        alike = self._alike or not counted or reads_prompts(decoding.config)
        return batches_by_length([len(row.ids) for row in rows], batch_size, padded=not alike)
