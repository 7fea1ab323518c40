"""`logo pool diff`: the differences between two pools."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from logo.adapters.pool import AdapterPool
from logo.cli.choices import OnBad
from logo.cli.options import Json, argument, usual
from logo.cli.output import out, plain_table, print_json
from logo.cli.pool.common import AllowPickle, OnBadAdapter, checked, refusals, steps, tell_refused
from logo.hub.names import is_hub_spec
from logo.pools import open_pool

if TYPE_CHECKING:
    from logo.adapters.upkeep.differences import Differences


def diff(
    one: str = argument(..., metavar="A", help="A pool or a single adapter: a folder, or a Hub repo."),
    other: str = argument(..., metavar="B", help="The pool or adapter to compare it with."),
    check: bool = usual(False, "Exit with 1 if they differ, as `diff` does."),
    all_: bool = usual(False, "Also list the adapters that are equal.", True, "--all"),
    allow_pickle: AllowPickle = False,
    on_bad_adapter: OnBadAdapter = "error",
    json: Json = False,
) -> None:
    """Compare two pools by name, or two adapters: same bytes, same update with other factors, or how far apart.

    Example: `logo pool diff adapters/ org/pool/tasks --check`
    """
    from logo.adapters.upkeep.differences import compared

    pools = [_opened(place, allow_pickle, on_bad_adapter) for place in (one, other)]
    for pool in pools:
        tell_refused(pool.refused)
    first, second = _named_alike(pools[0], pools[1])
    with steps("adapters", len(set(first.names) & set(second.names))) as step:
        found = compared(first, second, step)
    if json:
        refused = [refusals(pool.refused) for pool in pools]
        print_json({**_report(one, other, found), "refused": refused})
    else:
        _print(found, all_)
    if check and not found.same:
        raise typer.Exit(1)


def _opened(place: str, allow_pickle: bool, on_bad: OnBad) -> AdapterPool:
    how: dict[str, Any] = {} if is_hub_spec(place) else {"verify": on_bad == "skip", "cache": ""}
    pool = open_pool(place, base_model="", on_bad_adapter=on_bad, allow_pickle=allow_pickle, **how)
    return checked(pool, place, on_bad, lambda adapter: adapter.check_compared())


def _named_alike(one: AdapterPool, other: AdapterPool) -> tuple[AdapterPool, AdapterPool]:
    """The two pools. If each has one adapter, the second is renamed, so that they are compared whatever their names."""
    if len(one) != 1 or len(other) != 1 or one.names == other.names:
        return one, other
    [renamed] = (replace(adapter, name=one.names[0]) for adapter in other)
    return one, AdapterPool([renamed])


def _report(one: str, other: str, found: Differences) -> dict[str, Any]:
    return {
        "pools": [one, other],
        "same": found.same,
        "only": list(map(list, found.only)),
        "renamed": found.renamed,
        "shared": [
            {
                "name": each.name,
                "kind": each.kind,
                "relative": _number(each.relative),
                "cosine": _number(each.cosine),
                "modules": each.modules,
                "modules_only": list(each.only),
            }
            for each in found.shared
        ],
    }


def _print(found: Differences, all_: bool) -> None:
    listed = [each for each in found.shared if all_ or not each.same]
    if listed:
        table = plain_table("adapter", "", ">relative difference", ">cosine", ">modules")
        for each in listed:
            beside = "".join(
                f", {count} only in {place}" for count, place in zip(each.only, "AB", strict=True) if count
            )
            table.add_row(
                Text(each.name), each.kind, _shown(each.relative), _shown(each.cosine), f"{each.modules}{beside}"
            )
        out.print(table)
    for names, sign in zip(found.only, "AB", strict=True):
        for name in names:
            to = found.renamed.get(name) if sign == "A" else None
            elsewhere = f" (the bytes of {to} in B)" if to else ""
            out.print(Text.assemble((f"only in {sign} ", "yellow"), (name, "bold"), elsewhere))
    counts = {kind: sum(each.kind == kind for each in found.shared) for kind in _KINDS}
    parts = [f"{count} {kind}" for kind, count in counts.items() if count]
    parts += [f"{len(names)} only in {place}" for names, place in zip(found.only, "AB", strict=True) if names]
    out.print(", ".join(parts), markup=False)


_KINDS = ("same bytes", "same update", "other update", "other shapes")


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _number(value: float) -> float | None:
    """The number, or None if it is not finite and JSON cannot hold it."""
    return value if math.isfinite(value) else None
