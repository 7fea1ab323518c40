"""Adapters that were initialised with a part of the base weights (PiSSA, OLoRA, CorDA, LoRA-GA), read as plain LoRA.

They train `W - s B_0 A_0 + s B A`, so on the untouched base their update is `s [B, -B_0] [A; A_0]`, a plain LoRA of
twice the rank. If the initial `A_0, B_0` are in a folder below the adapter's own, as PEFT's examples save them, the
adapter is read in this form; `logo pool convert --initial` writes it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.config import LoraConfig, Refusal, changed_base, read_raw
from logo.adapters.files import CONFIG
from logo.adapters.layout import core_path
from logo.adapters.weights import WeightFile

if TYPE_CHECKING:
    import torch

    from logo.adapters.format import Adapter

# Names of folders below an adapter's own that hold its initial state.
FOLDERS = ("pissa_init", "olora_init", "corda_init", "lora_ga_init", "initial")


def initial_folder(folder: Path) -> Path | None:
    """The folder with the initial state of an adapter; None if there is none."""
    return next((folder / name for name in FOLDERS if (folder / name / CONFIG).is_file()), None)


def began(folder: str) -> bool:
    """Whether a folder only holds the initial state of the adapter above it."""
    above, name = os.path.split(folder)
    if name not in FOLDERS:
        return False
    try:
        return changed_base(read_raw(Path(above))) is not None
    except Refusal:
        return False


def with_initial(trained: Adapter, initial: Adapter) -> Adapter:
    """The trained adapter as a plain one of twice the rank, read from both.

    Raises:
        Refusal: the initial state is that of another adapter, since its modules, shapes or scales differ.
    """
    if trained.alone or initial.alone:
        raise Refusal("it is a DoRA adapter whose initialisation changed the base weights, which is not supported yet")
    first = {core_path(path): (path, module) for path, module in initial.modules.items()}
    if first.keys() != {core_path(path) for path in trained.modules}:
        raise Refusal(f"its initial adapter {initial.folder} adapts other modules")
    modules, keys = {}, {}
    for path, module in trained.modules.items():
        _, start = first[core_path(path)]
        sizes = [(m.rank, m.in_features, m.out_features) for m in (module, start)]
        if sizes[0] != sizes[1] or not math.isclose(start.scaling, module.scaling, rel_tol=1e-9):
            raise Refusal(f"its initial adapter {initial.folder} has another shape or scale at {path}")
        modules[path] = replace(module, rank=2 * module.rank)
        keys[module.key_a], keys[module.key_b] = start.key_a, start.key_b
    both = WithInitial(trained.file, initial.file, keys, frozenset(module.key_b for module in modules.values()))
    return replace(trained, modules=modules, file=both, config=_doubled(trained.config))


class WithInitial:
    """The weights of a trained adapter and its initial state side by side, `[A; A_0]` and `[B, -B_0]`.

    Args:
        trained, initial: the two files.
        keys: key in the first -> the same factor's key in the second.
        columns: the keys of B factors, which are joined along columns; others are joined along rows.
    """

    def __init__(
        self, trained: WeightFile, initial: WeightFile, keys: Mapping[str, str], columns: frozenset[str]
    ) -> None:
        self.path = trained.path
        self._trained, self._initial, self._keys, self._columns = trained, initial, dict(keys), columns

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._trained.shapes()
        for key in self._keys:
            a, b = shapes[key]
            shapes[key] = (a, 2 * b) if key in self._columns else (2 * a, b)
        return shapes

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        import torch

        made = self._trained.read(keys)
        start = self._initial.read([self._keys[key] for key in made if key in self._keys])
        for key in self._keys.keys() & made.keys():  # others are copies of base weights
            tensor, other = made[key], start[self._keys[key]]
            # Different dtypes are promoted to the wider one.
            made[key] = torch.cat([tensor, -other], dim=1) if key in self._columns else torch.cat([tensor, other])
        return made

    def sha256(self) -> str:
        """The digest of the digests of both files."""
        return hashlib.sha256(f"{self._trained.sha256()} {self._initial.sha256()}".encode()).hexdigest()


def doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for twice the rank and the same scale: alpha grows by 2 with `alpha / r`, by √2 with `alpha / √r`."""
    grown = math.sqrt(2) if config.get("use_rslora") else 2
    return {
        "init_lora_weights": True,
        "r": 2 * config.get("r", 8),
        "lora_alpha": grown * config.get("lora_alpha", 8),
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: grown * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }


def _doubled(config: LoraConfig) -> LoraConfig:
    grown = math.sqrt(2) if config.rslora else 2.0
    return replace(
        config,
        r=2 * config.r,
        alpha=grown * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: grown * alpha for key, alpha in config.alpha_pattern.items()},
    )
