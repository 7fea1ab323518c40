"""`logo serve`: an OpenAI-compatible server over one base model and a pool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logo.cli import serve_vllm
from logo.cli.opening import check_encoder, open_engine
from logo.cli.options import EngineOptions, changed
from logo.cli.output import note
from logo.cli.prompts import or_demo
from logo.cli.serve_options import ServerOptions
from logo.errors import StorageError, UsageError, need

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from logo.api.guards import GuardSettings
    from logo.engine import LoGo
    from logo.serve.entrance import Entrance

MAX_BODY = 1_000_000  # bytes of a request
_SIGNALS = ("norm",)  # that requests may ask for besides the engine's own


def serve(
    *vllm_flags: str,
    server: ServerOptions = ServerOptions(),
    engine: EngineOptions = EngineOptions(),
) -> None:
    """Serve a base model and a pool as one OpenAI-compatible endpoint.

    `model: "logo"` selects adapters for every request, an adapter's name forces it, the base model's name uses none.

    Example: logo serve --base-model demo

    Args:
        vllm_flags: With --engine vllm: flags for vLLM, after `--`.
    """
    if vllm_flags and not vllm_flags[0].startswith("-"):
        raise UsageError(f"{vllm_flags[0]!r}: expected options only; flags for vLLM follow after `--`")
    if server.server == "vllm":
        serve_vllm.serve(engine, server, vllm_flags)
        return
    _refuse(server, vllm_flags)
    need("the server", "starlette", "uvicorn", "prometheus_client")
    adapter_changes = _changes_folder(server.allow_adapter_changes)
    from logo.api.guards import is_loopback
    from logo.api.listening import address_of, listening
    from logo.api.logs import configure
    from logo.api.names import unmatched

    guards = _guards(server)
    configure(log_json=server.log != "text")
    # A log that programs read is JSON from its first line to its last.
    tell = note if server.log == "text" else logging.getLogger("logo.serve").info
    if not guards.api_keys and not guards.key_adapters and not is_loopback(server.host):
        tell(serve_vllm.OPEN.format(server.host))
    check_encoder(engine)
    socket = listening(server.host, server.port)
    base_model = or_demo(engine)
    server.model_name(base_model)  # raises before anything slow happens
    logo = open_engine(engine, base_model, server.probe_text, adapter_memory_gb=server.adapter_memory_gb)
    for pattern in unmatched(logo.names, guards.key_adapters):
        tell(f"--key-adapters: no adapter matches {pattern!r} now")
    app, entrance = _app(server, logo, server.model_name(base_model), adapter_changes, tell)
    from logo.serve.running import serve as run

    run(app, entrance, guards, socket, lambda: tell(f"Serving on {address_of(socket)}"))


def _refuse(server: ServerOptions, vllm_flags: Sequence[str]) -> None:
    """Raises UsageError for options of another kind of server."""
    for flag in (*changed(server, "replicas", "dry_run").values(), *vllm_flags):
        raise UsageError(f"{flag} is only for --engine vllm")
    if server.select_only:
        for flag in changed(server, "max_concurrent", "kv_cache_gb", "adapter_memory_gb", "shadow").values():
            raise UsageError(f"{flag} is for a server that generates: leave it out, or --select-only")


def _app(
    server: ServerOptions, logo: LoGo, name: str, adapter_changes: Path | None, tell: Callable[[str], None]
) -> tuple[Starlette, Entrance]:
    """The app over an engine, whose base model has this name for clients, and its entrance."""
    from logo.api.names import check_pool
    from logo.serve.app import create_app, create_selector
    from logo.serve.memory import Memory
    from logo.serve.routes import AppSettings
    from logo.serve.service import Service

    check_pool(name, logo.names)
    log_prompts = server.log == "prompts"
    settings = AppSettings(name, adapter_changes=adapter_changes, log_prompts=log_prompts, shadow=server.shadow)
    if server.select_only:
        return create_selector(logo, settings, signals=_SIGNALS)
    service = Service(logo, Memory(server.max_concurrent, server.kv_cache_gb), signals=_SIGNALS)
    service.batching.start()  # so that an error here is one line, not a traceback of uvicorn
    tell(service.batching.plan.line)
    return create_app(service, settings), service.entrance


def _changes_folder(folder: Path | None) -> Path | None:
    """The folder from which requests may add adapters; StorageError if there is none."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise StorageError(f"--allow-adapter-changes {folder}: expected a folder, found none; create it first")
    return folder.resolve()


def _guards(server: ServerOptions) -> GuardSettings:
    """Who may ask the server, and for what."""
    from logo.api.guards import GuardSettings
    from logo.api.names import read_key_adapters

    return GuardSettings(
        server.host,
        server.api_keys,
        MAX_BODY,
        tuple(server.allow_host or ()),
        tuple(server.cors or ()),
        key_adapters={} if server.key_adapters is None else read_key_adapters(server.key_adapters),
    )
