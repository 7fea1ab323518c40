"""Options of `logo serve` for the server itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from logo.api.logs import Log
from logo.cli.options import Engine, ProbeText, in_words, positive
from logo.errors import UsageError

SERVER = Group("Network, logs and limits", sort_key=1)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The network, limits, changes and logs of a server."""

    host: Annotated[str, Parameter(group=SERVER)] = "127.0.0.1"
    """Address to listen on."""

    port: Annotated[int, Parameter(group=SERVER, validator=Number(gte=0, lte=65535))] = 8000
    """Port to listen on; 0: any free port."""

    api_key: Annotated[
        list[str] | None, Parameter(group=SERVER, env_var="LOGO_API_KEY", env_var_split=lambda _, key, **__: [key])
    ] = None
    """Clients need one of these (repeatable)."""

    key_adapters: Annotated[Path | None, Parameter(group=SERVER)] = None
    """Keys bound to adapters: JSON such as {"KEY": ["team-a/*", "translate"]}."""

    allow_host: Annotated[list[str] | None, Parameter(group=SERVER)] = None
    """Further host name that the server answers to (repeatable)."""

    cors: Annotated[list[str] | None, Parameter(group=SERVER)] = None
    """Origin whose web pages may send requests (repeatable)."""

    served_model_name: Annotated[str | None, in_words("the last part of --base-model", of=SERVER)] = None
    """Model name to request the base model alone."""

    max_concurrent: Annotated[int, Parameter(group=SERVER, validator=Number(gte=1, lte=512))] = 64
    """Answers that are generated at the same time."""

    kv_cache_gb: Annotated[float | None, in_words("0.3 of what is free; CPU: at most 2", of=SERVER)] = None
    """Memory for keys and values, in 10⁹ bytes."""

    adapter_memory_gb: Annotated[float | None, in_words("0.3 of what is free", of=SERVER)] = None
    """Memory for adapters, in 10⁹ bytes."""

    allow_adapter_changes: Annotated[Path | None, Parameter(group=SERVER)] = None
    """Folder from which requests may add adapters to the pool."""

    log: Annotated[Log, Parameter(group=SERVER)] = "text"
    """Text, JSON, or JSON with prompts."""

    shadow: Annotated[Path | None, Parameter(group=SERVER)] = None
    """File for what would be selected where requests name adapters."""

    probe_text: Annotated[ProbeText | None, Parameter(group=SERVER, show_default=False)] = None
    """The part of a conversation that selects."""

    server: Annotated[Engine, Parameter(name="--engine")] = "local"
    """This process, or vLLM's own server."""

    select_only: bool = False
    """Generate nothing: answer only which adapters a prompt selects."""

    replicas: Annotated[int | None, in_words("one", validator=positive)] = None
    """With --engine vllm: how many processes answer (needs Ray)."""

    dry_run: bool = False
    """With --engine vllm: print what would be started, without secrets."""

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys of clients."""
        return tuple(self.api_key or ())

    def model_name(self, base_model: str) -> str:
        """Name of the base model alone in requests."""
        name = self.served_model_name or base_model.rstrip("/").rpartition("/")[2]
        if name == "logo":
            raise UsageError("--served-model-name: 'logo' is the model that selects adapters; choose another name")
        return name
