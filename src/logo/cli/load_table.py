"""How `logo bench serve` shows what it measured: arms side by side, one line per number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from logo.cli.output import note, screen

if TYPE_CHECKING:
    from logo.bench.figures import Percentiles, Summary
    from logo.bench.serving import Plan, Results

WIDTH = 120


def show(results: Results, plan: Plan, own: bool) -> None:
    """Prints the table, the ratios, how many answers were compared, and what was done."""
    screen(WIDTH).print(_table(results, plan))
    if results.ratios:
        note("output tokens (requests) per second, " + _ratios(results.ratios))
    if plan.verify:
        same = results.verified - len(results.differences)
        passing = f" ({results.verified_with_passing} with the passing adapter)" if plan.churn is not None else ""
        note(f"{same} of {results.verified} answers equal `LoGo.generate`, token for token{passing}")
    about = described(plan, own)
    note(
        f"{about['requests']} different requests, {about['streamed']} streamed · {about['concurrency']} at a time · "
        f"one-by-one: {about['one_by_one']}"
    )


def described(plan: Plan, own: bool) -> dict[str, object]:
    """The requested load as JSON; `own`: whether the bench started the server itself."""
    return {
        "requests": len(plan.asks),
        "streamed": sum(ask.stream for ask in plan.asks),
        "hanging_up": sum(ask.hang_up is not None for ask in plan.asks),
        "concurrency": plan.concurrency,
        "duration": plan.seconds,
        "rounds": plan.rounds,
        "one_by_one": "LoGo.generate with batch size 1" if own else "through the server, one request at a time",
        "churn_seconds": None if plan.churn is None else plan.churn.seconds,
    }


def _table(results: Results, plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("")
    arms = list(results.loads)
    for arm in arms:
        table.add_column(arm, justify="right")
    summaries = [results.summary(arm) for arm in arms]

    def row(name: str, of: Callable[[Summary], str]) -> None:
        table.add_row(name, *map(of, summaries))

    row("requests", lambda s: f"{s.requests:,}")
    row("answered", lambda s: f"{s.ok:,}")
    row("errors", lambda s: " · ".join(f"{count} × {kind}" for kind, count in s.errors.items()) or "0")
    if any(summary.hung_up for summary in summaries):
        row("hung up on purpose", lambda s: f"{s.hung_up:,}")
    row("wall seconds", lambda s: f"{s.seconds:,.1f}")
    row("requests/s", lambda s: f"{s.requests_per_second:,.2f}")
    row("output tokens/s", lambda s: f"{s.output_tokens_per_second:,.1f}")
    row("prompt tokens/s", lambda s: f"{s.prompt_tokens_per_second:,.1f}")
    row("ms to first token, p50 / p90 / p99", lambda s: _milliseconds(s.first_token))
    row("ms between tokens, p50 / p90 / p99", lambda s: _milliseconds(s.inter_token))
    row("ms end to end, p50 / p90 / p99", lambda s: _milliseconds(s.end_to_end))
    spent = [[load.client_cpu or 0.0 for load in results.loads[arm]] for arm in arms]
    if any(map(any, spent)):  # if much of the wall time, the clients are the bottleneck
        table.add_row("CPU seconds of the clients", *(f"{sum(one):,.1f}" if any(one) else "-" for one in spent))
    servers: list[Mapping[str, Any] | None] = [results.loads[arm][-1].server() for arm in arms]
    if any(servers):
        table.add_row("server: MB before / most / after", *(_three(s, "resident", 1e6) for s in servers))
        if plan.seconds is not None:
            table.add_row("server: MB per minute, second half", *map(_drift, servers))
        table.add_row("server: KV blocks before / most / after", *(_three(s, "kv_blocks", 1) for s in servers))
    if plan.churn is not None:
        table.add_row("adapters added and removed", *("-" if s is None else f"{s['adapter_changes']}" for s in servers))
    return table


def _milliseconds(values: Percentiles | None) -> str:
    if values is None:
        return "-"
    return " / ".join(f"{1000 * value:,.{0 if value >= 0.1 else 1}f}" for value in (values.p50, values.p90, values.p99))


def _three(server: Mapping[str, Any] | None, name: str, unit: float) -> str:
    if server is None or server[f"{name}_after"] is None:
        return "-"
    return " / ".join(f"{server[f'{name}_{when}'] / unit:,.0f}" for when in ("before", "max", "after"))


def _drift(server: Mapping[str, Any] | None) -> str:
    drift = None if server is None else server["resident_mb_per_minute"]
    return "-" if drift is None else f"{drift:+.2f}"


def _ratios(ratios: Mapping[str, float]) -> str:
    shown = [
        f"{name} {ratios[name]:.2f} ({ratios[f'{name}_requests']:.2f})"
        for name in ("logo_vs_base", "logo_vs_one_by_one")
        if name in ratios
    ]
    return " · ".join(shown)
