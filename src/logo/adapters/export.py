"""Writes a mixture as one plain PEFT adapter, which any tool that reads LoRA adapters can use.

    A = [A_1; A_2; ...]   (R, d_in)        B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]   (d_out, R)        alpha = r = R

so that `B A = Σ w_i s_i B_i A_i` exactly, for any ranks and targets. All adapters have to act on the same tokens, since
one adapter cannot act on different ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from logo.adapters.activation import EVERYWHERE
from logo.adapters.format import Adapter, LoraWeights
from logo.adapters.notes import ACTIVATION, noted, write_notes
from logo.adapters.writing import plain_tensors, save_adapter, unscaled
from logo.errors import UsageError
from logo.files import new_folder


def write_mixture(
    parts: Sequence[tuple[Adapter, float]], folder: Path, linear: Collection[str], base_model: str | None = None
) -> Path:
    """Writes the weighted sum of adapters as one adapter, in float32.

    Args:
        parts: adapters fitted to the base model, with their weights; those of weight 0 are left out.
        folder: must not exist yet, or be empty.
        linear: paths of the base model's linear modules.
        base_model: its name or folder, for the configuration.

    Returns:
        The folder.

    Raises:
        UsageError: there is nothing to write, adapters act on different tokens, or the folder holds something already.
        StorageError: it cannot be written.
    """
    parts = [(adapter, weight) for adapter, weight in parts if weight]
    if not parts:
        raise UsageError("the mixture has no adapter, so there is nothing to write")
    places = {adapter.activation for adapter, _ in parts}
    if len(places) > 1:
        raise UsageError(
            f"the mixture's adapters act on different tokens ({', '.join(sorted(map(str, places)))}), which one "
            "adapter cannot: leave some out, or force one activation on all (--activation)"
        )
    [activation] = places
    stacked = _stacked(parts)
    ranks = {path: len(one.A) for path, one in stacked.items()}
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        **unscaled(ranks),
        "target_modules": _targets(ranks, linear),
    }
    if activation.tokens:
        config["alora_invocation_tokens"] = list(activation.tokens)
    with new_folder(folder, "the mixture") as part:
        save_adapter(part, plain_tensors(stacked), config)
        # PEFT's configuration has no `last:N`, and a `pool.json` above the folder would apply to it.
        if not activation.tokens and (activation.last is not None or _said_around(folder)):
            write_notes(part, {ACTIVATION: str(activation)})
    return folder


def _said_around(folder: Path) -> bool:
    """Whether a `pool.json` above this folder would make a plain adapter in it not act everywhere."""
    place = folder.absolute()
    return noted(place, Path(place.anchor), EVERYWHERE) != EVERYWHERE


def _stacked(parts: Sequence[tuple[Adapter, float]]) -> dict[str, LoraWeights]:
    """The factors side by side, by module path."""
    import torch

    for adapter, _ in parts:
        adapter.check_linear()
    read = [(adapter.read(), weight) for adapter, weight in parts]
    stacked = {}
    for path in dict.fromkeys(path for weights, _ in read for path in weights):
        held = [(weights[path], weight) for weights, weight in read if path in weights]
        b = torch.cat([w * one.scaled_b() for one, w in held], dim=1)
        stacked[path] = LoraWeights(torch.cat([one.A.float() for one, _ in held]), b, 1.0)
    return stacked


def _targets(paths: Collection[str], linear: Collection[str]) -> list[str]:
    """Module names if every module of these names is adapted, else full paths."""
    names = {path.rsplit(".", 1)[-1] for path in paths}
    named = {path for path in linear if path.rsplit(".", 1)[-1] in names}
    return sorted(names if named == set(paths) else paths)
