"""`logo pool convert`: the same updates in another dtype, in safetensors, as plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from logo.adapters.format import Adapter
from logo.adapters.pool import AdapterPool
from logo.adapters.survey import survey
from logo.adapters.upkeep.card import short_ranks
from logo.cli.options import Json, usual
from logo.cli.output import natural_width, out, plain_table, print_json, screen, size
from logo.cli.pool.common import AllowPickle, Folder, OnBadAdapter, Out, checked, refusals, steps, tell_refused

if TYPE_CHECKING:
    import torch


Dtype = Literal["bf16", "fp16", "fp32"]


def convert(
    folder: Folder,
    out_folder: Out,
    dtype: Dtype | None = usual(None, "Dtype of the new files.", "as they are stored"),
    initial: Path | None = usual(
        None,
        "PiSSA, OLoRA, CorDA, LoRA-GA: the initial adapters, saved before training, under the same names, or "
        "one for all. The results are plain LoRA of twice the rank.",
        False,
        metavar="DIR",
    ),
    allow_pickle: AllowPickle = False,
    on_bad_adapter: OnBadAdapter = "error",
    json: Json = False,
) -> None:
    """Write a pool as plain safetensors adapters: in another dtype, from pickles, from PiSSA and its relatives.

    Example: `logo pool convert adapters/ --out plain-adapters/ --dtype bf16 --allow-pickle`
    """
    from logo.adapters.upkeep.conversion import DTYPES, Initial, converted, write_converted
    from logo.adapters.writing import check_new, write_pool

    check_new(out_folder)
    first = None if initial is None else Initial.open(initial, allow_pickle=allow_pickle)
    skip = on_bad_adapter == "skip"
    found, refused = survey(folder, allow_pickle=allow_pickle, verify=skip, unconverted=True)
    pool = AdapterPool.from_survey(folder, found, refused, on_bad_adapter=on_bad_adapter)
    to = None if dtype is None else DTYPES[dtype]
    # What is left out has to be known before the new pool is written.
    check = (lambda one: converted(one, to, first)) if skip else Adapter.check_linear
    pool = checked(pool, str(folder), on_bad_adapter, check)
    tell_refused(pool.refused)
    results: list[dict[str, Any]] = []

    def write(adapter: Adapter, place: Path) -> bool:
        result = converted(adapter, to, first)
        write_converted(result, place)
        weights = result.weights.values()
        results.append(
            {
                "name": adapter.name,
                "from": {
                    "file": adapter.file.path.name,
                    "dtypes": list(map(_short, result.before)),
                    "init": result.init,
                    "ranks": list(adapter.ranks),
                    "bytes": adapter.size,
                },
                "to": {
                    "dtypes": sorted({_short(one.A.dtype) for one in weights}),
                    "ranks": sorted({len(one.A) for one in weights}),
                    "bytes": sum(file.stat().st_size for file in place.glob("*.safetensors")),
                },
                "error": result.error,
            }
        )
        return result.error == 0

    def change() -> dict[str, Any]:
        how = {"dtype": dtype, "initial": bool(initial)}
        errors = {one["name"]: one["error"] for one in results if one["error"]}
        return {"command": "convert", **how, "relative_errors": errors, "refused": [bad.name for bad in pool.refused]}

    with steps("adapters", len(pool)) as step:
        write_pool(folder, pool, out_folder, write, change, step)
    if json:
        report = {"folder": str(folder), "out": str(out_folder)}
        print_json({**report, "adapters": results, "refused": refusals(pool.refused)})
        return
    _print(results)
    out.print(f"{out_folder}: written", markup=False)


def _print(results: list[dict[str, Any]]) -> None:
    table = plain_table("adapter", "was", "dtype", ">rank", ">size", "is", ">rank", ">size", ">error")
    for one in results:
        was, now = one["from"], one["to"]
        kind = ", ".join(filter(None, ("pickle" if was["file"].endswith(".bin") else "safetensors", was["init"])))
        cells = (kind, _listed(was["dtypes"]), short_ranks(was["ranks"]), size(was["bytes"]))
        after = (_listed(now["dtypes"]), short_ranks(now["ranks"]), size(now["bytes"]), f"{one['error']:.2g}")
        table.add_row(Text(one["name"]), *cells, *after)
    screen(natural_width(table)).print(table)


def _listed(values: list[Any]) -> str:
    return "/".join(map(str, values))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
