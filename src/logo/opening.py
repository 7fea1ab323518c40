"""`LoGo.from_pretrained`: loads a base model by name and a pool, and makes an engine of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from logo.adapters.pool import DEFAULT_K, AdapterPool, officially_named, open_pool
from logo.adapters.sources import OnBadAdapter, pool_sources, spec_of
from logo.decoding import Truncation
from logo.errors import UsageError, check_type, closest
from logo.models import load_base
from logo.selection.settings import SelectionSettings

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

Preset = Literal["official"]
OFFICIAL_TRUNCATION = Truncation(2048, "right")
LOCAL = "local"
# Engines beside the one of this process: name -> the module with `open_engine`. These modules are above this one and
# large, so they are imported on demand.
ENGINES = {"vllm": "logo.backends.vllm.opening"}


class FromPretrained:
    """Makes a `LoGo` for a model that is not in memory yet."""

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | os.PathLike[str],
        pool: AdapterPool | str | Path | Sequence[str | Path] | None = None,
        *,
        engine: str = LOCAL,
        preset: Preset | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        device_map: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: Literal[False] = False,
        model_dir: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        truncation: Truncation | None = None,
        adapter_memory_gb: float | None = None,
        adapter_cache_gb: float | None = None,
        fold: bool | None = None,
        on_bad_adapter: OnBadAdapter = "error",
        **settings: Any,
    ) -> Self:
        """Loads a base model, and opens a pool for it.

        Args:
            base_model: a Hub id, a folder, a short name (`"Llama-3.1-8B"`) or `"demo"`.
            pool: an `AdapterPool`, or what `AdapterPool.open` takes: a folder, a Hub repository, a manifest, or several
                of these. Default: the pool of the base model, for the demo and the three official models.
            engine: `"local"` runs the model in this process; `"vllm"` runs vLLM's offline engine (docs/vllm.md), and
                returns an engine with the same methods (`logo.calls.Calls`).
            preset: `"official"` changes defaults to those of the authors' script, as `logo evaluate --preset official`
                does: signal `norm`, k 20, `probe_context="carry"`, prompts cut at their end to 2048 tokens, float32,
                and the checkpoint's own generation config.
            device: `"auto"`, `"cpu"`, `"cuda:0"`, ...; `device_map="auto"` instead uses several devices.
            dtype: a torch dtype or its name; `"auto"`: the checkpoint's own on an accelerator, float32 on the CPU.
            attn_implementation, quantization_config, model_kwargs: for `AutoModelForCausalLM.from_pretrained`; the last
                has its other options, or those of `vllm.LLM`.
            trust_remote_code: not supported; True is an error.
            **settings: the fields of `SelectionSettings`: `signal`, `k`, `probe_context`, ...

        Raises:
            ModelError, HubError: the base model cannot be loaded.
            PoolError, AdapterError: the pool cannot be used on it.
            UsageError: a setting that does not exist or cannot be used.
        """
        if hasattr(base_model, "generate"):
            raise UsageError("base_model: a loaded model has no name to open; give it to LoGo(model, tokenizer, pool)")
        check_type("base_model", base_model, (str, os.PathLike), "a Hub id, a folder or a short name")
        base_model = os.fspath(base_model)
        if preset is not None and preset not in get_args(Preset):
            raise UsageError(f"preset: expected {', '.join(map(repr, get_args(Preset)))} or None, found {preset!r}")
        official = preset == "official"
        if official:
            settings = {"signal": "norm", "probe_context": "carry", **settings}
            dtype = "float32" if dtype == "auto" else dtype
            truncation = truncation or OFFICIAL_TRUNCATION
        chosen = SelectionSettings.of(**settings)
        if engine != LOCAL:
            if official:
                raise UsageError("preset 'official' probes as the authors' script does: use the engine 'local'")
            asked = {
                "device": None if device == "auto" else device,
                "device_map": device_map,
                "attn_implementation": attn_implementation,
                "quantization_config": quantization_config,
                "adapter_memory_gb": adapter_memory_gb,
                "adapter_cache_gb": adapter_cache_gb,
                "fold": fold,
            }
            made: Self = _opener(engine)(
                base_model,
                pool if pool is None or isinstance(pool, AdapterPool) else spec_of(pool_sources(pool, base_model)),
                settings=chosen,
                dtype=dtype,
                model_kwargs={**(model_kwargs or {}), **({"trust_remote_code": True} if trust_remote_code else {})},
                model_dir=model_dir,
                revision=revision,
                token=token,
                truncation=truncation,
                on_bad_adapter=on_bad_adapter,
                others={name: value for name, value in asked.items() if value is not None},
            )
            return made
        named = None
        if not isinstance(pool, AdapterPool):
            named = None if pool is None else spec_of(pool_sources(pool, base_model))
            how: dict[str, Any] = {"on_bad_adapter": on_bad_adapter, "token": token}
            pool = open_pool(named, base_model, model_dir, examples=chosen.examples, **how)
        if official:
            pool = officially_named(pool, base_model, named)
            if chosen.k is None:
                chosen = replace(chosen, k=min(DEFAULT_K, len(pool)))
        model, tokenizer = load_base(
            base_model,
            device=device,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            model_kwargs={**(model_kwargs or {}), **({"trust_remote_code": True} if trust_remote_code else {})},
            model_dir=model_dir,
            revision=revision,
            token=token,
        )
        logo: Any = cls(  # type: ignore[call-arg]
            model,
            tokenizer,
            pool,
            settings=chosen,
            generation_config=model.generation_config if official else None,
            truncation=truncation,
            adapter_memory_gb=adapter_memory_gb,
            adapter_cache_gb=adapter_cache_gb,
            fold=fold,
            on_bad_adapter=on_bad_adapter,
        )
        logo.calibrate()
        return logo  # type: ignore[no-any-return]


def _opener(engine: str) -> Callable[..., Any]:
    """The function that makes an engine of this name.

    Raises:
        UsageError: there is none.
    """
    if engine not in ENGINES:
        known = (LOCAL, *ENGINES)
        raise UsageError(f"unknown engine {engine!r}{closest(engine, known)}: expected one of {', '.join(known)}")
    opener: Callable[..., Any] = importlib.import_module(ENGINES[engine]).open_engine
    return opener
