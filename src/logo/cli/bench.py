"""`logo bench`: measurements side by side in one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from logo.cli import bench_serve
from logo.cli.commands import Commands, Group
from logo.cli.expanded import expanded
from logo.cli.opening import open_engine
from logo.cli.options import OFFICIAL_SIGNAL, EngineOptions, Json, rare, usual
from logo.cli.output import err, note, out, plain_table, print_json, progress, write_json
from logo.cli.prompts import or_demo, read_prompts
from logo.errors import UsageError, closest
from logo.extras import need

if TYPE_CHECKING:
    from logo.bench.full import Results
    from logo.bench.probe import ProbeBench

app = Commands(cls=Group, invoke_without_command=True)
app.command("serve")(bench_serve.serve)

DTYPES = ("float32", "bfloat16", "float16")


@app.callback()
@expanded
def bench(
    context: typer.Context,
    base_model: str | None = usual(None, "A real base model (with --adapters).", "synthetic"),
    adapters: Path | None = usual(None, "The pool of that base model.", "synthetic", metavar="DIR"),
    count: int = usual(260, "Adapters in the pool.", min=2),
    k: int = usual(20, "Adapters per prompt.", True, "-k", min=1),
    rank: int = usual(16, "Rank of the adapters.", min=1),
    targets: str = rare(
        "q_proj,v_proj", "Projections that the adapters adapt: q_, k_, v_, o_, gate_, up_ or down_proj, or all-linear."
    ),
    hidden: int = rare(1024, "Width of the model.", min=64),
    layers: int = rare(12, "Layers of the model.", min=1),
    heads: int = rare(16, "Attention heads.", min=1),
    vocabulary: int = rare(32000, "Size of the vocabulary.", min=256),
    seed: int = usual(0, "Random seed of weights and prompts."),
    rounds: int = usual(5, "Measured rounds, after a warm-up round.", min=1),
    device: str = usual("cpu", "Device to measure on."),
    dtype: str = usual("float32", "Dtype of the base model: float32, bfloat16 or float16."),
    in_memory: bool | None = rare(
        None, "Where the synthetic adapters are.", "in memory with --device cuda", "--in-memory/--on-disk"
    ),
    peft: bool | None = rare(None, "Measure PEFT too, for minutes.", "peft with adapters on disk", "--peft/--no-peft"),
    large: int = rare(10000, "Size of the additional large pool of small adapters; 0: none.", min=0),
    curves: bool = rare(True, "Measure how cost grows with pool size, k, batch and prompt length."),
    save: Path | None = usual(None, "Write all measurements to this JSON file.", False, metavar="FILE"),
    png: Path | None = usual(None, "Draw the curves.", "beside the JSON", metavar="FILE"),
    json: Json = False,
) -> None:
    """Measure the cost of every part of LoGo beside the base model alone and beside PEFT: table, JSON, pictures.

    The model and the adapters are synthetic unless named; cost depends on their sizes only.

    Example: `logo bench --save bench.json`
    """
    if context.invoked_subcommand is not None:
        return
    from logo.bench.curves import draw
    from logo.bench.full import Plan, run_bench
    from logo.bench.synthetic import Sizes, parse_targets

    if peft:
        need("a comparison with PEFT (--no-peft leaves it out)", "peft")
    picture = png if png is not None or save is None else save.with_suffix(".png")
    if picture is not None and curves:
        need("a picture of the curves (--png, or beside --save)", "matplotlib")
    if (base_model is None) != (adapters is None):
        raise UsageError("expected both --base-model M and --adapters DIR, or neither")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}{closest(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    if in_memory and (adapters is not None or peft):
        raise UsageError("--in-memory is for a synthetic pool without PEFT, which reads files: leave it out")
    in_memory = adapters is None and not peft and device.startswith("cuda") if in_memory is None else in_memory
    sizes = Sizes(hidden, layers, heads, vocabulary, rank, parse_targets(targets))
    plan = Plan(
        sizes=sizes,
        adapters=count,
        k=min(k, count),
        base_model=base_model,
        folder=adapters,
        rounds=rounds,
        device=device,
        dtype=dtype,
        in_memory=in_memory,
        peft=not in_memory if peft is None else peft,
        large=large,
        with_curves=curves,
        seed=seed,
    )
    with err.status("") as shown:
        results = run_bench(plan, lambda part: shown.update(f"[dim]{part}[/dim]"))
    if json:
        print_json(results.as_dict())
    else:
        out.print(_parts(results))
        out.print(_ratios(results))
        about = results.about
        note(
            f"medians of {about['rounds']} rounds after a warm-up · {about['hardware']}, {about['threads']} threads · "
            f"{about['dtype']} · {about['adapters']} adapters, k {about['k']}"
        )
    if save is not None:
        write_json(save, results.as_dict())
        note(f"written: {save}")
    if picture is not None and results.shown:
        draw(list(results.shown), picture)
        note(f"drawn: {picture}")


def _parts(results: Results) -> Table:
    table = plain_table("part", "arm", ">ms", ">peak MB")
    for part in results.parts:
        for i, (name, arm) in enumerate(part.arms.items()):
            peak = "-" if arm.peak_bytes is None else f"{arm.peak_bytes / 1e6:.0f}"
            table.add_row("" if i else part.name, name, f"{1000 * arm.seconds:,.1f}", peak)
    large = results.large
    if large is not None:
        table.add_row(f"{large.adapters:,} adapters", "cold", f"{1000 * large.cold:,.1f}", "-")
        table.add_row("", "known", f"{1000 * large.known:,.1f}", f"{large.held_bytes / 1e6:.0f}")
        table.add_row("", "scoring", f"{1000 * large.scoring:,.2f}", f"{large.index_bytes / 1e6:.0f}")
        table.add_row("", "one product with the index", f"{1000 * large.product:,.2f}", "-")
    return table


def _ratios(results: Results) -> Table:
    table = plain_table("ratio", ">")
    for name, value in results.ratios.items():
        table.add_row(name, f"{value:.4f}" if value < 0.1 else f"{value:.2f}")
    return table


@app.command("probe")
@expanded
def probe(
    engine: EngineOptions,
    prompts: Path = usual(..., "Prompts, one per line.", True, "--prompts", metavar="FILE"),
    rounds: int = usual(5, "Measured rounds, after a warm-up round.", min=1),
    json: Json = False,
) -> None:
    """Measure time and memory of selecting, by the chosen and by the official signal, beside a plain prefill.

    Example: `logo bench probe --base-model M --adapters DIR --prompts prompts.txt`
    """
    from logo.bench.probe import probe_bench
    from logo.engine import LoGo

    texts = read_prompts(None, prompts)
    base_model = or_demo(engine)
    chosen = open_engine(engine, base_model)
    official = LoGo(
        chosen.model,
        chosen.tokenizer,
        chosen.pool,
        settings=replace(chosen.settings, signal=OFFICIAL_SIGNAL, unscorable="skip"),
    )
    engines = {OFFICIAL_SIGNAL: official, chosen.settings.signal: chosen}
    with progress(disable=not err.is_terminal) as shown:
        bar = shown.add_task("rounds", total=rounds + 1)
        result = probe_bench(engines, texts, rounds, lambda: shown.advance(bar))
    if json:
        print_json(result.as_dict())
        return
    out.print(_table(result))
    note(
        f"{result.prompts} prompts, {result.tokens} tokens, one at a time · medians of {result.rounds} rounds after a "
        f"warm-up · {result.device}, {result.threads} threads"
    )


def _table(result: ProbeBench) -> Table:
    table = plain_table("", ">s per pass", ">to prefill", ">peak MB", ">points", ">index MB")
    for name, arm in result.arms.items():
        peak = "-" if arm.peak_bytes is None else f"{arm.peak_bytes / 1e6:.1f}"
        index = f"{arm.index_bytes / 1e6:.1f}" if arm.points else "-"
        table.add_row(name, f"{arm.seconds:.3f}", f"{arm.ratio:.2f}", peak, str(arm.points or "-"), index)
    return table


@app.command("merges")
def merges(
    seed: int = usual(0, "Random seed of the model, the adapters and DARE's drops.", min=0),
    json: Json = False,
) -> None:
    """Compare every merge with PEFT's own on a small random model: the largest difference of a logit.

    Example: `logo bench merges`
    """
    from logo.bench.merges import SIZES, WEIGHTS, compare_merges

    compared = compare_merges(seed=seed)
    if json:
        print_json([row.as_dict() for row in compared])
        return
    table = plain_table("merge", "in PEFT", ">max difference", ">largest logit", ">from Σ w s B A")
    for row in compared:
        exact = "-" if row.from_exact is None else f"{row.from_exact:.2g}"
        table.add_row(row.kind, row.peft, f"{row.difference:.1e}", f"{row.logit:.2f}", exact)
    out.print(table)
    note(
        f"float32 · a random Llama of {SIZES.layers} layers, {len(WEIGHTS)} adapters of rank {SIZES.rank}, weights "
        f"{', '.join(map(str, WEIGHTS))} · last column: how far ΔW is from the weighted sum of what the adapters do"
    )
