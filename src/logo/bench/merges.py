"""Every merge beside PEFT's own, on a random model: the largest difference of the logits.

PEFT saves the adapters. They are opened like any others, combined, and applied to the model like mixtures. They are
compared with PEFT's `add_weighted_adapter` or `create_arrow_model`. The random merges need the same random numbers, so
PEFT draws from a generator of ours, module by module. Each merge is also compared with the exact sum `Σ w s B A`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from logo.adapters.format import LoraWeights
from logo.adapters.layout import BaseLayout, linear_modules
from logo.adapters.pool import AdapterPool
from logo.bench.synthetic import Sizes, base_model
from logo.extras import need
from logo.mixing import AdapterStore, GatedLoRA, Merge
from logo.mixing.merges import MERGES
from logo.mixing.routing import Router, Routing
from logo.mixing.stacks import stacked
from logo.mixing.store import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = Sizes(hidden=128, layers=3, heads=4, vocabulary=512, rank=4, targets=("q_proj", "v_proj", "down_proj"))
WEIGHTS = (0.5, 0.3, 0.4, -0.2)
_PEFT_NAMES = {"mixture": "cat", "fusion": "Σ w of state dicts"}
_ROWS, _TOKENS = 4, 16
# Ratio of each singular value of an adapter to the one before: as in trained adapters, and small enough for PEFT's
# fifteen steps of power iteration to find the first direction.
_DECAY = 0.5
_MEMORY = 10**9  # bytes


@dataclass(frozen=True)
class Compared:
    """One merge.

    Attributes:
        kind: our name.
        peft: PEFT's name.
        difference: largest difference of a logit from PEFT's.
        logit: the largest logit, for scale.
        from_exact: `‖ΔW - Σ w s B A‖ / ‖Σ w s B A‖` over all modules; None for `arrow`, which has no ΔW.
    """

    kind: str
    peft: str
    difference: float
    logit: float
    from_exact: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_merges(sizes: Sizes = SIZES, weights: Sequence[float] = WEIGHTS, seed: int = 0) -> list[Compared]:
    """Compares every merge on one random Llama with one random adapter for each weight.

    Raises:
        MissingLibrary: PEFT is not installed.
    """
    need("a comparison with PEFT", "peft")
    model, _ = base_model(sizes, seed)
    ids = torch.randint(3, sizes.vocabulary, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        oracle = _peft_model(model, sizes, len(weights), Path(folder), seed)
        pool = AdapterPool.from_directory(folder).fit(BaseLayout.of(model))
        tensors = {adapter.name: adapter.read() for adapter in pool}
        mix = dict(zip(pool.names, weights, strict=True))
        rows = [_compare_kind(Merge(kind), model, oracle, mix, tensors, ids, seed) for kind in MERGES]
        return [*rows, _compare_arrow(model, Path(folder), pool, ids)]


def _compare_kind(
    merge: Merge,
    model: PreTrainedModel,
    oracle: Any,
    mix: Mapping[str, float],
    tensors: Mapping[str, Mapping[str, LoraWeights]],
    ids: Tensor,
    seed: int,
) -> Compared:
    modules = dict(linear_modules(model))
    source = torch.Generator().manual_seed(seed)
    ours, distance, length = {}, 0.0, 0.0
    for path in (path for path in modules if path in tensors[next(iter(mix))]):  # in the order in which PEFT draws
        parts = [tensors[name][path] for name in mix]
        ours[path] = merge(parts, list(mix.values()), source)
        exact = torch.stack([w * part.scaled_b() @ part.A for w, part in zip(mix.values(), parts, strict=True)]).sum(0)
        distance += float((ours[path].B @ ours[path].A - exact).square().sum())
        length += float(exact.square().sum())
    store = AdapterStore(modules, torch.float32, _MEMORY)
    with (
        store.held([Source("merged", "merged", lambda: ours)]) as hold,
        GatedLoRA(modules).active(stacked(store, hold), torch.ones(1, 1)),
    ):
        logits = model(input_ids=ids).logits
    name = _PEFT_NAMES.get(merge.kind, merge.kind)
    _merge_in_peft(oracle, merge, mix, torch.Generator().manual_seed(seed))
    oracle.set_adapter("merged")
    theirs = oracle(input_ids=ids).logits
    oracle.set_adapter(next(iter(mix)))
    oracle.delete_adapter("merged")
    difference = float((logits - theirs).abs().max())
    return Compared(merge.kind, name, difference, float(theirs.abs().max()), (distance / length) ** 0.5)


def _merge_in_peft(oracle: Any, merge: Merge, mix: Mapping[str, float], source: torch.Generator) -> None:
    """Adds the merge to the PEFT model, as an adapter `merged`."""
    names, weights = list(mix), list(mix.values())
    if merge.kind == "fusion":  # as LoraHub does it: every tensor of the state dicts
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        states = [get_peft_model_state_dict(oracle, adapter_name=name) for name in names]
        state = {key: sum(w * s[key] for w, s in zip(weights, states, strict=True)) for key in states[0]}
        oracle.add_adapter("merged", copy.deepcopy(oracle.peft_config[names[0]]))
        set_peft_model_state_dict(oracle, state, adapter_name="merged")
        return
    with _drawing_from(source):
        oracle.add_weighted_adapter(
            names,
            weights,
            "merged",
            combination_type=_PEFT_NAMES.get(merge.kind, merge.kind),
            density=merge.density,
            majority_sign_method=merge.majority_sign,
        )


def _compare_arrow(
    model: PreTrainedModel,
    folder: Path,
    pool: AdapterPool,
    ids: Tensor,
) -> Compared:
    from peft import ArrowConfig, create_arrow_model

    routing = Routing()
    config = ArrowConfig(top_k=routing.top_k, router_temperature=routing.temperature, rng_seed=0)
    paths = [str(adapter.folder) for adapter in pool]
    theirs = create_arrow_model(copy.deepcopy(model), paths, config).eval()(input_ids=ids).logits
    modules = dict(linear_modules(model))
    store = AdapterStore(modules, torch.float32, _MEMORY)
    with store.held([store.source(adapter) for adapter in pool]) as hold:
        allowed = torch.ones(1, len(pool), dtype=torch.bool)
        with Router(modules).active(hold.keys, stacked(store, hold), allowed, routing):
            logits = model(input_ids=ids).logits
    return Compared("arrow", "arrow", float((logits - theirs).abs().max()), float(theirs.abs().max()), None)


def _peft_model(model: PreTrainedModel, sizes: Sizes, count: int, folder: Path, seed: int) -> Any:
    """A copy of the model with this many adapters, each saved in its own folder."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=list(sizes.targets), task_type="CAUSAL_LM"
    )
    names = [f"adapter{i}" for i in range(count)]
    made: Any = get_peft_model(copy.deepcopy(model), config, names[0])
    for name in names[1:]:
        made.add_adapter(name, config)
    generator = torch.Generator().manual_seed(seed)
    spread = _DECAY ** (torch.arange(sizes.rank) / 2)
    for key, parameter in made.named_parameters():
        parameter.requires_grad_(False)
        if ".lora_" in key:
            columns = parameter.T if ".lora_A." in key else parameter  # (d, r)
            columns.copy_(torch.linalg.qr(torch.randn(columns.shape, generator=generator))[0] * spread)
    made.save_pretrained(str(folder))
    return made.eval()


@contextmanager
def _drawing_from(source: torch.Generator) -> Iterator[None]:
    """Within the block, PEFT drops entries by our generator instead of the global one."""
    draw = torch.bernoulli
    with patch.object(torch, "bernoulli", lambda shares: draw(shares, generator=source)):
        yield
