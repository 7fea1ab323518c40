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
from logo.models import context_length
from logo.prompts import Prompts
from logo.selection.calibration import HiddenVectors
from logo.selection.plan import plan
from logo.selection.points import Point
from logo.selection.scorer import BaseReader, Scorer
from logo.selection.signals import Signal
from logo.selection.texts import Texts
from logo.vllm.gates import StepGates, turned
from logo.vllm.layers import GatedWrapper, Tap, is_compiled, multiplied, split, tap_residual
from logo.vllm.options import VllmOptions, log
from logo.vllm.pool import pool_of, scoring_signals
from logo.vllm.requests import NAME, Mix, Probe, parse
from logo.vllm.skeleton import skeleton
from logo.vllm.taps import Span, Taps, TextReader

# The ids that this worker gives to requests begin here, behind those that vLLM itself uses to warm up.
_FIRST = 2**20
# How many adapters are remembered that the latest pool does not have: mixtures with them may still wait for slots.
_REMEMBERED = 4096


@dataclass
class _Request:
    """A running request of ours."""

    number: int  # its id among adapters, in this worker
    asked: Mix | Probe  # what its path says
    prompt: Sequence[int]  # its token ids
    begins: tuple[int | None, ...]  # of a mixture, the position from which each adapter acts; None: nowhere
    settled: Tensor | None = None  # of a mixture, the gate (1, slots) where all adapters act that ever do, once known


class _TextsNeeded(Exception):
    """The model has to run texts first. The arguments say how they are read, and are their token ids."""


