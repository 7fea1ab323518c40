"""`LoGo.from_pretrained`: loads a base model by name and a pool, and makes an engine of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from logo import plugins
from logo.adapters.pool import DEFAULT_K, AdapterPool, CurrentPool, officially_named
from logo.adapters.sources import OnBadAdapter, PoolOptions, parse_sources, pool_sources, spec_of
from logo.errors import UsageError, check_choice, check_type
from logo.models import load_base
from logo.prompts import Truncation
from logo.selection.settings import SelectionSettings

T = TypeVar("T")
Preset = Literal["official"]
Engine = Literal["local", "vllm"]
OFFICIAL_TRUNCATION = Truncation(2048, "right")
LOCAL = "local"
# Engines beside the one of this process: name -> the module with `open_engine`. These modules are above this one and
# large, so they are imported on demand.
ENGINES = {"vllm": "logo.vllm.offline"}
# Options of `from_pretrained` that load the base model, and those of `LoGo` beside them; all others are settings.
LOADING_OPTIONS = ("device", "dtype", "device_map", "attn_implementation", "quantization_config", "model_kwargs")
LOCAL_OPTIONS = ("generation_config", "probe_context", "adapter_memory_gb", "prefix_cache_gb", "merge")


def opened(
    make: Callable[..., T],
    base_model: str | os.PathLike[str],
    pool: AdapterPool | CurrentPool | str | Path | Sequence[str | Path] | None = None,
    *,
    engine: str = LOCAL,
    preset: Preset | None = None,
    model_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    truncation: Truncation | None = None,
    trust_remote_code: bool = False,
    on_bad_adapter: OnBadAdapter = "error",
    **options: Any,
) -> T:
    """See `LoGo.from_pretrained`; `make` is the class of the engine."""
    plugins.load_installed()
    base_model = _checked_name(base_model)
    if preset is not None:
        check_choice("preset", preset, Preset)
    check_choice("engine", engine, Engine)
    official = preset == "official"
    if official and engine != LOCAL:
        raise UsageError("preset 'official' probes as the authors' script does: use the engine 'local'")
    if official:
        options = {"signal": "norm", "probe_context": "carry", "dtype": "float32"} | options
        truncation = truncation or OFFICIAL_TRUNCATION
    loading: dict[str, Any] = {name: options.pop(name) for name in LOADING_OPTIONS if name in options}
    if trust_remote_code:
        loading["model_kwargs"] = {**(loading.get("model_kwargs") or {}), "trust_remote_code": True}
    local: dict[str, Any] = {name: options.pop(name) for name in LOCAL_OPTIONS if name in options}
    settings = SelectionSettings.of(**options)
    loading |= {"model_dir": model_dir, "revision": revision, "token": token}
    local |= {"truncation": truncation, "on_bad_adapter": on_bad_adapter}
    pool = pool.value if isinstance(pool, CurrentPool) else pool
    if engine != LOCAL:
        return _opened_elsewhere(engine, base_model, pool, settings, loading, local)  # type: ignore[no-any-return]
    sources = None
    if not isinstance(pool, AdapterPool):
        sources = pool_sources(pool, base_model, model_dir)
        pool_options: PoolOptions = {"on_bad_adapter": on_bad_adapter, "token": token, "examples": settings.examples}
        pool = AdapterPool.opened(sources, pool_options)
    if official:
        pool = officially_named(pool, base_model, sources)
        settings = replace(settings, k=min(DEFAULT_K, len(pool)) if settings.k is None else settings.k)
    model, tokenizer = load_base(base_model, **loading)
    if official and local.get("generation_config") is None:
        local["generation_config"] = model.generation_config
    logo: Any = make(model, tokenizer, pool, settings=settings, **local)
    logo.calibrate()
    return logo  # type: ignore[no-any-return]


def _checked_name(base_model: str | os.PathLike[str]) -> str:
    """A base model by name; UsageError for anything else."""
    if hasattr(base_model, "generate"):
        raise UsageError("base_model: a loaded model has no name to open; give it to LoGo(model, tokenizer, pool)")
    check_type("base_model", base_model, (str, os.PathLike), "a Hub id, a folder or a short name")
    return os.fspath(base_model)


def _opened_elsewhere(
    engine: str,
    base_model: str,
    pool: AdapterPool | str | Path | Sequence[str | Path] | None,
    settings: SelectionSettings,
    loading: dict[str, Any],
    local: dict[str, Any],
) -> Any:
    """An engine that runs the model in another way; options that it does not have are refused there by name."""
    shared = ("model_dir", "revision", "token", "truncation", "on_bad_adapter")
    options = loading | local
    arguments: dict[str, Any] = {name: options.pop(name) for name in shared}
    arguments["dtype"] = options.pop("dtype", "auto")
    arguments["model_kwargs"] = options.pop("model_kwargs", None) or {}
    arguments["others"] = {name: value for name, value in options.items() if value not in (None, "auto")}
    source = pool if pool is None or isinstance(pool, AdapterPool) else spec_of(parse_sources(pool))
    open_engine = importlib.import_module(ENGINES[engine]).open_engine
    return open_engine(base_model, source, settings=settings, **arguments)
