"""What LoGo costs beside the base model alone, and how much faster it is than the same method written with PEFT.

    python benchmarks/cost.py --json cost.json

The model and the adapters are random; cost depends on their sizes only. Ratios of costs and of speeds are ours over
theirs. Each part is shown when it is measured; `--quick` measures less, and PEFT not. With another tree's `src` on
PYTHONPATH, the same script measures that tree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers

from logo import AdapterPool, LoGo, SelectionSettings
from parts import LONG, Bench, Lengths, MeasuredPart, long_name
from peft_arm import PeftArm
from rounds import Timed, timed
from synthetic import TARGETS, Sizes, base_model, write_adapters

# One layer of Llama-3.1-8B, with hardly any vocabulary.
LLAMA_8B_LAYER = Sizes(hidden=4096, layers=1, heads=32, vocabulary=512)


class Ratio(NamedTuple):
    """What is divided by what: two arms of a part, and what the quotient means, in words."""

    part: str
    above: str
    below: str
    meaning: str


def of_long(tokens: int) -> dict[str, Ratio]:
    """The ratios of prompts of so many tokens."""
    part = long_name(tokens)
    return {
        f"select_{tokens}_vs_prefill": Ratio(part, "select", "prefill", f"the same, {tokens:,} tokens"),
        f"e2e1_{tokens}_vs_base": Ratio(part, "answered", "base", "time to select and answer them, by the base's"),
    }


RATIOS = {
    "open_vs_peft": Ratio("open pool", "cold", "PEFT", "time to open the pool, by PEFT's"),
    "select_vs_prefill": Ratio("select", "norm", "prefill", "time to select by `norm`, by that to read 256 tokens"),
    "select_calibrated_vs_prefill": Ratio(
        "select", "calibrated", "prefill", "time to select by `calibrated`, likewise"
    ),
    **{name: ratio for tokens in LONG for name, ratio in of_long(tokens).items()},
    "prefill_vs_base": Ratio("prefill", "mixture", "base", "time to read 256 tokens with a mixture, by the base's"),
    "decode1_vs_base": Ratio("decode, batch 1", "base", "mixture", "speed of a decoding step"),
    "decode16_vs_base": Ratio("decode, batch 16", "base", "related", "the same, 16 rows of four tasks"),
    "decode16_random_vs_base": Ratio("decode, batch 16", "base", "random", "the same, 16 unrelated rows"),
    "decode16_random_8b_layer_vs_base": Ratio(
        "decode, one layer of 8B", "base", "random", "the same, one layer of Llama-3.1-8B"
    ),
    "e2e1_vs_base": Ratio(
        "end to end, batch 1", "calibrated", "base", "time to select and answer 32 tokens, by the base's to answer"
    ),
    "e2e16_vs_base": Ratio("end to end, batch 16", "calibrated", "base", "the same, 16 unrelated rows"),
    "e2e16_related_vs_base": Ratio(
        "end to end, batch 16", "calibrated, related", "base", "the same, 16 rows of four tasks"
    ),
    "read_once_vs_prefill": Ratio(
        "read once", "once", "prefill", "time to the first token, adapters on the last four tokens"
    ),
    "read_once_long_vs_prefill": Ratio("read once", "long, once", "long prefill", "the same, 550 tokens"),
    "read_once_cached_vs_prefill": Ratio("read once", "cached, once", "long prefill", "the same, 500 of them cached"),
    "read_once_cached_vs_cached_prefill": Ratio(
        "read once", "cached, once", "cached prefill", "the same, the base's are cached, too"
    ),
    "e2e1_read_once_vs_base": Ratio("read once, batch 1", "once", "base", "time to select and answer, read once"),
    "e2e16_read_once_vs_base": Ratio("read once, batch 16", "once", "base", "the same, 16 unrelated rows"),
    "e2e16_related_read_once_vs_base": Ratio(
        "read once, batch 16", "once, related", "base", "the same, 16 rows of four tasks"
    ),
    "e2e1_vs_peft": Ratio("end to end, batch 1", "PEFT", "norm", "speed of the method by PEFT's public API"),
    "e2e1_vs_peft_all_active": Ratio(
        "end to end, batch 1", "PEFT, all active", "norm", "PEFT with all selected adapters active at once"
    ),
    "e2e16_vs_peft": Ratio("end to end, batch 16", "PEFT", "norm", "16 prompts, by PEFT one after the other"),
    "e2e16_vs_peft_one_batch": Ratio(
        "end to end, batch 16", "PEFT, one batch", "norm", "PEFT with every mixture loaded as an adapter"
    ),
}


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        sizes: sizes of the model and its adapters; `layer`: of the one large layer.
        adapters, k: adapters in the pool, and per prompt.
        rounds: measured rounds, after a warm-up round.
        device, dtype: of the base model.
        peft: whether to measure PEFT.
        quick: whether to leave out prompts of 4,000 tokens and those that are read once.
    """

    sizes: Sizes = field(default_factory=Sizes)
    layer: Sizes = LLAMA_8B_LAYER
    adapters: int = 130
    k: int = 20
    lengths: Lengths = field(default_factory=Lengths)
    rounds: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    peft: bool = True
    quick: bool = False
    seed: int = 0


