"""`VllmLoGo`: an engine with the methods of `LoGo` whose model runs in vLLM's offline engine.

    prompts -> token ids -> probes in vLLM's workers -> scores -> Selection -> LLM.generate -> Generation

Scores and mixtures are computed by the same workers as in the server. Answers come whole: a stream has one piece.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from logo import plugins
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, CurrentPool, open_pool, warn_of_bad
from logo.adapters.sources import OnBadAdapter, pool_sources, spec_of
from logo.answering import AnsweringEngine
from logo.core import Generation, Prompt, Selection
from logo.decoding import Batch, Decoding, overflow
from logo.endings import cut_after_end, end_tokens
from logo.errors import LoGoError, ModelError, PoolError, UsageError, need
from logo.models import (
    checked_dtype,
    checked_options,
    fetch,
    load_config,
    load_tokenizer,
    loading,
    lock_of,
    resolve_base,
)
from logo.prompts import Prompts, Truncation
from logo.scoring import Scored, checked_nll, continued_rows
from logo.selection.plan import plan
from logo.selection.settings import SelectionSettings
from logo.selection.signals import SIGNALS
from logo.state import EngineState
from logo.streams import Stream
from logo.vllm.engine import Engine
from logo.vllm.launch import EXTENSION
from logo.vllm.options import NO_USAGE, OPTIONS, POOL, VllmOptions, affecting_answers
from logo.vllm.patches import version
from logo.vllm.pool import head_adapter, rank_of, slots_of, targets_of
from logo.vllm.requests import Mix
from logo.vllm.sampling import check_config, parameters, refused
from logo.vllm.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import GenerationConfig
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
    for name, value in others.items():
        if name != "probe_context":
            raise UsageError(f"{name}: the engine 'vllm' has no such option; give those of vllm.LLM in model_kwargs")
        if value != "base":
            raise UsageError("inside vLLM prompts are probed by the base model alone: leave out probe_context")
    if os.environ.get(OPTIONS):
        raise UsageError(f"{OPTIONS} is set, which is for `vllm serve`: unset it, and give the options here")
    need("engine 'vllm'", "vllm")
    from vllm import LLM
    from vllm.platforms import current_platform

    checked_options(model_kwargs)
    source = fetch(resolve_base(base_model, model_dir), revision=revision, token=token)
    on_cpu = current_platform.is_cpu()
    own = torch.float32 if on_cpu else getattr(load_config(source), "dtype", None) or torch.float32
    computed = checked_dtype(dtype, own)
    if isinstance(token, str):
        os.environ.setdefault("HF_TOKEN", token)  # vLLM's processes open the pool again
    if isinstance(pool, AdapterPool):
        place, opened = _folder_of(pool, settings, on_bad_adapter), pool
    else:
        named = None if pool is None else str(pool)
        place = spec_of(pool_sources(named, base_model, model_dir))
        how: dict[str, Any] = {"on_bad_adapter": on_bad_adapter, "examples": settings.examples, "token": token}
        opened = open_pool(named, base_model, model_dir, **how)
    model = skeleton(source, computed)
    fitted = opened.fit(BaseLayout.of(model), on_bad_adapter=on_bad_adapter, activation=settings.activation)
    warn_of_bad(fitted.refused)
    plan(model, fitted, settings)  # refuses a pool that cannot be scored, before vLLM is started
    k = settings.k_of(fitted)
    additional = dict(model_kwargs.get("additional_config") or {})
    VllmOptions.of(additional, {POOL: place})  # raises the errors of vLLM's processes here
    config = {"k": k, **settings.changed, **additional.get("logo", {}), "pool": place}
    additional["logo"] = {**config, "on_bad_adapter": on_bad_adapter, "signals": list(SIGNALS)}
    signal = SIGNALS.definitions.get(settings.signal)
    if signal is not None and signal.folder is None:
        found = f"signal {settings.signal!r} is defined in {signal.place.partition(':')[0]}"
        raise UsageError(f"{found}, which vLLM's processes cannot import: put it into a module of its own")
    os.environ.update(plugins.environment())  # vLLM's processes inherit it
    os.environ.setdefault(NO_USAGE, "1")
    flags: dict[str, Any] = {
        **{"model": source, "dtype": computed, "max_loras": slots_of(fitted, k), "max_lora_rank": rank_of(fitted)},
        "lora_target_modules": list(targets_of(fitted)),
        "generation_config": "vllm",  # every request has its own decoding options
        # On CPUs, a prompt that is read in parts ends vLLM if it has a seed, as every sampled answer has.
        **({"enable_chunked_prefill": False} if on_cpu and "max_num_batched_tokens" not in model_kwargs else {}),
        **model_kwargs,
        **{"enable_lora": True, "worker_extension_cls": EXTENSION, "additional_config": additional},
    }
    model.generation_config = _generation_config(source) or model.generation_config
    try:
        llm = LLM(**flags)
    except LoGoError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, TypeError):
            raise UsageError(f"model_kwargs: vllm.LLM refuses them: {reason}") from error
        raise ModelError(f"base model {base_model}: vLLM cannot run it: {reason}") from error
    vocabulary = model.get_input_embeddings().weight.shape[0]
    limits = llm.llm_engine.vllm_config.model_config.max_model_len, truncation or Truncation(), settings.probe_text
    prompts = Prompts(load_tokenizer(source), *limits, vocabulary)
    return VllmLoGo(llm, model, prompts, settings, opened.default_k, affecting_answers(model_kwargs))


def _engine(llm: Any) -> Engine:
    """The engine of `vllm.LLM`, which is not open yet; nothing that is awaited in it waits for another task."""

    async def call(*args: Any) -> list[dict[str, Any]]:
        return llm.collective_rpc("logo", args=args)  # type: ignore[no-any-return]

    async def run(rows: Sequence[tuple[Sequence[int], Any, Any]]) -> list[Any]:
        ids, sampling, loras = map(list, zip(*rows, strict=True))
        with refused(f"prompts of up to {max(map(len, ids))} tokens"):
            prompts = [{"prompt_token_ids": list(row)} for row in ids]
            return list(llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras))

    return Engine(call, run, llm.llm_engine.vllm_config)


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
        self.llm, self.model, self.tokenizer = llm, model, prompts.tokenizer
        self.prompts, self.settings = prompts, settings
        self.engine_options, self.versions = options, {"vllm": version()}
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
            served = self.engine.served = _wait(self.engine.signal(served, signal))
        scorer = served.opened[signal]
        default_k = min(state.fitted.default_k, len(scorer.selector.names))
        return replace(scorer, selector=replace(scorer.selector, default_k=default_k))

    def _scores(
        self,
        state: EngineState,
        scorer: Any,
        rows: Sequence[Prompt],
        candidates: Sequence[Collection[str] | None],
        batch_size: int,
    ) -> torch.Tensor:
        probed = [row.ids if state.probes_all else row.probed for row in rows]
        scores: list[list[float]] = []
        for start in range(0, len(rows), _PROBED):
            part = slice(start, start + _PROBED)
            scores += _wait(self.engine.scores(self.engine.served, scorer.name, probed[part], candidates[part]))
        return torch.tensor(scores, dtype=torch.float32)

    # -- answering -----------------------------------------------------------------------------------------------

    def _config(
        self, config: GenerationConfig | None, max_new_tokens: int | None, options: Mapping[str, Any]
    ) -> GenerationConfig:
        complete = super()._config(config, max_new_tokens, options)
        check_config(complete)
        return complete

    def _batches(self, rows: Sequence[Prompt], batch_size: int, decoding: Decoding) -> Iterable[Sequence[int]]:
        return [range(len(rows))]

    def _stream(self, batch: Batch) -> Stream:
        def pieces() -> Iterator[str]:
            text = self._decode(batch, None)[0].text
            if text:
                yield text

        return Stream(pieces())

    def _decode(self, batch: Batch, streamer: BaseStreamer | None) -> list[Generation]:
        started, decoding = time.perf_counter(), batch.decoding
        rules, ends = decoding.rules(self.tokenizer), end_tokens(decoding.config)
        # Each answer has a seed of its own, which is drawn from PyTorch's generator, as in the local engine.
        seeds = [int(torch.randint(2**31, ())) if decoding.config.do_sample else None for _ in batch.rows]
        tokens: list[list[int]] = [[] for _ in batch.rows]
        left, mixes = list(range(len(tokens))), [self.engine.mix(self.engine.served, one) for one in batch.selections]
        while left:  # a row whose text only looked like an end goes on behind its prompt, with other noise
            asked = [parameters(decoding, len(tokens[i]), (s := seeds[i]) and s + len(tokens[i])) for i in left]
            rows = [[*batch.rows[i], *tokens[i]] for i in left]
            placed = [replace(mixes[i], prompt=len(batch.rows[i])) if tokens[i] else mixes[i] for i in left]
            for i, output in zip(left, self._run(rows, asked, placed), strict=True):
                [made] = output.outputs
                for token, place in zip(made.token_ids, made.logprobs, strict=True):
                    if not math.isfinite(place[token].logprob):
                        raise overflow(batch.selections[i].mixture)
                tokens[i] += made.token_ids
            left = [i for i in left if len(tokens[i]) < decoding.config.max_new_tokens]
            left = [i for i in left if cut_after_end(tokens[i], ends, rules)[1] == "length"]
        if streamer is not None:
            for ids in ([batch.rows[0]], *([token] for token in tokens[0])):
                streamer.put(torch.tensor(ids))
            streamer.end()
        seconds = (time.perf_counter() - started) / len(tokens)
        continued: Any = [(one, "gated" if mix.parts else "none") for one, mix in zip(tokens, mixes, strict=True)]
        return decoding.generations(self.tokenizer, continued, batch.selections, seconds)

    def _run(self, rows: Sequence[Sequence[int]], asked: Sequence[Any], mixes: Sequence[Mix]) -> list[Any]:
        """vLLM's outputs for rows, as many at a time as there are slots for their adapters."""

        async def run(part: slice) -> list[Any]:
            async with self.engine.held(mixes[part]) as loras:
                return await self.engine.run(list(zip(rows[part], asked[part], loras, strict=True)))

        return [one for part in _parts(mixes, self.engine.slots.count) for one in _wait(run(part))]

    def _scored(
        self,
        pool: AdapterPool,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        mixtures: Sequence[Mapping[str, float]],
        batch_size: int,
    ) -> list[Scored]:
        from vllm import SamplingParams

        # Checks the pairs. vLLM needs room for one more token behind a prompt, even if none is requested.
        continued_rows(pairs, mixtures, (self.prompts.context or 0) - 1)
        if (head := head_adapter(pool)) is not None:
            what = f"adapter {head!r} acts on the output head, of which the engine 'vllm' computes the last token alone"
            raise UsageError(f"score: {what}; use the engine 'local'")
        # The last gold token is only predicted, never read. Of the others, vLLM gives the log probability of each and
        # of one of the most likely ones in its place.
        once: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
        asked, mixes, served = [], [], self.engine.served
        for (ids, gold), mixture in zip(pairs, mixtures, strict=True):
            several = 1 if len(gold) > 1 else None
            asked.append(SamplingParams(**once, prompt_logprobs=several, logprob_token_ids=[gold[-1]]))
            mixes.append(self.engine.mix(served, Selection.forced(mixture), len(ids)))
        outputs = self._run([[*ids, *gold[:-1]] for ids, gold in pairs], asked, mixes)
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
    start, keys = 0, set[str]()
    for i, mix in enumerate(mixes):
        if i > start and len(keys | {*mix.keys}) > slots:
            yield slice(start, i)
            start, keys = i, set()
        keys |= {*mix.keys}
    yield slice(start, len(mixes))


