"""The demo's pool without its example prompts, and prompts of its tasks as traffic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from logo.adapters.files import EXAMPLES
from logo.demo import assets_dir, heldout

# A day of traffic: eight prompts of each task, and some that no adapter was made for; later prompts of each task.
TRAFFIC = {task: [row["context"] for row in rows[:8]] for task, rows in heldout().items()}
STRANGE = [f"Book a table for {n} at seven tonight." for n in ("two", "four", "six")]
LATER = {task: [row["context"] for row in rows[8:20]] for task, rows in heldout().items()}
PROMPTS = [prompt for prompts in TRAFFIC.values() for prompt in prompts] + STRANGE


def bare_pool(folder: Path) -> Path:
    """Copies the demo's adapters without their examples."""
    shutil.copytree(assets_dir() / "adapters", folder)
    for file in folder.rglob(EXAMPLES):
        file.unlink()
    return folder


def written(file: Path, lines: list[Any]) -> Path:
    """Writes one JSON value per line."""
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return file
