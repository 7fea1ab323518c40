"""LoGo: many LoRA adapters on one language model, picked and mixed for every single input.

The public API and nothing else; each name is imported when it is first used, so `import logo` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from logo.errors import (
    AdapterError,
    DataError,
    HubError,
    LoGoError,
    ModelError,
    PoolError,
    StorageError,
    UsageError,
)

if TYPE_CHECKING:
    from logo.adapters.format import Adapter
    from logo.adapters.pool import AdapterPool
    from logo.decoder import Generation
    from logo.decoding import Truncation
    from logo.engine import LoGo
    from logo.scoring import Scored
    from logo.selection.selector import Selection
    from logo.selection.settings import SelectionSettings

__version__ = "0.1.0"

_LAZY = {
    "Adapter": "logo.adapters.format",
    "AdapterPool": "logo.adapters.pool",
    "Generation": "logo.decoder",
    "LoGo": "logo.engine",
    "Scored": "logo.scoring",
    "Selection": "logo.selection.selector",
    "SelectionSettings": "logo.selection.settings",
    "Truncation": "logo.decoding",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterPool",
    "DataError",
    "Generation",
    "HubError",
    "LoGo",
    "LoGoError",
    "ModelError",
    "PoolError",
    "Scored",
    "Selection",
    "SelectionSettings",
    "StorageError",
    "Truncation",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'logo' has no attribute {name!r}")
