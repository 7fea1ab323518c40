"""Options of `logo serve` for the server itself; `logo.cli.serve` runs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from logo.cli.choices import Engine, VllmMode
from logo.cli.options import rare, usual
from logo.errors import UsageError

NETWORK = "Network"
LIMITS = "Limits"
CHANGES = "Changes and logs"
VLLM = "With --engine vllm"


@dataclass(frozen=True)
class ServerOptions:
    """The network, limits, changes and logs of a server, and what only vLLM's own reads."""

    host: Annotated[str, usual("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, usual("Port to listen on; 0: any free port.", min=0, max=65535)] = 8000
    api_key: Annotated[list[str] | None, usual("Clients need one of these (repeatable); or set $LOGO_API_KEY.")] = None
    key_adapters: Annotated[
        Path | None,
        rare(
            'API keys bound to adapters: JSON such as {"KEY": ["team-a/*", "translate"]}.',
            metavar="FILE",
            panel=NETWORK,
        ),
    ] = None
    allow_host: Annotated[list[str] | None, rare("Further host name that the server answers to.", panel=NETWORK)] = None
    cors: Annotated[
        list[str] | None,
        rare("Origin whose web pages may send requests (repeatable).", metavar="ORIGIN", panel=NETWORK),
    ] = None
    open_metrics: Annotated[bool, rare("Serve /metrics without a key.", True, "--open-metrics", panel=NETWORK)] = False
    served_model_name: Annotated[
        str | None, rare("Model name to request the base model alone.", "the last part of --base-model", panel=NETWORK)
    ] = None
    signals: Annotated[
        str | None,
        rare(
            "Signals that requests may ask for; the pool is calibrated for each before the server starts.",
            "the one of --signal",
            metavar="SIGNAL,...",
            panel=LIMITS,
        ),
    ] = None
    max_concurrent: Annotated[int, usual("Answers that are generated at the same time.", min=1, max=512)] = 64
    max_queue: Annotated[int, rare("Further answers that may wait; more get status 429.", min=0, panel=LIMITS)] = 256
    request_timeout: Annotated[float, rare("Seconds that a request may take; 0: no limit.", min=0.0, panel=LIMITS)] = (
        600.0
    )
    max_body_mb: Annotated[
        float | None,
        rare("Largest size of a request, in 10⁶ bytes.", "1, or 32 with --engine vllm", min=0.001, panel=LIMITS),
    ] = None
    kv_cache_gb: Annotated[
        float | None, usual("Memory for keys and values, in 10⁹ bytes.", "CPU: 2; GPU: half the free memory", min=0.001)
    ] = None
    allow_adapter_changes: Annotated[
        Path | None, usual("Folder from which requests may add adapters to the pool.", False, metavar="DIR")
    ] = None
    log_json: Annotated[bool, usual("Log one JSON object per line.", True, "--log-json")] = False
    log_prompts: Annotated[
        bool,
        rare(
            "With --log-json: log prompts, too (the first 200 tokens), for `logo pool health`.",
            True,
            "--log-prompts",
            panel=CHANGES,
        ),
    ] = False
    server: Annotated[Engine, usual("This process, or vLLM's own server with LoGo inside.", True, "--engine")] = "local"
    vllm_mode: Annotated[
        VllmMode,
        rare("A slot per adapter (gate) or per request (merge); auto: the one that needs less memory.", panel=VLLM),
    ] = "auto"
    max_model_len: Annotated[
        int | None, rare("Maximum tokens of a prompt and its answer.", "the model's", min=1, panel=VLLM)
    ] = None
    dry_run: Annotated[bool, rare("Print what would be started, without secrets.", True, "--dry-run", panel=VLLM)] = (
        False
    )
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- VLLM_FLAGS]", help="With --engine vllm: further flags for vLLM.", show_default=False
        ),
    ] = None

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys of clients, from the command line or else from the environment."""
        return tuple(self.api_key or ()) or tuple(filter(None, [os.environ.get("LOGO_API_KEY")]))

    @property
    def other_signals(self) -> tuple[str, ...]:
        """The signals of `--signals`."""
        return tuple(name.strip() for name in (self.signals or "").split(",") if name.strip())

    def model_name(self, base_model: str) -> str:
        """Name of the base model alone in requests."""
        name = self.served_model_name or base_model.rstrip("/").rpartition("/")[2]
        if name == "logo":
            raise UsageError("--served-model-name: 'logo' is the model that selects adapters; choose another name")
        return name
