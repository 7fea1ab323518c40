"""`VllmLoGo`: an engine with the methods of `LoGo` whose model runs in vLLM's offline engine.

    prompts -> token ids -> probes in vLLM's workers -> scores -> Selection -> recipe -> vLLM -> Generation

Scores and mixtures are computed by the same workers as in the server (`logo.backends.vllm.worker`); the ends of answers
and the errors are those of the local engine (`logo.engine`), of which this is a subclass. HTTP plays no part here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, CurrentPool
from logo.backends.vllm.core import Core, Opened, new_key, outcomes, scores_of, texts_of, values
from logo.backends.vllm.hooks import version
from logo.backends.vllm.likelihood import scored, scoring
from logo.backends.vllm.marks import answering, probing, reading
from logo.backends.vllm.pool import head_adapter
from logo.backends.vllm.requests import Group, Requests, Running
from logo.backends.vllm.sampling import check_config, parameters
from logo.core import Generation, Options, Prompt, Selection
from logo.decoding import Batch, Decoding, overflow
from logo.engine import LoGo
from logo.errors import ModelError, UsageError
from logo.prompts import Prompts
from logo.scoring import Scored, continued_rows
from logo.selection.points import plan
from logo.selection.settings import SelectionSettings
from logo.selection.texts import WHOLE, Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

# The most prompts that are probed together; less than the number whose scores vLLM's workers keep.
_PROBED = 2048


class VllmLoGo(LoGo):
    """Selects and mixes adapters per prompt inside vLLM. `LoGo.from_pretrained(..., engine="vllm")` makes one.

    Rows of a call run together as vLLM schedules them; `batch_size` has no effect. The pool cannot change.

    Args:
        llm: vLLM's `LLM`, opened with a pool.
        model: the base model without its weights.
        tokenizer: the model's, with a pad token.
        prompts: reads prompts with this tokenizer.
        settings: how prompts are read, scored and selected.
        default_k: adapters per prompt if neither a call nor the settings give k; None: the pool's own number.
        engine_options: arguments of `vllm.LLM` that the user gave, and on which results depend.

    Raises:
        LoGoError: the pool does not fit, or cannot be scored.
    """

    def __init__(
        self,
        llm: Any,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        settings: SelectionSettings,
        default_k: int | None = None,
        engine_options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.llm, self.model, self.tokenizer = llm, model, tokenizer
        self.prompts, self.settings = prompts, settings
        self.engine_options, self.versions = engine_options, {"vllm": version()}
        self.probe_context, self.prefix_cache, self._carried = "base", None, None
        self.merge = None  # each adapter has a slot of vLLM, which decides
        self._checkpoint, self._generation_config = model.generation_config, None
        self.core = Core(llm.llm_engine.vllm_config)
        adapters = self.core.pool.adapters
        self._fitted = AdapterPool(adapters, adapters.refused, default_k=default_k or adapters.default_k)
        self.pool = CurrentPool(self._fitted)
        self._layout = BaseLayout.of(model)
        self._lock: Any = threading.RLock()
        self._requests = Requests(llm.llm_engine)
        pool = self.core.staged(None, self._ask("logo_stage", None))
        self._ask("logo_commit")
        self.core.commit(pool, {})
        self._scorers: dict[str, Any] = {}  # by signal, what is known of them here
        self._scorer(settings.signal)

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> AdapterPool:
        """The pool fitted to the base model, without adapters that do not fit (`on_bad_adapter="skip"`)."""
        if self.pool.value is not self._fitted:
            raise UsageError("the pool of the engine 'vllm' cannot change: open another engine, or use engine 'local'")
        return self._fitted

    @property
    def points(self) -> tuple[str, ...]:
        found: tuple[str, ...] = self._scorer(self.settings.signal).points
        return found

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return (torch.device(self.llm.llm_engine.vllm_config.device_config.device),)

    def close(self) -> None:
        """Shuts vLLM down; the engine cannot be used afterwards."""
        self.llm.llm_engine.engine_core.shutdown()

    # -- selecting -----------------------------------------------------------------------------------------------

    def _ask(self, name: str, *args: Any) -> list[Any]:
        """Calls one of `logo.backends.vllm.calls.CALLS` on every worker, and returns the values."""
        return values(self.llm.collective_rpc(name, args=args))

    def _scorer(self, signal: str, tell: Any = None) -> Any:
        """What is known here of the scorer of a signal, which is opened in the workers, and calibrated if necessary.

        Raises:
            LoGoError: it cannot score this pool.
        """
        if signal not in self._scorers:
            with self._lock:
                plan(self.model, self._fitted, self.settings, signal)  # raises the errors of the workers here
                told = self._ask("logo_signal", signal)
                while texts := texts_of(told):
                    told = self._ask("logo_calibrate", signal, texts, self._probe(texts, ""))
                opened = Opened.of(signal, self.settings.reading(self._fitted, signal), told[0])
                default_k = min(self._fitted.default_k, len(opened.names))
                opened = replace(opened, selector=replace(opened.selector, default_k=default_k))
                self._scorers[signal] = opened
        return self._scorers[signal]

    def _scores(
        self, pool: AdapterPool, scorer: Any, rows: Sequence[Prompt], among: Sequence[Any], batch_size: int
    ) -> torch.Tensor:
        """Scores (rows, adapters) of prompts, which run as probes.

        Raises:
            NotFinite: a score overflowed.
            ModelError: a prompt could not be scored.
        """
        found: list[Any] = []
        for start in range(0, len(rows), _PROBED):
            part = slice(start, start + _PROBED)
            keys = self._probe(
                [self._probed(row) for row in rows[part]], scorer.name, among[part], scorer.signal.window
            )
            taken = outcomes(self._ask("logo_scores", keys))
            found += [scores_of(taken[key]) for key in keys]  # the pool does not change, so that there are some
        return torch.tensor(found)

    def _probed(self, row: Prompt) -> Sequence[int]:
        return row.ids if self.core.probe_text == "all" else row.probed

    def _probe(
        self, rows: Sequence[Sequence[int]], signal: str, among: Sequence[Any] = (), window: Window = WHOLE
    ) -> list[str]:
        """Runs prompts as probes, and returns the keys of their results."""
        from vllm import SamplingParams

        keys = [new_key() for _ in rows]
        with self._requests.together() as group:
            for key, ids, names in zip(keys, rows, among or [None] * len(rows), strict=True):
                with probing(key, signal, names, window):
                    group.start(ids, SamplingParams(max_tokens=1, temperature=0.0, detokenize=False))
            group.wait()
        return keys

    # -- answering -----------------------------------------------------------------------------------------------

    def _checked(self, pool: AdapterPool, *given: Any) -> tuple[Options, Decoding]:
        call, decoding = super()._checked(pool, *given)
        check_config(decoding.config)
        return call, decoding

    def _batches(self, rows: Sequence[Prompt], batch_size: int, decoding: Decoding) -> Iterable[Sequence[int]]:
        return [range(len(rows))]

    def _decode(self, batch: Batch, streamer: BaseStreamer | None) -> list[Generation]:
        rows, selections, decoding = batch.rows, batch.selections, batch.decoding
        started = time.perf_counter()
        with ExitStack() as stack:
            loras = [stack.enter_context(self.core.request(one)) for one in selections]
            key = self._answering(stack)
            group = stack.enter_context(self._requests.together())
            if streamer is not None:
                streamer.put(torch.tensor([rows[0]]))
            for ids, lora in zip(rows, loras, strict=True):
                self._start(group, ids, lora, decoding, every_token=streamer is not None)
            if streamer is not None:
                self._stream(group, selections[0], streamer)
            group.wait()
            self._check_mixed(key, loras)
        for one, selection in zip(group.running, selections, strict=True):
            _check_finite(one, selection)
        if streamer is not None:
            streamer.end()
        seconds = (time.perf_counter() - started) / len(rows)
        forms = ["none" if lora is None else "gated" for lora in loras]
        continued: Any = [(one.tokens, form) for one, form in zip(group.running, forms, strict=True)]
        return decoding.generations(self.tokenizer, continued, selections, seconds)

    def _pieces(self, batch: Batch) -> Generator[str]:
        [row], [selection], decoding = batch.rows, batch.selections, batch.decoding
        said = _Pieces(self.tokenizer, skip_special_tokens=True)
        with ExitStack() as stack:
            lora = stack.enter_context(self.core.request(selection))
            group = stack.enter_context(self._requests.together())
            key = new_key()
            with answering(key):
                self._start(group, row, lora, decoding, every_token=True)
            for tokens in group.pieces():
                _check_finite(group.running[0], selection)
                for token in tokens:
                    said.put(torch.tensor([token]))
                yield from said.taken()
            self._check_mixed(key, [lora])
        said.end()
        yield from said.taken()

    def _start(self, group: Group, ids: Sequence[int], lora: Any, decoding: Decoding, *, every_token: bool) -> None:
        rules = decoding.rules(self.tokenizer)
        # Each answer has a seed of its own, which is drawn from PyTorch's generator, as in the local engine.
        seed = int(torch.randint(2**31, ())) if decoding.config.do_sample else None
        how = parameters(decoding, every_token=every_token or bool(rules), seed=seed)
        group.start(ids, how, lora, rules)

    def _stream(self, group: Group, selection: Selection, streamer: BaseStreamer) -> None:
        for tokens in group.pieces():
            _check_finite(group.running[0], selection)
            for token in tokens:
                streamer.put(torch.tensor([token]))

    def _answering(self, stack: ExitStack) -> str:
        """Gives the answers that are started inside a stack a key for their failures."""
        key = new_key()
        stack.enter_context(answering(key))
        return key

    def _check_mixed(self, key: str, loras: Sequence[Any]) -> None:
        """Raises ModelError if a worker could not make a mixture of the answers with this key."""
        if any(lora is not None for lora in loras):
            reason = outcomes(self._ask("logo_failures", [key]))[key]
            if reason is not None:
                raise ModelError(f"the mixture could not be made: {reason}")

    def _scored(
        self,
        pool: AdapterPool,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        mixtures: Sequence[Mapping[str, float]],
        batch_size: int,
    ) -> list[Scored]:
        # Checks the pairs. vLLM needs room for one more token behind a prompt, even if none is requested.
        continued_rows(pairs, mixtures, (self.prompts.context or 0) - 1)
        if (head := head_adapter(pool)) is not None:
            raise UsageError(
                f"score: adapter {head!r} acts on the output head, of which the engine 'vllm' computes the last "
                "token's alone; use the engine 'local'"
            )
        with ExitStack() as stack:
            chosen = [Selection.forced(mixture) for mixture in mixtures]
            loras = [stack.enter_context(self.core.request(selection)) for selection in chosen]
            key = self._answering(stack)
            group = stack.enter_context(self._requests.together())
            for (ids, gold), lora in zip(pairs, loras, strict=True):
                # The last gold token is only predicted, never read.
                with reading(len(ids)):
                    group.start([*ids, *gold[:-1]], scoring(gold), lora)
            group.wait()
            self._check_mixed(key, loras)
        return [scored(one.last, gold) for one, (_, gold) in zip(group.running, pairs, strict=True)]


def _check_finite(one: Running, selection: Selection) -> None:
    """Raises NotFinite if a request's logits were not finite."""
    if not one.finite:
        raise overflow(selection.mixture)


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Decodes tokens as they come into text of whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self._texts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._texts.append(text)

    def taken(self) -> list[str]:
        """The pieces of text since the last call."""
        found, self._texts = [text for text in self._texts if text], []
        return found
