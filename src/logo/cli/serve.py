"""`logo serve`: an OpenAI-compatible server over one base model and a pool."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from logo.cli import serve_ray, serve_vllm
from logo.cli.belonging import check_selection_options
from logo.cli.choices import Engine, VllmMode
from logo.cli.expanded import expanded, given
from logo.cli.opening import open_engine, selection_settings
from logo.cli.options import EngineOptions, rare, usual
from logo.cli.output import note
from logo.cli.prompts import or_demo
from logo.cli.serve_vllm import OPEN
from logo.errors import StorageError, UsageError
from logo.extras import need

NETWORK = "Network"
LIMITS = "Limits"
CHANGES = "Changes and logs"
VLLM = "With --engine vllm"

MAX_QUEUE, REQUEST_TIMEOUT, MAX_BODY_MB = 256, 600.0, 1.0


@expanded
def serve(
    engine: EngineOptions,
    replicas: serve_ray.ReplicaOptions,
    host: Annotated[str, usual("Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, usual("Port to listen on; 0: any free port.", min=0, max=65535)] = 8000,
    api_key: Annotated[list[str] | None, usual("Clients need one of these (repeatable); or set $LOGO_API_KEY.")] = None,
    key_adapters: Annotated[
        Path | None,
        rare(
            'API keys bound to adapters: JSON such as {"KEY": ["team-a/*", "translate"]}.',
            metavar="FILE",
            panel=NETWORK,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None, rare("Further host name that the server answers to.", panel=NETWORK)
    ] = None,
    cors: Annotated[
        list[str] | None,
        rare("Origin whose web pages may send requests (repeatable).", metavar="ORIGIN", panel=NETWORK),
    ] = None,
    open_metrics: Annotated[bool, rare("Serve /metrics without a key.", True, "--open-metrics", panel=NETWORK)] = False,
    served_model_name: Annotated[
        str | None, rare("Model name to request the base model alone.", "the last part of --base-model", panel=NETWORK)
    ] = None,
    signals: Annotated[
        str | None,
        rare(
            "Signals that requests may ask for; the pool is calibrated for each before the server starts.",
            "the one of --signal",
            metavar="SIGNAL,...",
            panel=LIMITS,
        ),
    ] = None,
    max_concurrent: Annotated[int, usual("Answers that are generated at the same time.", min=1, max=512)] = 64,
    max_queue: Annotated[
        int, rare("Further answers that may wait; more get status 429.", min=0, panel=LIMITS)
    ] = MAX_QUEUE,
    request_timeout: Annotated[
        float, rare("Seconds that a request may take; 0: no limit.", min=0.0, panel=LIMITS)
    ] = REQUEST_TIMEOUT,
    max_body_mb: Annotated[
        float | None,
        rare("Largest size of a request, in 10⁶ bytes.", "1, or 32 with --engine vllm", min=0.001, panel=LIMITS),
    ] = None,
    kv_cache_gb: Annotated[
        float | None, usual("Memory for keys and values, in 10⁹ bytes.", "CPU: 2; GPU: half the free memory", min=0.001)
    ] = None,
    allow_adapter_changes: Annotated[
        Path | None, usual("Folder from which requests may add adapters to the pool.", False, metavar="DIR")
    ] = None,
    log_json: Annotated[bool, usual("Log one JSON object per line.", True, "--log-json")] = False,
    log_prompts: Annotated[
        bool,
        rare(
            "With --log-json: log prompts, too (the first 200 tokens), for `logo pool health`.",
            True,
            "--log-prompts",
            panel=CHANGES,
        ),
    ] = False,
    server: Annotated[
        Engine, usual("This process, or vLLM's own server with LoGo inside.", True, "--engine")
    ] = "local",
    vllm_mode: Annotated[
        VllmMode,
        rare("A slot per adapter (gate) or per request (merge); auto: the one that needs less memory.", panel=VLLM),
    ] = "auto",
    max_model_len: Annotated[
        int | None, rare("Maximum tokens of a prompt and its answer.", "the model's", min=1, panel=VLLM)
    ] = None,
    dry_run: Annotated[
        bool, rare("Print what would be started, without secrets.", True, "--dry-run", panel=VLLM)
    ] = False,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- VLLM_FLAGS]", help="With --engine vllm: further flags for vLLM.", show_default=False
        ),
    ] = None,
) -> Any:
    """Serve a base model and a pool as one OpenAI-compatible endpoint.

    `model: "logo"` selects adapters for every request, an adapter's name forces it, the base model's name uses none.

    Example: `logo serve --base-model demo`, then `curl localhost:8000/v1/completions -H 'Content-Type:
    application/json' -d '{"model": "logo", "prompt": "What is 7 plus 5?"}'`
    """
    check_selection_options(given(), [selection_settings(engine)])
    layout = serve_ray.layout_of(replicas, engine)
    keys = tuple(api_key or ()) or tuple(filter(None, [os.environ.get("LOGO_API_KEY")]))
    others = [name.strip() for name in (signals or "").split(",") if name.strip()]
    if server == "vllm":
        not_theirs = {
            "--key-adapters": key_adapters is not None,
            "--max-queue": max_queue != MAX_QUEUE,
            "--request-timeout": request_timeout != REQUEST_TIMEOUT,
            "--allow-adapter-changes": allow_adapter_changes is not None,
            "--log-json": log_json,
            "--log-prompts": log_prompts,
        }
        engine, base_model = or_demo(engine)
        vllm_server = serve_vllm.VllmServerOptions(
            name=_name(served_model_name, base_model),
            host=host,
            port=port,
            api_keys=keys,
            allow_hosts=tuple(allow_host or ()),
            cors=tuple(cors or ()),
            open_metrics=open_metrics,
            signals=others,
            max_concurrent=max_concurrent,
            kv_cache_gb=kv_cache_gb,
            mode=vllm_mode,
            max_model_len=max_model_len,
            max_body_mb=max_body_mb,
            arguments=tuple(arguments or ()),
            refused=tuple(option for option, is_given in not_theirs.items() if is_given),
        )
        if layout is None:
            return serve_vllm.serve(engine, base_model, vllm_server, dry_run=dry_run)
        from logo.serving.running import listening, released

        address = released(listening(host, port))
        several = functools.partial(serve_ray.serve, engine, base_model, replicas, layout, address)
        return serve_vllm.serve(engine, base_model, vllm_server, dry_run=dry_run, several=several)
    for option, is_given in (
        ("--vllm-mode", vllm_mode != "auto"),
        ("--max-model-len", max_model_len is not None),
        ("--dry-run", dry_run),
        (f"argument {(arguments or [''])[0]!r}", bool(arguments)),
    ):
        if is_given:
            raise UsageError(f"{option} is only for --engine vllm")
    if engine.fold is not None:
        raise UsageError(
            f"--{'' if engine.fold else 'no-'}fold is not for this server, in which sequences with different mixtures "
            "share batches and nothing is folded; leave it out"
        )
    need("the server", "fastapi", "uvicorn", "prometheus_client")
    if log_prompts and not log_json:
        raise UsageError("--log-prompts: prompts are only logged as JSON; add --log-json")
    folder = None if allow_adapter_changes is None else allow_adapter_changes.resolve()
    if folder is not None and not folder.is_dir():
        raise StorageError(f"--allow-adapter-changes {folder}: expected a folder, found none; create it first")
    from logo.serving.guards import GuardSettings, is_loopback
    from logo.serving.keys import read_key_adapters, unmatched
    from logo.serving.logs import configure
    from logo.serving.running import address_of, listening, released

    bound = {} if key_adapters is None else read_key_adapters(key_adapters)
    size = int((max_body_mb or MAX_BODY_MB) * 1e6)
    guards = GuardSettings(host, keys, size, tuple(allow_host or ()), tuple(cors or ()), open_metrics, bound)
    configure(log_json=log_json)
    # A log that programs read is JSON from its first line to its last.
    tell = logging.getLogger("logo.serving").info if log_json else note
    if not keys and not bound and not is_loopback(host):
        tell(OPEN.format(host))
    taken = listening(host, port)
    engine, base_model = or_demo(engine)
    name = _name(served_model_name, base_model)

    from logo.api.names import check_pool
    from logo.selection.signals import get_signal
    from logo.serving.app import AppSettings
    from logo.serving.memory import Memory
    from logo.serving.running import serve as run
    from logo.serving.service import Service

    for other in others:
        get_signal(other)  # raises before anything slow happens
    settings = AppSettings(name, request_timeout or None, folder, log_prompts)
    if layout is not None:
        limits = {"max_concurrent": max_concurrent, "kv_cache_gb": kv_cache_gb, "max_queue": max_queue}
        plan = serve_ray.plan_of(
            engine, base_model, settings, guards, signals=tuple(others), log_json=log_json, **limits
        )
        return serve_ray.serve(engine, base_model, replicas, layout, released(taken), plan)
    logo = open_engine(engine, base_model)
    check_pool(name, logo.names)
    for pattern in unmatched(logo.names, bound):
        tell(f"--key-adapters: no adapter matches {pattern!r} now")
    memory = Memory(max_concurrent, kv_cache_gb)
    service = Service(logo, memory, signals=others, max_queue=max_queue)
    tell(service.batching.plan.line)
    run(service, settings, guards, taken, lambda: tell(f"Serving on {address_of(taken)}"))
    return None


def _name(asked: str | None, base_model: str) -> str:
    """Name of the base model alone in requests."""
    name = asked or base_model.rstrip("/").rpartition("/")[2]
    if name == "logo":
        raise UsageError("--served-model-name: 'logo' is the model that selects adapters; choose another name")
    return name
