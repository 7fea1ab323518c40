"""`Core`: the pool of one vLLM engine in the process that talks to the engine's workers.

It checks the options of a call, turns the workers' scores into a selection, and a selection into a `LoRARequest`. The
HTTP router and the offline engine share it.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from logo.adapters.layout import BaseLayout
from logo.api.names import Models
from logo.backends.vllm import plugin
from logo.backends.vllm.options import Options
from logo.backends.vllm.pool import Change, KeyedPool, check_alike, scoring_signals
from logo.backends.vllm.prefixes import block_of
from logo.backends.vllm.recipe import Recipe
from logo.backends.vllm.skeleton import skeleton
from logo.backends.vllm.taps import CHANGED, UNKNOWN_PREFIX
from logo.errors import LoGoError, ModelError, NotFinite, UsageError
from logo.protocol import MixtureRequest
from logo.selecting import Choosing
from logo.selection.selector import Selection, forced

# Recipes that have failed, as far as they are remembered.
_FAILED = 4096


class WorkerError(LoGoError, RuntimeError):
    """An error reply of one of vLLM's workers."""


class Core:
    """One engine's pool, outside of its workers.

    Args:
        vllm_config: of the engine.

    Raises:
        LoGoError: there is no pool, or it does not fit; or vLLM was started without adapters.
    """

    def __init__(self, vllm_config: Any) -> None:
        additional = getattr(vllm_config, "additional_config", None)
        options = Options.of(additional if isinstance(additional, Mapping) else None, os.environ)
        if options is None:
            raise UsageError("LoGo needs a pool: set LOGO_POOL to a folder of adapters or a Hub repository")
        if vllm_config.lora_config is None:
            raise UsageError("LoGo needs vLLM to take adapters: start it with --enable-lora")
        if plugin.refused is not None:
            raise ModelError(plugin.refused)
        self.options = options
        self._cache = vllm_config.cache_config
        model = vllm_config.model_config
        self.skeleton = skeleton(model.model, model.dtype, model.revision)
        self._layout = BaseLayout.of(self.skeleton)
        self.pool = KeyedPool.open(options, self.skeleton)
        self.signals = scoring_signals(options, self.skeleton, self.pool.adapters)
        self.choosing = Choosing(self.pool.adapters, options.settings)
        self.mode, self.reason = "", ""
        self._scored: dict[str, tuple[str, ...]] = {}  # the adapters that each signal scores
        self._live: Counter[int] = Counter()  # ids of recipes whose answers are on their way
        self._texts: dict[int, str] = {}
        self._salts: Counter[str] = Counter()  # how often a recipe has failed
        self._answering: Counter[str] = Counter()  # and the keys of their adapters

    # -- opening and changing --------------------------------------------------------------------------------------

    def staged(self, change: Change | None, described: Sequence[Mapping[str, Any]]) -> KeyedPool:
        """The pool that the workers have begun to open, or to change to.

        Raises:
            PoolError: a worker has another pool than this process.
        """
        pool = self.pool if change is None else self.pool.changed(change, self._layout)
        check_alike(described, pool)
        self.mode, self.reason = described[0]["mode"], described[0]["reason"]
        return pool

    def followed(self, described: Sequence[Mapping[str, Any]]) -> KeyedPool:
        """The pool that the workers have, which another process has opened or changed.

        Raises:
            LoGoError: it cannot be opened here, or is another one by now.
        """
        pool = self.pool.following(described[0]["adapters"], self._layout)
        check_alike(described, pool)
        self.mode, self.reason = described[0]["mode"], described[0]["reason"]
        return pool

    def commit(self, pool: KeyedPool, scored: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
        """Makes it the pool that requests select from.

        Args:
            scored: what each signal scores, see `logo.backends.vllm.scoring.Scoring.open`.

        Returns:
            keys of adapters that have left it; answers with them may still be on their way.
        """
        left = set(self.pool.keys.values()) - set(pool.keys.values())
        self.pool, self._scored = pool, {signal: tuple(facts["names"]) for signal, facts in scored.items()}
        described = [signal for signal, facts in scored.items() if facts["described"]]
        self.choosing = Choosing(pool.adapters, self.options.settings, described)
        return tuple(left)

    def answering(self, keys: Iterable[str]) -> bool:
        """Whether answers with any of these adapters are on their way."""
        return any(self._answering[key] for key in keys)

    @property
    def k(self) -> int:
        """Adapters of a mixture where a call does not say."""
        return self.options.settings.k or min(self.pool.adapters.default_k, len(self.pool.keys))

    @property
    def block(self) -> int:
        """Number of tokens of a block of vLLM's cache."""
        return block_of(self._cache)

    def models(self, base: str) -> Models:
        """What requests may give as their model."""
        return Models(base, self.pool.keys, self.signals)

    # -- choosing ------------------------------------------------------------------------------------------------

    def signal(self, wanted: MixtureRequest) -> str | None:
        """The signal that a prompt has to be probed with; None where its mixture is forced."""
        if wanted.adapters is not None:
            return None
        return self.choosing.call_settings(wanted.options).settings.signal

    def select(self, wanted: MixtureRequest, scores: Sequence[float] | None) -> Selection:
        """What is chosen, or forced.

        Args:
            scores: of the probe; None where the mixture is forced.

        Raises:
            LoGoError: as `LoGo.select`.
        """
        if wanted.adapters is not None or scores is None:
            return forced(wanted.adapters or {}, self.pool.adapters)
        call = self.choosing.call_settings(wanted.options)
        return self.choosing.choose(torch.tensor(scores), self._scored[call.settings.signal], call)

    @contextmanager
    def request(self, selection: Selection, forced: str | None = None) -> Iterator[Any]:
        """vLLM's `LoRARequest` of a selection while its answer is on its way; None for the base model alone.

        Args:
            forced: see `KeyedPool.recipe`.

        Raises:
            UsageError: likewise; or the mixture cannot be made.
        """
        from vllm.lora.request import LoRARequest

        recipe = self.pool.recipe(selection, forced)
        if self.mode != "gate" and len({recipe.activation(key) for key in recipe.keys}) > 1:
            raise UsageError(
                f"the adapters of this mixture begin to act at different tokens, which {self.mode} mode cannot do: "
                "start vLLM in gate mode, or force an activation"
            )
        if not recipe.parts:
            yield None
            return
        text = recipe.salted(self._salts[str(recipe)])
        number = recipe.number(self._texts, text)
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

    def failed(self, text: str) -> None:
        """A recipe was not mixed: the next request for it gets another text, and so other cached keys and values."""
        self._salts[text.partition("#")[0]] += 1
        while len(self._salts) > _FAILED:  # one that is forgotten and fails again is noticed again
            del self._salts[next(iter(self._salts))]

    def recipe(self, selection: Selection) -> Recipe:
        """The recipe of a selection."""
        return self.pool.recipe(selection)


def new_key() -> str:
    """Of a probe: nobody else's."""
    return uuid.uuid4().hex


def values(answers: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What each worker answered.

    Raises:
        WorkerError: one of them refused.
    """
    for answer in answers:
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
    return [answer["value"] for answer in answers]


def texts_of(opened: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The texts that have to be run next, from what each worker says of a signal; none where all of them are ready."""
    return next((one["texts"] for one in opened if one["texts"]), [])


def scores_of(found: Any, digest: str | None = None) -> list[float] | None:
    """The scores of a probe, from what a worker has answered; None where the prompt has to be probed again, and whole.

    Args:
        digest: of the pool that is selected from; None: it cannot change.

    Raises:
        NotFinite: a score overflowed.
        ModelError: there are none.
    """
    if isinstance(found, str):
        if found in (CHANGED, UNKNOWN_PREFIX):
            return None
        if "finite" in found:
            raise NotFinite(found)
        raise ModelError(f"the prompt could not be scored: {found}")
    return list(found[1]) if digest in (None, found[0]) else None
