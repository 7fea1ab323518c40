"""Opens a base model and a pool in vLLM's offline engine, and computes vLLM's options."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo import plugins
from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, open_pool, warn_of_bad
from logo.adapters.sources import ExamplesUse, OnBadAdapter, pool_sources, spec_of
from logo.backends.vllm.slots import Slots
from logo.errors import LoGoError, ModelError, PoolError, UsageError, need
from logo.models import checked_dtype, checked_options, fetch, load_config, load_tokenizer, loading, resolve_base
from logo.prompts import Prompts, Truncation
from logo.selection.points import plan
from logo.selection.settings import SelectionSettings
from logo.selection.signals import SIGNALS

if TYPE_CHECKING:
    import torch

    from logo.backends.vllm.offline import VllmLoGo


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
        UsageError: an option that it does not have.
        LoGoError: the base model or the pool cannot be opened.
    """
    if others.get("probe_context", "base") != "base":
        raise UsageError("inside vLLM prompts are probed by the base model alone: leave out probe_context")
    for name in others.keys() - {"probe_context"}:
        raise UsageError(f"{name}: the engine 'vllm' has no such option; give those of vllm.LLM in model_kwargs")
    need("engine 'vllm'", "vllm")
    checked_options(model_kwargs)
    from logo.backends.vllm.offline import VllmLoGo
    from logo.backends.vllm.options import NO_USAGE, VllmOptions, affecting_answers
    from logo.backends.vllm.skeleton import skeleton

    source = fetch(resolve_base(base_model, model_dir), revision=revision, token=token)
    computed = checked_dtype(dtype, _own_dtype(source))
    place, opened = _opened(pool, base_model, model_dir, on_bad_adapter, settings, token)
    model = skeleton(source, computed)
    fitted = opened.fit(BaseLayout.of(model), on_bad_adapter=on_bad_adapter)
    warn_of_bad(fitted.refused)
    fitted = fitted.acting(settings.activation)
    plan(model, fitted, settings)  # refuses a pool that cannot be scored, before vLLM is started
    given = dict(model_kwargs)
    additional = dict(given.pop("additional_config", None) or {})
    own = additional.get("logo", {})
    if not isinstance(own, Mapping):
        raise UsageError(f"additional_config: expected 'logo' to be an object, found {type(own).__name__}")
    slots = Slots.of(fitted)
    config = {"k": min(settings.k or fitted.default_k, len(fitted)), **settings.changed, **own}
    config |= {"pool": place, "on_bad_adapter": on_bad_adapter, "signals": _usable(model, fitted, settings)}
    VllmOptions.of({"logo": config}, {})  # raises the errors of vLLM's processes here
    tokenizer, checkpoint = load_tokenizer(source), _generation_config(source)
    model.generation_config = checkpoint or model.generation_config
    _check_importable(settings.signal)
    os.environ.update(plugins.environment())  # vLLM's processes inherit it
    os.environ.setdefault(NO_USAGE, "1")
    llm = _started(
        base_model,
        {
            "model": source,
            "dtype": computed,
            "max_loras": slots.count,
            "max_lora_rank": slots.rank,
            "lora_target_modules": list(slots.targets),
            "generation_config": "vllm",  # every request has its own decoding options
            **given,
            "enable_lora": True,
            "additional_config": {**additional, "logo": config},
        },
    )
    prompts = Prompts(
        tokenizer,
        llm.llm_engine.vllm_config.model_config.max_model_len,
        truncation or Truncation(),
        probe_text=settings.probe_text,
        vocabulary=model.get_input_embeddings().weight.shape[0],
    )
    return VllmLoGo(llm, model, tokenizer, prompts, settings, opened.default_k, affecting_answers(model_kwargs))


def _started(base_model: str, options: dict[str, Any]) -> Any:
    """Starts vLLM's `LLM`.

    Raises:
        UsageError: an option that `vllm.LLM` does not have or cannot use.
        ModelError: vLLM cannot run the base model.
    """
    from vllm import LLM

    try:
        return LLM(**options)
    except LoGoError:
        raise
    except TypeError as error:
        raise UsageError(f"model_kwargs: vllm.LLM refuses them: {' '.join(str(error).split())}") from error
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"base model {base_model}: vLLM cannot run it: {reason}") from error


def _own_dtype(source: str) -> Any:
    """The checkpoint's own dtype on an accelerator, float32 on a CPU."""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return torch.float32
    return getattr(load_config(source), "dtype", None) or torch.float32


def _opened(
    pool: AdapterPool | str | Path | None,
    base_model: str,
    model_dir: str | Path | None,
    on_bad_adapter: OnBadAdapter,
    settings: SelectionSettings,
    token: str | bool | None,
) -> tuple[str, AdapterPool]:
    """The place from which vLLM's processes open the pool, and the opened pool."""
    if isinstance(pool, AdapterPool):
        return _folder_of(pool, on_bad_adapter, settings.examples), pool
    named = None if pool is None else str(pool)
    opened = open_pool(
        named,
        base_model,
        model_dir,
        on_bad_adapter=on_bad_adapter,
        examples=settings.examples,
        token=token,
    )
    sources = pool_sources(named, base_model, model_dir)
    # vLLM's processes lack the token, so they open what was downloaded.
    if isinstance(token, str) and any(one.on_hub for one in sources):
        with suppress(PoolError):
            return _folder_of(opened, on_bad_adapter, settings.examples), opened
    return spec_of(sources), opened


def _folder_of(pool: AdapterPool, on_bad_adapter: OnBadAdapter, examples: ExamplesUse) -> str:
    """The folder that holds exactly the adapters of an open pool, as they are in it.

    Raises:
        PoolError: there is no such folder, so that vLLM's processes cannot open this pool.
    """
    wanted = AdapterPool(replace(one, examples=()) for one in pool) if examples == "ignore" else pool
    roots = {str(adapter.folder.absolute()).removesuffix(f"/{adapter.name}") for adapter in pool}
    if len(roots) == 1:
        [root] = roots
        if AdapterPool.open(root, on_bad_adapter=on_bad_adapter, examples=examples).digest == wanted.digest:
            return root
    raise PoolError(
        "the engine 'vllm' opens the pool again in vLLM's processes: expected all adapters in one folder under their "
        "names, with the example prompts and the activation that they have there, and no others in it; give that "
        "folder, a manifest or a Hub repository as the pool"
    )


def _check_importable(signal: str) -> None:
    source = SIGNALS.sources.get(signal)
    if source is not None and source.folder is None:
        raise UsageError(
            f"signal {signal!r} is defined in {source.place.partition(':')[0]}, which vLLM's processes cannot import: "
            "put it into a module of its own"
        )


def _usable(model: Any, pool: AdapterPool, settings: SelectionSettings) -> Sequence[str]:
    """The signals that a call may ask for: those that can score this pool."""
    usable = []
    for signal in SIGNALS:
        try:
            plan(model, pool, settings, signal)
        except LoGoError:  # raised again when a call asks for this signal
            continue
        usable.append(signal)
    return usable


def _generation_config(source: str) -> Any:
    """The generation config of the checkpoint; None if it has none."""
    from transformers import GenerationConfig

    with loading(source, source):
        try:
            return GenerationConfig.from_pretrained(source)
        except OSError:
            return None
