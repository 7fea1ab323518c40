"""`logo serve`: an OpenAI-compatible server over one base model and a pool."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions, expanded
from logo.cli.output import note
from logo.cli.prompts import or_demo
from logo.errors import StorageError, UsageError

NETWORK = "Network"
LIMITS = "Limits"
CHANGES = "Changes and logs"


@expanded
def serve(
    engine: EngineOptions,
    host: Annotated[str, typer.Option(help="Where to listen.", rich_help_panel=NETWORK)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535, rich_help_panel=NETWORK)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Clients have to send one of these (repeatable); $LOGO_API_KEY keeps it off the command line.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    key_adapters: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='API keys bound to adapters: JSON such as {"KEY": ["team-a/*", "translate"]}.',
            rich_help_panel=NETWORK,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name under which the server may be called.", rich_help_panel=NETWORK),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages from there may ask.", rich_help_panel=NETWORK),
    ] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="/metrics needs no key.", rich_help_panel=NETWORK)
    ] = False,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="What the base model alone is called.",
            show_default="the last part of --base-model",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    signals: Annotated[
        str | None,
        typer.Option(
            metavar="SIGNAL,...",
            help="Signals that requests may ask for; the pool is prepared for each before the server starts.",
            show_default="the one of --selection-strategy",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_concurrent: Annotated[
        int, typer.Option(help="Answers that are generated together.", min=1, max=512, rich_help_panel=LIMITS)
    ] = 64,
    max_queue: Annotated[
        int, typer.Option(help="Answers that may wait beside those; more get 429.", min=0, rich_help_panel=LIMITS)
    ] = 256,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take; 0: any.", min=0.0, rich_help_panel=LIMITS)
    ] = 600.0,
    max_body_mb: Annotated[
        float, typer.Option(help="Size of a request, in 10⁶ bytes.", min=0.001, rich_help_panel=LIMITS)
    ] = 1.0,
    kv_cache_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory for keys and values, in 10⁹ bytes.",
            min=0.001,
            show_default="2 on a CPU, half of what is free on a GPU",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    allow_adapter_changes: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Take adapters from this folder by request.",
            show_default="the pool stays as it is",
            rich_help_panel=CHANGES,
        ),
    ] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log one JSON object per line.", rich_help_panel=CHANGES)
    ] = False,
) -> None:
    """Serve a base model and a pool as one OpenAI-compatible endpoint.

    `model: "logo"` selects adapters for every request, an adapter's name forces it, the base model's name uses none.

    Example: `logo serve --base-model demo`, then `curl localhost:8000/v1/completions -H 'Content-Type:
    application/json' -d '{"model": "logo", "prompt": "What is 7 plus 5?", "temperature": 0}'`
    """
    for needed in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(needed) is None:
            raise UsageError(f"serving needs {needed}: install lora-on-the-go[serve]")
    folder = None if allow_adapter_changes is None else allow_adapter_changes.resolve()
    if folder is not None and not folder.is_dir():
        raise StorageError(f"--allow-adapter-changes {folder}: expected a folder, found none; create it first")
    keys = tuple(api_key or ()) or tuple(filter(None, [os.environ.get("LOGO_API_KEY")]))
    from logo.serving.guards import GuardSettings, is_loopback
    from logo.serving.keys import read_key_adapters, unmatched
    from logo.serving.logs import configure
    from logo.serving.running import address_of, listening

    bound = {} if key_adapters is None else read_key_adapters(key_adapters)
    guards = GuardSettings(
        host, keys, int(max_body_mb * 1e6), tuple(allow_host or ()), tuple(cors or ()), open_metrics, bound
    )
    configure(log_json=log_json)
    if not keys and not bound and not is_loopback(host):
        note(f"Listening on {host} without an API key: whoever reaches it may use it. --api-key asks for one.")
    taken = listening(host, port)
    engine, base_model = or_demo(engine)
    name = served_model_name or base_model.rstrip("/").rpartition("/")[2]
    if name == "logo":
        raise UsageError("--served-model-name 'logo' is what selects adapters; choose another name for the base model")

    from logo.selection.signals import get_signal
    from logo.serving.app import AppSettings
    from logo.serving.memory import Memory
    from logo.serving.running import serve as run
    from logo.serving.service import Service

    others = [name.strip() for name in (signals or "").split(",") if name.strip()]
    for other in others:
        get_signal(other)  # raises before anything slow happens
    logo = open_engine(engine, base_model)
    for pattern in unmatched(logo.names, bound):
        note(f"--key-adapters: no adapter matches {pattern!r} now")
    memory = Memory(max_concurrent, kv_cache_gb)
    service = Service(logo, memory, signals=others, max_queue=max_queue)
    note(service.batching.plan.line)
    settings = AppSettings(name, request_timeout or None, folder)
    run(service, settings, guards, taken, lambda: note(f"Serving on {address_of(taken)}"))
