"""`VllmLoGo`: an engine with the methods of `LoGo` whose model runs in vLLM's offline engine.

    prompts -> token ids -> probes in vLLM's workers -> scores -> Selection -> recipe -> vLLM -> Generation

Scores and mixtures are computed by the same workers as in the server (`logo.backends.vllm.worker`); the ends of answers
and the errors are shared with the local engine (`logo.calls`). HTTP plays no part here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from logo.adapters.activation import NotInvoked
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool
from logo.backends.vllm.core import Core, outcomes, values
from logo.backends.vllm.hooks import version
from logo.backends.vllm.likelihood import scored, scoring
from logo.backends.vllm.marks import reading
from logo.backends.vllm.pool import head_adapter
from logo.backends.vllm.probing import InWorkers
from logo.backends.vllm.requests import Group, Requests, Running
from logo.backends.vllm.sampling import check_config, parameters
from logo.calls import Calls
from logo.decoder import Decoding, Generation, overflow
from logo.decoding import Prompts
from logo.errors import ModelError, UsageError
from logo.mixing import EXACT, NEVER, Merge, begins
from logo.scoring import Scored, continued_rows
from logo.selection import Selection
from logo.selection.plan import plan
from logo.selection.settings import SelectionSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


class VllmLoGo(Calls):
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
        self.prompts, self.settings, self._engine_options = prompts, settings, engine_options
        self.core = Core(llm.llm_engine.vllm_config)
        self.pool = self.core.pool.adapters
        self.pool.default_k = default_k or self.pool.default_k
        self._version = self.pool.version
        self._layout = BaseLayout.of(model)
        self._lock = threading.RLock()
        self._not_invoked = NotInvoked()
        self._requests = Requests(llm.llm_engine)
        pool = self.core.staged(None, self._call("logo_stage", None))
        self._call("logo_commit")
        self.core.commit(pool, {})
        self._selecting: InWorkers = InWorkers(model, self.pool, settings, self._requests, self._call)
        self._selecting.open(settings)

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> AdapterPool:
        """The pool fitted to the base model, without adapters that do not fit (`on_bad_adapter="skip"`)."""
        self._sync()
        return self.pool

    @property
    def k(self) -> int:
        """Adapters per prompt: the setting, or the default of the pool."""
        if self.settings.k is not None:
            return self.settings.k
        return min(self.pool.default_k, len(plan(self.model, self.pool, self.settings).adapters))

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(self._selecting.open(self.settings)["points"])

    @property
    def not_invoked(self) -> Mapping[str, int]:
        """Adapter -> how many prompts lacked its invocation tokens, so that it did nothing there."""
        return dict(self._not_invoked)

    @property
    def folding(self) -> dict[str, Any]:
        """The form in which vLLM mixes adapters, and why, for JSON; nothing is folded into the weights."""
        return {"asked": None, "mode": self.core.mode, "reason": self.core.reason}

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return (torch.device(self.llm.llm_engine.vllm_config.device_config.device),)

    @property
    def versions(self) -> dict[str, str]:
        return {"vllm": version()}

    @property
    def engine_options(self) -> Mapping[str, Any]:
        return self._engine_options

    @property
    def merge(self) -> Merge:
        """Adapters are always summed exactly."""
        return EXACT

    @merge.setter
    def merge(self, merge: Merge | str) -> None:
        asked = merge if isinstance(merge, Merge) else Merge(merge)
        if not asked.exact:
            raise UsageError(f"merge {asked.kind!r}: the engine 'vllm' mixes adapters exactly; use the engine 'local'")

    def close(self) -> None:
        """Shuts vLLM down; the engine cannot be used afterwards."""
        self.llm.llm_engine.engine_core.shutdown()

    # -- what vLLM does ------------------------------------------------------------------------------------------

    def _call(self, name: str, *args: Any) -> list[Any]:
        return values(self.llm.collective_rpc(name, args=args))

    def _sync(self) -> None:
        if self.pool.version != self._version:
            raise UsageError("the pool of the engine 'vllm' cannot change: open another engine, or use engine 'local'")

    def _decoding(self, decoding: Decoding) -> Decoding:
        check_config(decoding.config)
        self.pool.acting(decoding.activation)  # raises UsageError if an adapter cannot have it
        return decoding

    def _answers(
        self,
        rows: Sequence[Sequence[int]],
        selections: Sequence[Selection],
        decoding: Decoding,
        probed: float,
        batch_size: int,
        streamer: BaseStreamer | None,
    ) -> list[Generation]:
        started = time.perf_counter()
        self._invoke(rows, [selection.mixture for selection in selections], decoding.activation)
        with ExitStack() as stack:
            loras = [stack.enter_context(self.core.request(one, decoding.activation)) for one in selections]
            group = stack.enter_context(self._requests.together())
            if streamer is not None:
                stack.callback(streamer.end)
                streamer.put(torch.tensor([rows[0]]))
            for ids, lora in zip(rows, loras, strict=True):
                self._start(group, ids, lora, decoding, every_token=streamer is not None)
            if streamer is not None:
                self._stream(group, selections[0], loras[0], streamer)
            group.wait()
            self._check_mixed([lora.lora_name for lora in loras if lora is not None])
        for one, selection, lora in zip(group.running, selections, loras, strict=True):
            self._check_finite(one, selection, lora)
        seconds = {"probe": probed, "generate": (time.perf_counter() - started) / len(rows)}
        forms = ["base" if lora is None else "gated" for lora in loras]
        continued: Any = [(one.tokens, form) for one, form in zip(group.running, forms, strict=True)]
        return decoding.generations(self.tokenizer, continued, selections, seconds)

    def _pieces(self, row: Sequence[int], selection: Selection, decoding: Decoding) -> Generator[str]:
        said = _Pieces(self.tokenizer, skip_special_tokens=True)
        self._invoke([row], [selection.mixture], decoding.activation)
        with self.core.request(selection, decoding.activation) as lora, self._requests.together() as group:
            self._start(group, row, lora, decoding, every_token=True)
            for tokens in group.pieces():
                self._check_finite(group.running[0], selection, lora)
                for token in tokens:
                    said.put(torch.tensor([token]))
                yield from said.taken()
            self._check_mixed([] if lora is None else [lora.lora_name])
        said.end()
        yield from said.taken()

    def _start(self, group: Group, ids: Sequence[int], lora: Any, decoding: Decoding, *, every_token: bool) -> None:
        rules = decoding.rules(self.tokenizer)
        # Each answer has a seed of its own, which is drawn from PyTorch's generator, as in the local engine.
        seed = int(torch.randint(2**31, ())) if decoding.config.do_sample else None
        how = parameters(decoding, every_token=every_token or bool(rules), seed=seed)
        group.start(ids, how, lora, rules)

    def _stream(self, group: Group, selection: Selection, lora: Any, streamer: BaseStreamer) -> None:
        for tokens in group.pieces():
            self._check_finite(group.running[0], selection, lora)
            for token in tokens:
                streamer.put(torch.tensor([token]))

    def _invoke(
        self, rows: Sequence[Sequence[int]], mixtures: Sequence[Mapping[str, float]], forced: str | None = None
    ) -> None:
        """Counts prompts that lack the invocation tokens of an adapter in their mixture.

        Raises:
            UsageError: a prompt lacks them, and `when_not_invoked` is `"error"`.
        """
        pool = self.pool.acting(forced)
        if not all(activation.everywhere for activation in pool.activations):
            for row, mixture in zip(rows, mixtures, strict=True):
                found = begins(pool, mixture, row)
                self._not_invoked.note(name for name, begin in found.items() if begin == NEVER)

    def _check_finite(self, one: Running, selection: Selection, lora: Any) -> None:
        """Raises NotFinite if a request's logits were not finite; the KV cache is cleaned first."""
        if not one.finite:
            self._requests.stop([one])
            found = overflow(selection.mixture)
            self._clean(lora, found)
            raise found

    def _clean(self, lora: Any, found: ModelError) -> None:
        """Removes from the KV cache what an overflow has left there.

        No later request finds the blocks of a mixture that has failed (`Core.failed`). vLLM finds blocks of the base
        model by their tokens, so its prefix cache is reset before their content changes. vLLM refuses to reset it while
        other requests run; the blocks then keep their content.
        """
        if lora is not None:
            self._call("logo_clean", lora.lora_name, str(found))
            self.core.failed(lora.lora_name)
        elif self.llm.reset_prefix_cache():
            self._call("logo_clean", None, str(found))

    def _check_mixed(self, recipes: Sequence[str]) -> None:
        """Raises ModelError if a worker could not mix one of these recipes."""
        asked = list(dict.fromkeys(recipes))
        failed = [reason for reason in outcomes(self._call("logo_take", asked)).values() if reason] if asked else []
        if failed:
            raise ModelError(f"the mixture could not be made: {failed[0]}")

    def _score(self, row: Sequence[int], gold: Sequence[int], mixtures: Sequence[Mapping[str, float]]) -> list[Scored]:
        return self._score_pairs([(row, gold)] * len(mixtures), mixtures, len(mixtures))

    def _score_pairs(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        mixtures: Sequence[Mapping[str, float]],
        batch_size: int,
    ) -> list[Scored]:
        # Checks the pairs. vLLM needs room for one more token behind a prompt, even if none is requested.
        continued_rows(pairs, mixtures, (self.prompts.context or 0) - 1)
        if (head := head_adapter(self.pool)) is not None:
            raise UsageError(
                f"score: adapter {head!r} acts on the output head, of which the engine 'vllm' computes the last "
                "token's alone; use the engine 'local'"
            )
        self._invoke([ids for ids, _ in pairs], mixtures)
        with ExitStack() as stack:
            chosen = [Selection.forced(mixture) for mixture in mixtures]
            loras = [stack.enter_context(self.core.request(selection)) for selection in chosen]
            group = stack.enter_context(self._requests.together())
            for (ids, gold), lora in zip(pairs, loras, strict=True):
                # The last gold token is only predicted, never read.
                with reading(len(ids)):
                    group.start([*ids, *gold[:-1]], scoring(gold), lora)
            group.wait()
            self._check_mixed([lora.lora_name for lora in loras if lora is not None])
        return [self._scored(one, gold, lora) for one, (_, gold), lora in zip(group.running, pairs, loras, strict=True)]

    def _scored(self, one: Running, gold: Sequence[int], lora: Any) -> Scored:
        try:
            return scored(one.last, gold)
        except ModelError as found:
            self._clean(lora, found)
            raise


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
