"""Writes adapters as plain PEFT folders, which any tool that reads LoRA adapters can use.

A folder appears complete or not at all. A mixture is one adapter:

    A = [A_1; A_2; ...]   (R, d_in)        B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]   (d_out, R)        alpha = r = R

so that `B A = Σ w_i s_i B_i A_i` exactly, for any ranks and targets. All adapters have to act on the same tokens, since
one adapter cannot act on different ones.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logo.adapters.activation import EVERYWHERE, Activation, noted, read_notes
from logo.adapters.adapter import Adapter, LoraWeights
from logo.adapters.peft import CONFIG, NOTES, SAFETENSORS
from logo.errors import AdapterError, UsageError, listed
from logo.files import new_folder

if TYPE_CHECKING:
    from torch import Tensor


def save_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object], note: str | None = None
) -> None:
    """Writes one PEFT folder in place, which may exist, with a `note` of `activation_note`; for use inside
    `new_folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SAFETENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if note is not None:
        (folder / NOTES).write_text(note, encoding="utf-8")


def plain_tensors(weights: Mapping[str, LoraWeights]) -> dict[str, Tensor]:
    """Factors under PEFT's keys; scales are left to the configuration."""
    down = {f"base_model.model.{path}.lora_A.weight": own.A for path, own in weights.items()}
    up = {f"base_model.model.{path}.lora_B.weight": own.B for path, own in weights.items()}
    return down | up


def write_mixture(
    parts: Sequence[tuple[Adapter, float]], folder: Path, linear: Collection[str], base_model: str | None = None
) -> Path:
    """Writes the weighted sum of adapters as one adapter, in float32, and returns its folder.

    Args:
        parts: adapters fitted to the base model, with their weights; those of weight 0 are left out.
        linear: paths of the base model's linear modules.
        base_model: its name or folder, for the configuration.

    Raises:
        UsageError: there is nothing to write, adapters act on different tokens, or the folder holds something already.
        StorageError: it cannot be written.
    """
    import torch

    parts = [(adapter, weight) for adapter, weight in parts if weight]
    if not parts:
        raise UsageError("the mixture has no adapter, so there is nothing to write")
    activations = {adapter.activation for adapter, _ in parts}
    if len(activations) > 1:
        places = listed([f"{adapter.name!r} {_where(adapter.activation)}" for adapter, _ in parts], 5)
        raise UsageError(
            f"the mixture's adapters act on different tokens ({places}): write those that act on the same tokens alone"
        )
    [activation] = activations
    stacked: dict[str, LoraWeights] = {}
    for adapter, weight in parts:
        for path, own in linear_weights(adapter).items():
            a = own.A.float()
            b = weight * own.scaled_b()
            if path in stacked:
                a = torch.cat([stacked[path].A, a])
                b = torch.cat([stacked[path].B, b], dim=1)
            stacked[path] = LoraWeights(a, b, 1.0)
    ranks = {path: len(weights.A) for path, weights in stacked.items()}
    config = _mixture_config(ranks, linear, base_model)
    if activation.tokens:
        config["alora_invocation_tokens"] = list(activation.tokens)
    note = activation_note(folder, activation)
    with new_folder(folder) as part:
        save_adapter(part, plain_tensors(stacked), config, note)
    return folder


def _where(activation: Activation) -> str:
    """Where an adapter acts, in words."""
    return f"from the tokens {list(activation.tokens)} on" if activation.tokens else str(activation)


def _mixture_config(ranks: Mapping[str, int], linear: Collection[str], base_model: str | None) -> dict[str, object]:
    """PEFT's configuration of a mixture with these ranks, by paths of modules."""
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    patterns = {re.escape(path): own_rank for path, own_rank in ranks.items() if own_rank != rank}
    names = {path.rsplit(".", 1)[-1] for path in ranks}
    called_so = {path for path in linear if path.rsplit(".", 1)[-1] in names}
    # Full paths, if other linear modules are called so, or others may be, as a layer is where names are numbers.
    short = called_so == set(ranks) and not any(name.isdigit() for name in names)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "target_modules": sorted(names if short else ranks),
    }


def activation_note(folder: Path, activation: Activation) -> str | None:
    """The text of an adapter's own `pool.json`, in which what else is said there already, such as `k`, stays. None: it
    needs none. Errors as `read_notes`."""
    notes = {name: value for name, value in read_notes(folder).items() if name != "activation"}
    if needs_activation_note(folder, activation):
        notes["activation"] = str(activation)
    return json.dumps(notes, indent=2) + "\n" if notes else None


def needs_activation_note(folder: Path, activation: Activation) -> bool:
    """Whether the configuration of an adapter in this folder cannot say on which tokens it acts: PEFT's has no
    `last:N`, and a `pool.json` above the folder would apply to it. Errors as `read_notes`."""
    if activation.tokens:
        return False
    above = folder.absolute().parent
    return activation.last is not None or noted(above, EVERYWHERE) != EVERYWHERE


def linear_weights(adapter: Adapter) -> dict[str, LoraWeights]:
    """The factors of an adapter. Raises AdapterError unless it is `s B A` on linear modules, which alone is written."""
    for path, module in adapter.modules.items():
        if module.embedding:
            raise AdapterError(adapter.name, f"it adapts an embedding ({path}), which cannot be rewritten yet")
    return adapter.read()