def measure(plan: Plan) -> Iterator[MeasuredPart]:
    """Runs every part."""
    batch = plan.lengths.batch
    with _opened(plan, replace(plan.layer, rank=plan.sizes.rank)) as small:
        yield small.decoding(batch, related=False, name="decode, one layer of 8B")
    with _opened(plan, plan.sizes) as bench:
        opened = bench.opening()
        yield bench.selecting()
        for tokens in LONG[:1] if plan.quick else LONG:
            yield bench.long(tokens)
        yield bench.prefilling()
        for rows in (1, batch):
            yield bench.decoding(rows)
        if not plan.quick:
            once = bench.reading_once()
            yield bench.once_prefill(once)
            for rows in (1, batch):
                yield bench.once_end_to_end(once, rows)
            del once
        peft: list[PeftArm] = []
        if plan.peft:
            # Last, so that PEFT's hundred thousand modules for hundreds of adapters slow down no other arm; and once,
            # since it takes a minute.
            model, tokenizer = base_model(plan.sizes, plan.seed, plan.device, plan.dtype)
            spent = timed(lambda: peft.append(PeftArm(model, tokenizer, bench.folder, bench.k)))
            opened = replace(opened, arms={**opened.arms, "PEFT": Timed(spent, (spent,), None)})
        yield opened
        for rows in (1, batch):
            yield bench.end_to_end(rows, peft[0] if peft else None)


def ratios(parts: Sequence[MeasuredPart]) -> dict[str, float]:
    """The ratios of the arms that were measured."""
    arms_of = {part.name: part.arms for part in parts}
    quotients = {}
    for name, ratio in RATIOS.items():
        arms: Mapping[str, Timed] = arms_of.get(ratio.part, {})
        if ratio.above in arms and ratio.below in arms:
            quotients[name] = arms[ratio.above].seconds / arms[ratio.below].seconds
    return quotients


def report(plan: Plan, parts: Sequence[MeasuredPart]) -> dict[str, Any]:
    """Everything, as JSON."""
    return {
        "about": {
            **asdict(plan),
            "hardware": _hardware(plan.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "ratios": ratios(parts),
        "parts": {
            part.name: {"arms": {name: asdict(arm) for name, arm in part.arms.items()}, **part.counts} for part in parts
        },
    }


@contextmanager
def _opened(plan: Plan, sizes: Sizes) -> Iterator[Bench]:
    """Within the block: an engine on a random model and adapters in a temporary folder."""
    with tempfile.TemporaryDirectory() as scratch, patch.dict(os.environ, {"LOGO_CACHE": f"{scratch}/cache"}):
        folder = Path(scratch) / "pool"
        write_adapters(folder, sizes, plan.adapters, plan.seed)
        model, tokenizer = base_model(sizes, plan.seed, plan.device, plan.dtype)
        k = min(plan.k, plan.adapters)
        settings = SelectionSettings(signal="norm", k=k)
        logo = LoGo(model, tokenizer, AdapterPool.open(folder), settings=settings)
        yield Bench(logo, folder, sizes, k, plan.lengths, plan.rounds, itertools.count(plan.seed + 1))


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _show(part: MeasuredPart) -> None:
    for i, (name, arm) in enumerate(part.arms.items()):
        peak = "-" if arm.peak_bytes is None else f"{arm.peak_bytes / 1e6:.0f}"
        print(f"{'' if i else part.name:<25}{name:<22}{1000 * arm.seconds:>10,.1f}  {peak:>7}", flush=True)


def _show_ratios(plan: Plan, parts: Sequence[MeasuredPart]) -> None:
    print("\nratio")
    for name, value in ratios(parts).items():
        digits = 4 if value < 0.1 else 2
        print(f"{name:<36}{value:<8.{digits}f}{RATIOS[name].meaning}")
    where = f"{_hardware(plan.device)}, {torch.get_num_threads()} threads · {plan.dtype}"
    print(f"medians of {plan.rounds} rounds after a warm-up · {where} · {plan.adapters} adapters, k {plan.k}")


def main(argv: Sequence[str] | None = None, plan: Plan | None = None) -> None:
    """Measures and prints.

    Args:
        plan: the defaults of the options, and what is no option.
    """
    plan = plan or Plan()
    sizes = plan.sizes
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, 60 adapters, no long prompts, no PEFT")
    parser.add_argument("--rounds", type=int, default=plan.rounds, help="measured rounds, after a warm-up round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to this file")
    parser.add_argument("--adapters", type=int, default=plan.adapters, help="adapters in the pool")
    parser.add_argument("-k", type=int, default=plan.k, help="adapters per prompt")
    parser.add_argument("--rank", type=int, default=sizes.rank)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=sizes.targets, help="adapted projections")
    parser.add_argument("--hidden", type=int, default=sizes.hidden, help="width of the model")
    parser.add_argument("--layers", type=int, default=sizes.layers)
    parser.add_argument("--heads", type=int, default=sizes.heads)
    parser.add_argument("--vocabulary", type=int, default=sizes.vocabulary)
    parser.add_argument("--device", default=plan.device)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=plan.dtype)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    parser.add_argument("--seed", type=int, default=plan.seed, help="random seed of weights and prompts")
    options = parser.parse_args(argv)
    if options.quick:
        parser.set_defaults(rounds=1, adapters=60, no_peft=True)
        options = parser.parse_args(argv)
    plan = replace(
        plan,
        sizes=Sizes(
            options.hidden, options.layers, options.heads, options.vocabulary, options.rank, tuple(options.targets)
        ),
        adapters=options.adapters,
        k=options.k,
        rounds=options.rounds,
        device=options.device,
        dtype=options.dtype,
        peft=not options.no_peft,
        quick=options.quick,
        seed=options.seed,
    )
    print(f"{'part':<25}{'arm':<22}{'ms':>10}  peak MB", flush=True)
    parts = []
    for part in measure(plan):
        _show(part)
        parts.append(part)
    _show_ratios(plan, parts)
    if options.json is not None:
        options.json.write_text(json.dumps(report(plan, parts), indent=2) + "\n", encoding="utf-8")
        print(f"written: {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
