"""`logo pool inspect --spectra`: norms, effective ranks, near-duplicates, unusual adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from logo.adapters.format import Adapter
from logo.adapters.upkeep.card import short_ranks
from logo.cli.output import out, plain_table
from logo.cli.pool.common import steps, targets
from logo.errors import listed

if TYPE_CHECKING:
    from torch import Tensor

    from logo.adapters.upkeep.anatomy import Anatomy

LAYER_RANGES = 3


def taken_apart(adapters: Sequence[Adapter]) -> Anatomy:
    """`anatomy` of the adapters, with a progress bar."""
    from logo.adapters.upkeep.anatomy import anatomy, module_paths

    with steps("modules", len(module_paths(adapters))) as step:
        return anatomy(adapters, step)


def table(adapters: Sequence[Adapter], found: Anatomy) -> Table:
    """One row per adapter."""
    shown = plain_table("adapter", ">rank", "targets", ">norm", ">effective rank", "nearest", ">overlap", ">cosine")
    for adapter in adapters:
        name = adapter.name
        nearest = found.nearest(name)
        beside = ("-", "-", "-") if nearest is None else (nearest[0], f"{nearest[1]:.2f}", f"{nearest[2]:.2f}")
        shown.add_row(
            Text(name),
            short_ranks(adapter.ranks),
            ", ".join(targets(adapter)),
            f"{found.norm(name):.3g}",
            f"{found.effective_rank(name):.1f}",
            *map(Text, beside),
        )
    return shown


def show(adapters: Sequence[Adapter], found: Anatomy, threshold: float) -> None:
    """Prints the size of the updates per kind of module, near-duplicates, and outliers."""
    from logo.adapters.upkeep.outliers import outliers

    by_module = list(_by_module(found))
    if by_module:
        shown = plain_table("module", "layers", ">median norm", ">effective rank", ">largest norm", "of")
        for row in by_module:
            shown.add_row(
                row["module"],
                _layers(row),
                f"{row['norm']:.3g}",
                f"{row['effective_rank']:.1f}",
                f"{row['largest']:.3g}",
                Text(row["adapter"]),
            )
        out.print()
        out.print(shown)
        out.print()
    for one, other, overlap, cosine in found.near_duplicates(threshold):
        out.print(
            Text.assemble(
                ("near-duplicates ", "yellow"),
                f"{one}, {other}: overlap {overlap:.2f}, cosine {cosine:.2f}, norms {found.norm(one):.3g} and "
                f"{found.norm(other):.3g}",
            )
        )
    for outlier in outliers(adapters, found):
        out.print(Text.assemble(("stands out ", "yellow"), f"{listed(outlier.adapters, 8)}: {outlier.text}"))


def report(adapters: Sequence[Adapter], found: Anatomy, threshold: float) -> dict[str, Any]:
    """What `show` prints, for JSON."""
    from logo.adapters.upkeep.outliers import outliers

    return {
        "spectra": {
            name: {
                "norm": found.norm(name),
                "effective_rank": found.effective_rank(name),
                "modules": {
                    path: {"norm": update.norm, "effective_rank": update.effective_rank}
                    for path, update in found.updates[name].items()
                },
            }
            for name in found.names
        },
        "modules": list(_by_module(found)),
        "overlap": _numbers(found.overlap),
        "cosine": _numbers(found.cosine),
        "near_duplicates": [
            {
                "adapters": [one, other],
                "overlap": overlap,
                "cosine": cosine,
                "norms": [found.norm(one), found.norm(other)],
            }
            for one, other, overlap, cosine in found.near_duplicates(threshold)
        ],
        "stands_out": [
            {"kind": outlier.kind, "text": outlier.text, "adapters": list(outlier.adapters)}
            for outlier in outliers(adapters, found)
        ],
    }


def _by_module(found: Anatomy) -> Iterator[dict[str, Any]]:
    """For each kind of module and range of layers: medians over adapters and modules, and the largest norm.

    Updates of zeros are left out: they are reported as outliers, and would distort the medians.
    """
    from logo.adapters.upkeep.anatomy import kind_of, layer_of

    every = {layer_of(path) for updates in found.updates.values() for path in updates}
    layers = sorted(layer for layer in every if layer is not None)
    width = -(-len(layers) // LAYER_RANGES) or 1
    part = {layer: number // width for number, layer in enumerate(layers)}
    groups: dict[tuple[str, int], list[tuple[int | None, str, float, float]]] = {}
    for name, updates in found.updates.items():
        for path, update in updates.items():
            layer = layer_of(path)
            group = groups.setdefault((kind_of(path), -1 if layer is None else part[layer]), [])
            if update.norm > 0:
                group.append((layer, name, update.norm, update.effective_rank))
    for (kind, _), group in sorted(groups.items()):
        if not group:
            continue
        _, adapter, largest, _ = max(group, key=lambda entry: entry[2])
        known = sorted({layer for layer, *_ in group if layer is not None})
        yield {
            "module": kind,
            "layers": [known[0], known[-1]] if known else None,
            "norm": median(norm for _, _, norm, _ in group),
            "effective_rank": median(rank for *_, rank in group),
            "largest": largest,
            "adapter": adapter,
        }


def _layers(row: dict[str, Any]) -> str:
    if row["layers"] is None:
        return ""
    first, last = row["layers"]
    return str(first) if first == last else f"{first}–{last}"


def _numbers(matrix: Tensor) -> list[list[float | None]]:
    """Rows and columns in the order of the adapters; null where there is nothing to compare."""
    return [[None if value != value else value for value in row] for row in matrix.tolist()]
