"""`VllmLoGo`: an engine with the methods of `LoGo` whose model runs in vLLM's offline engine.

    prompts -> token ids -> probes in vLLM's workers -> scores -> Selection -> LLM.generate -> Generation

Scores and mixtures are computed by the same workers as in the server. Answers come whole: a stream has one piece.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from logo import plugins
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, CurrentPool, open_pool, warn_of_bad
from logo.adapters.sources import OnBadAdapter, pool_sources, spec_of
from logo.answering import AnsweringEngine
from logo.core import AnswerOptions, Generation, Options, Selection
from logo.decoding import Batch, Decoding, overflow
from logo.endings import cut_after_end, end_tokens
from logo.errors import LoGoError, ModelError, PoolError, UsageError, need
from logo.mixing.cache import bytes_of
from logo.models import (
    checked_dtype,
    checked_options,
    fetch,
    load_config,
    load_tokenizer,
    loading,
    lock_of,
    resolve_base,
    usual_dtype,
)
from logo.prompts import Prompts, Truncation
from logo.scoring import Pair, Scored, checked_nll, continued_rows
from logo.selection.encoder import Embedded, load_encoder
from logo.selection.plan import plan
from logo.selection.settings import SelectionSettings
from logo.selection.signals import SIGNALS
from logo.state import EngineState
from logo.streams import Stream
from logo.vllm.engine import Engine
from logo.vllm.launch import CPU_CACHE, CPU_CACHE_GB, EXTENSION
from logo.vllm.options import NO_USAGE, OPTIONS, POOL, VllmOptions, affecting_answers
from logo.vllm.patches import version
from logo.vllm.pool import head_adapter, rank_of, slots_of, targets_of
from logo.vllm.requests import Mix
from logo.vllm.sampling import check_config, parameters, refused
from logo.vllm.skeleton import skeleton

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

T = TypeVar("T")

# The most prompts that are probed together; less than the number whose scores vLLM's workers keep.
_PROBED = 2048


def open_engine(
    base_model: str,
    pool: AdapterPool | str | Path | None,
    *,
    settings: SelectionSettings,
    dtype: str | torch.dtype,
    model_kwargs: Mapping[str, Any],
    model_dir: str | Path | None,
    revision: str | None,
    token: str | bool | None,
    truncation: Truncation | None,
    on_bad_adapter: OnBadAdapter,
    others: Mapping[str, Any],
) -> VllmLoGo:
    """Starts vLLM with a pool; see `logo.engine.LoGo.from_pretrained`.

    Args:
        model_kwargs: arguments of `vllm.LLM`. Its slots, ranks and modules override those computed from the pool.
        others: options by name that only the local engine has; any of them is refused, unless it is the default.

    Raises:
        MissingLibrary: vLLM is not installed.
        LoGoError: an option that it does not have; the base model or the pool cannot be opened.
    """
    _refuse_options(others)
    need("engine 'vllm'", "vllm")
    if settings.encoder is not None:
        load_encoder(settings.encoder)  # one that cannot be loaded is refused before vLLM is started
    checked_options(model_kwargs)
    source = fetch(resolve_base(base_model, model_dir), revision=revision, token=token)
    computed = _computed(dtype, source)
    if isinstance(token, str):
        os.environ.setdefault("HF_TOKEN", token)  # vLLM's processes open the pool again
    if isinstance(pool, AdapterPool):
        place = _folder_of(pool, settings, on_bad_adapter)
    else:
        name = None if pool is None else str(pool)
        place = spec_of(pool_sources(name, base_model, model_dir))
        options: Any = {"on_bad_adapter": on_bad_adapter, "examples": settings.examples, "token": token}
        pool = open_pool(name, base_model, model_dir, **options)
    model = skeleton(source, computed)
    model.generation_config = _generation_config(source) or model.generation_config
    fitted = pool.fit(BaseLayout.of(model), on_bad_adapter=on_bad_adapter, activation=settings.activation)
    warn_of_bad(fitted.refused)
    plan(model, fitted, settings)  # refuses a pool that cannot be scored, before vLLM is started
    logo_options = _logo_options(fitted, place, settings, on_bad_adapter, model_kwargs)
    llm = _started(base_model, {"model": source, "dtype": computed, **_arguments(fitted, logo_options, model_kwargs)})
    prompts = Prompts(
        load_tokenizer(source),
        llm.llm_engine.vllm_config.model_config.max_model_len,
        truncation or Truncation(),
        settings.probe_text,
        model.get_input_embeddings().weight.shape[0],
    )
    return VllmLoGo(llm, model, prompts, settings, pool.default_k, affecting_answers(model_kwargs))


def _refuse_options(others: Mapping[str, Any]) -> None:
    """Raises UsageError for options of the local engine alone, and for those in the environment of a server."""
    for name, value in others.items():
        if name != "probe_context":
            raise UsageError(f"{name}: the engine 'vllm' has no such option; give those of vllm.LLM in model_kwargs")
        if value != "base":
            raise UsageError("inside vLLM prompts are probed by the base model alone: leave out probe_context")
    if os.environ.get(OPTIONS):
        raise UsageError(f"{OPTIONS} is set, which is for `vllm serve`: unset it, and give the options here")


def _computed(dtype: str | torch.dtype, source: str) -> torch.dtype:
    """The type that vLLM computes in; `auto` is the checkpoint's, and on CPUs as the local engine has it."""
    config = load_config(source)
    usual = usual_dtype(config, torch.device("cpu")) if _on_cpu() else config.dtype or torch.float32
    return checked_dtype(dtype, usual)  # type: ignore[no-any-return]


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _logo_options(
    fitted: AdapterPool,
    place: str,
    settings: SelectionSettings,
    on_bad_adapter: OnBadAdapter,
    model_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """LoGo's options for vLLM's processes, which open the pool at `place` again; those that the user gave them take
    precedence. UsageError: they cannot be used there."""
    additional = model_kwargs.get("additional_config") or {}
    VllmOptions.of(additional, {POOL: place})  # raises the errors of vLLM's processes here
    signal = SIGNALS.definitions.get(settings.signal)
    if signal is not None and signal.folder is None:
        where = signal.place.partition(":")[0]
        raise UsageError(
            f"signal {settings.signal!r} is defined in {where}, which vLLM's processes cannot import: put it into a "
            "module of its own"
        )
    chosen = {"k": settings.k_of(fitted), **settings.changed, **additional.get("logo", {})}
    return {**chosen, "pool": place, "on_bad_adapter": on_bad_adapter, "signals": list(SIGNALS)}


def _arguments(fitted: AdapterPool, logo_options: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a pool; those of the user take precedence, but for what LoGo needs."""
    usual: dict[str, Any] = {
        "max_loras": slots_of(fitted, logo_options["k"]),
        "max_lora_rank": rank_of(fitted),
        "lora_target_modules": list(targets_of(fitted)),
        "generation_config": "vllm",  # every request has its own decoding options
    }
    if _on_cpu():
        if "max_num_batched_tokens" not in model_kwargs:
            # A prompt that is read in parts ends vLLM if it has a seed, as every sampled answer has.
            usual["enable_chunked_prefill"] = False
        if "gpu_memory_utilization" not in model_kwargs and not os.environ.get(CPU_CACHE):
            usual["kv_cache_memory_bytes"] = bytes_of("kv_cache_memory_bytes", CPU_CACHE_GB)
    needed = {
        "enable_lora": True,
        "worker_extension_cls": EXTENSION,
        "additional_config": {**(model_kwargs.get("additional_config") or {}), "logo": logo_options},
    }
    return {**usual, **model_kwargs, **needed}


def _started(base_model: str, arguments: Mapping[str, Any]) -> Any:
    """`vllm.LLM` with these arguments; UsageError, ModelError: vLLM refuses them."""
    from vllm import LLM

    os.environ.update(plugins.environment())  # vLLM's processes inherit it
    os.environ.setdefault(NO_USAGE, "1")
    try:
        return LLM(**arguments)
    except LoGoError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, TypeError):
            raise UsageError(f"model_kwargs: vllm.LLM refuses them: {reason}") from error
        raise ModelError(f"base model {base_model}: vLLM cannot run it: {reason}") from error


def _engine(llm: Any) -> Engine:
    """The engine of `vllm.LLM`, which is not open yet; nothing that is awaited in it waits for another task."""

    async def call(*args: Any) -> list[dict[str, Any]]:
        with _alive():
            return llm.collective_rpc("logo", args=args)  # type: ignore[no-any-return]

    async def run(rows: Sequence[tuple[Sequence[int], Any, Any]]) -> list[Any]:
        ids, sampling, loras = map(list, zip(*rows, strict=True))
        with _alive(), refused(f"prompts of up to {max(map(len, ids))} tokens"):
            prompts = [{"prompt_token_ids": list(row)} for row in ids]
            return list(llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras))

    return Engine(call, run, llm.llm_engine.vllm_config)


@contextmanager
def _alive() -> Iterator[None]:
    """Converts vLLM's error for an engine that has ended into a ModelError."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise ModelError(
            "vLLM's engine has ended, for the reason that it wrote before: close this engine, and open another one"
        ) from error


class VllmLoGo(AnsweringEngine):
    """Selects and mixes adapters per prompt inside vLLM. `LoGo.from_pretrained(..., engine="vllm")` makes one.

    Rows of a call run together as vLLM schedules them; `batch_size` has no effect. The pool cannot change.

    Args:
        llm: vLLM's `LLM`, opened with a pool.
        model: the base model without its weights.
        prompts, settings: read prompts; and say how they are read, scored and selected.
        default_k: adapters per prompt if neither a call nor the settings give k.
        options: arguments of `vllm.LLM` that the user gave, and on which results depend.

    Raises:
        LoGoError: the pool does not fit, or cannot be scored.
    """

    def __init__(
        self, llm: Any, model: Any, prompts: Prompts, settings: SelectionSettings, default_k: int, options: Any
    ) -> None:
        self.llm = llm
        self.model = model
        self.prompts = prompts
        self.tokenizer = prompts.tokenizer
        self.settings = settings
        self.engine_options = options
        self.versions = {"vllm": version()}
        self.probe_context = "base"
        self.prefix_cache = None
        self.merge = None  # mixtures are computed in vLLM's slots
        self._checkpoint = model.generation_config
        self._generation_config = None
        self._layout = BaseLayout.of(model)
        self._turns = lock_of(model)
        self.engine = _engine(llm)
        _wait(self.engine.open([settings.signal]))
        served = self.engine.served.pool
        fitted = AdapterPool(served, served.refused, default_k=default_k)
        self._state = EngineState(fitted, fitted, None, self.engine.probe_text == "all")
        self.pool = CurrentPool(fitted)

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def points(self) -> tuple[str, ...]:
        """Where prompts are read, such as `"4.v_proj"`; opens the signal first if necessary."""
        return self._scorer(self._current(), self.settings.signal).points  # type: ignore[no-any-return]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return (torch.device(self.llm.llm_engine.vllm_config.device_config.device),)

    def close(self) -> None:
        """Shuts vLLM down; the engine cannot be used afterwards."""
        self.llm.llm_engine.engine_core.shutdown()

    # -- selecting -----------------------------------------------------------------------------------------------

    def _current(self) -> EngineState:
        if self.pool.value is not self._state.pool:
            raise UsageError("the pool of the engine 'vllm' cannot change: open another engine, or use engine 'local'")
        return self._state

    def _scorer(self, state: EngineState, signal: str) -> Any:
        """What is known of the scorer of a signal, which the workers open first if necessary."""
        served = self.engine.served
        if signal not in served.opened:
            plan(self.model, state.fitted, self.settings, signal)  # raises the errors of the workers here
            served = _wait(self.engine.signal(served, signal))
            self.engine.served = served
        scorer = served.opened[signal]
        default_k = min(state.fitted.default_k, len(scorer.selector.names))
        return replace(scorer, selector=replace(scorer.selector, default_k=default_k))

    def _scores(
        self,
        state: EngineState,
        scorer: Any,
        probed: Sequence[Sequence[int]],
        candidates: Sequence[Collection[str] | None],
        batch_size: int,
        embedded: Embedded,
    ) -> torch.Tensor:
        scores: list[list[float]] = []
        for start in range(0, len(probed), _PROBED):
            part = slice(start, start + _PROBED)
            scores += _wait(self.engine.scores(self.engine.served, scorer.name, probed[part], candidates[part]))
        return torch.tensor(scores, dtype=torch.float32)

    # -- answering -----------------------------------------------------------------------------------------------

    def _checked(self, state: EngineState, adapters: object, options: AnswerOptions) -> tuple[Options, Decoding]:
        call, decoding = super()._checked(state, adapters, options)
        check_config(decoding.config)
        return call, decoding

    def _stream(self, batch: Batch) -> Stream:
        def pieces() -> Iterator[str]:
            text = self._decode(batch, None)[0].text
            if text:
                yield text

        return Stream(pieces())

    def _decode(self, batch: Batch, streamer: BaseStreamer | None) -> list[Generation]:
        started = time.perf_counter()
        decoding = batch.decoding
        mixes = [self.engine.mix(self.engine.served, selection) for selection in batch.selections]
        tokens = self._tokens(batch, mixes)
        if streamer is not None:
            streamer.put(torch.tensor([batch.rows[0]]))
            for token in tokens[0]:
                streamer.put(torch.tensor([token]))
            streamer.end()
        seconds = (time.perf_counter() - started) / len(tokens)
        kinds = ["gated" if mix.parts else "none" for mix in mixes]
        continued: Any = list(zip(tokens, kinds, strict=True))
        return decoding.generations(self.tokenizer, continued, batch.selections, seconds)

    def _tokens(self, batch: Batch, mixes: Sequence[Mix]) -> list[list[int]]:
        """The tokens of the answers of a batch; NotFinite: a mixture overflows."""
        decoding = batch.decoding
        rules = decoding.rules(self.tokenizer)
        ends = end_tokens(decoding.config)
        # Each answer has a seed of its own, which is drawn from PyTorch's generator, as in the local engine.
        seeds = [int(torch.randint(2**31, ())) if decoding.config.do_sample else None for _ in batch.rows]
        tokens: list[list[int]] = [[] for _ in batch.rows]
        unended = list(range(len(tokens)))
        while unended:  # a row whose text only looked like an end goes on behind its prompt, with other noise
            rows = [[*batch.rows[i], *tokens[i]] for i in unended]
            options = [parameters(decoding, len(tokens[i]), seeds[i]) for i in unended]
            placed = [replace(mixes[i], prompt=len(batch.rows[i])) if tokens[i] else mixes[i] for i in unended]
            for i, output in zip(unended, self._run(rows, options, placed), strict=True):
                [answer] = output.outputs
                for token, place in zip(answer.token_ids, answer.logprobs, strict=True):
                    if not math.isfinite(place[token].logprob):
                        raise overflow(batch.selections[i].mixture)
                tokens[i] += answer.token_ids
            unended = [i for i in unended if len(tokens[i]) < decoding.config.max_new_tokens]
            unended = [i for i in unended if cut_after_end(tokens[i], ends, rules)[1] == "length"]
        return tokens

    def _run(self, rows: Sequence[Sequence[int]], options: Sequence[Any], mixes: Sequence[Mix]) -> list[Any]:
        """vLLM's outputs for rows, as many at a time as there are slots for their adapters."""

        async def run(part: slice) -> list[Any]:
            async with self.engine.held(mixes[part]) as loras:
                return await self.engine.run(list(zip(rows[part], options[part], loras, strict=True)))

        return [output for part in _parts(mixes, self.engine.slots.count) for output in _wait(run(part))]

    def _scored(
        self,
        pool: AdapterPool,
        pairs: Sequence[Pair],
        mixtures: Sequence[Mapping[str, float]],
        batch_size: int,
    ) -> list[Scored]:
        from vllm import SamplingParams

        # Checks the pairs. vLLM needs room for one more token behind a prompt, even if none is requested.
        continued_rows(pairs, mixtures, (self.prompts.context or 0) - 1)
        head = head_adapter(pool)
        if head is not None:
            why = f"adapter {head!r} acts on the output head, of which the engine 'vllm' computes the last token alone"
            raise UsageError(f"score: {why}; use the engine 'local'")
        # The last gold token is only predicted, never read. Of the others, vLLM gives the log probability of each and
        # of one of the most likely ones in its place.
        once: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
        rows = []
        options = []
        mixes = []
        for (ids, gold), mixture in zip(pairs, mixtures, strict=True):
            rows.append([*ids, *gold[:-1]])
            likely = 1 if len(gold) > 1 else None
            options.append(SamplingParams(**once, prompt_logprobs=likely, logprob_token_ids=[gold[-1]]))
            mixes.append(self.engine.mix(self.engine.served, Selection.forced(mixture), len(ids)))
        outputs = self._run(rows, options, mixes)
        return [_scored(output, gold) for output, (_, gold) in zip(outputs, pairs, strict=True)]


def _wait(task: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(task)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, task).result()


def _parts(mixes: Sequence[Mix], slots: int) -> Iterator[slice]:
    """The rows in parts whose adapters fit into the slots together; a single row that does not is refused later."""
    start = 0
    keys: set[str] = set()
    for i, mix in enumerate(mixes):
        if i > start and len(keys.union(mix.keys)) > slots:
            yield slice(start, i)
            start = i
            keys.clear()
        keys.update(mix.keys)
    yield slice(start, len(mixes))


def _scored(output: Any, gold: Sequence[int]) -> Scored:
    """The score of a completion from vLLM's log probabilities of its tokens; ModelError if one is NaN or infinite."""
    [answer] = output.outputs
    read = output.prompt_logprobs[-(len(gold) - 1) :] if len(gold) > 1 else []
    places = list(zip(read, gold, strict=False))
    total = sum(place[token].logprob for place, token in places) + answer.logprobs[0][gold[-1]].logprob

    def first(place: Mapping[int, Any]) -> int:  # of tokens that are as likely, the one of the lowest id, as greedily
        return min(place, key=lambda token: (-place[token].logprob, token))

    exact = all(first(place) == token for place, token in places) and answer.token_ids[0] == gold[-1]
    return Scored(exact, checked_nll(-total / len(gold)), len(gold))


def _folder_of(pool: AdapterPool, settings: SelectionSettings, on_bad_adapter: OnBadAdapter) -> str:
    """The folder that holds exactly the adapters of an open pool, as they are in it; PoolError: there is none, so that
    vLLM's processes cannot open this pool."""
    used = AdapterPool(one.undescribed() for one in pool) if settings.examples == "ignore" else pool
    roots = {str(adapter.folder.absolute()).removesuffix(f"/{adapter.name}") for adapter in pool}
    if len(roots) == 1:
        again = AdapterPool.open(*roots, on_bad_adapter=on_bad_adapter, examples=settings.examples)
        if again.digest == used.digest:
            return roots.pop()
    raise PoolError(
        "the engine 'vllm' opens the pool again in vLLM's processes: expected all adapters in one folder under their "
        "names, with the example prompts and the activation that they have there, and no others in it; give that "
        "folder, a manifest or a Hub repository as the pool"
    )


def _generation_config(source: str) -> Any:
    """The generation config of the checkpoint; None if it has none."""
    from transformers import GenerationConfig

    with loading(source, source), suppress(OSError):
        return GenerationConfig.from_pretrained(source)
