"""`logo pool prune`: a pool of smaller ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from logo.adapters.format import Adapter
from logo.adapters.upkeep.card import short_ranks
from logo.cli.options import Json, usual
from logo.cli.output import out, plain_table, print_json
from logo.cli.pool.common import AllowPickle, Folder, OnBadAdapter, Out, opened, refusals, steps


def prune(
    folder: Folder,
    out_folder: Out,
    energy: float | None = usual(
        None,
        "Keep of every update the directions that hold this share of its squared norm: 0.95 leaves a relative "
        "error of at most √0.05 = 0.22.",
        False,
        metavar="SHARE",
    ),
    rank: int | None = usual(None, "Keep this many directions instead.", False),
    allow_pickle: AllowPickle = False,
    on_bad_adapter: OnBadAdapter = "error",
    json: Json = False,
) -> None:
    """Write a pool whose updates are the best approximations of smaller rank, with the error of each.

    The updates are truncated by singular value decomposition, per module. The new adapters are plain PEFT adapters with
    alpha = r, so that their scale is 1, in their former dtype.

    Example: `logo pool prune adapters/ --out small-adapters/ --energy 0.95`
    """
    from logo.adapters.upkeep.pruning import Budget, pruned, write_pruned
    from logo.adapters.writing import check_new, write_pool

    budget = Budget(energy, rank)
    check_new(out_folder)
    pool = opened(folder, allow_pickle, on_bad_adapter, lambda adapter: adapter.check_linear())
    results: list[dict[str, Any]] = []

    def write(adapter: Adapter, to: Path) -> bool:
        result = pruned(adapter, budget)
        write_pruned(result, to)
        after = sorted(set(result.ranks.values()))
        results.append(
            {
                "name": adapter.name,
                "ranks_before": list(adapter.ranks),
                "ranks": after,
                "mean_rank": sum(result.ranks.values()) / len(result.ranks),
                "parameters_before": adapter.parameters,
                "parameters": result.parameters,
                "error": result.error,
            }
        )
        return result.kept

    def change() -> dict[str, Any]:
        errors = {one["name"]: one["error"] for one in results}
        refused = [bad.name for bad in pool.refused]
        return {"command": "prune", "energy": energy, "rank": rank, "relative_errors": errors, "refused": refused}

    with steps("adapters", len(pool)) as step:
        write_pool(folder, pool, out_folder, write, change, step)
    if json:
        report = {"folder": str(folder), "out": str(out_folder), "energy": energy, "rank": rank}
        print_json({**report, "adapters": results, "refused": refusals(pool.refused)})
        return
    table = plain_table("adapter", ">rank before", ">rank", ">parameters before", ">parameters", ">relative error")
    for one in results:
        table.add_row(
            Text(one["name"]),
            short_ranks(one["ranks_before"]),
            short_ranks(one["ranks"]),
            f"{one['parameters_before']:,}",
            f"{one['parameters']:,}",
            f"{one['error']:.3g}",
        )
    out.print(table)
    before, after = (sum(one[key] for one in results) for key in ("parameters_before", "parameters"))
    out.print(f"{out_folder}: written, {after / before:.0%} of the parameters", markup=False)
