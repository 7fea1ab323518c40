"""Options of `logo serve` for the server itself; `logo.cli.serve` runs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from logo.cli.choices import Engine, VllmMode
from logo.cli.options import argument, rare, usual
from logo.errors import UsageError

NETWORK = "Network"
LIMITS = "Limits"
CHANGES = "Changes and logs"
VLLM = "With --engine vllm"


@dataclass(frozen=True)
class ServerOptions:
    """The network, limits, changes and logs of a server, and what only vLLM's own reads."""

    host: str = usual("127.0.0.1", "Address to listen on.")
    port: int = usual(8000, "Port to listen on; 0: any free port.", min=0, max=65535)
    api_key: list[str] | None = usual(None, "Clients need one of these (repeatable); or set $LOGO_API_KEY.")
    key_adapters: Path | None = rare(
        None,
        'API keys bound to adapters: JSON such as {"KEY": ["team-a/*", "translate"]}.',
        metavar="FILE",
        panel=NETWORK,
    )
    allow_host: list[str] | None = rare(None, "Further host name that the server answers to.", panel=NETWORK)
    cors: list[str] | None = rare(
        None, "Origin whose web pages may send requests (repeatable).", metavar="ORIGIN", panel=NETWORK
    )
    open_metrics: bool = rare(False, "Serve /metrics without a key.", panel=NETWORK)
    served_model_name: str | None = rare(
        None, "Model name to request the base model alone.", "the last part of --base-model", panel=NETWORK
    )
    signals: str | None = rare(
        None,
        "Signals that requests may ask for; the pool is calibrated for each before the server starts.",
        "the one of --signal",
        metavar="SIGNAL,...",
        panel=LIMITS,
    )
    max_concurrent: int = usual(64, "Answers that are generated at the same time.", min=1, max=512)
    max_queue: int = rare(256, "Further answers that may wait; more get status 429.", min=0, panel=LIMITS)
    request_timeout: float = rare(600.0, "Seconds that a request may take; 0: no limit.", min=0.0, panel=LIMITS)
    max_body_mb: float | None = rare(
        None, "Largest size of a request, in 10⁶ bytes.", "1, or 32 with --engine vllm", min=0.001, panel=LIMITS
    )
    kv_cache_gb: float | None = usual(
        None, "Memory for keys and values, in 10⁹ bytes.", "CPU: 2; GPU: half the free memory", min=0.001
    )
    allow_adapter_changes: Path | None = usual(
        None, "Folder from which requests may add adapters to the pool.", False, metavar="DIR"
    )
    log_json: bool = usual(False, "Log one JSON object per line.")
    log_prompts: bool = rare(
        False,
        "With --log-json: log prompts, too (the first 200 tokens), for `logo pool health` and `learn`.",
        panel=CHANGES,
    )
    server: Engine = usual("local", "This process, or vLLM's own server with LoGo inside.", True, "--engine")
    vllm_mode: VllmMode = rare(
        "auto", "A slot per adapter (gate) or per request (merge); auto: the one that needs less memory.", panel=VLLM
    )
    max_model_len: int | None = rare(
        None, "Maximum tokens of a prompt and its answer.", "the model's", min=1, panel=VLLM
    )
    dry_run: bool = rare(False, "Print what would be started, without secrets.", panel=VLLM)
    arguments: list[str] | None = argument(
        None, metavar="[-- VLLM_FLAGS]", help="With --engine vllm: further flags for vLLM.", show_default=False
    )

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
