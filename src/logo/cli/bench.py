"""`logo bench`: measurements side by side in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from logo.cli.options import EngineOptions, expanded, open_engine
from logo.cli.output import err, note, out, print_json, progress
from logo.cli.prompts import or_demo, read_prompts

if TYPE_CHECKING:
    from logo.bench.probe import ProbeBench

app = typer.Typer(no_args_is_help=True, help="Measure what things cost, side by side in one run.")


@app.callback()
def root() -> None:
    """Measure what things cost, side by side in one run."""


@app.command("probe")
@expanded
def probe(
    engine: EngineOptions,
    file: Annotated[Path, typer.Option(metavar="FILE", help="Prompts, one per line.")],
    rounds: Annotated[int, typer.Option(help="Rounds that count, after one that does not.", min=1)] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time and memory of selecting, by the chosen and by the official signal, against a plain prefill.

    Example: `logo bench probe --base-model M --adapters DIR --file prompts.txt`
    """
    from dataclasses import replace

    from logo.bench.probe import probe_bench
    from logo.cli.options import OFFICIAL_SIGNAL
    from logo.engine import LoGo

    prompts = read_prompts(None, file)
    engine, base_model = or_demo(engine)
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
        result = probe_bench(engines, prompts, rounds, lambda: shown.advance(bar))
    if json:
        print_json(result.as_dict())
        return
    out.print(_table(result))
    note(
        f"{result.prompts} prompts, {result.tokens} tokens, one at a time · medians of {result.rounds} rounds after a "
        f"warm-up · {result.device}, {result.threads} threads"
    )


def _table(result: ProbeBench) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "s per pass", "to prefill", "peak MB", "points", "index MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, arm in result.arms.items():
        peak = "-" if arm.peak_bytes is None else f"{arm.peak_bytes / 1e6:.1f}"
        index = f"{arm.index_bytes / 1e6:.1f}" if arm.points else "-"
        table.add_row(name, f"{arm.seconds:.3f}", f"{arm.ratio:.2f}", peak, str(arm.points or "-"), index)
    return table
