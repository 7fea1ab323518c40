"""vLLM's own server as a command: the flags for a pool, and LoGo's options in the environment."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from logo import plugins
from logo.errors import UsageError
from logo.vllm.options import NO_USAGE, OPTIONS, POOL

MODULE = "vllm.entrypoints.openai.api_server"
EXTENSION = "logo.vllm.worker.Extension"
PLUGINS = "VLLM_PLUGINS"  # vLLM loads routes of plugins that are named there, and of the other plugins only those
API_KEY = "VLLM_API_KEY"

# The longest environment variable of a process on Linux, in bytes, less some room for its name.
_LONGEST = 128 * 1024 - 64


@dataclass(frozen=True)
class Launch:
    """The command and the environment that start a vLLM server.

    Attributes:
        model, name: a folder or a Hub id, and the name of the base model alone.
        slots, rank, targets: `--max-loras`, `--max-lora-rank` and `--lora-target-modules`.
        pool, options: for `LOGO_POOL` and `LOGO_OPTIONS`.
        host, port: address to listen on.
        api_key: required of clients; None: vLLM's own variable, if it is set.
        flags, given: further flags of ours, and the user's, which override all others.
    """

    model: str
    name: str
    slots: int
    rank: int
    targets: Sequence[str]
    pool: str
    options: Mapping[str, Any]
    host: str
    port: int
    api_key: str | None = field(default=None, repr=False)
    flags: Sequence[str] = ()
    given: Sequence[str] = ()

    @property
    def command(self) -> list[str]:
        """The program and its arguments. There is no secret among them."""
        return [
            *(sys.executable, "-m", MODULE),
            *("--model", self.model, "--served-model-name", self.name),
            *("--host", self.host, "--port", str(self.port)),
            *("--enable-lora", "--max-loras", str(self.slots), "--max-lora-rank", str(self.rank)),
            *("--lora-target-modules", *self.targets, "--worker-extension-cls", EXTENSION),
            *self.flags,
            *self.given,  # of a flag that is given twice, vLLM takes the last
        ]

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables to add, without secrets; UsageError if the options are too long for one."""
        options = json.dumps(dict(self.options), ensure_ascii=False)
        if len(options.encode()) > _LONGEST:
            raise UsageError(
                f"the options of LoGo take {len(options.encode()):,} bytes, but an environment variable may have at "
                f"most {_LONGEST:,}: give fewer --calibration-prompts"
            )
        usage = os.environ.get(NO_USAGE, "1")  # a user may ask for vLLM's reports
        named = [name for name in (*os.environ.get(PLUGINS, "").split(","), "logo") if name]
        own = {POOL: self.pool, OPTIONS: options, NO_USAGE: usage, PLUGINS: ",".join(dict.fromkeys(named))}
        return own | plugins.environment()

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of the server."""
        return {**inherited, **self.variables, **({} if self.api_key is None else {API_KEY: self.api_key})}

    def shown(self) -> str:
        """The command line for a shell, without secrets."""
        said = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*said, shlex.join(self.command)])


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises UsageError where vLLM would start a server that has no place for LoGo."""
    why = {
        "VLLM_USE_RUST_FRONTEND": "vLLM's Rust frontend does not load the routes that LoGo needs",
        "VLLM_LORA_ENABLE_DUAL_STREAM": "it hides layers from LoGo's probe",
    }
    for name, reason in why.items():
        if environment.get(name, "0").strip() not in ("", "0"):
            raise UsageError(f"{name} is set: {reason}; unset it")
