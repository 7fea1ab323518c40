"""LoGo in one worker of vLLM: which rows of a step are probed, which mixtures others have, and the adapters in slots.

vLLM calls it before every step (`logo.vllm.patches`). The process that talks to the engine calls it between steps, by
the methods of `Extension`, and decides which adapter goes into which slot and when a pool is no longer needed.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logo.adapters.activation import earliest, warn_of_silent
from logo.adapters.adapter import Adapter
from logo.adapters.pool import AdapterPool
from logo.errors import AdapterError, LoGoError, ModelError, UsageError
from logo.files import Store, cache_folder
from logo.prompts import Prompts
from logo.selection.base_reader import BaseReader
from logo.selection.calibration import HiddenVectors
from logo.selection.plan import described_points, plan
from logo.selection.points import Point
from logo.selection.scorer import Scorer
from logo.selection.signals import Signal
from logo.selection.texts import Texts
from logo.vllm.blocks import clear, clearing
from logo.vllm.gates import Rows, StepGates, turned
from logo.vllm.layers import GatedWrapper, Tap, is_compiled, multiplied, split, tap_residual
from logo.vllm.options import VllmOptions, log
from logo.vllm.pool import pool_of, scoring_signals
from logo.vllm.requests import NAME, Mix, ProbeRequest, parse
from logo.vllm.skeleton import fitting, prompts_of, skeleton
from logo.vllm.taps import Span, Taps, TextReader

# The ids that this worker gives to requests begin here, behind those that vLLM itself uses to warm up.
_FIRST = 2**20
# How many adapters are remembered that the latest pool does not have: mixtures with them may still wait for slots.
_REMEMBERED = 4096


@dataclass
class _Request:
    """A running request of ours."""

    number: int  # its id among adapters, in this worker
    content: Mix | ProbeRequest  # what its path says
    prompt: Sequence[int]  # its token ids
    begins: tuple[int | None, ...] = ()  # of a mixture, the position from which each adapter acts; None: nowhere
    gate: Tensor | None = None  # of a mixture, the gate (1, slots) where all adapters act that ever do, once known


# The most texts that are run between two calls of `Worker.signal`, since taps keep only so many outcomes.
_MOST_TEXTS = 1024


class _TextsNeeded(Exception):
    """The model has to run texts first. The arguments say how they are read, and are their token ids."""


class Worker:
    """LoGo's part of one vLLM worker, attached to the worker's LoRA manager before its model is wrapped."""

    def __init__(self, manager: Any, vllm_config: Any, options: VllmOptions) -> None:
        model_config = vllm_config.model_config
        lora = vllm_config.lora_config
        self._options = options
        self._manager = manager
        self._dtype = lora.lora_dtype
        self._skeleton = skeleton(model_config.model, model_config.dtype, model_config.revision)
        pool = pool_of(options, self._skeleton)
        self._pools: dict[str, AdapterPool] = {pool.digest: pool}
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # by key, those of the latest pool last
        self._remember(pool)
        # Compiled layers keep the taps that they were compiled with; a changed pool may need others.
        self._compiled = is_compiled(vllm_config)
        self._gates = StepGates(
            manager.max_num_batched_tokens + 7,
            max(manager.max_num_batched_tokens, manager.max_num_seqs),
            lora.max_loras,
            manager.device,
            self._dtype,
            eager=manager.device.type == "cpu" and not self._compiled,
        )
        self.taps = Taps(self._place_of, manager.device)
        self.scores = self.taps.take
        self._numbers = itertools.count(_FIRST)
        self._requests: dict[str, _Request] = {}  # by vLLM's id of the request
        self._warned = set[str]()  # the adapters of which a warning says that they do not act
        self._step: dict[int, tuple[_Request, int]] = {}  # by number: the position of its first token in this step
        self._slots: dict[str, int] = {}  # key of an adapter -> id in vLLM's manager
        self._ranks: dict[int, dict[str, int]] = {}  # that id -> module -> rank of the adapter there
        self._block_sizes: tuple[int, ...] | None = ()  # see `clearing`; (): not known before the first step
        self._places = self._read_at(pool)
        split(vllm_config, sorted(map(str, self._places)))
        self._model_config = model_config
        # Until a pool is replaced, also of what the cache folder does not take.
        self._store: Store = Store(cache_folder(options.settings.cache))
        # While a signal is opened: text -> place in vLLM's model -> hidden vectors (tokens, d).
        self._kept: dict[tuple[int, ...], dict[str, Tensor]] = {}

    # -- vLLM's model --------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Puts our wrapper, with a tap, into every layer that vLLM has wrapped; ModelError: a layer that adapters act
        on, or that is probed, is not one that vLLM can adapt."""
        from vllm.distributed import tensor_model_parallel_all_gather

        manager = self._manager._adapter_manager
        device = self._manager.device
        self._vllm_adapters = manager
        self._modules: dict[str, str] = {}  # module path in adapters -> path of vLLM's layer
        for path in manager.modules:
            self._modules |= dict.fromkeys(manager.packed_modules.get(path, [path]), path)
        for pool in self._pools.values():
            self._check_layers(pool)
        read = {self._modules.get(module) for entering, module in self._places if entering != "residual"}
        wrapper = GatedWrapper(manager.max_num_batched_tokens, manager.max_num_seqs, device, self._gates)
        manager.punica_wrapper_mapping = dict.fromkeys(manager.punica_wrapper_mapping, wrapper)
        for path, layer in manager.modules.items():
            if not multiplied(layer):
                raise ModelError(
                    f"LoGo cannot apply adapters to {path} ({type(layer).__name__}): leave out the adapters that act "
                    "on it; if none does, pass --lora-target-modules with the modules that the pool acts on"
                )
            if isinstance(getattr(layer, "lora_b_stacked", None), tuple):
                layer.lora_b_stacked = tuple(turned(b) for b in layer.lora_b_stacked)
            if hasattr(layer, "punica_wrapper"):
                base = getattr(layer, "base_layer", None)
                parted = getattr(base, "input_is_parallel", False) and getattr(base, "tp_size", 1) > 1
                gather = tensor_model_parallel_all_gather if parted else None
                layer.punica_wrapper = wrapper.of_layer(Tap(path, self.taps, device, gather, path in read))
        for path in sorted(path for entering, path in self._places if entering == "residual"):
            try:
                tap_residual(model.get_submodule(path), path, self.taps, device)
            except AttributeError:
                kind = type(model).__name__
                raise ModelError(f"vLLM's {kind} has no layer {path}, which is probed: use another signal") from None

    def _check_layers(self, pool: AdapterPool) -> None:
        for adapter in pool:
            for module in adapter.modules:
                self._layer(module, f"adapter {adapter.name!r} acts on")

    def _read_at(self, pool: AdapterPool) -> frozenset[tuple[str, str]]:
        """The places that the requestable signals read: (`Signal.input`, path of a layer or module)."""
        settings = self._options.settings
        places: set[tuple[str, str]] = set()
        for signal in scoring_signals(self._options, self._skeleton, pool):
            pool_signal = settings.signal_for(pool, signal)
            for point in plan(self._skeleton, pool, settings, signal).points:
                places.add((pool_signal.input, point.layer_path if pool_signal.input == "residual" else point.module))
            # Whether or not an adapter has example prompts yet: one that joins the pool may.
            for point in described_points(self._skeleton, settings, pool_signal):
                places.add(("residual", point.layer_path))
        return frozenset(places)

    def _place_of(self, point: Point, read: str) -> str:
        if read == "residual" or point.residual:
            return point.layer_path
        return self._layer(point.module, "the probe reads")

    def _layer(self, module: str, why: str) -> str:
        if module not in self._modules:
            there = ", ".join(sorted({path.rpartition(".")[2] for path in self._modules}))
            kind = type(self._vllm_adapters.model).__name__
            raise ModelError(
                f"{why} {module}, but vLLM's {kind} has no layer there that takes adapters; it has {there}"
            )
        return self._modules[module]

    # -- every step ----------------------------------------------------------------------------------------------

    def begin(self, scheduled: Any, runner: Any) -> None:
        """Notes the requests of a step (vLLM's `SchedulerOutput`), and gives each of ours an id of its own, by which
        `write_gates` finds its rows; and clears the blocks that are new in this step."""
        if self._block_sizes == ():
            self._block_sizes = clearing(runner)
        if self._block_sizes is not None:
            clear(runner, scheduled, self._block_sizes)
        for request_id in scheduled.finished_req_ids:
            ended = self._requests.pop(request_id, None)
            if ended is not None and isinstance(ended.content, ProbeRequest):
                self.taps.drop(ended.content.key)
        self._step = {}
        for new in scheduled.scheduled_new_reqs:
            request = self._begun(new)
            if request is not None:
                new.lora_request = type(new.lora_request)(NAME, request.number, new.lora_request.lora_path)
                self._step[request.number] = request, new.num_computed_tokens
        running = scheduled.scheduled_cached_reqs
        for request_id, computed in zip(running.req_ids, running.num_computed_tokens, strict=True):
            if request_id in self._requests:
                request = self._requests[request_id]
                self._step[request.number] = request, computed

    def _begun(self, new: Any) -> _Request | None:
        """The request that vLLM names as new, also if it was put back and begins again; None if it is not ours."""
        content = None if new.lora_request is None else parse(new.lora_request.lora_path)
        if content is None or new.req_id in self._requests:
            return self._requests.get(new.req_id)
        prompt = new.prompt_token_ids or [-1] * len(new.prompt_embeds)
        request = _Request(next(self._numbers), content, prompt)
        if isinstance(content, Mix):
            request.begins = content.begins(prompt)
            silent = [key for key, begin in zip(content.keys, request.begins, strict=True) if begin is None]
            warn_of_silent((self._adapters[key].name for key in silent), self._warned)
        self._requests[new.req_id] = request
        return request

    def write_gates(self, mapping: Any) -> None:
        """Sets the gates of the step, and the rows that the taps read, by vLLM's `LoRAMapping`: the id of every token,
        and of every token whose logits are computed. Tokens of one request follow each other."""
        token_ids = np.asarray(mapping.index_mapping)
        sampled_ids = np.asarray(mapping.prompt_mapping)
        gates: list[Rows] = []
        sampled_gates: list[Rows] = []
        spans: list[Span] = []
        for number, (request, start) in self._step.items():
            rows = np.flatnonzero(token_ids == number)
            if not len(rows):  # vLLM warms up
                continue
            if isinstance(request.content, ProbeRequest):
                read = min(len(rows), len(request.prompt) - start)
                if read > 0:
                    spans.append(Span(request.content, request.prompt, int(rows[0]), start, read))
                continue
            gate = self._gate(request, request.content, start, len(rows))
            gates.append((int(rows[0]), gate))
            sampled_rows = np.flatnonzero(sampled_ids == number)
            if len(sampled_rows):  # more than one only where tokens were guessed
                sampled_gates.append((int(sampled_rows[0]), gate[-1:].expand(len(sampled_rows), -1)))
        self._gates.write(gates, sampled_gates)
        try:
            self.taps.begin(spans)
        except Exception as error:  # such as exhausted memory: these prompts get no scores, and all others go on
            log.error("LoGo: the prompts of a step cannot be read", exc_info=error)

    def _gate(self, request: _Request, mix: Mix, start: int, count: int) -> Tensor:
        """The gate (count, slots) of tokens of a mixture, the first of which has the position `start`."""
        settled = max((begin or 0 for begin in request.begins), default=0)
        if request.gate is None or start < settled:  # a request that was put back begins anew
            slots = {number: slot for slot, number in enumerate(self._vllm_adapters.lora_index_to_id)}
            positions = torch.arange(start, start + count)
            gate = torch.zeros(count, self._gates.tokens.shape[1])
            for (key, weight, _), begin in zip(mix.parts, request.begins, strict=True):
                if begin is not None:
                    gate[:, slots[self._slots[key]]] += weight * (positions >= begin)
            if start < settled:
                return gate
            request.gate = gate[:1]  # its adapters stay in their slots while it runs
        return request.gate.expand(count, -1)

    # -- adapters ------------------------------------------------------------------------------------------------

    def load(self, into: Sequence[tuple[int, str]]) -> None:
        """Puts adapters, by key, into slots that no request in progress uses, which are numbered from 0 on;
        AdapterError: one cannot be read or overflows; its slot is empty then."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        for slot, key in into:
            number = slot + 1  # of vLLM's
            adapter = self._adapters[key]
            self._slots = {before: taken for before, taken in self._slots.items() if taken != number}
            self._vllm_adapters.remove_adapter(number)
            self._ranks.pop(number, None)
            loras = {}
            for module, weights in adapter.read().items():
                a = weights.A.to(self._dtype)
                b = weights.scaled_b().to(self._dtype)
                if not bool(b.isfinite().all()):  # it would spoil the answers of others
                    raise AdapterError(adapter.name, f"{module} overflows in {self._dtype}")
                loras[module] = LoRALayerWeights(module, len(a), 1, a, b, scaling=1.0)  # else B would be scaled again
            model = LoRAModel(number, max(adapter.ranks), loras)
            self._vllm_adapters.add_adapter(model)
            self._vllm_adapters.activate_adapter(number)
            model.loras.clear()  # the slot holds it now
            self._slots[key] = number
            self._ranks[number] = {path: module.rank for path, module in adapter.modules.items()}
        self._tell_ranks()

    def _tell_ranks(self) -> None:
        """Tells the layers which ranks the adapters in their slots have there."""
        in_slots = [self._ranks.get(number, {}) for number in self._vllm_adapters.lora_index_to_id]
        for path, layer in self._vllm_adapters.modules.items():
            parts = self._vllm_adapters.packed_modules.get(path, [path])
            if getattr(layer, "n_slices", 0) == len(parts):  # else its parts cannot be told apart
                ranks = tuple(tuple(modules.get(part, 0) for modules in in_slots) for part in parts)
                layer.punica_wrapper.ranks = ranks

    # -- pools ---------------------------------------------------------------------------------------------------

    def pool(self, before: str, change: Sequence[str]) -> str:
        """Opens a pool that comes from another (its digest) by a change (see `pool_of`), beside those that are in use,
        and returns its digest. LoGoError: the change cannot be made; nothing has changed."""
        pool = pool_of(self._options, self._skeleton, self._pools[before], change)
        unread = self._read_at(pool) - self._places
        if unread and (self._compiled or any(entering == "residual" for entering, _ in unread)):
            where = ", ".join(sorted(path for _, path in unread))
            raise UsageError(f"this pool is probed at {where}, which the server cannot read: restart it with this pool")
        self._check_layers(pool)
        self._pools[pool.digest] = pool
        self._remember(pool)
        return pool.digest

    def _remember(self, pool: AdapterPool) -> None:
        for adapter in pool:
            self._adapters[adapter.key] = adapter
            self._adapters.move_to_end(adapter.key)
        while len(self._adapters) > len(pool) + _REMEMBERED:
            self._adapters.popitem(last=False)

    def signal(
        self, digest: str, signal: str, texts: Sequence[Sequence[int]], keys: Sequence[str], fresh: bool
    ) -> dict[str, Any]:
        """Opens the scorer of a signal for one of the pools, or says which texts the model has to run before.

        A calibration needs the hidden vectors of texts, and a worker cannot start forward passes of its own. So this is
        called again and again, with the texts that the last call returned and the keys of the probes that ran them. The
        first texts are those of the calibration, then the example prompts of adapters.

        Args:
            fresh: whether to read all texts anew, since other workers lack what this one has stored.

        Returns:
            `texts` and `points`: the texts to run next, as token ids, and where they are read; without any, where the
            scorer reads, and its `selector`. ModelError: a text was not read whole.
        """
        if fresh:
            self._store = Store(None)
            self._kept = {}
        for text, (key, vectors) in zip(texts, self.taps.take(keys).items(), strict=True):
            if not isinstance(vectors, dict):
                raise ModelError(f"calibration text {key}: {vectors}")
            self._kept.setdefault(tuple(text), {}).update(vectors)
        scorers: Any = {key: reader for key, reader in self.taps.readers.items() if key[1]}  # and no texts
        of_signal = (scorer for (_, name), scorer in reversed(scorers.items()) if name == signal)
        before = scorers.get((digest, signal)) or next(of_signal, None)
        window = self._options.settings.signal_for(self._pools[digest], signal).window
        prompts = fitting(self._prompts, window, self._model_config.max_model_len)
        base = BaseReader(self._skeleton, prompts.texts, self._vectors, self._manager.device, self._store)
        try:
            scorer = Scorer.open(base, self._pools[digest], self._options.settings, signal, before=before)
        except _TextsNeeded as needed:
            read, rows = needed.args
            self.taps.read_by({**scorers, (digest, ""): read})
            return {"texts": [list(row) for row in rows], "points": [point.name for point in read.points]}
        except BaseException:
            self._kept = {}
            raise
        self._kept = {}
        self.taps.read_by({**scorers, (digest, signal): scorer})
        return {"texts": [], "points": [point.name for point in scorer.points], "selector": asdict(scorer.selector)}

    def expected(self, digest: str, signal: str) -> tuple[list[int], list[float]] | None:
        """The first text of the calibration (token ids), and the scores of its responses; None: there is none."""
        scorer: Any = self.taps.readers[digest, signal]
        if scorer.calibration is None or scorer.reading is None:
            return None
        [text, *_] = scorer.reading.texts.neutral
        return list(text), scorer.calibrated(0, len(text) - scorer.signal.begin(text))

    def drop(self, digest: str) -> None:
        """Forgets a pool that nobody selects from any more; its adapters stay in their slots until these are needed."""
        self._pools.pop(digest, None)
        self.taps.read_by({key: reader for key, reader in self.taps.readers.items() if key[0] != digest})

    def _vectors(self, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
        """A `TextRunner`: the hidden vectors of texts that vLLM has run; raises _TextsNeeded if it has not."""
        rows = [self._kept.get(tuple(row), {}) for row in texts.rows]
        places = [self._place_of(point, signal.input) for point in points]
        missing = [
            text for text, row in zip(texts.rows, rows, strict=True) if any(place not in row for place in places)
        ]
        if missing:
            raise _TextsNeeded(TextReader(tuple(points), signal), missing[:_MOST_TEXTS])
        acted = None
        if signal.token == "tail":
            acted_by_text = []
            for row in texts.rows:
                positions = torch.arange(signal.begin_of_text(row), len(row))
                acted_by_text.append(positions >= earliest(signal.activations, row))
            acted = torch.cat(acted_by_text)
        vectors = {}
        for place in dict.fromkeys(places):
            parts = [row[place] for row in rows]
            counts = torch.tensor([len(part) for part in parts])
            vectors[place] = HiddenVectors(torch.cat(parts), torch.arange(len(parts)).repeat_interleave(counts), acted)
        return (vectors[place] for place in places)

    @functools.cached_property
    def _prompts(self) -> Prompts:
        return prompts_of(self._model_config, self._skeleton)


class Extension:
    """What `--worker-extension-cls logo.vllm.worker.Extension` adds to vLLM's workers, for `collective_rpc`."""

    model_runner: Any

    def logo(self, name: str, *args: Any) -> dict[str, Any]:
        """Calls a method of `Worker`. Returns its value, or the text of its error: an exception would leave the replies
        of other ranks in vLLM's queues, where the next calls would find them."""
        own = getattr(getattr(self.model_runner, "lora_manager", None), "logo", None)
        if own is None:
            return {"error": "LoGo is not in this worker: start vLLM with --enable-lora, and name a pool in LOGO_POOL"}
        try:
            return {"value": getattr(own, name)(*args)}
        except LoGoError as error:
            return {"error": str(error), "kind": type(error).__name__, "args": list(map(str, error.args))}
        except Exception as error:
            log.error("LoGo: %s failed", name, exc_info=error)
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
