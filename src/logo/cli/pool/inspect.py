"""`logo pool inspect`: the adapters of a pool, and with `--spectra` their norms, ranks and overlaps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from logo.adapters.format import Adapter
from logo.cli.options import argument, usual
from logo.cli.output import one_line, out, plain_table, print_json, size
from logo.cli.pool import spectra as spectra_part
from logo.cli.pool.common import AllowPickle, Threshold, divided, fitting, refusal, refusals, surveyed, targets
from logo.errors import AdapterError, LeftOut, listed


def inspect(
    folder: str = argument(
        ..., metavar="PLACE", help="Folder of adapters, at any depth, or whatever `--adapters` takes."
    ),
    base_model: str | None = usual(
        None, "Also check that every adapter fits this base model (its configuration is enough)."
    ),
    model_dir: str = usual("./hf_models", "Folder that is searched first for the base model."),
    allow_pickle: AllowPickle = False,
    verify: bool = usual(True, "Read all tensors and check them for NaN and Inf."),
    check: bool = usual(False, "Exit with 1 if anything would be refused, or nothing is usable."),
    spectra: bool = usual(
        False,
        "Also analyse the updates: norms, effective ranks, near-duplicates, unusual adapters. Decomposes "
        "every update: seconds for tens of adapters, and the time grows with the square of their number.",
    ),
    threshold: Threshold = 0.9,
    json: bool = usual(False, "Print JSON, with the sha256 of every adapter."),
) -> None:
    """List the adapters of a pool, and those that would be refused, with the reason.

    Example: `logo pool inspect adapters/ --base-model Qwen/Qwen2.5-7B --spectra`
    """
    good, refused = surveyed(folder, allow_pickle, verify)
    if base_model is not None:
        good, misfits = divided(good, fitting(base_model, model_dir))
        refused += misfits
    if spectra:
        good, copies = divided(good, lambda adapter: adapter.check_compared())
        refused += copies
    refused.sort(key=lambda error: error.name)
    taken = spectra_part.taken_apart(good) if spectra else None
    if json:
        more = {} if taken is None else spectra_part.report(good, taken, threshold)
        print_json(_report(folder, good, refused, more))
    else:
        if good:
            out.print(_table(good) if taken is None else spectra_part.table(good, taken))
        if taken is not None:
            spectra_part.show(good, taken, threshold)
        for activation, names in _acting(good).items():
            out.print(Text.assemble(("activation ", "yellow"), f"{activation}: {listed(names, 8)}"))
        for bad in refused:
            out.print(refusal(bad))
        total = size(sum(adapter.size for adapter in good))
        out.print(f"{folder}: {len(good)} usable ({total}), {len(refused)} refused", markup=False)
    if check and not (good and all(isinstance(bad, LeftOut) for bad in refused)):
        raise typer.Exit(1)


def _report(
    folder: str, good: Sequence[Adapter], refused: Sequence[AdapterError], more: dict[str, Any]
) -> dict[str, Any]:
    return {
        "folder": folder,
        "adapters": [
            {
                "name": adapter.name,
                "ranks": list(adapter.ranks),
                "modules": len(adapter.modules),
                "targets": targets(adapter),
                "parameters": adapter.parameters,
                "bytes": adapter.size,
                "activation": str(adapter.activation),
                "base_model": adapter.config.base_model,
                "sha256": adapter.sha256,
            }
            for adapter in good
        ],
        "refused": refusals(refused),
        **more,
    }


def _acting(adapters: Sequence[Adapter]) -> dict[str, list[str]]:
    """The names of the adapters that do not act everywhere, by their activation."""
    found = defaultdict[str, list[str]](list)
    for adapter in adapters:
        if not adapter.activation.everywhere:
            found[str(adapter.activation)].append(one_line(adapter.name))
    return found


def _table(adapters: Sequence[Adapter]) -> Table:
    table = plain_table("adapter", ">rank", ">modules", "targets", ">parameters", ">size")
    for adapter in adapters:
        table.add_row(
            Text(adapter.name),
            "/".join(map(str, adapter.ranks)),
            str(len(adapter.modules)),
            ", ".join(targets(adapter)),
            f"{adapter.parameters:,}",
            size(adapter.size),
        )
    return table
