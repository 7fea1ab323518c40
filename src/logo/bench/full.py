"""The whole bench in one run: every part, the main ratios, the pictures."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from logo.adapters.pool import AdapterPool
from logo.bench.curves import Curve, curves
from logo.bench.large import LargePool, large_pool
from logo.bench.once import once_end_to_end, once_prefill, reading_once
from logo.bench.parts import Bench, MeasuredPart, endless, mixtures_of, peft_opened, real_prompts
from logo.bench.peft_arm import PeftArm
from logo.bench.synthetic import Sizes, base_model, memory_pool, write_adapters
from logo.engine import LoGo
from logo.models import load_base
from logo.selection.settings import SelectionSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# One layer of Llama-3.1-8B, with hardly any vocabulary.
LLAMA_8B_LAYER = Sizes(hidden=4096, layers=1, heads=32, vocabulary=512)
# Tokens of a prompt that is read once: the cached beginning, and the user's own part.
_KNOWN, _OWN = 500, 50
# Lengths in tokens.
_PROMPT, _DECODE_PROMPT, _NEW, _PREFIX, _AFTER_PREFIX, _BATCH = 256, 64, 32, 1000, 64, 16


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        sizes: sizes of the synthetic model and its adapters.
        adapters, k: adapters in the synthetic pool, and per prompt.
        base_model, folder: a real base model and its pool instead.
        rounds: measured rounds.
        device, dtype: of the base model: `"cpu"`, `"cuda"`, ..., and `"float32"`, `"bfloat16"` or `"float16"`.
        in_memory: do not write the synthetic adapters to files. PEFT needs files.
        peft, large, with_curves: whether to measure PEFT, the large pool (its size; 0: none) and the curves.
    """

    sizes: Sizes = field(default_factory=Sizes)
    adapters: int = 260
    k: int = 20
    base_model: str | None = None
    folder: Path | None = None
    rounds: int = 5
    device: str = "cpu"
    dtype: str = "float32"
    in_memory: bool = False
    peft: bool = True
    large: int = 10000
    with_curves: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Results:
    """The results of a run."""

    about: Mapping[str, object]
    parts: tuple[MeasuredPart, ...]
    large: LargePool | None
    shown: tuple[Curve, ...]
    held_bytes: int

    def part(self, name: str) -> MeasuredPart | None:
        """The part of this name, if it was measured."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def ratios(self) -> dict[str, float]:
        """Costs as ours over theirs, speeds as ours over theirs."""
        wanted = {
            "open_vs_peft": ("open pool", "cold", "PEFT"),
            "select_vs_prefill": ("select", "norm", "prefill"),
            "select_calibrated_vs_prefill": ("select", "calibrated", "prefill"),
            "prefix_second_vs_first": ("shared prefix", "norm, second", "norm, first"),
            "prefix_calibrated_second_vs_first": ("shared prefix", "calibrated, second", "calibrated, first"),
            "prefill_vs_base": ("prefill", "mixture", "base"),
            "decode1_vs_base": ("decode, batch 1", "base", "mixture"),
            "decode16_vs_base": (f"decode, batch {_BATCH}", "base", "related"),
            "decode16_random_vs_base": (f"decode, batch {_BATCH}", "base", "random"),
            "decode16_random_8b_layer_vs_base": ("decode, one layer of 8B", "base", "random"),
            "e2e1_vs_base": ("end to end, batch 1", "calibrated", "base"),
            "e2e16_vs_base": (f"end to end, batch {_BATCH}", "calibrated", "base"),
            "e2e16_related_vs_base": (f"end to end, batch {_BATCH}", "calibrated, related", "base"),
            "read_once_vs_prefill": ("read once", "once", "prefill"),
            "read_once_long_vs_prefill": ("read once", "long, once", "long prefill"),
            "read_once_cached_vs_prefill": ("read once", "cached, once", "long prefill"),
            "read_once_cached_vs_cached_prefill": ("read once", "cached, once", "cached prefill"),
            "e2e1_read_once_vs_base": ("read once, batch 1", "once", "base"),
            "e2e16_read_once_vs_base": (f"read once, batch {_BATCH}", "once", "base"),
            "e2e16_related_read_once_vs_base": (f"read once, batch {_BATCH}", "once, related", "base"),
            "e2e1_vs_peft": ("end to end, batch 1", "PEFT", "norm"),
            "e2e1_vs_peft_all_active": ("end to end, batch 1", "PEFT, all active", "norm"),
            "e2e16_vs_peft": (f"end to end, batch {_BATCH}", "PEFT", "norm"),
            "e2e16_vs_peft_one_batch": (f"end to end, batch {_BATCH}", "PEFT, one batch", "norm"),
        }
        found = {}
        for name, (part, over, under) in wanted.items():
            measured = self.part(part)
            if measured is not None and over in measured.arms and under in measured.arms:
                found[name] = measured.ratio(over, under)
        return found

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        parts = {
            part.name: {"arms": {name: asdict(arm) for name, arm in part.arms.items()}, **part.counts}
            for part in self.parts
        }
        return {
            "about": dict(self.about),
            "ratios": self.ratios,
            "parts": parts,
            "held_bytes": self.held_bytes,
            "large_pool": None if self.large is None else self.large.as_dict(),
            "curves": [asdict(curve) for curve in self.shown],
        }


def run_bench(plan: Plan, say: Callable[[str], None] = lambda part: None) -> Results:
    """Runs everything.

    Args:
        say: called with the name of every part when it begins.
    """
    with ExitStack() as stack:
        layer = [_one_layer(plan, say)] if plan.base_model is None else []
        folder = plan.folder
        if folder is None and not plan.in_memory:
            folder = stack.enter_context(_written(plan, plan.sizes, say))
        bench = _bench(plan, plan.sizes, folder, say)
        opened, held = bench.opening()
        names = bench.logo.names
        parts = [
            bench.selecting(_PROMPT),
            bench.prefix(_PREFIX, _AFTER_PREFIX),
            bench.prefilling(_PROMPT),
            bench.decoding(1, _DECODE_PROMPT, {"mixture": mixtures_of(names, 1, bench.k)["random"]}),
            bench.decoding(_BATCH, _DECODE_PROMPT, mixtures_of(names, _BATCH, bench.k)),
            bench.first_tokens(_BATCH, _DECODE_PROMPT),
            *layer,
        ]
        once = reading_once(bench)
        known = min(_KNOWN, (once.prompts.context or _KNOWN + 2 * _OWN) - 2 * _OWN)
        parts.append(once_prefill(bench, once, _PROMPT, known, _OWN))
        parts += [once_end_to_end(bench, once, batch, _DECODE_PROMPT, _NEW) for batch in (1, _BATCH)]
        del once
        shown = tuple(curves(bench)) if plan.with_curves else ()
        large = large_pool(plan.large, plan.rounds, say, plan.seed) if plan.large else None
        peft = None
        if plan.peft and folder is not None:
            # Last, so that PEFT's hundred thousand modules for hundreds of adapters slow down no other arm.
            say("open pool with PEFT")
            model, tokenizer = _base(plan, plan.sizes)
            peft, spent = peft_opened(lambda: PeftArm(model, tokenizer, folder, bench.k))
            opened = replace(opened, arms={**opened.arms, "PEFT": spent})
        ends = [bench.end_to_end(batch, _DECODE_PROMPT, _NEW, peft) for batch in (1, _BATCH)]
        return Results(_about(plan, bench), (opened, *parts, *ends), large, shown, held)


@contextmanager
def _written(plan: Plan, sizes: Sizes, say: Callable[[str], None]) -> Iterator[Path]:
    """Within the block: a folder of synthetic adapters."""
    say(f"writing {plan.adapters} adapters")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pool"
        write_adapters(folder, sizes, plan.adapters, plan.seed)
        yield folder


def _bench(plan: Plan, sizes: Sizes, folder: Path | None, say: Callable[[str], None]) -> Bench:
    def opened(cache: str | None) -> AdapterPool:
        if folder is None:
            return memory_pool(sizes, plan.adapters, plan.seed)
        return AdapterPool.from_directory(folder)

    model, tokenizer = _base(plan, sizes)
    pool = opened(None)
    k = min(plan.k, len(pool))
    logo = LoGo(model, tokenizer, pool, settings=SelectionSettings(signal="norm", k=k))
    made = endless(sizes, plan.seed + 1) if plan.base_model is None else real_prompts(logo, plan.seed + 1)
    return Bench(logo, opened, k, made, plan.rounds, say, in_memory=folder is None)


def _base(plan: Plan, sizes: Sizes) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if plan.base_model is not None:
        return load_base(plan.base_model, device=plan.device, dtype=plan.dtype)
    return base_model(sizes, plan.seed, plan.device, plan.dtype)


def _one_layer(plan: Plan, say: Callable[[str], None]) -> MeasuredPart:
    """Random mixtures in one layer of Llama-3.1-8B's shapes, in which adapters are smaller relative to the base
    weights.
    """
    sizes = replace(LLAMA_8B_LAYER, rank=plan.sizes.rank)
    with nullcontext() if plan.in_memory else _written(plan, sizes, say) as folder:
        bench = _bench(plan, sizes, folder, say)
        mixtures = {"random": mixtures_of(bench.logo.names, _BATCH, plan.k)["random"]}
        return replace(bench.decoding(_BATCH, _DECODE_PROMPT, mixtures), name="decode, one layer of 8B")


def _about(plan: Plan, bench: Bench) -> dict[str, object]:
    device: Any = torch.device(plan.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": plan.device,
        "hardware": name,
        "threads": torch.get_num_threads(),
        "dtype": plan.dtype,
        "in_memory": bench.in_memory,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base_model": plan.base_model or plan.sizes.as_dict(),
        "adapters": len(bench.logo.names),
        "k": bench.k,
        "rounds": plan.rounds,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
