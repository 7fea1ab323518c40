"""What may be written beside results: options without secrets."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from logo.version import __version__

# The last words of names whose values nobody may read in results, such as `hf_token` and `api_key`.
_SECRETS = frozenset({"token", "key", "secret", "password", "credentials"})
# The option whose value is a JSON object as a text, and those that are texts `a=1,b=x`.
_JSON, _LISTS = "vllm_options", ("engine_args", "method_args")


def without_secrets(value: Any) -> Any:
    """A value without the entries that carry a secret (`hf_token`, ...), however deep they are, also in the texts of
    `--vllm-options`, `--engine-args` and `--method-args`."""
    if isinstance(value, Mapping):
        return {name: _shown(str(name), entry) for name, entry in value.items() if not _secret(name)}
    if isinstance(value, (list, tuple)):
        return [without_secrets(entry) for entry in value]
    return value


def identified(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for an identity, with a digest in place of a value that nobody may read."""
    digests = {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in options.items()}
    return {name: f"sha256:{digests[name]}" if _secret(name) else value for name, value in options.items()}


def _shown(name: str, value: Any) -> Any:
    if name == _JSON and isinstance(value, str):
        try:
            return json.dumps(without_secrets(json.loads(value)))
        except ValueError:  # it is refused elsewhere
            return None
    if name in _LISTS and isinstance(value, str):
        return ",".join(part for part in value.split(",") if not _secret(part.partition("=")[0]))
    return without_secrets(value)


def _secret(name: object) -> bool:
    return str(name).strip().replace("-", "_").lower().rpartition("_")[2] in _SECRETS


def versions() -> dict[str, str | None]:
    """The versions that a result depends on, from the installed distributions; None for one that is not there."""
    versions_by_name: dict[str, str | None] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "logo": __version__,
    }
    for library in ("torch", "transformers", "huggingface_hub", "nltk", "rouge_score", "sacrebleu"):
        try:
            versions_by_name[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions_by_name[library] = None
    return versions_by_name
