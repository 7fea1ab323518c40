"""The bundled demo world: a tiny base model, a pool of single-task adapters and held-out rows, inside the package.

Nothing here imports torch. ``make demo-assets`` rebuilds the assets from ``tools/demo_world``.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["adapters_dir", "assets_dir", "heldout", "heldout_dir", "model_dir", "showcase"]


def assets_dir() -> Path:
    """The folder of all demo assets."""
    return Path(__file__).resolve().parent / "assets"


def model_dir() -> Path:
    """The folder of the base model and its tokenizer."""
    return assets_dir() / "model"


def adapters_dir() -> Path:
    """The folder with one PEFT adapter folder per task."""
    return assets_dir() / "adapters"


def heldout_dir() -> Path:
    """The folder with one file of held-out rows per task."""
    return assets_dir() / "heldout"


def heldout() -> dict[str, list[dict[str, str]]]:
    """Held-out rows by task: each has a ``context`` (the request) and a ``completion`` (the answer)."""
    rows: dict[str, list[dict[str, str]]] = {}
    for path in sorted(heldout_dir().glob("*.jsonl")):
        rows[path.stem] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows


def showcase() -> list[dict[str, str]]:
    """One request per task in an unseen phrasing, with ``task``, ``context`` and ``completion``."""
    rows: list[dict[str, str]] = json.loads((assets_dir() / "showcase.json").read_text(encoding="utf-8"))
    return rows
