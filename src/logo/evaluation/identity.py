"""What the results of a run depend on, and nothing else: by it a run knows its own journal, result and shards.

Where files lie, which device answers and how many prompts it takes at once are no part of it: devices and batches
agree to rounding. What is recorded of the base model is a digest of a sample of its weights, not where it was found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from logo import __version__
from logo.evaluation.datasets import Row
from logo.evaluation.journal import fingerprint

if TYPE_CHECKING:
    from logo.engine import LoGo

# Settings that change how fast a prompt is read, not what is read.
_NO_MATTER = frozenset({"cache", "prefix_cache_gb"})
_SAMPLE = 16  # weights of each parameter


def engine_identity(logo: LoGo, base_model: str, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Of an engine, as JSON: base model, settings, and how answers are generated. The pool is recorded beside it.

    Args:
        base_model: as the user names it; its last part counts.
        generation: options of `LoGo.generate`; a `generation_config` counts by what differs from transformers' own.
    """
    settings = {name: value for name, value in asdict(logo.settings).items() if name not in _NO_MATTER}
    options = dict(generation)
    config = options.pop("generation_config", None)
    if config is not None:
        options["generation_config"] = config.to_diff_dict()
    identity = {
        "logo": __version__,
        "base_model": PurePath(base_model).name,
        "weights": _weights_digest(logo),
        "dtype": str(logo.model.dtype).removeprefix("torch."),
        "merge": asdict(logo.merge),
        "settings": {**settings, "points": [point.name for point in logo.router.points]},
        "truncation": asdict(logo.prompts.truncation),
        "generation": options,
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def pool_digests(logo: LoGo) -> dict[str, str]:
    """SHA-256 by name of the adapters in use, in pool order."""
    digests = logo.pool.sha256()
    return {name: digests[name] for name in logo.names}


def rows_digest(rows: Sequence[Row]) -> str:
    """The SHA-256 of everything in these rows, in hex."""
    return fingerprint({"rows": [row.as_dict() for row in rows]})


def order_dependence(logo: LoGo, generation: Mapping[str, Any]) -> str | None:
    """Why a row's result depends on the rows before it, in a few words; None if it does not."""
    if logo.settings.probe_context == "carry":
        return "--probe-context carry probes with the adapters of the row before"
    if logo.settings.baseline == "running":
        return "--baseline running compares with the rows before"
    config = generation.get("generation_config")
    if config is not None and config.do_sample:
        return "the model's generation config asks for sampling"
    return None


def _weights_digest(logo: LoGo) -> str:
    """Of the first few weights of every parameter: enough to tell two models apart, at no cost."""
    import torch

    digest = hashlib.sha256()
    for parameter in logo.model.parameters():
        if parameter.device.type != "meta":  # kept elsewhere by accelerate
            sample = parameter.detach().flatten()[:_SAMPLE].to("cpu", torch.float32)
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