def _scored(output: Any, gold: Sequence[int]) -> Scored:
    """The score of a completion from vLLM's log probabilities of its tokens; ModelError if one is NaN or infinite."""
    [made] = output.outputs
    read = output.prompt_logprobs[-(len(gold) - 1) :] if len(gold) > 1 else []
    places = list(zip(read, gold, strict=False))
    total = sum(place[token].logprob for place, token in places) + made.logprobs[0][gold[-1]].logprob

    def first(place: Mapping[int, Any]) -> int:  # of tokens that are as likely, the one of the lowest id, as greedily
        return min(place, key=lambda token: (-place[token].logprob, token))

    exact = all(first(place) == token for place, token in places) and made.token_ids[0] == gold[-1]
    return Scored(exact, checked_nll(-total / len(gold)), len(gold))


def _folder_of(pool: AdapterPool, settings: SelectionSettings, on_bad_adapter: OnBadAdapter) -> str:
    """The folder that holds exactly the adapters of an open pool, as they are in it; PoolError: there is none, so that
    vLLM's processes cannot open this pool."""
    wanted = AdapterPool(replace(one, examples=()) for one in pool) if settings.examples == "ignore" else pool
    how: dict[str, Any] = {"on_bad_adapter": on_bad_adapter, "examples": settings.examples}
    roots = {str(adapter.folder.absolute()).removesuffix(f"/{adapter.name}") for adapter in pool}
    if len(roots) == 1 and AdapterPool.open(*roots, **how).digest == wanted.digest:
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
