"""`LoGo`: selects and mixes adapters for every prompt, on a base model in this process.

The methods for callers are in `logo.calls`. This module runs the model, and is the only one that combines adapters,
mixing and selection:

    text, chat, ids -> probe -> signal -> selector -> Selection -> store -> gates -> model.generate -> Generation
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, CurrentPool, warn_of_bad
from logo.adapters.sources import OnBadAdapter
from logo.calls import Calls
from logo.completions import CompletionScorer
from logo.decoder import Decoder, Decoding, Generation
from logo.decoding import Prompts, Truncation, batches_by_length, reads_prompts
from logo.errors import check_type, listed
from logo.mixing import Mixer
from logo.mixing.store import adapter_store
from logo.models import check_mode, check_usable, context_length, devices, lock_of
from logo.opening import FromPretrained
from logo.scoring import Scored
from logo.selecting import Probing
from logo.selection import Selection
from logo.selection.beginnings import Beginnings
from logo.selection.calibration import Calibration
from logo.selection.index import Tell
from logo.selection.prefixes import reusable
from logo.selection.scorer import Scorer
from logo.selection.scorers import Scorers
from logo.selection.settings import SelectionSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


class LoGo(Calls, FromPretrained):
    """Selects and mixes adapters per prompt on one base model.

    Args:
        model: a Hugging Face causal LM, in eval mode. Its weights are never changed.
        tokenizer: the model's, with a pad token.
        pool: the adapters, or the pool of another engine as it is now.
        settings: how prompts are read, scored and selected.
        generation_config: how calls decode that give no config; None: greedily.
        truncation: how prompts are cut that are too long.
        adapter_memory_gb: memory (10⁹ bytes) for adapters on the devices of the model; None: a share of the free
            memory, see `logo.mixing.placement`.
        adapter_cache_gb: host memory for adapter files, beside an accelerator; None: as much as `adapter_memory_gb`.
        fold: add a mixture that all rows of a batch share to a copy of the weights, so that decoding costs what the
            base model costs. None: if that pays and does not round to half precision; see `logo.mixing.costs`.
        on_bad_adapter: what to do with adapters that do not fit the base model.

    Raises:
        PoolError: an adapter does not fit, or cannot be scored (see `SelectionSettings.unscorable`).
        UsageError: something else than a pool, or a model with layers of PEFT or with dropout in training mode.

    Attributes:
        pool: the pool; `add` and `remove` put another one in its place, which the next call uses.
        beginnings: the cache of prompt beginnings, for adapters that act only from a position on; None: the model keeps
            more than keys and values, so that prompts are read again under their mixtures.
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
        adapter_memory_gb: float | None = None,
        adapter_cache_gb: float | None = None,
        fold: bool | None = None,
        on_bad_adapter: OnBadAdapter = "error",
    ) -> None:
        pool = pool.value if isinstance(pool, CurrentPool) else pool
        check_type("pool", pool, AdapterPool, "an AdapterPool, such as AdapterPool.open(SOURCE)")
        check_usable(model)
        self.model = model
        self.tokenizer = tokenizer
        self.pool = CurrentPool(pool)
        self._lock = lock_of(model)
        with self._lock:  # an answer of another engine sets the checkpoint's config aside
            checkpoint = model.generation_config
        self.settings = settings or SelectionSettings()
        self.prompts = Prompts(
            tokenizer,
            context_length(model),
            truncation or Truncation(),
            checkpoint=checkpoint,
            default=generation_config,
            probe_text=self.settings.probe_text,
            vocabulary=model.get_input_embeddings().weight.shape[0],
        )
        self._on_bad_adapter = on_bad_adapter
        self._layout = BaseLayout.of(model)
        self.store = adapter_store(model, adapter_memory_gb, adapter_cache_gb)
        self._mixer = Mixer(model, self.store, fold)
        budget = int(self.settings.prefix_cache_gb * 1e9)
        self.beginnings = Beginnings(model, budget) if reusable(model) else None
        self._decoder = Decoder(model, self.prompts, self._mixer, self.beginnings)
        self._completions = CompletionScorer(model, self.prompts, self._mixer, self.beginnings)
        self._selecting: Probing = Probing(model, self.prompts, self._mixer, self.settings, self.beginnings)
        self.take(self.prepared(pool))
        warn_of_bad(self._fitted.refused)

    @property
    def fitted(self) -> AdapterPool:
        """The pool fitted to the base model, without adapters that do not fit (`on_bad_adapter="skip"`)."""
        self._sync()
        return self._fitted

    @property
    def k(self) -> int:
        """Adapters per prompt: the setting, or the default of the pool as it is now."""
        self._sync()
        return self._selecting.scorers.k if self.settings.k is None else self.settings.k

    @property
    def scorer(self) -> Scorer:
        """The scorer of the pool as it is now, which is calibrated first if necessary."""
        with self._lock:
            self._sync()
            return self._selecting.scorer()

    def calibrate(self, signal: str | None = None, tell: Tell | None = None) -> Calibration | None:
        """Calibrates adapters that are not cached, and indexes all, which the first selection would do otherwise.

        Args:
            signal: another signal than the engine's own.
            tell: called now and then with the numbers of adapters in the index so far and in all.

        Returns:
            The calibration, which says where prompts are read; None for signals without one.

        Raises:
            AdapterError: an adapter that cannot be read.
            PoolError: adapters that another signal cannot score.
        """
        with self._lock:
            self._sync()
            return self._selecting.scorer(signal, tell).calibration

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(point.name for point in self.scorer.points)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return devices(self.model)

    @property
    def versions(self) -> dict[str, str]:
        return {}

    @property
    def folding(self) -> dict[str, Any]:
        """The settings by which a mixture is folded, for JSON; see `logo.mixing.costs`."""
        return self._mixer.folding

    @property
    def reads(self) -> str:
        """In words, what is read of a prompt to score adapters."""
        self._sync()
        scorers = self._selecting.scorers
        token = scorers.reading(self.settings).token
        acts = " and ".join(map(str, self.fitted.activations))
        what = {
            "last": "the last token",
            "mean": "the mean of all tokens",
            "each": "each token",
            "tail": f"the tokens on which the adapters act ({acts})",
        }[token]
        return f"{what}, at {len(self.points)} points" + (", once" if scorers.read_once else "")

    def _parts(self, lengths: Sequence[int], batch_size: int) -> Iterable[Sequence[int]]:
        if not self._selecting.scorers.read_once:
            return super()._parts(lengths, batch_size)
        return self._selecting.batches(lengths, batch_size)

    def _holding(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.beginnings is None else self.beginnings.held()

    def _answers(
        self,
        rows: Sequence[Sequence[int]],
        selections: Sequence[Selection],
        decoding: Decoding,
        probed: float,
        batch_size: int,
        streamer: BaseStreamer | None,
    ) -> list[Generation]:
        answers: dict[int, Generation] = {}
        padded = not reads_prompts(decoding.config)
        for batch in batches_by_length([len(row) for row in rows], batch_size, padded=padded):
            ids, chosen = [rows[i] for i in batch], [selections[i] for i in batch]
            made = self._decoder(self._fitted, decoding, probed, ids, chosen, streamer)
            answers |= zip(batch, made, strict=True)
        return [answers[i] for i in range(len(rows))]

    def _pieces(self, row: Sequence[int], selection: Selection, decoding: Decoding) -> Generator[str]:
        return self._decoder.stream(self._fitted, row, selection.mixture, decoding, self._lock)

    def _score(self, row: Sequence[int], gold: Sequence[int], mixtures: Sequence[Mapping[str, float]]) -> list[Scored]:
        return self._completions.mixtures(self._fitted, row, gold, mixtures)

    def _score_pairs(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        mixtures: Sequence[Mapping[str, float]],
        batch_size: int,
    ) -> list[Scored]:
        return self._completions.pairs(self._fitted, pairs, mixtures, batch_size)

    def prepared(self, pool: AdapterPool) -> Prepared:
        """Prepares another pool while this one is in use: nothing changes before `take`.

        Raises:
            PoolError: an adapter does not fit, or cannot be scored.
            AdapterError: an adapter that cannot be read.
        """
        with self._lock:
            fitted = pool.fit(self._layout, model=self.model, on_bad_adapter=self._on_bad_adapter)
            fitted = fitted.acting(self.settings.activation, self.settings.when_not_invoked)
            _tell_of_plain(fitted)
            return Prepared(pool.without(fitted.refused), fitted, self._selecting.prepared(fitted), self.settings)

    def take(self, prepared: Prepared, instead_of: AdapterPool | None = None) -> None:
        """Replaces the pool by a prepared one; a change of the pool `instead_of` which it comes is kept."""
        with self._lock:
            self._selecting.take(prepared.fitted, prepared.scorers)
            self._fitted, self._seen = prepared.fitted, prepared.pool
            self.pool.put(prepared.pool, instead_of)
            self._mixer.forget(self._fitted)

    def _sync(self) -> None:
        """Follows changes of the pool, and checks that the model was not put into training mode."""
        check_mode(self.model)
        if self.pool.value is self._seen:
            return
        with self._lock:
            pool = self.pool.value
            if pool is not self._seen:
                # A pool that cannot be used changes nothing, and is refused again at the next call.
                known = len(pool.refused)
                prepared = self.prepared(pool)
                self.take(prepared, pool)
                warn_of_bad(prepared.fitted.refused[known:])


def _tell_of_plain(pool: AdapterPool) -> None:
    plain = [adapter.name for adapter in pool if adapter.activation.everywhere]
    if plain and len(plain) < len(pool):
        warnings.warn(
            f"{len(plain)} of {len(pool)} adapters act on every token ({listed(plain)}), so every prompt is read "
            "twice: reading it once needs activation in all adapters of a pool",
            UserWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class Prepared:
    """A pool that an engine can take at once.

    Attributes:
        pool: as it was given, without the adapters that were left out.
        fitted: matched to the base model.
        scorers: of it.
        settings: the engine's.
    """

    pool: AdapterPool
    fitted: AdapterPool
    scorers: Scorers
    settings: SelectionSettings

    def calibrate(self, signal: str) -> None:
        """Calibrates and indexes for a signal; errors as `LoGo.calibrate`."""
        self.scorers.get(self.settings.for_call(signal=signal))
