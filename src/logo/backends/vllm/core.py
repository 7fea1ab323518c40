"""`Core`: the pool of one vLLM engine in the process that talks to the engine's workers.

It checks the options of a call, turns the workers' scores into a selection, and a selection into a `LoRARequest`. The
HTTP router and the offline engine share it.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool
from logo.api.names import Models
from logo.backends.vllm import plugin
from logo.backends.vllm.options import Options
from logo.backends.vllm.pool import Change, KeyedPool, check_alike, scoring_signals
from logo.backends.vllm.skeleton import skeleton
from logo.backends.vllm.taps import CHANGED
from logo.errors import LoGoError, ModelError, NotFinite, UsageError
from logo.protocol import MixtureRequest
from logo.selecting import Choosing
from logo.selection.plan import with_activations
from logo.selection.selector import Selection, forced
from logo.selection.settings import SelectionSettings
from logo.selection.window import USUAL_WINDOW, WHOLE, Window


class WorkerError(LoGoError, RuntimeError):
    """An error of one of vLLM's workers that a user can fix."""


class WorkerFailure(LoGoError, RuntimeError):
    """An unexpected error of one of vLLM's workers, such as exhausted memory."""


class Core:
    """The pool of one engine, as seen from outside of its workers.

    Args:
        vllm_config: of the engine.

    Attributes:
        broken: why nothing can be answered until the server starts again; None: it can.

    Raises:
        LoGoError: there is no pool, or it does not fit; or vLLM was started without adapters.
    """

    def __init__(self, vllm_config: Any) -> None:
        additional = getattr(vllm_config, "additional_config", None)
        options = Options.of(additional if isinstance(additional, Mapping) else None, os.environ)
        if options is None:
            raise UsageError("LoGo needs a pool: set LOGO_POOL to a folder of adapters or a Hub repository")
        if vllm_config.lora_config is None:
            raise UsageError("LoGo needs vLLM's support for adapters: start vLLM with --enable-lora")
        if plugin.refused is not None:
            raise ModelError(plugin.refused)
        self.options = options
        model = vllm_config.model_config
        self.skeleton = skeleton(model.model, model.dtype, model.revision)
        self._layout = BaseLayout.of(self.skeleton)
        self.pool = KeyedPool.open(options, self.skeleton)
        self.signals = scoring_signals(options, self.skeleton, self.pool.adapters)
        self.choosing = Choosing(self.pool.adapters, options.settings)
        self.broken: str | None = None
        self._scored: dict[str, tuple[str, ...]] = {}  # the adapters that each signal scores
        self._live: Counter[int] = Counter()  # id of a recipe -> its answers in progress
        self._texts: dict[int, str] = {}
        self._answering: Counter[str] = Counter()  # key of an adapter -> answers in progress that use it

    # -- opening and changing --------------------------------------------------------------------------------------

    def staged(self, change: Change | None, described: Sequence[Mapping[str, Any]]) -> KeyedPool:
        """The pool after `change` (None: the present one), once it is known that all workers have staged the same one.

        Raises:
            PoolError: a worker has another pool than this process.
        """
        pool = self.pool if change is None else self.pool.changed(change, self._layout)
        check_alike(described, pool)
        return pool

    def commit(self, pool: KeyedPool, scored: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
        """Makes `pool` the one that requests select from.

        Args:
            scored: what each signal scores, see `logo.backends.vllm.scoring.Scoring.open`.

        Returns:
            The keys of the adapters that are no longer in the pool; answers in progress may still use them.
        """
        left = set(self.pool.keys.values()) - set(pool.keys.values())
        self.pool, self._scored = pool, {signal: tuple(facts["names"]) for signal, facts in scored.items()}
        described = [signal for signal, facts in scored.items() if facts["described"]]
        sizes = {signal: facts["sizes"] for signal, facts in scored.items()}
        self.choosing = Choosing(pool.adapters, self.options.settings, described, sizes)
        return tuple(left)

    def answering(self, keys: Iterable[str]) -> bool:
        """Whether an answer in progress uses any of these adapters."""
        return any(self._answering[key] for key in keys)

    @property
    def k(self) -> int:
        """Adapters per mixture, for calls that do not give k."""
        return self.options.settings.k or min(self.pool.adapters.default_k, len(self.pool.keys))

    def models(self, base: str) -> Models:
        """The names that requests may give as `model`."""
        return Models(base, self.pool.keys, self.signals)

    # -- choosing ------------------------------------------------------------------------------------------------

    def signal(self, wanted: MixtureRequest) -> str | None:
        """The signal that a prompt has to be probed with; None where its mixture is forced."""
        if wanted.adapters is not None:
            return None
        return self.choosing.call_settings(wanted.options).settings.signal

    def window(self, signal: str) -> Window:
        """The part of a prompt that is probed for a signal."""
        return window_of(self.options.settings.for_call(signal=signal), self.pool.adapters)

    def candidates(self, wanted: MixtureRequest) -> Collection[str] | None:
        """The names of the adapters that a request may select; None: all.

        Raises:
            LoGoError: as `LoGo.select`.
        """
        return self.choosing.call_settings(wanted.options).candidates

    def select(self, wanted: MixtureRequest, scores: Sequence[float] | None) -> Selection:
        """The selection that the scores give, or the forced one.

        Args:
            scores: those of the probe; None if the mixture is forced.

        Raises:
            LoGoError: as `LoGo.select`.
        """
        if wanted.adapters is not None or scores is None:
            return forced(wanted.adapters or {}, self.pool.adapters)
        call = self.choosing.call_settings(wanted.options)
        return self.choosing.choose(torch.tensor(scores), self._scored[call.settings.signal], call)

    @contextmanager
    def request(self, selection: Selection, forced: str | None = None) -> Iterator[Any]:
        """Yields vLLM's `LoRARequest` of a selection, None for the base model.

        The block has to begin before anything else runs after the selection, and to last as long as the answer: the
        adapters that were scored then stay in their slots, even if the pool changes.

        Args:
            forced: see `KeyedPool.recipe`.

        Raises:
            UsageError: as `KeyedPool.recipe`.
        """
        from vllm.lora.request import LoRARequest

        recipe = self.pool.recipe(selection, forced)
        if not recipe.parts:
            yield None
            return
        text, number = str(recipe), recipe.number(self._texts)
        self._live[number] += 1
        self._texts[number] = text
        self._answering.update(recipe.keys)
        try:
            yield LoRARequest(text, number, text)
        finally:
            self._live[number] -= 1
            self._answering.subtract(recipe.keys)
            if not self._live[number]:
                del self._live[number], self._texts[number]


def window_of(settings: SelectionSettings, pool: AdapterPool) -> Window:
    """The part of a prompt that is probed: all of it for a signal that is not compared with neutral text, and for
    adapters that all act from a position on, which are scored at the tokens on which they act."""
    settings = with_activations(settings, pool)
    return WHOLE if settings.activations or settings.reading.scale == "raw" else USUAL_WINDOW


def new_key() -> str:
    """A unique key, for a probe, a request or a process."""
    return uuid.uuid4().hex


def values(answers: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The values that the workers returned.

    Raises:
        WorkerError, WorkerFailure: one of them returned an error.
    """
    for answer in answers:
        if "error" in answer:
            raise (WorkerFailure if answer.get("unexpected") else WorkerError)(str(answer["error"]))
    return [answer["value"] for answer in answers]


def outcomes(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The outcome of each probe or each mixture (see `Worker.scores`, `Worker.failures`): the first failure that any
    worker reports, else that of the first worker."""
    first, *others = answers
    failed = {key: found for one in reversed(others) for key, found in one.items() if isinstance(found, str)}
    return {key: found if isinstance(found, str) else failed.get(key, found) for key, found in first.items()}


def texts_of(opened: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The texts (token ids) that vLLM has to run next for a signal, from the replies of the workers; empty if none."""
    return next((one["texts"] for one in opened if one["texts"]), [])


def scores_of(found: Any, digest: str | None = None) -> list[float] | None:
    """The scores in a worker's reply to a probe; None if the pool has changed meanwhile.

    Args:
        digest: of the pool that the caller selects from; None: the pool cannot change.

    Raises:
        NotFinite: a score overflowed.
        ModelError: the prompt could not be scored.
    """
    if isinstance(found, str):
        if found == CHANGED:
            return None
        if "finite" in found:
            raise NotFinite(found)
        raise ModelError(f"the prompt could not be scored: {found}")
    return list(found[1]) if digest in (None, found[0]) else None
