"""A pool of thousands of adapters: opening it, its memory, and scoring beside one product with its index."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from logo.adapters.format import Adapter
from logo.adapters.pool import AdapterPool
from logo.bench.rounds import resident, side_by_side, timed
from logo.bench.synthetic import Sizes, base_model, prompts, write_adapters
from logo.engine import LoGo
from logo.selection.settings import SelectionSettings

# So small that thousands of adapters fit on a disk and the model costs almost nothing.
SMALL = Sizes(hidden=256, layers=2, heads=4, vocabulary=1024, rank=8)
_ADAPTERS_GB = 0.05


@dataclass(frozen=True)
class LargePool:
    """The measurement.

    Attributes:
        adapters: size of the pool.
        cold: seconds to open the pool without a cache, index included.
        known: seconds to open it again.
        index_bytes, budget_bytes: size of the index, and the limit for tensors of used adapters.
        held_bytes: memory of opening it again and answering prompts.
        scoring, product: seconds to score one hidden vector, and of one matrix-vector product with the index.
        same_best: whether the best 20 (or fewer) equal those of scoring one adapter after the other.
    """

    adapters: int
    cold: float
    known: float
    index_bytes: int
    budget_bytes: int
    held_bytes: int
    scoring: float
    product: float
    same_best: bool

    def as_dict(self) -> dict[str, object]:
        """The measurement as JSON, with its ratios."""
        return {
            **asdict(self),
            "cold_ms_each": 1000 * self.cold / self.adapters,
            "scoring_vs_product": self.scoring / self.product,
            "held_vs_index_and_budget": self.held_bytes / (self.index_bytes + self.budget_bytes),
        }


def large_pool(count: int, rounds: int, say: Callable[[str], None], seed: int = 0) -> LargePool:
    """Writes `count` small adapters to a temporary folder and measures them.

    Args:
        say: called with a description of each step.
    """
    model, tokenizer = base_model(SMALL, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch) / "pool", str(Path(scratch) / "cache")
        say(f"writing {count} adapters")
        write_adapters(folder, SMALL, count, seed)
        settings = SelectionSettings(signal="norm", cache=cache)

        def opened() -> LoGo:
            pool = AdapterPool.from_directory(folder, verify=False)
            logo = LoGo(model, tokenizer, pool, settings=settings, adapter_memory_gb=_ADAPTERS_GB)
            logo.calibrate()
            return logo

        say(f"opening {count} adapters")
        cold = timed(opened)
        before = resident()
        engines: list[LoGo] = []
        known = timed(lambda: engines.append(opened()))
        [logo] = engines
        say("scoring")
        for prompt in prompts(SMALL, 20, 16, seed):
            logo.generate(prompt, max_new_tokens=2)
        held = resident() - before
        scoring, product, same = _scoring(logo, rounds, seed)
        index = logo.scorer.index_bytes
        return LargePool(count, cold, known, index, int(_ADAPTERS_GB * 1e9), held, scoring, product, same)


def _scoring(logo: LoGo, rounds: int, seed: int) -> tuple[float, float, bool]:
    [index] = logo.scorer.indices
    hidden = torch.randn(1, SMALL.hidden, generator=torch.Generator().manual_seed(seed))
    found = side_by_side(
        {"scoring": lambda: index.norms(hidden), "product": lambda: torch.mv(index.stacked, hidden[0])},
        max(rounds, 20),
    )
    each = torch.tensor([float(_response(adapter, index.point.module, hidden).norm()) for adapter in index.adapters])
    most = min(20, len(each))
    best = index.norms(hidden)[0].topk(most).indices
    return found["scoring"].seconds, found["product"].seconds, bool((best == each.topk(most).indices).all())


def _response(adapter: Adapter, module: str, hidden: torch.Tensor) -> torch.Tensor:
    """`ΔW h` of one adapter, from its own file."""
    weights = adapter.read([module])[module]
    return weights.scaled_b() @ (weights.A.float() @ hidden[0])
