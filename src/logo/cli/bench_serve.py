"""`logo bench serve`: a server under load, beside its base model alone and one prompt after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.progress import Progress, TaskID

from logo.cli.expanded import expanded
from logo.cli.load_table import described, show
from logo.cli.opening import open_engine
from logo.cli.options import EngineOptions, Json, argument, changed, rare, usual
from logo.cli.output import err, note, print_json, progress, write_json
from logo.cli.prompts import or_demo
from logo.errors import UsageError
from logo.extras import need
from logo.models import DEMO

if TYPE_CHECKING:
    from logo.bench.local_server import LocalServer
    from logo.bench.serving import Plan
    from logo.bench.wire import Ask
    from logo.engine import LoGo

SERVER = "Server"
LOAD = "Load"
TROUBLE = "Trouble on purpose"

SHOWN = 5  # differences that are named


@expanded
def serve(
    engine: EngineOptions,
    options: list[str] | None = argument(
        None, metavar="[-- OPTIONS...]", help="More options for `logo serve`.", show_default=False
    ),
    url: str | None = usual(None, "Address of a running server.", "starts `logo serve` itself"),
    api_key: str | None = rare(None, "API key of that server.", envvar="LOGO_API_KEY", panel=SERVER),
    arms: str = usual("logo,base,one-by-one", "What is measured."),
    rounds: int = usual(1, "Rounds over all arms.", min=1),
    requests: int = usual(500, "Number of different requests.", min=1),
    duration: float | None = usual(
        None, "Repeat the requests for this many seconds.", "each once", metavar="SECONDS", min=1.0
    ),
    concurrency: int = usual(64, "Concurrent requests.", min=1),
    stream_share: float = rare(0.5, "Share of the requests that are streamed.", min=0.0, max=1.0, panel=LOAD),
    prompts: Path | None = usual(
        None,
        "File with one prompt per line, as text or as a JSON object with `prompt`.",
        "the demo's held-out rows; other models, and --url: requests of many kinds",
        metavar="FILE",
    ),
    max_new_tokens: str = usual("8..64", "Longest answer in tokens, drawn from this range.", metavar="N|N..M"),
    seed: int = rare(0, "Random seed of the order, the lengths and all other draws.", panel=LOAD),
    timeout: float = rare(300.0, "Time limit of one request.", metavar="SECONDS", min=0.1, panel=LOAD),
    churn: float | None = rare(
        None, "Add an adapter and remove it again every this many seconds.", metavar="SECONDS", min=0.01, panel=TROUBLE
    ),
    churn_adapter: Path | None = rare(None, "The adapter of --churn.", metavar="DIR", panel=TROUBLE),
    hang_up: float = rare(
        0.0,
        "Share of the clients that close the connection at the first token or later.",
        metavar="SHARE",
        min=0.0,
        max=1.0,
        panel=TROUBLE,
    ),
    verify: str = usual("0", "Compare this many answers with `LoGo.generate`, token for token.", metavar="N|all"),
    save: Path | None = usual(None, "Write all measurements to this JSON file.", False, metavar="FILE"),
    json: Json = False,
) -> None:
    """Measure a server under load from many HTTP clients: throughput, latency, errors.

    The same requests go to LoGo, to the base model alone and, one by one, to LoGo without a server. The exit code
    is 1 if a request fails, if a compared answer differs, or if the server does not free its memory.

    Example: `logo bench serve --requests 100 --verify all`
    """
    need("a benchmark of servers", "httpx")
    from logo.bench.load import Endpoint
    from logo.bench.serving import Plan, run_bench
    from logo.bench.watch import Churn

    if (churn is None) != (churn_adapter is None):
        raise UsageError("--churn and --churn-adapter go together: give both or neither")
    if url is not None and options:
        raise UsageError(f"{' '.join(options)}: only for a server that this command starts; leave them or --url out")
    compared = _count(verify, requests)
    engine, base_model = _models(engine, url, compared)
    asks = _asks(prompts, base_model, requests, _range(max_new_tokens), stream_share, hang_up, seed)
    passing = None
    if churn is not None and churn_adapter is not None:
        passing = Churn(churn, churn_adapter.resolve(), f"bench-{churn_adapter.resolve().name}")
    plan = Plan(tuple(asks), _arms(arms), concurrency, duration, rounds, compared, passing, timeout)
    place = Endpoint(url.rstrip("/"), api_key) if url is not None else _own(engine, plan, options or (), api_key)

    def opened() -> LoGo:
        assert base_model is not None  # `_models` has one wherever a model is opened here
        return open_engine(engine, base_model)

    with progress(disable=not err.is_terminal) as shown:
        results = run_bench(plan, place, opened, api_key=api_key, begin=_Steps(shown).begin)
    about = {"url": url, "base_model": base_model, "seed": seed, **described(plan, url is None)}
    content = {"about": about, **results.as_dict()}
    if json:
        print_json(content)
    else:
        show(results, plan, url is None)
    if save is not None:
        write_json(save, content)
        note(f"written: {save}")
    for problem in results.problems:
        err.print(f"[red]logo: problem:[/red] {escape(problem)}")
    for difference in results.differences[:SHOWN]:
        err.print(f"  {difference}", markup=False)
    if results.problems:
        raise typer.Exit(1)


# -- what was asked for -----------------------------------------------------------------------------------------


def _count(text: str, requests: int) -> int:
    if text == "all":
        return requests
    if not text.isdecimal():
        raise UsageError(f"--verify {text!r}: expected a number or 'all'")
    return min(int(text), requests)


def _models(engine: EngineOptions, url: str | None, compared: int) -> tuple[EngineOptions, str | None]:
    """The options and the base model to open here; None: a server that is there already has its own."""
    if compared and url is not None and engine.base_model is None:
        raise UsageError("--verify: name the server's base model (--base-model), which is opened here to compare with")
    if compared:
        if engine.dtype not in (None, "float32"):
            raise UsageError(f"--verify compares tokens, which takes float32; leave out --dtype {engine.dtype}")
        engine = replace(engine, dtype="float32")
    if url is not None and engine.base_model is None:
        return engine, None
    base_model = or_demo(engine)
    return replace(engine, base_model=base_model), base_model


def _range(text: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    if not low.isdecimal() or (dots and not high.isdecimal()) or not 0 < int(low) <= int(high or low):
        raise UsageError(f"--max-new-tokens {text!r}: expected a number, or a range such as 8..64")
    return int(low), int(high or low)


def _arms(text: str) -> tuple[Any, ...]:
    from logo.bench.serving import ARMS

    arms = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not arms:
        raise UsageError(f"--arms {text!r}: expected some of {', '.join(ARMS)}, with commas between them")
    return arms


def _asks(
    prompts: Path | None,
    base_model: str | None,
    requests: int,
    max_tokens: tuple[int, int],
    stream_share: float,
    hang_up: float,
    seed: int,
) -> list[Ask]:
    from logo.bench.traffic import make_asks, mixed_prompts, read_asked
    from logo.demo import heldout

    if prompts is not None:
        texts = read_asked(prompts)
    elif base_model == DEMO:
        texts = [row["context"] for rows in heldout().values() for row in rows]
    else:
        texts = mixed_prompts(seed)
    return make_asks(
        texts, requests, max_tokens=max_tokens, stream_share=stream_share, hang_up_share=hang_up, seed=seed
    )


def _own(engine: EngineOptions, plan: Plan, options: Sequence[str], api_key: str | None) -> Callable[[], LocalServer]:
    """A function that starts a server with these options. The key is not on its command line, which others can read."""
    from logo.bench.local_server import LocalServer

    queue = max(256, plan.concurrency)  # so that no request of ours is refused
    wanted = [*as_arguments(engine), f"--max-queue={queue}", *options]
    if plan.churn is not None:
        wanted += ["--allow-adapter-changes", str(plan.churn.folder.parent)]
    return lambda: LocalServer(wanted, {} if api_key is None else {"LOGO_API_KEY": api_key})


def as_arguments(engine: EngineOptions) -> list[str]:
    """The options as they are written on a command line; those that have their default are left out."""
    values = ((flag, getattr(engine, name)) for name, flag in changed(engine).items())
    return [flag if isinstance(value, bool) else f"{flag}={value}" for flag, value in values]


class _Steps:
    """Progress bars: one for the current step, and one for each finished load."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._endless: TaskID | None = None

    def begin(self, what: str, steps: int | None) -> Callable[[], None]:
        if self._endless is not None:
            self._shown.remove_task(self._endless)
        task = self._shown.add_task(what, total=steps)
        self._endless = task if steps is None else None
        return lambda: self._shown.advance(task)
