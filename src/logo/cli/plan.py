"""`logo plan`: the memory that a number of adapters needs inside vLLM."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from logo.adapters.layout import BaseLayout
from logo.adapters.pool import DEFAULT_K
from logo.cli.choices import VllmMode
from logo.cli.opening import open_pool, quiet_transformers, selection_settings
from logo.cli.options import EngineOptions, usual
from logo.cli.output import natural_width, out, plain_table, print_json, screen, size
from logo.errors import UsageError, closest
from logo.models import load_skeleton

if TYPE_CHECKING:
    from logo.backends.plan import Plan
    from logo.backends.shapes import ModelShape, PoolShape

# GPU -> the memory that PyTorch reports, in 2³⁰ bytes.
GPUS = {
    "B200": 178.3,
    "H200": 139.8,
    "H100": 79.1,
    "A100-80": 79.2,
    "A100-40": 39.4,
    "L40S": 44.4,
    "A10": 22.0,
    "L4": 22.0,
    "RTX-4090": 23.5,
    "V100-32": 31.7,
    "T4": 14.6,
}
_USUAL_CONTEXT = 4096


def plan(
    base_model: str = usual(..., "Hub id, folder or short name; only its configuration is read."),
    adapters: str | None = usual(
        None, "A number of adapters, or a pool.", "the base model's own", metavar="N|DIR_OR_REPO"
    ),
    rank: int | None = usual(None, "Rank of each of N adapters.", "16"),
    targets: str | None = usual(None, "Modules that each of N adapters adapts.", "all-linear", metavar="NAME,..."),
    n_selected_modules: int | None = usual(None, "Adapters per mixture.", "20; demo: 3", "--n-selected-modules", "-k"),
    concurrency: int = usual(64, "Concurrent requests."),
    context: int | None = usual(None, "Tokens of a request, prompt and answer.", "4096, or as many as the model reads"),
    dtype: str = usual("auto", "float32, bfloat16, float16 or auto (the checkpoint's; bfloat16 instead of float32)."),
    gpu: str | None = usual(None, f"{', '.join(GPUS)}, or its memory in 10⁹ bytes.", metavar="NAME|GB"),
    tensor_parallel: int = usual(1, "GPUs that share the model."),
    gpu_memory_utilization: float = usual(0.9, "Share of a GPU's memory that vLLM may take."),
    mode: VllmMode = usual("auto", "A slot per adapter (gate) or per request (merge); auto: the smaller one."),
    model_dir: str = usual("./hf_models", "Folder that is searched first for base models and adapters."),
    json: bool = usual(False, "Print JSON, in bytes."),
) -> None:
    """Compute the memory of a base model and a pool inside vLLM, and the better way to mix there.

    Nothing is loaded: sizes come from the base model's configuration and from the headers of the pool's files.

    Example: `logo plan --base-model Qwen/Qwen2.5-7B --adapters 260 --rank 16 --concurrency 64 --gpu H100`
    """
    memory = None if gpu is None else device_bytes(gpu)
    count = int(adapters) if adapters is not None and re.fullmatch(r"-?\d+", adapters) else None
    if count is None and (rank is not None or targets is not None):
        raise UsageError("--rank and --targets describe adapters that do not exist yet: give --adapters a number")

    from logo.backends.plan import plan as planned
    from logo.backends.shapes import ALL_LINEAR, ModelShape, PoolShape, number_dtype

    quiet_transformers()
    model = load_skeleton(base_model, model_dir=model_dir)
    shape = ModelShape.of(model)
    kind = number_dtype(shape, dtype)
    if count is None:
        options = EngineOptions(base_model, adapters, n_selected_modules=n_selected_modules, model_dir=model_dir)
        opened = open_pool(options, base_model).fit(BaseLayout.of(model))
        pool = PoolShape.of(model, opened, selection_settings(options))
    else:
        names = ALL_LINEAR if targets in (None, ALL_LINEAR) else [name.strip() for name in str(targets).split(",")]
        k = DEFAULT_K if n_selected_modules is None else n_selected_modules
        pool = PoolShape.even(model, count, 16 if rank is None else rank, names, k)
    asked = min(_USUAL_CONTEXT, shape.context or _USUAL_CONTEXT) if context is None else context
    found = planned(
        shape,
        pool,
        concurrency=concurrency,
        context=asked,
        dtype_bytes=kind.itemsize,
        device_bytes=memory,
        tensor_parallel=tensor_parallel,
        utilisation=gpu_memory_utilization,
        mode=None if mode == "auto" else mode,
    )
    if json:
        print_json(_plain(found, shape, pool, asked, concurrency))
    else:
        _print(found, shape, pool, str(kind).removeprefix("torch."), asked, concurrency)


def device_bytes(gpu: str) -> int:
    """The memory of a GPU by its name, or by what it has in 10⁹ bytes.

    Raises:
        UsageError: it is neither.
    """
    if re.fullmatch(r"\d+(\.\d+)?", gpu) and float(gpu) > 0:
        return int(float(gpu) * 1e9)
    named = {name.lower(): memory for name, memory in GPUS.items()}
    if gpu.lower() not in named:
        raise UsageError(
            f"--gpu {gpu!r}: expected the memory in 10⁹ bytes, or one of {', '.join(GPUS)}{closest(gpu.upper(), GPUS)}"
        )
    return int(named[gpu.lower()] * 2**30)


def _plain(found: Plan, shape: ModelShape, pool: PoolShape, context: int, concurrency: int) -> dict[str, Any]:
    return {
        **{"adapters": len(pool), "k": pool.k, "concurrency": concurrency, "context": context},
        **{"parameters": shape.parameters, "mode": found.mode},
        **asdict(found),
        **{"total": found.total, "fits": found.fits, "flags": list(found.flags)},
    }


def _print(found: Plan, shape: ModelShape, pool: PoolShape, dtype: str, context: int, concurrency: int) -> None:
    slots, each = found.slots, "" if found.tensor_parallel == 1 else f", on each of {found.tensor_parallel} GPUs"
    table = plain_table("part", ">size", f"what{each}")
    quantised = f", {shape.bits:g} bits in its layers" if shape.quantised else ""
    table.add_row("weights", size(found.weights), f"{shape.parameters:,} parameters in {dtype}{quantised}")
    table.add_row("adapter slots", size(slots.bytes), f"{slots.mode}: {slots.count:,} slots of rank {slots.rank}")
    read = f"{pool.points} {'point' if pool.points == 1 else 'points'} x {sum(pool.ranks):,} ranks x {pool.width:,}"
    table.add_row("scoring index", size(found.index), f"{read} features at most, in float32")
    table.add_row("keys and values", size(found.cache), f"{concurrency:,} requests of {context:,} tokens")
    if found.usable is not None:
        table.add_row("working memory", size(found.working), "an allowance for activations and captured graphs")
    table.add_row("together", size(found.total), _verdict(found))
    screen(natural_width(table)).print(table)
    out.print(f"\n{found.mode}: {found.reason}", markup=False)
    if found.other is not None:
        other = found.other
        out.print(f"{other.mode} would take {size(other.bytes)}: {other.count:,} slots of rank {other.rank}")
    out.print(f"the pool: {len(pool):,} adapters, {size(found.pool)} in {dtype}")
    out.print(f"vLLM: {' '.join(found.flags)}", markup=False)


def _verdict(found: Plan) -> str:
    if found.usable is None:
        return "name a GPU (--gpu) to see whether it fits"
    fits = "it fits" if found.fits else "it does not fit"
    return f"of {size(found.usable)}: {fits}; at most {found.most:,} such requests would"
