"""LoGo in one worker of vLLM: scores of probed prompts, and mixtures from recipes.

vLLM calls it through the hooks of `logo.backends.vllm.hooks`. The router and the offline engine call it through
`collective_rpc`, which runs the functions of `logo.backends.vllm.calls` on every worker.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool
from logo.backends.vllm import graphs
from logo.backends.vllm.built import hold
from logo.backends.vllm.gates import StepGates, turned
from logo.backends.vllm.marks import Span
from logo.backends.vllm.onsets import Rows, mapped, others
from logo.backends.vllm.options import VllmOptions
from logo.backends.vllm.pool import Change, KeyedPool, described, scoring_signals
from logo.backends.vllm.recipe import Recipe, is_recipe
from logo.backends.vllm.runner_v2 import Remembered
from logo.backends.vllm.scoring import Scoring
from logo.backends.vllm.skeleton import skeleton
from logo.backends.vllm.slots import check_slots
from logo.backends.vllm.taps import Taps
from logo.backends.vllm.wrapper import Residual, Tapped, multiplied, with_kernels
from logo.errors import ModelError, UsageError
from logo.models import context_length
from logo.prompts import Prompts
from logo.selection.points import Point, plan

log = logging.getLogger("vllm.logo")  # below vLLM's own, so that its lines look like theirs

# Recipes that are remembered, and failures that nobody has taken.
_REMEMBERED = 4096


class Worker:
    """LoGo's part of one vLLM worker, attached to the worker's LoRA manager.

    Args:
        manager: vLLM's manager of the adapters of one worker, before its model is wrapped.
        vllm_config: of the engine.
        options: LoGo's options.
    """

    def __init__(self, manager: Any, vllm_config: Any, options: VllmOptions) -> None:
        model_config, lora = vllm_config.model_config, vllm_config.lora_config
        self.options = options
        self._worker_manager = manager
        self._device, self._dtype, self._lora = manager.device, lora.lora_dtype, lora
        self.skeleton = skeleton(model_config.model, model_config.dtype, model_config.revision)
        self._layout = BaseLayout.of(self.skeleton)
        self.pool = KeyedPool.open(options, self.skeleton)
        self._by_key = self.pool.by_key
        self._ids = {key: _own_id(key) for key in self._by_key}
        check_slots(self.pool.adapters, lora)
        tokens, requests = manager.max_num_batched_tokens, manager.max_num_seqs
        listed = with_kernels(options.products, self._device)
        self.gates = StepGates(tokens + 7, max(tokens, requests), lora.max_loras, self._device, self._dtype, listed)
        self.taps = Taps(self._place_of, self._device)
        self.spans: Sequence[Span] = ()  # of the next step, set by the runner's hook
        self.late: Sequence[Rows] | Exception = ()  # likewise; or the error of that hook
        self.answers: Sequence[tuple[str, str]] = ()  # of the next step, likewise: (recipe, key of an answer)
        self.running: Container[str] = ()  # vLLM's ids of the requests that have not ended, as far as they are probes
        self.requests: dict[str, Remembered] = {}  # of runner V2
        self._mixtures: dict[int, tuple[str, Recipe]] = {}  # by vLLM's ids, the latest last
        self._failures: dict[str, str] = {}  # key of an answer -> why it was not mixed
        # Compiled layers keep the slices and the taps that they were compiled with; a changed pool may need others.
        self._compiled = graphs.compiled(vllm_config)
        self.reading = False  # whether the current step has tokens of probed prompts
        self.split = graphs.split(vllm_config)
        self._places = self._read_at(self.pool.adapters)
        graphs.stamp(vllm_config, [str(listed), *sorted(map(str, self._places))])
        self._max_tokens = model_config.max_model_len - 1
        self._tokenizer = model_config.tokenizer
        self.scoring: Scoring | None = None
        self._staged: tuple[KeyedPool, Scoring] | None = None
        self.opener: str | None = None  # the process that opens the pool, while it does

    # -- vLLM's model --------------------------------------------------------------------------------------------

    @property
    def _adapters(self) -> Any:
        return self._worker_manager._adapter_manager

    def attach(self, model: nn.Module) -> None:
        """Puts a tap before every layer that vLLM has wrapped, and transposes the factors that are multiplied in place.

        Raises:
            ModelError: a layer that adapters act on, or that is probed, is not one that vLLM can adapt.
        """
        from vllm.distributed import tensor_model_parallel_all_gather

        self._model = model
        manager = self._adapters
        self._modules: dict[str, str] = {}  # module path in adapters -> path of vLLM's layer
        for path in manager.modules:
            for part in manager.packed_modules.get(path, [path]):
                self._modules[part] = path
        for adapter in self.pool.adapters:
            for module in adapter.modules:
                self._layer(module, f"adapter {adapter.name!r} acts on")
        read = {self._modules.get(module) for how, module in self._places if how != "residual"}
        for path, layer in manager.modules.items():
            if not multiplied(layer):
                raise ModelError(
                    f"LoGo cannot apply adapters to {path} ({type(layer).__name__}): leave out the adapters that act "
                    "on it; if none does, pass --lora-target-modules with the modules that the pool acts on"
                )
            b = getattr(layer, "lora_b_stacked", None)
            if isinstance(b, tuple):
                layer.lora_b_stacked = tuple(turned(part) for part in b)
            if hasattr(layer, "punica_wrapper"):
                base = getattr(layer, "base_layer", None)
                parted = getattr(base, "input_is_parallel", False) and getattr(base, "tp_size", 1) > 1
                layer.punica_wrapper = Tapped(
                    layer.punica_wrapper, path, self.taps, tensor_model_parallel_all_gather if parted else None
                )
                layer.punica_wrapper.read = path in read
        self._note_used()
        self._tap_residuals()

    def _note_used(self) -> None:
        """Tells the layers on which of their slices the pool acts; they keep multiplying all (None) if compiled."""
        touched = {module for adapter in self._by_key.values() for module in adapter.modules}
        manager = self._adapters
        for path, layer in manager.modules.items():
            parts = manager.packed_modules.get(path, [path])
            known = not self._compiled and getattr(layer, "n_slices", 0) == len(parts)
            if isinstance(getattr(layer, "punica_wrapper", None), Tapped):
                layer.punica_wrapper.used = tuple(part in touched for part in parts) if known else None

    def _read_at(self, pool: AdapterPool) -> frozenset[tuple[str, str]]:
        """The places that the requestable signals read: (`Signal.input`, path of a layer or module)."""
        found = set()
        for signal in scoring_signals(self.options, self.skeleton, pool):
            how = self.options.settings.reading(pool, signal).input
            for point in plan(self.skeleton, pool, self.options.settings, signal).points:
                found.add((how, point.layer_path if how == "residual" else point.module))
        return frozenset(found)

    def _tap_residuals(self) -> None:
        """Puts a tap before the decoder layers whose residual stream some signal reads."""
        for path in sorted(path for how, path in self._places if how == "residual"):
            layer = self._model.get_submodule(self._decoder(path))
            layer.register_forward_pre_hook(Residual(path, self.taps, self._device), with_kwargs=True)

    def _place_of(self, point: Point, read: str) -> str:
        return point.layer_path if read == "residual" else self._layer(point.module, "the probe reads")

    def _decoder(self, path: str) -> str:
        try:
            self._model.get_submodule(path)
        except AttributeError:
            raise ModelError(
                f"vLLM's {type(self._model).__name__} has no layer {path}, which the probe reads: use another signal"
            ) from None
        return path

    def _layer(self, module: str, why: str) -> str:
        if module not in self._modules:
            raise ModelError(
                f"{why} {module}, but vLLM's {type(self._model).__name__} has no layer there that takes adapters; it "
                f"has {', '.join(sorted({path.rpartition('.')[2] for path in self._modules}))}"
            )
        return self._modules[module]

    # -- every step ----------------------------------------------------------------------------------------------

    def begin_step(self, requests: Iterable[Any]) -> None:
        """Prepares a step: passes its probed prompts to the taps, and finds the recipes to mix.

        Args:
            requests: vLLM's `LoRARequest` of every adapter in the step.
        """
        spans, self.spans = self.spans, ()
        self.reading = bool(spans)
        self.taps.begin(spans, self.running)
        recipes = [request for request in requests if is_recipe(request.lora_path)]
        texts: dict[int, str] = {}
        for request in recipes:
            number, text = request.lora_int_id, request.lora_path
            if texts.setdefault(number, text) != text:
                for both in (texts[number], text):
                    self.fail(both, "another mixture in this batch has the same id by chance; send the request again")
            known = self._mixtures.pop(number, None)  # those of this step become the latest
            recipe = known[1] if known is not None and known[0] == text else Recipe.parse(text)
            if not self._by_key.keys() >= set(recipe.keys):
                self.fail(text, "this worker lacks one of its adapters")
            self._mixtures[number] = text, recipe
        while len(self._mixtures) > max(_REMEMBERED, len(recipes)):
            self._mixtures.pop(next(iter(self._mixtures)))
        if recipes:
            self.make_resident()

    def mapped(self, mapping: Any) -> Any:
        """See `logo.backends.vllm.onsets.mapped`; raises the error of a runner's hook that failed for this step."""
        late, self.late = self.late, ()
        if isinstance(late, Exception):
            raise late
        self._mixtures |= others(late)
        return mapped(mapping, late) if late else mapping

    def fail(self, text: str, reason: str) -> None:
        """Notes that the answers with a recipe in this step failed, so that they become errors. An exception here would
        end the engine."""
        self._failures.update((key, reason) for recipe, key in self.answers if recipe == text)
        while len(self._failures) > _REMEMBERED:
            self._failures.pop(next(iter(self._failures)))
        log.error("LoGo: a mixture failed: %s", reason)

    def scores(self, keys: Sequence[str]) -> dict[str, Any]:
        """For each probe, the digest of the pool and the scores of its adapters, or why there are none."""
        found = self.taps.take(keys)
        return {key: one if isinstance(one, str) else [self.pool.digest, one] for key, one in found.items()}

    def failures(self, keys: Sequence[str]) -> dict[str, str | None]:
        """For each answer, why its mixture was not made, or None. A failure is told once."""
        return {key: self._failures.pop(key, None) for key in keys}

    def write_gates(self, mapping: Any, slots: Sequence[int | None]) -> None:
        """Sets the gates of the current step.

        Args:
            mapping: vLLM's ids of the adapter of every token, and of every token whose logits are computed.
            slots: the id of the adapter in each of vLLM's slots; None: the slot is empty.
        """
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        sampled = np.asarray(mapping.prompt_mapping, dtype=np.int64)
        known = [int(number) for number in np.unique(np.concatenate([ids, sampled])) if number > 0]
        place = {number: slot for slot, number in enumerate(slots) if number is not None}
        rows = torch.zeros(len(known) + 1, len(slots))
        for row, number in enumerate(known, start=1):
            if number in self._mixtures:
                for key, weight in self._mixtures[number][1].parts:
                    slot = place.get(self._ids.get(key, 0))
                    if slot is None:  # noted in `begin_step`
                        rows[row] = 0.0
                        break
                    rows[row, slot] = weight
        order = np.array([0, *known])
        self.gates.write(
            rows,
            torch.from_numpy(np.searchsorted(order, np.maximum(ids, 0))),
            torch.from_numpy(np.searchsorted(order, np.maximum(sampled, 0))),
        )

    # -- adapters ------------------------------------------------------------------------------------------------

    def make_resident(self) -> None:
        """Loads the pool into vLLM's slots, where it stays; does nothing if it is there."""
        hold(self._adapters, {self._ids[key]: adapter for key, adapter in self._by_key.items()}, self._dtype)

    # -- the pool ------------------------------------------------------------------------------------------------

    def stage(self, change: Change | None) -> dict[str, Any]:
        """Begins to open or to change the pool, and loads its new adapters into slots; requests are answered from the
        present pool until `commit`. After an error, nothing has changed.

        Args:
            change: None: open the pool that the options name.

        Returns:
            `described` of the new pool.

        Raises:
            LoGoError: the change cannot be made.
        """
        pool = self.pool if change is None else self.pool.changed(change, self._layout)
        lacking = set(pool.keys.values()) - self._by_key.keys()
        if len(self._by_key) + len(lacking) > self._lora.max_loras:
            raise UsageError(
                f"all {self._lora.max_loras} of vLLM's slots are in use, and a new adapter needs one before another "
                f"can leave: pass --max-loras {self._lora.max_loras + 1} or more"
            )
        if lacking:
            check_slots(pool.adapters, self._lora)
        unread = self._read_at(pool.adapters) - self._places
        if unread and (self._compiled or any(how == "residual" for how, _ in unread)):
            where = ", ".join(sorted(path for _, path in unread))
            raise UsageError(f"this pool is probed at {where}, which the server cannot read: restart it with this pool")
        given = self.taps, self._prompts, self._device
        made = Scoring(self.skeleton, pool.adapters, self.options, *given, before=self.scoring)
        self._by_key = {**self._by_key, **pool.by_key}
        self._ids = {key: _own_id(key) for key in self._by_key}
        try:
            self.make_resident()
        except BaseException:
            # Otherwise every later step would try to load it again, and fail.
            self._remove(lacking)
            raise
        self._staged = pool, made
        return described(pool)

    def open_signal(self, signal: str, run: tuple[Sequence[Sequence[int]], Sequence[str]] | None) -> dict[str, Any]:
        """Calls `Scoring.open`, or `Scoring.calibrate` if `run` gives texts that were run and their keys. It is called
        for the staged pool if there is one, else for the current pool."""
        scoring = self.scoring if self._staged is None else self._staged[1]
        if scoring is None:
            raise ModelError("the pool is not open")
        opened = scoring.open(signal) if run is None else scoring.calibrate(signal, *run)
        if scoring is self.scoring:
            scoring.install()
        return opened

    def commit(self) -> None:
        """Makes the staged pool the current one. Its adapters are loaded; removed ones stay until `forget`.

        Raises:
            ModelError: nothing was staged.
        """
        if self._staged is None:
            raise ModelError("no change of the pool has begun")
        (self.pool, self.scoring), self._staged = self._staged, None
        self._note_used()
        self.scoring.install()

    def abandon(self) -> None:
        """Drops the staged pool and the adapters that only it has."""
        if self._staged is not None:
            (pool, _), self._staged = self._staged, None
            self._remove(pool.keys.values())

    def forget(self, keys: Iterable[str]) -> None:
        """Removes adapters that have left the pool and that no answer uses any more."""
        self._remove(keys)
        self._note_used()

    def _remove(self, keys: Iterable[str]) -> None:
        """Removes adapters from the slots; those of the current and the staged pool stay."""
        staged = () if self._staged is None else self._staged[0].keys.values()
        for key in set(keys) & self._by_key.keys() - {*self.pool.keys.values(), *staged}:
            self._adapters.remove_adapter(self._ids[key])
            del self._by_key[key], self._ids[key]

    @cached_property
    def _prompts(self) -> Prompts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._tokenizer, trust_remote_code=False)
        context = min(context_length(self.skeleton) or self._max_tokens, self._max_tokens)
        return Prompts(tokenizer, context)


def _own_id(key: str) -> int:
    """The id in vLLM of a single adapter, by which its slot is found."""
    return Recipe(((key, 1.0),)).number()
