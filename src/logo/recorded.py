"""What may be written beside results: options without secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_SECRETS = frozenset({"token", "hf_token", "auth_token", "access_token", "api_key", "password", "secret"})


def without_secrets(value: Any) -> Any:
    """A value without the entries that carry a secret (`token`, ...), however deep they are, also in a text that is a
    JSON object, such as `--vllm-options`."""
    if isinstance(value, Mapping):
        return {name: without_secrets(one) for name, one in value.items() if not _secret(name)}
    if isinstance(value, (list, tuple)):
        return [without_secrets(one) for one in value]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            found = json.loads(value)
        except ValueError:
            return value
        kept = without_secrets(found)
        return value if kept == found else json.dumps(kept)
    return value


def _secret(name: object) -> bool:
    return str(name).strip("-").replace("-", "_").lower() in _SECRETS
