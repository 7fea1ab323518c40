"""`logo serve`: an OpenAI-compatible server over one base model and a pool."""

from __future__ import annotations

import functools
import logging
from typing import Any

from logo.cli import cluster, serve_vllm
from logo.cli.belonging import check_selection_options
from logo.cli.expanded import expanded
from logo.cli.opening import open_engine, selection_settings
from logo.cli.options import EngineOptions, changed
from logo.cli.output import note
from logo.cli.prompts import or_demo
from logo.cli.serve_options import ServerOptions
from logo.cli.serve_vllm import OPEN
from logo.errors import StorageError, UsageError, need

MAX_BODY_MB = 1.0


@expanded
def serve(server: ServerOptions, engine: EngineOptions, replicas: cluster.ReplicaOptions) -> Any:
    """Serve a base model and a pool as one OpenAI-compatible endpoint.

    `model: "logo"` selects adapters for every request, an adapter's name forces it, the base model's name uses none.

    Example: `logo serve --base-model demo`, then `curl localhost:8000/v1/completions -H 'Content-Type:
    application/json' -d '{"model": "logo", "prompt": "What is 7 plus 5?"}'`
    """
    check_selection_options([selection_settings(engine)])
    layout = replicas.layout(engine)
    if server.server == "vllm":
        base_model = or_demo(engine)
        server.model_name(base_model)  # raises before anything slow happens
        if layout is None:
            return serve_vllm.serve(engine, base_model, server)
        from logo.serve.running import listening

        with listening(server.host, server.port) as free:  # another process will listen there
            address = free.getsockname()[:2]
        several = functools.partial(cluster.serve, engine, base_model, layout, address)
        return serve_vllm.serve(engine, base_model, server, several)
    if layout is not None:
        raise UsageError("several replicas are only for --engine vllm; add it, or leave out --replicas")
    arguments = [f"argument {argument!r}" for argument in server.arguments or ()]
    for flag in (*changed(server, "max_model_len", "dry_run").values(), *arguments):
        raise UsageError(f"{flag} is only for --engine vllm")
    for flag in changed(engine, "merge").values():
        raise UsageError(
            f"{flag} is not for this server, in which sequences with different mixtures share batches and nothing is "
            "merged; leave it out"
        )
    need("the server", "starlette", "uvicorn", "prometheus_client")
    if server.log_prompts and not server.log_json:
        raise UsageError("--log-prompts: prompts are only logged as JSON; add --log-json")
    folder = None if server.allow_adapter_changes is None else server.allow_adapter_changes.resolve()
    if folder is not None and not folder.is_dir():
        raise StorageError(
            f"--allow-adapter-changes {server.allow_adapter_changes}: expected a folder, found none; create it first"
        )
    from logo.serve.guards import GuardSettings, is_loopback
    from logo.serve.logs import configure
    from logo.serve.names import read_key_adapters, unmatched
    from logo.serve.running import address_of, listening

    bound = {} if server.key_adapters is None else read_key_adapters(server.key_adapters)
    guards = GuardSettings(
        server.host,
        server.api_keys,
        int((server.max_body_mb or MAX_BODY_MB) * 1e6),
        tuple(server.allow_host or ()),
        tuple(server.cors or ()),
        server.open_metrics,
        bound,
    )
    configure(log_json=server.log_json)
    # A log that programs read is JSON from its first line to its last.
    tell = logging.getLogger("logo.serve").info if server.log_json else note
    if not guards.api_keys and not bound and not is_loopback(server.host):
        tell(OPEN.format(server.host))
    taken = listening(server.host, server.port)
    base_model = or_demo(engine)
    name = server.model_name(base_model)

    from logo.selection.signals import get_signal
    from logo.serve.app import AppSettings
    from logo.serve.batching import Memory
    from logo.serve.names import check_pool
    from logo.serve.running import serve as run
    from logo.serve.service import Service

    signals = server.other_signals
    for signal in signals:
        get_signal(signal)  # raises before anything slow happens
    settings = AppSettings(name, server.request_timeout or None, folder, server.log_prompts)
    logo = open_engine(engine, base_model)
    check_pool(name, logo.names)
    for pattern in unmatched(logo.names, bound):
        tell(f"--key-adapters: no adapter matches {pattern!r} now")
    memory = Memory(server.max_concurrent, server.kv_cache_gb)
    service = Service(logo, memory, signals=signals, max_queue=server.max_queue)
    tell(service.batching.plan.line)
    run(service, settings, guards, taken, lambda: tell(f"Serving on {address_of(taken)}"))
    return None
