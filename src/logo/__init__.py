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
    MissingLibrary,
    ModelError,
    PluginError,
    PoolError,
    StorageError,
    UsageError,
)
from logo.version import __version__ as __version__

if TYPE_CHECKING:
    from logo.adapters.adapter import Adapter, LoraWeights
    from logo.adapters.pool import AdapterPool
    from logo.baselines import Prepared, Task, register_method
    from logo.core import Generation, Selection
    from logo.engine import LoGo
    from logo.evaluation.metrics import MetricFunction, register_metric
    from logo.prompts import Truncation
    from logo.scoring import Scored
    from logo.selection.index import ScoringIndex
    from logo.selection.settings import SelectionSettings
    from logo.selection.signals import SignalFunction, register_signal
    from logo.streams import Stream

_LAZY = {
    "Adapter": "logo.adapters.adapter",
    "AdapterPool": "logo.adapters.pool",
    "Generation": "logo.core",
    "LoGo": "logo.engine",
    "LoraWeights": "logo.adapters.adapter",
    "MetricFunction": "logo.evaluation.metrics",
    "Prepared": "logo.baselines",
    "Scored": "logo.scoring",
    "ScoringIndex": "logo.selection.index",
    "Selection": "logo.core",
    "SelectionSettings": "logo.selection.settings",
    "SignalFunction": "logo.selection.signals",
    "Stream": "logo.streams",
    "Task": "logo.baselines",
    "Truncation": "logo.prompts",
    "register_method": "logo.baselines",
    "register_metric": "logo.evaluation.metrics",
    "register_signal": "logo.selection.signals",
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
    "LoraWeights",
    "MetricFunction",
    "MissingLibrary",
    "ModelError",
    "PluginError",
    "PoolError",
    "Prepared",
    "Scored",
    "ScoringIndex",
    "Selection",
    "SelectionSettings",
    "SignalFunction",
    "StorageError",
    "Stream",
    "Task",
    "Truncation",
    "UsageError",
    "register_method",
    "register_metric",
    "register_signal",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'logo' has no attribute {name!r}")
