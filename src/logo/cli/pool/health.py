"""`logo pool health`: a report on a pool from the logs of its server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from logo.cli.options import argument, usual
from logo.cli.output import natural_width, note, one_line, out, plain_table, print_json, screen
from logo.errors import listed
from logo.extras import need
from logo.folders import check_writable, replace_file

if TYPE_CHECKING:
    from logo.serving.traffic import Adapter, Traffic
    from logo.serving.unserved import Group

SHOWN = 40  # adapters in the table
GROUPS = 8  # of prompts
LENGTH = 60  # characters of an example


def health(
    logs: list[Path] = argument(..., metavar="LOG...", help="Logs of servers (`logo serve --log-json 2> LOG`)."),
    png: Path | None = usual(None, "Draw wins and confidence.", metavar="FILE"),
    json: bool = usual(False, "Print JSON, with every adapter."),
) -> None:
    """Report from server logs which adapters win, which never win, which always tie, and what has changed.

    If prompts were logged (`logo serve --log-prompts`), those for which the pool probably has no adapter are
    grouped by the words and spellings that they share (TF-IDF of words and runs of three characters, average linkage).
    Of more than 1000 such prompts, a random sample is grouped. Nothing is downloaded, and no model runs.

    Example: `logo pool health day.log --png day.png`
    """
    from logo.serving.traffic import read_traffic
    from logo.serving.traffic_picture import picture
    from logo.serving.unserved import groups

    if png is not None:
        need("--png", "matplotlib")
        check_writable(png.parent, "--png")
    found = read_traffic(logs)
    alike = groups(found.unserved)
    if found.first_bad is not None:
        note(f"skipped lines that are not complete JSON objects: {found.bad}, the first at {found.first_bad}")
    if png is not None:
        replace_file(png, picture(found))
        note(f"{png}")
    if json:
        print_json(_report(found, alike))
        return
    out.print(_summary(found), markup=False)
    table = _table(found)
    screen(natural_width(table)).print(table)
    for head, text in _remarks(found, alike):
        out.print(Text.assemble((f"{head} ", "yellow"), text))


def _summary(found: Traffic) -> str:
    parts = [f"adapters selected for {found.prompts} prompts in {found.hours:.1f} h"]
    if found.known:
        parts.append(f"{found.unsure} unsure ({found.unsure / found.known:.0%})")
    if found.forced:
        parts.append(f"{found.forced} more prompts named their adapters")
    return ", ".join(parts)


def _table(found: Traffic) -> Table:
    """The adapters that won at least once, by number of wins."""
    table = plain_table("adapter", ">wins", ">share", ">first half", ">second half", ">weight", ">confidence")
    winners = [adapter for adapter in found.adapters if adapter.wins]
    for adapter in winners[:SHOWN]:
        table.add_row(
            Text(one_line(adapter.name)),
            str(adapter.wins),
            f"{adapter.wins / found.prompts:.1%}",
            *(f"{share:.1%}" for share in adapter.halves),
            f"{adapter.weight:.2f}",
            "-" if adapter.confidence is None else f"{adapter.confidence:.2f}",
        )
    if len(winners) > SHOWN:
        table.add_row(Text(f"and {len(winners) - SHOWN} more", style="dim"))
    return table


def _remarks(found: Traffic, alike: Sequence[Group]) -> Iterator[tuple[str, str]]:
    """Findings: a word for each, and a line."""
    if never := _never(found):
        names = listed([one_line(name) for name in never], 8)
        yield "never won", f"{len(never)} of {len(found.adapters)} adapters: {names}"
    if not found.pool_known:
        yield (
            "unknown pool",
            "no line lists the pool's adapters (the server's first line does); only those named in the log are listed",
        )
    for tie in found.ties:
        one, other = map(one_line, tie.adapters)
        yield "always tie", f"{one}, {other}: side by side in {tie.tied} of the {tie.won} prompts that either won"
    for adapter in _moved(found):
        first, second = adapter.halves
        yield "moved", f"{one_line(adapter.name)}: won {first:.1%} of the first half, {second:.1%} of the second"
    if found.unsure_moved:
        first, second = found.unsure_halves
        yield "moved", f"unsure: {first:.1%} of the first half, {second:.1%} of the second"
    if found.unsure and not found.logged:
        yield "no adapter", f"for {found.unsure} prompts, which were not logged (logo serve --log-prompts)"
    for group in alike[:GROUPS]:
        examples = " · ".join(one_line(text, LENGTH) for text in group.examples)
        yield "no adapter", f"for {group.size} prompts such as: {examples}"
    if alone := len(found.unserved) - sum(group.size for group in alike[:GROUPS]):
        of = (
            f" in a sample of {len(found.unserved)} out of {found.logged}" if len(found.unserved) < found.logged else ""
        )
        yield "no adapter", f"for {alone} other prompts{of}"


def _never(found: Traffic) -> list[str]:
    return sorted(adapter.name for adapter in found.adapters if not adapter.wins)


def _moved(found: Traffic) -> list[Adapter]:
    """Adapters whose share of wins has changed, largest change first."""
    moved = [adapter for adapter in found.adapters if adapter.moved]
    return sorted(moved, key=lambda one: -abs(one.halves[1] - one.halves[0]))


def _report(found: Traffic, alike: Sequence[Group]) -> dict[str, Any]:
    """The whole report, for JSON."""
    return {**asdict(found), "never_won": _never(found), "unserved": [asdict(group) for group in alike]}
