"""`logo pool`: what is in a folder of adapters, and a mixture of them as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions, expanded
from logo.cli.output import note, out, print_json, selection_line
from logo.cli.prompts import Chat, System, as_asked, forced, or_demo, read_prompts

if TYPE_CHECKING:
    from logo.adapters.format import Adapter
    from logo.adapters.layout import BaseLayout
    from logo.errors import AdapterError

app = typer.Typer(help="Look into pools of adapters.", no_args_is_help=True)


@app.callback()
def pool() -> None:
    """Look into pools of adapters."""


@app.command("inspect")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of adapters, at any depth.")],
    base_model: Annotated[
        str | None,
        typer.Option(help="Also check that every adapter fits this base model (its configuration is enough)."),
    ] = None,
    model_dir: Annotated[str, typer.Option(help="Looked in first for the base model.")] = "./hf_models",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read adapter_model.bin too (tensors only).")
    ] = False,
    verify: Annotated[bool, typer.Option(help="Read all tensors and check them for NaN and Inf.")] = True,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if anything would be refused.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with the sha256 of every adapter.")] = False,
) -> None:
    """List the adapters in a folder, and what would be refused and why.

    Example: `logo pool inspect adapters/ --base-model Qwen/Qwen2.5-7B`
    """
    from logo.adapters.pool import survey
    from logo.errors import AdapterError

    good, refused = survey(folder, allow_pickle=allow_pickle, verify=verify)
    if base_model is not None:
        layout = _layout(base_model, model_dir)
        for adapter in list(good):
            try:
                adapter.fit(layout)
            except AdapterError as error:
                good.remove(adapter)
                refused.append(error)
    refused.sort(key=lambda error: error.name)
    if json:
        print_json(_report(folder, good, refused))
    else:
        _print(folder, good, refused)
    if check and refused:
        raise typer.Exit(1)


@app.command("export")
@expanded
def export(
    engine: EngineOptions,
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to; must not exist yet.")],
    prompt: Annotated[str | None, typer.Argument(help="Write the mixture that this prompt selects.")] = None,
    chat: Chat = False,
    system: System = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=WEIGHT]", help="Write these adapters instead (repeatable).")
    ] = None,
) -> None:
    """Write a mixture as one plain PEFT adapter, which any tool that reads LoRA adapters answers with.

    Example: `logo pool export "What is 7 plus 5?" --output sums`
    """
    from logo.errors import UsageError

    mixture = forced(adapter)
    if (prompt is None) == (mixture is None):
        raise UsageError("expected either a prompt, which selects, or --adapter NAME=WEIGHT")
    engine, base_model = or_demo(engine)
    logo = open_engine(engine, base_model)
    if prompt is not None:
        [selection] = logo.select(as_asked(read_prompts([prompt], None), chat, system))
        note(f"  {selection_line(selection)}")
        logo.save_mixture(selection, folder)
    else:
        logo.save_mixture(mixture or {}, folder)
    out.print(f"{folder}: written", markup=False)


def _layout(base_model: str, model_dir: str) -> BaseLayout:
    from logo.models import load_layout

    return load_layout(base_model, model_dir=model_dir)


def _report(folder: Path, good: Sequence[Adapter], refused: Sequence[AdapterError]) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "adapters": [
            {
                "name": adapter.name,
                "ranks": list(adapter.ranks),
                "modules": len(adapter.modules),
                "targets": targets(adapter),
                "parameters": adapter.parameters,
                "bytes": adapter.size,
                "base_model": adapter.config.base_model,
                "sha256": adapter.sha256,
            }
            for adapter in good
        ],
        "refused": [{"name": error.name, "reason": error.reason} for error in refused],
    }


def _print(folder: Path, good: Sequence[Adapter], refused: Sequence[AdapterError]) -> None:
    if good:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("adapter", "rank", "modules", "targets", "parameters", "size"):
            table.add_column(name, justify="right" if name in ("rank", "modules", "parameters", "size") else "left")
        for adapter in good:
            table.add_row(
                Text(adapter.name),
                "/".join(map(str, adapter.ranks)),
                str(len(adapter.modules)),
                ", ".join(targets(adapter)),
                f"{adapter.parameters:,}",
                _size(adapter.size),
            )
        out.print(table)
    for error in refused:
        out.print(Text.assemble(("refused ", "red"), (error.name, "bold"), f": {error.reason}"))
    total = sum(adapter.size for adapter in good)
    out.print(f"{folder}: {len(good)} usable ({_size(total)}), {len(refused)} refused", markup=False)


def targets(adapter: Adapter) -> list[str]:
    """The names of the modules it adapts, without their layers."""
    return sorted({path.rsplit(".", 1)[-1] for path in adapter.modules})


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
