"""`logo pool inspect`: the adapters of a pool, with their norms and effective ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from logo.adapters.adapter import Adapter
from logo.adapters.sources import gather, parse_sources
from logo.cli.output import natural_width, one_line, out, plain_table, print_json, screen
from logo.cli.pool.common import divided, fitting, refusal, refusals
from logo.errors import AdapterError, LeftOut, PoolError, listed

if TYPE_CHECKING:
    from logo.cli.pool.publish import Size


def inspect(
    folder: str,
    /,
    *,
    base_model: str | None = None,
    json: bool = False,
) -> int:
    """List the adapters of a pool, and those that would be refused, with the reason.

    The norm is that of all updates of an adapter, and the effective rank the mean over them.

    The exit code is 1 if anything would be refused, or nothing is usable.

    Example: logo pool inspect adapters/ --base-model Qwen/Qwen2.5-7B

    Args:
        folder: Folder of adapters, at any depth, or whatever `--adapters` takes.
        base_model: Also check that every adapter fits this base model (its configuration is enough).
        json: Print JSON, with the sha256 of every adapter.
    """
    from logo.cli.pool.publish import size_of

    good, refused = _found(folder)
    if base_model is not None:
        good, misfits = divided(good, fitting(base_model))
        refused += misfits
    sizes: dict[str, Size] = {}
    good, unread = divided(good, lambda adapter: sizes.update({adapter.name: size_of(adapter)}))
    refused += unread
    refused.sort(key=lambda error: error.name)
    bad = sum(not isinstance(error, LeftOut) for error in refused)
    if json:
        print_json(_report(folder, good, refused, sizes))
    else:
        if good:
            table = _table(good, sizes)
            screen(natural_width(table)).print(table)
        for activation, names in _acting(good).items():
            out.print(Text.assemble(("activation ", "yellow"), f"{activation}: {listed(names, 8)}"))
        with_copies = [one_line(adapter.name) for adapter in good if adapter.copies]
        if with_copies:
            remark = "copies of base weights: used if they equal the base model's own, refused in vLLM"
            out.print(f"{listed(with_copies, 8)}: {remark}", markup=False)
        for error in refused:
            out.print(refusal(error))
        total = decimal(sum(adapter.size for adapter in good))
        left_out = f", {len(refused) - bad} left out" if len(refused) > bad else ""
        out.print(f"{folder}: {len(good)} adapters usable ({total}), {bad} refused{left_out}", markup=False)
    return int(not good or bool(bad))


def _found(source: str) -> tuple[list[Adapter], list[AdapterError]]:
    """The adapters of a source, and why others there cannot be used."""
    try:
        good, refused, _ = gather(parse_sources(source), skip=True, verify=True)
    except PoolError:  # an empty folder is told as such
        return [], []
    return good, refused


def _report(
    folder: str, good: Sequence[Adapter], refused: Sequence[AdapterError], sizes: Mapping[str, Size]
) -> dict[str, Any]:
    return {
        "folder": folder,
        "adapters": [
            {
                "name": adapter.name,
                "ranks": list(adapter.ranks),
                "modules": len(adapter.modules),
                "targets": adapter.targets,
                "parameters": adapter.parameters,
                "bytes": adapter.size,
                "activation": str(adapter.activation),
                "copies": list(adapter.copies),
                "base_model": adapter.config.base_model,
                "description": adapter.description,
                "sha256": adapter.sha256,
                **vars(sizes[adapter.name]),
            }
            for adapter in good
        ],
        "refused": refusals(refused),
    }


def _acting(adapters: Sequence[Adapter]) -> dict[str, list[str]]:
    """The names of the adapters that do not act everywhere, by their activation."""
    names = defaultdict[str, list[str]](list)
    for adapter in adapters:
        if not adapter.activation.everywhere:
            names[str(adapter.activation)].append(one_line(adapter.name))
    return names


def _table(adapters: Sequence[Adapter], sizes: Mapping[str, Size]) -> Table:
    columns = ("adapter", ">rank", ">modules", "targets", ">parameters", ">size", ">norm", ">effective rank")
    table = plain_table(*columns)
    for adapter in adapters:
        size = sizes[adapter.name]
        table.add_row(
            Text(adapter.name),
            "/".join(map(str, adapter.ranks)),
            str(len(adapter.modules)),
            ", ".join(adapter.targets),
            f"{adapter.parameters:,}",
            decimal(adapter.size),
            f"{size.norm:.3g}",
            f"{size.effective_rank:.1f}",
        )
    return table
