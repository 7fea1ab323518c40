"""`pool.json`: what is known about a pool beside its adapters: recipe, activation, data, losses, what was done to it.

Everything in it is optional and nothing of it decides how an adapter is read, so a file that makes no sense is a
warning and counts as none.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTES = "pool.json"
CHANGES = "changes"


def read_notes(root: Path) -> dict[str, Any]:
    """The notes of a pool; empty where there are none."""
    file = root / NOTES
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{file} is left out, since it cannot be read: {error}", UserWarning, stacklevel=2)
        return {}
    if not isinstance(notes, dict):
        warnings.warn(f"{file} is left out: it must hold an object", UserWarning, stacklevel=2)
        return {}
    return notes


def changed(notes: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The notes of a pool that was made of another one: all of the other's, and what was done, last."""
    before = notes.get(CHANGES)
    return {**notes, CHANGES: [*(before if isinstance(before, list) else []), dict(change)]}


def write_notes(root: Path, notes: Mapping[str, Any]) -> None:
    """Writes `pool.json`, in place; for use within `new_folder`."""
    (root / NOTES).write_text(json.dumps(notes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
