"""Folders and files that many tests write: base models and rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny
from test_engine import tokenizer


def write_base(folder: Path, kind: str = "llama", template: str | None = None, **settings: Any) -> Path:
    """A tiny model with a tokenizer of one word a token, as a folder that `--base-model` takes."""
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(folder)
    tiny.model(kind, **settings).save_pretrained(folder)
    return folder


def write_rows(file: Path, some: Sequence[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in some))
    return file
