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
COUNT_NANS = "VLLM_COMPUTE_NANS_IN_LOGITS"  # vLLM then marks each answer whose logits are NaN
# On CPUs, memory for keys and values in GB, where neither the user nor vLLM's own variable says how much.
CPU_CACHE_GB = 2.0
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"

# The longest environment variable of a process on Linux, in bytes, less some room for its name.
_LONGEST = 128 * 1024 - 64


@dataclass(frozen=True)
class Launch:
    """The command and the environment that start a vLLM server."""

    model: str  # a folder or a Hub id
    name: str  # of the base model alone
    slots: int  # `--max-loras`, how many adapters answer at a time
    rank: int  # `--max-lora-rank`
    targets: Sequence[str]  # `--lora-target-modules`
    pool: str  # for `LOGO_POOL`
    options: Mapping[str, Any]  # for `LOGO_OPTIONS`
    host: str
    port: int
    api_key: str | None = field(default=None, repr=False)  # required of clients; None: vLLM's own variable, if set
    flags: Sequence[str] = ()  # further flags of ours
    given: Sequence[str] = ()  # the user's flags, which override all others

    @property
    def command(self) -> list[str]:
        """The program and its arguments, without secrets."""
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
        length = len(options.encode())
        if length > _LONGEST:
            most = f"an environment variable may have at most {_LONGEST:,}"
            raise UsageError(f"the options of LoGo take {length:,} bytes, but {most}: give fewer calibration prompts")
        usage = os.environ.get(NO_USAGE, "1")  # a user may ask for vLLM's reports
        plugin_names = [name for name in (*os.environ.get(PLUGINS, "").split(","), "logo") if name]
        own = {POOL: self.pool, OPTIONS: options, NO_USAGE: usage, PLUGINS: ",".join(dict.fromkeys(plugin_names))}
        return own | plugins.environment()

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of the server."""
        variables = {**inherited, **self.variables}
        if self.api_key is not None:
            variables[API_KEY] = self.api_key
        return variables

    def shown(self) -> str:
        """The command line for a shell, without secrets."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.command)])


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises UsageError where vLLM would start a server that has no place for LoGo."""
    reasons = {
        "VLLM_USE_RUST_FRONTEND": "vLLM's Rust frontend does not load the routes that LoGo needs",
        "VLLM_LORA_ENABLE_DUAL_STREAM": "it hides layers from LoGo's probe",
        "VLLM_RAISE_ON_LOGIT_NANS": "one adapter that overflows would end the engine, and every answer with it",
    }
    for name, reason in reasons.items():
        if environment.get(name, "0").strip() not in ("", "0"):
            raise UsageError(f"{name} is set: {reason}; unset it")
