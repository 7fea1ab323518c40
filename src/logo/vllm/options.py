"""LoGo's options inside vLLM: from the environment, or from `--additional-config '{"logo": {...}}'`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from logo.adapters.sources import OnBadAdapter
from logo.api.logs import Log
from logo.errors import UsageError, closest
from logo.selection.settings import SelectionSettings
from logo.selection.signals import get_signal

log = logging.getLogger("vllm.logo")  # below vLLM's own, so that its lines look like theirs

# Environment variables: one with the pool, and one with all other options as JSON.
POOL, OPTIONS = "LOGO_POOL", "LOGO_OPTIONS"
MODULES = "LOGO_LORA_MODULES"  # the sources that `--lora-modules` names, which join the pool; set by our plugin
NO_USAGE = "VLLM_NO_USAGE_STATS"  # vLLM reports its usage unless this variable is 1

# Arguments of `vllm.LLM` for slots, parallelism, memory, speed and loading.
_NO_MATTER = frozenset(
    {
        *("max_loras", "max_lora_rank", "max_cpu_loras", "max_num_seqs", "max_num_batched_tokens"),
        *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"),
        *("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size", "swap_space"),
        *("cpu_offload_gb", "enforce_eager", "enable_prefix_caching", "enable_chunked_prefill", "disable_log_stats"),
        *("disable_custom_all_reduce", "async_scheduling", "compilation_config", "use_tqdm_on_load"),
        *("hf_token", "download_dir", "load_format", "model_loader_extra_config"),
    }
)


@dataclass(frozen=True)
class VllmOptions:
    """The options of every process of one vLLM server."""

    pool: str  # a folder of adapters, or a Hub repository `org/name[/folder][@revision]`
    signals: tuple[str, ...] = ("norm",)  # those that requests may ask for besides the settings' own
    adapter_changes: bool = False  # whether requests may change the pool, as with `VLLM_ALLOW_RUNTIME_LORA_UPDATING`
    on_bad_adapter: OnBadAdapter = "error"  # what to do with adapters that do not fit the base model
    log: Log = "text"  # a line per request as in our own server, or, with `text`, vLLM's own
    shadow: str = ""  # file for what would be selected where requests name adapters; empty: none
    host: str = ""  # the server's address, if it is known
    hosts: tuple[str, ...] = ()  # these two: see `logo.api.guards.GuardSettings`
    origins: tuple[str, ...] = ("*",)
    settings: SelectionSettings = field(default_factory=SelectionSettings)  # how prompts are read and selected for

    @classmethod
    def of(cls, additional: Mapping[str, Any] | None, environment: Mapping[str, str]) -> VllmOptions | None:
        """The options that are given; None if there are none. Those of `--additional-config` take precedence.
        UsageError: an option that does not exist or cannot be used."""
        values: dict[str, Any] = json_object(environment[OPTIONS], OPTIONS) if environment.get(OPTIONS) else {}
        if environment.get(POOL):
            values["pool"] = environment[POOL]
        inside = (additional or {}).get("logo") or {}
        if not isinstance(inside, Mapping):
            raise UsageError(f"additional_config: expected 'logo' to be an object, found {type(inside).__name__}")
        values |= inside
        modules = environment.get(MODULES)
        if modules and isinstance(values.get("pool", ""), str):
            values["pool"] = ",".join(filter(None, [values.get("pool"), modules]))
        if not values:
            return None
        own = {field.name for field in fields(cls)} - {"settings"}
        names = [*own, *(field.name for field in fields(SelectionSettings))]
        for name in values:
            if name not in names:
                raise UsageError(f"unknown option {name!r} of LoGo{closest(name, names)}; known: {', '.join(names)}")
        if not isinstance(values.get("pool"), str):
            raise UsageError(f"LoGo needs a pool: set {POOL} to a folder of adapters or a Hub repository")
        settings = SelectionSettings.of(**{name: value for name, value in values.items() if name not in own})
        options = {name: value for name, value in values.items() if name in own}
        for name, fine in (
            ("on_bad_adapter", get_args(OnBadAdapter)),
            ("adapter_changes", (True, False)),
            ("log", get_args(Log)),
        ):
            if options.get(name, fine[0]) not in fine:
                expected = ", ".join(map(str, fine)).lower()
                raise UsageError(f"{name}: expected one of {expected}, found {options[name]!r}")
        options |= {name: tuple(options[name]) for name in ("signals", "hosts", "origins") if name in options}
        checked = cls(settings=settings, **options)
        for signal in checked.all_signals:
            get_signal(signal)  # refuses one that does not exist
        return checked

    @property
    def all_signals(self) -> tuple[str, ...]:
        """All signals that requests may ask for, the settings' own first."""
        return tuple(dict.fromkeys((self.settings.signal, *self.signals)))


def affecting_answers(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that can change an answer by more than rounding, without LoGo's own options."""
    counted = {name: value for name, value in given.items() if name not in _NO_MATTER}
    additional = dict(counted.pop("additional_config", None) or {})
    additional.pop("logo", None)
    if additional:
        counted["additional_config"] = additional
    return counted


def json_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object that a user has written; `where` names the option in errors. UsageError: it is none."""
    message = f"{where}: expected a JSON object, found {text!r:.60}"
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{message} ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(message)
    return value