class Worker:
    """LoGo's part of one vLLM worker, attached to the worker's LoRA manager before its model is wrapped."""

    def __init__(self, manager: Any, vllm_config: Any, options: VllmOptions) -> None:
        model_config, lora = vllm_config.model_config, vllm_config.lora_config
        self._options, self._manager, self._dtype = options, manager, lora.lora_dtype
        self._skeleton = skeleton(model_config.model, model_config.dtype, model_config.revision)
        pool = pool_of(options, self._skeleton)
        self._pools: dict[str, AdapterPool] = {pool.digest: pool}
        self._known: OrderedDict[str, Adapter] = OrderedDict()  # by key, those of the latest pool last
        self._remember(pool)
        tokens, requests = manager.max_num_batched_tokens, manager.max_num_seqs
        # Compiled layers keep the slices and the taps that they were compiled with; a changed pool may need others.
        self._compiled = is_compiled(vllm_config)
        eager = manager.device.type == "cpu" and not self._compiled
        sizes = tokens + 7, max(tokens, requests), lora.max_loras
        self._gates = StepGates(*sizes, manager.device, self._dtype, eager=eager)
        self.taps = Taps(self._place_of, manager.device)
        self.scores = self.taps.take
        self._numbers = itertools.count(_FIRST)
        self._requests: dict[str, _Request] = {}  # by vLLM's id of the request
        self._told = set[str]()  # the adapters of which a warning says that they do not act
        self._step: dict[int, tuple[_Request, int]] = {}  # by number: the position of its first token in this step
        self._slots: dict[str, int] = {}  # key of an adapter -> id in vLLM's manager
        self._places = self._read_at(pool)
        split(vllm_config, sorted(map(str, self._places)))
        self._max_tokens, self._tokenizer = model_config.max_model_len - 1, model_config.tokenizer
        # Until a pool is replaced, also of what the cache folder does not take.
        self._store: Store = Store(cache_folder(options.settings.cache))
        # While a signal is opened: text -> place in vLLM's model -> hidden vectors (tokens, d).
        self._kept: dict[tuple[int, ...], dict[str, Tensor]] = {}

    # -- vLLM's model --------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Puts our wrapper, with a tap, into every layer that vLLM has wrapped; ModelError: a layer that adapters act
        on, or that is probed, is not one that vLLM can adapt."""
        from vllm.distributed import tensor_model_parallel_all_gather

        self._adapters = manager = self._manager._adapter_manager
        device = self._manager.device
        self._modules: dict[str, str] = {}  # module path in adapters -> path of vLLM's layer
        for path in manager.modules:
            self._modules |= dict.fromkeys(manager.packed_modules.get(path, [path]), path)
        for pool in self._pools.values():
            self._check_layers(pool)
        read = {self._modules.get(module) for how, module in self._places if how != "residual"}
        wrapper = GatedWrapper(manager.max_num_batched_tokens, manager.max_num_seqs, device, self._gates)
        manager.punica_wrapper_mapping = dict.fromkeys(manager.punica_wrapper_mapping, wrapper)
        for path, layer in manager.modules.items():
            if not multiplied(layer):
                found = f"LoGo cannot apply adapters to {path} ({type(layer).__name__})"
                also = "if none does, pass --lora-target-modules with the modules that the pool acts on"
                raise ModelError(f"{found}: leave out the adapters that act on it; {also}")
            if isinstance(b := getattr(layer, "lora_b_stacked", None), tuple):
                layer.lora_b_stacked = tuple(turned(part) for part in b)
            if hasattr(layer, "punica_wrapper"):
                base = getattr(layer, "base_layer", None)
                parted = getattr(base, "input_is_parallel", False) and getattr(base, "tp_size", 1) > 1
                gather = tensor_model_parallel_all_gather if parted else None
                layer.punica_wrapper = wrapper.of_layer(Tap(path, self.taps, device, gather, path in read))
        for path in sorted(path for how, path in self._places if how == "residual"):
            try:
                tap_residual(model.get_submodule(path), path, self.taps, device)
            except AttributeError:
                found = type(model).__name__
                raise ModelError(f"vLLM's {found} has no layer {path}, which is probed: use another signal") from None

    def _check_layers(self, pool: AdapterPool) -> None:
        for adapter in pool:
            for module in adapter.modules:
                self._layer(module, f"adapter {adapter.name!r} acts on")

    def _read_at(self, pool: AdapterPool) -> frozenset[tuple[str, str]]:
        """The places that the requestable signals read: (`Signal.input`, path of a layer or module)."""
        found, settings = set(), self._options.settings
        for signal in scoring_signals(self._options, self._skeleton, pool):
            how = settings.reading(pool, signal).input
            for point in plan(self._skeleton, pool, settings, signal).points:
                found.add((how, point.layer_path if how == "residual" else point.module))
        return frozenset(found)

    def _place_of(self, point: Point, read: str) -> str:
        return point.layer_path if read == "residual" else self._layer(point.module, "the probe reads")

    def _layer(self, module: str, why: str) -> str:
        if module not in self._modules:
            has = ", ".join(sorted({path.rpartition(".")[2] for path in self._modules}))
            found = f"{why} {module}, but vLLM's {type(self._adapters.model).__name__} has no layer there"
            raise ModelError(f"{found} that takes adapters; it has {has}")
        return self._modules[module]

    # -- every step ----------------------------------------------------------------------------------------------

    def begin(self, scheduled: Any) -> None:
        """Notes the requests of a step (vLLM's `SchedulerOutput`), and gives each of ours an id of its own, by which
        `write_gates` finds its rows."""
        for gone in scheduled.finished_req_ids:
            ended = self._requests.pop(gone, None)
            if ended is not None and isinstance(ended.asked, Probe):
                self.taps.drop(ended.asked.key)
        self._step = {}
        for new in scheduled.scheduled_new_reqs:
            lora = new.lora_request
            asked = None if lora is None else parse(lora.lora_path)
            if asked is None:
                continue
            if new.req_id not in self._requests:
                prompt = new.prompt_token_ids or [-1] * len(new.prompt_embeds)
                begins = asked.begins(prompt) if isinstance(asked, Mix) else ()
                self._requests[new.req_id] = _Request(next(self._numbers), asked, prompt, begins)
                parts = zip(getattr(asked, "keys", ()), begins, strict=True)
                warn_of_silent((self._known[key].name for key, begin in parts if begin is None), self._told)
            found = self._requests[new.req_id]
            new.lora_request = type(lora)(NAME, found.number, lora.lora_path)
            self._step[found.number] = found, new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if (known := self._requests.get(name)) is not None:
                self._step[known.number] = known, computed

    def write_gates(self, mapping: Any) -> None:
        """Sets the gates of the step, and the rows that the taps read, by vLLM's `LoRAMapping`: the id of every token,
        and of every token whose logits are computed. Tokens of one request follow each other."""
        tokens, sampled, spans = [], [], list[Span]()
        ids, drawn = np.asarray(mapping.index_mapping), np.asarray(mapping.prompt_mapping)
        place = {number: slot for slot, number in enumerate(self._adapters.lora_index_to_id)}
        for number, (found, start) in self._step.items():
            rows, last = np.flatnonzero(ids == number), np.flatnonzero(drawn == number)
            if not len(rows):  # vLLM warms up
                continue
            row, count = int(rows[0]), len(rows)
            if isinstance(found.asked, Probe):
                if (read := min(count, len(found.prompt) - start)) > 0:
                    spans.append(Span(found.asked, found.prompt, row, start, read))
                continue
            gate, settled = found.settled, max((begin or 0 for begin in found.begins), default=0)
            if gate is None or start < settled:  # one that was put back begins anew
                positions = torch.arange(start, start + count)
                gate = torch.zeros(count, self._gates.tokens.shape[1])
                for (key, weight, _), begin in zip(found.asked.parts, found.begins, strict=True):
                    if begin is not None:
                        gate[:, place[self._slots[key]]] += weight * (positions >= begin)
                if start >= settled:
                    found.settled = gate[:1]  # its adapters stay in their slots while it runs
            gate = gate.expand(count, -1)
            tokens.append((row, gate))
            if len(last):  # more than one only where tokens were guessed
                sampled.append((int(last[0]), gate[-1:].expand(len(last), -1)))
        self._gates.write(tokens, sampled)
        try:
            self.taps.begin(spans)
        except Exception as error:  # such as exhausted memory: these prompts get no scores, and all others go on
            log.error("LoGo: the prompts of a step cannot be read", exc_info=error)

    # -- adapters ------------------------------------------------------------------------------------------------

    def load(self, into: Sequence[tuple[int, str]]) -> None:
        """Puts adapters, by key, into slots that no request in progress uses, which are numbered from 0 on;
        AdapterError: one cannot be read or overflows; its slot is empty then."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        for slot, key in into:
            number, adapter = slot + 1, self._known[key]
            self._slots = {known: other for known, other in self._slots.items() if other != number}
            self._adapters.remove_adapter(number)
            loras = {}
            for module, weights in adapter.read().items():
                a, b = weights.A.to(self._dtype), weights.scaled_b().to(self._dtype)
                if not bool(b.isfinite().all()):  # it would spoil the answers of others
                    raise AdapterError(adapter.name, f"{module} overflows in {self._dtype}")
                loras[module] = LoRALayerWeights(module, len(a), 1, a, b, scaling=1.0)  # else B would be scaled again
            made = LoRAModel(number, max(adapter.ranks), loras)
            self._adapters.add_adapter(made)
            self._adapters.activate_adapter(number)
            made.loras.clear()  # the slot holds it now
            self._slots[key] = number

    # -- pools ---------------------------------------------------------------------------------------------------

    def pool(self, before: str, change: Sequence[str]) -> str:
        """Opens a pool that comes from another (its digest) by a change (see `pool_of`), beside those that are in use,
        and returns its digest. LoGoError: the change cannot be made; nothing has changed."""
        pool = pool_of(self._options, self._skeleton, self._pools[before], change)
        unread = self._read_at(pool) - self._places
        if unread and (self._compiled or any(how == "residual" for how, _ in unread)):
            where = ", ".join(sorted(path for _, path in unread))
            raise UsageError(f"this pool is probed at {where}, which the server cannot read: restart it with this pool")
        self._check_layers(pool)
        self._pools[pool.digest] = pool
        self._remember(pool)
        return pool.digest

    def _remember(self, pool: AdapterPool) -> None:
        for adapter in pool:
            self._known[adapter.key] = adapter
            self._known.move_to_end(adapter.key)
        while len(self._known) > len(pool) + _REMEMBERED:
            self._known.popitem(last=False)

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
            self._store, self._kept = Store(None), {}
        for text, (key, vectors) in zip(texts, self.taps.take(keys).items(), strict=True):
            if not isinstance(vectors, dict):
                raise ModelError(f"calibration text {key}: {vectors}")
            self._kept.setdefault(tuple(text), {}).update(vectors)
        scorers: Any = {which: one for which, one in self.taps.readers.items() if which[1]}
        earlier = (one for (_, name), one in reversed(scorers.items()) if name == signal)
        before = scorers.get((digest, signal)) or next(earlier, None)
        base = BaseReader(self._skeleton, self._prompts.texts, self._vectors, self._manager.device, self._store)
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
        self._note_used()
        return {"texts": [], "points": [one.name for one in scorer.points], "selector": asdict(scorer.selector)}

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
        self.taps.read_by({which: one for which, one in self.taps.readers.items() if which[0] != digest})

    def _note_used(self) -> None:
        """Tells the layers on which of their slices adapters act; they keep multiplying all (None) if compiled."""
        touched = {module for adapter in self._known.values() for module in adapter.modules}
        for path, layer in self._adapters.modules.items():
            parts = self._adapters.packed_modules.get(path, [path])
            known = not self._compiled and getattr(layer, "n_slices", 0) == len(parts)
            if hasattr(layer, "punica_wrapper"):
                layer.punica_wrapper.used = tuple(part in touched for part in parts) if known else None

    def _vectors(self, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[HiddenVectors]:
        """A `TextRunner`: the hidden vectors of texts that vLLM has run; raises _TextsNeeded if it has not."""
        rows = [self._kept.get(tuple(row), {}) for row in texts.rows]
        places = [self._place_of(point, signal.input) for point in points]
        if any(place not in row for row in rows for place in places):
            raise _TextsNeeded(TextReader(tuple(points), signal), texts.rows)
        acted = None
        if signal.token == "tail":  # whether adapters act on each token that is read
            begins = [earliest(signal.activations, row) for row in texts.rows]
            pairs = zip(texts.rows, begins, strict=True)
            acted = torch.cat([torch.arange(int(len(row) > 1), len(row)) >= begin for row, begin in pairs])
        found = {}
        for place in dict.fromkeys(places):
            parts = [row[place].mean(dim=0, keepdim=True) if signal.token == "mean" else row[place] for row in rows]
            counts = torch.tensor([len(part) for part in parts])
            found[place] = HiddenVectors(torch.cat(parts), torch.arange(len(parts)).repeat_interleave(counts), acted)
        return (found[place] for place in places)

    @functools.cached_property
    def _prompts(self) -> Prompts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._tokenizer, trust_remote_code=False)
        return Prompts(tokenizer, min(context_length(self._skeleton) or self._max_tokens, self._max_tokens))


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
