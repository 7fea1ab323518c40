"""The cost of selecting beside a plain prefill of the same prompts by the base model.

Prompts are taken one at a time; `logo.bench.rounds` times the arms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from logo.bench.rounds import side_by_side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from logo.engine import LoGo

PREFILL = "prefill"


@dataclass(frozen=True)
class Arm:
    """One arm over all prompts.

    Attributes:
        seconds: median over rounds of one pass over all prompts.
        ratio: `seconds` divided by that of the plain prefill.
        peak_bytes: most additional memory; None if the system does not report it.
        points: points that are read; 0 for the prefill.
        index_bytes: size of the scoring index.
    """

    seconds: float
    ratio: float
    peak_bytes: int | None
    points: int
    index_bytes: int


@dataclass(frozen=True)
class ProbeBench:
    """The measurement; `tokens` and `prompts` are those of one round."""

    arms: Mapping[str, Arm]
    rounds: int
    prompts: int
    tokens: int
    threads: int
    device: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def probe_bench(
    engines: Mapping[str, LoGo], prompts: Sequence[str], rounds: int = 5, on_round: Callable[[], None] | None = None
) -> ProbeBench:
    """Times `LoGo.select` of each engine against a plain prefill of the base model.

    Args:
        engines: by signal, on one model.
        prompts: each is taken alone.
        rounds: measured rounds, after a warm-up round.
        on_round: called after each round.
    """
    first = next(iter(engines.values()))
    rows = first.prompts.encode(prompts)
    runs: dict[str, Callable[[], None]] = {PREFILL: lambda: prefill(first.model, rows)}
    runs |= {name: _selecting(logo, prompts) for name, logo in engines.items()}
    timed = side_by_side(runs, rounds, device=first.model.device, on_round=on_round)
    arms = {
        name: Arm(
            arm.seconds,
            arm.seconds / timed[PREFILL].seconds,
            arm.peak_bytes,
            len(engines[name].scorer.points) if name in engines else 0,
            engines[name].scorer.index_bytes if name in engines else 0,
        )
        for name, arm in timed.items()
    }
    device = str(first.model.device)
    return ProbeBench(arms, rounds, len(rows), sum(map(len, rows)), torch.get_num_threads(), device)


def _selecting(logo: LoGo, prompts: Sequence[str]) -> Callable[[], None]:
    def run() -> None:
        for prompt in prompts:
            logo.select(prompt)

    return run


@torch.no_grad()
def prefill(model: PreTrainedModel, rows: Sequence[Sequence[int]], **options: Any) -> None:
    """Runs each prompt as `generate` begins: all tokens at once, with a cache, and logits of the last token only.

    Args:
        options: further arguments of the model's forward pass.
    """
    device = model.get_input_embeddings().weight.device
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for row in rows:
        model(input_ids=torch.tensor([row], device=device), use_cache=True, **last, **options)
