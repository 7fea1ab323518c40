"""`Core`: the pool of one vLLM engine in the process that talks to the engine's workers.

It checks the options of a request, turns the workers' scores into a selection, and a selection into a `LoRARequest`.
The HTTP router and the offline engine share it.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from logo.adapters.layout import BaseLayout
from logo.backends.vllm import plugin
from logo.backends.vllm.options import VllmOptions
from logo.backends.vllm.pool import Change, KeyedPool, check_alike, scoring_signals
from logo.backends.vllm.skeleton import skeleton
from logo.backends.vllm.taps import CHANGED
from logo.core import Forced, Options, ProbeText, Selection
from logo.errors import LoGoError, ModelError, NotFinite, UsageError
from logo.selection.selector import Evidence, Selector, forced
from logo.selection.signals import Signal
from logo.selection.texts import Window
from logo.serve.names import MixtureRequest, Models


class WorkerError(LoGoError, RuntimeError):
    """An error of one of vLLM's workers that a user can fix."""


class WorkerFailure(LoGoError, RuntimeError):
    """An unexpected error of one of vLLM's workers, such as exhausted memory."""


@dataclass(frozen=True)
class Opened:
    """What is known outside of vLLM's workers of the scorer of a signal there.

    Attributes:
        name: of the signal.
        signal: how prompts are read.
        points: where prompts are read.
        selector: makes selections from its scores.
        calibration: none, since the workers have it.
    """

    name: str
    signal: Signal
    points: tuple[str, ...]
    selector: Selector
    calibration: None = None

    @classmethod
    def of(cls, name: str, signal: Signal, told: Mapping[str, Any]) -> Opened:
        """From the reply of a worker, see `logo.backends.vllm.scoring.Scoring.open`."""
        facts = told["selector"]
        evidence = None if facts["evidence"] is None else Evidence(**facts["evidence"])
        selector = Selector(tuple(facts["names"]), facts["default_k"], evidence, facts["sizes"])
        return cls(name, signal, tuple(told["points"]), selector)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are scored, in pool order."""
        return self.selector.names


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
        options = VllmOptions.of(additional if isinstance(additional, Mapping) else None, os.environ)
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
        self.broken: str | None = None
        self._opened: dict[str, Opened] = {}  # by signal
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
        self.pool, reading = pool, self.options.settings.reading
        self._opened = {name: Opened.of(name, reading(pool.adapters, name), told) for name, told in scored.items()}
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

    def asked(self, wanted: MixtureRequest) -> Options:
        """The options of the selection that a request asks for, checked.

        Raises:
            LoGoError: as `LoGo.select`.
        """
        return self.options.settings.options(self.pool.adapters, wanted.options)

    def window(self, signal: str) -> Window:
        """The part of a prompt that is probed for a signal."""
        return self._opened[signal].signal.window

    @property
    def probe_text(self) -> ProbeText | None:
        """The part of a conversation that is probed, see `SelectionSettings.probe_text`."""
        asked, pool = self.options.settings.probe_text, self.pool.adapters
        invoked = pool.read_once and any(one.tokens for one in pool.activations)
        return "all" if asked is None and invoked else asked

    def select(self, call: Options, scores: Sequence[float]) -> Selection:
        """The selection that the scores of a probe give.

        Raises:
            LoGoError: as `LoGo.select`.
        """
        return self._opened[call.signal].selector(torch.tensor(scores), call)

    def forced(self, adapters: Forced) -> Selection:
        """The mixture that a request forces; errors as `LoGo.generate`."""
        return forced(adapters, self.pool.adapters)

    @contextmanager
    def request(self, selection: Selection) -> Iterator[Any]:
        """Yields vLLM's `LoRARequest` of a selection, None for the base model.

        The block has to begin before anything else runs after the selection, and to last as long as the answer: the
        adapters that were scored then stay in their slots, even if the pool changes.

        Raises:
            UsageError: as `KeyedPool.recipe`.
        """
        from vllm.lora.request import LoRARequest

        recipe = self.pool.recipe(selection)
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
