"""`LoGo.from_pretrained`: loads a base model by name and a pool, and makes an engine of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from logo import plugins
from logo.adapters.pool import DEFAULT_K, AdapterPool, CurrentPool, officially_named
from logo.adapters.sources import OnBadAdapter, PoolOptions, parse_sources, pool_sources, spec_of
from logo.errors import UsageError, check_type, closest
from logo.models import load_base
from logo.prompts import Truncation
from logo.selection.settings import SelectionSettings

T = TypeVar("T")
Preset = Literal["official"]
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
    if hasattr(base_model, "generate"):
        raise UsageError("base_model: a loaded model has no name to open; give it to LoGo(model, tokenizer, pool)")
    pool = pool.value if isinstance(pool, CurrentPool) else pool
    check_type("base_model", base_model, (str, os.PathLike), "a Hub id, a folder or a short name")
    base_model = os.fspath(base_model)
    presets, engines = (*get_args(Preset), None), (LOCAL, *ENGINES)
    for what, value, known in (("preset", preset, presets), ("engine", engine, engines)):
        if value not in known:
            expected = ", ".join(map(repr, known))
            raise UsageError(f"{what}: expected one of {expected}, found {value!r}{closest(str(value), ENGINES)}")
    official = preset == "official"
    if official:
        options = {"signal": "norm", "probe_context": "carry", "dtype": "float32"} | options
        truncation = truncation or OFFICIAL_TRUNCATION
    loading: dict[str, Any] = {name: options.pop(name) for name in LOADING_OPTIONS if name in options}
    if trust_remote_code:
        loading["model_kwargs"] = {**(loading.get("model_kwargs") or {}), "trust_remote_code": True}
    local: dict[str, Any] = {name: options.pop(name) for name in LOCAL_OPTIONS if name in options}
    settings = SelectionSettings.of(**options)
    whence: dict[str, Any] = {"model_dir": model_dir, "revision": revision, "token": token}
    if engine != LOCAL:
        if official:
            raise UsageError("preset 'official' probes as the authors' script does: use the engine 'local'")
        elsewhere: T = importlib.import_module(ENGINES[engine]).open_engine(
            base_model,
            pool if pool is None or isinstance(pool, AdapterPool) else spec_of(parse_sources(pool)),
            settings=settings,
            truncation=truncation,
            on_bad_adapter=on_bad_adapter,
            dtype=loading.pop("dtype", "auto"),
            model_kwargs=loading.pop("model_kwargs", None) or {},
            others={name: value for name, value in (loading | local).items() if value not in (None, "auto")},
            **whence,
        )
        return elsewhere
    sources = None
    if not isinstance(pool, AdapterPool):
        sources = pool_sources(pool, base_model, model_dir)
        how: PoolOptions = {"on_bad_adapter": on_bad_adapter, "token": token, "examples": settings.examples}
        pool = AdapterPool.opened(sources, how)
    if official:
        pool = officially_named(pool, base_model, sources)
        settings = replace(settings, k=min(DEFAULT_K, len(pool)) if settings.k is None else settings.k)
    model, tokenizer = load_base(base_model, **loading, **whence)
    local |= {"settings": settings, "truncation": truncation, "on_bad_adapter": on_bad_adapter}
    if official and local.get("generation_config") is None:
        local["generation_config"] = model.generation_config
    logo: Any = make(model, tokenizer, pool, **local)
    logo.calibrate()
    return logo  # type: ignore[no-any-return]
