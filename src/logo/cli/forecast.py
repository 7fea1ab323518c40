"""`logo eval run --estimate`: what the run would take, from what is known before anything is fetched or written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.survey import check_folder
from logo.cli.evaluate_options import Asked
from logo.cli.opening import device_of
from logo.cli.options import EngineOptions
from logo.cli.output import out, print_json, size
from logo.errors import HubError, LoGoError
from logo.models import load_config, load_tokenizer, model_sizes, resolve_base
from logo.pools import pool_place
from logo.prompts import Conversation, read, text_of

LABEL = 12  # columns

if TYPE_CHECKING:
    from logo.evaluation.forecast import Download, Forecast, Hours, Memory
    from logo.evaluation.jobs import Job
    from logo.evaluation.session import Session


def forecast(asked: Asked, jobs: Sequence[Job], opened: Callable[[], Session]) -> Forecast:
    """The estimate of downloads, memory and time for these jobs.

    Args:
        opened: opens engine and session; called only if nothing has to be fetched for it.
    """
    from logo.evaluation.forecast import Download, Forecast, timed

    engine, base_model = asked.engine, asked.base_model
    source = resolve_base(base_model, engine.model_dir)
    named = base_model if Path(source).is_dir() else source
    try:
        found = model_sizes(source)
        base = Download(named, found.total, found.missing)
    except HubError as error:
        base = Download(named, reason=str(error))
    pool, sizes = _pool(engine, base_model)
    memory, memory_reason = _memory(asked, jobs, sizes, base.missing == 0)
    here = base.missing == 0 and pool.missing == 0
    return Forecast(
        rows={job.dataset: len(job.places) for job in jobs},
        base_model=base,
        adapters=pool,
        memory=memory,
        hours=timed(opened(), jobs) if here else None,
        memory_reason=memory_reason,
        hours_reason="" if here else "rows can only be timed if base model and adapters are on this machine",
    )


def _pool(engine: EngineOptions, base_model: str) -> tuple[Download, Sequence[int]]:
    from logo.adapters.sizes import pool_sizes, weight_sizes
    from logo.evaluation.forecast import Download

    place = pool_place(engine.adapters, base_model, engine.model_dir)
    for one in place.places:
        if one.kind == "folder":
            check_folder(Path(one.source))
    named = engine.adapters or (place.spec if place.on_hub else Path(place.spec).name)
    try:
        sizes = pool_sizes(place.places, allow_pickle=engine.allow_pickle)
    except HubError as error:
        return Download(named, reason=str(error)), ()
    return Download(named, sizes.total, sizes.missing), weight_sizes(sizes)


def _memory(asked: Asked, jobs: Sequence[Job], adapters: Sequence[int], here: bool) -> tuple[Memory | None, str]:
    from logo.evaluation.forecast import memory_of

    engine, base_model, run = asked.engine, asked.base_model, asked.run
    try:
        config = load_config(base_model, model_dir=engine.model_dir)
    except LoGoError as error:
        return None, str(error)
    dtype = engine.dtype or ("float32" if asked.official else "auto")
    if dtype == "auto":
        own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        dtype = "float32" if device_of(engine.device) == "cpu" else own
    prompts = [job.rows[place].prompt for job in jobs for place in job.places]
    tokens, exact = _longest(prompts, base_model, engine.model_dir, here)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or tokens + run.max_new_tokens
    found = memory_of(
        config,
        dtype,
        rows=min(run.batch_size, len(prompts)),
        tokens=min(tokens + run.max_new_tokens, context),
        exact=exact,
        adapters=adapters,
        budget=None if engine.adapter_memory_gb is None else int(engine.adapter_memory_gb * 1e9),
        k=len(adapters) if asked.method is not None and asked.method.whole_pool else asked.k,
    )
    return found, ""


def _longest(prompts: Sequence[str | Conversation], base_model: str, model_dir: str, here: bool) -> tuple[int, bool]:
    """Tokens of the longest prompt, and whether they were counted: a tokenizer that is not here is not fetched, and no
    text has more tokens than bytes."""
    if not here:
        return max((len(text_of(prompt).encode()) for prompt in prompts), default=0), False

    tokenizer = load_tokenizer(base_model, model_dir=model_dir)
    return max((len(read(tokenizer, prompt)) for prompt in prompts), default=0), True


def show(found: Forecast, *, json: bool) -> None:
    """Prints the forecast, as JSON or as lines."""
    if json:
        print_json(_plain(found))
        return
    rows = sum(found.rows.values())
    lines = [
        ("rows", f"{rows:,} in {len(found.rows)} {'dataset' if len(found.rows) == 1 else 'datasets'}"),
        ("base model", _download(found.base_model)),
        ("adapters", _download(found.adapters)),
        *(_memory_lines(found.memory) if found.memory else [("memory", f"not known: {found.memory_reason}")]),
        ("time", _time(found.hours) if found.hours else f"not known: {found.hours_reason}"),
    ]
    for name, text in lines:
        out.print(f"{name:<{LABEL}}{text}", markup=False)


def _plain(found: Forecast) -> dict[str, Any]:
    plain = asdict(found)
    if found.memory is not None:
        plain["memory"]["total"] = found.memory.total
    return plain


def _download(found: Download) -> str:
    if found.total is None or found.missing is None:
        return f"{found.source}: size not known: {found.reason}"
    rest = f"{size(found.missing)} to download" if found.missing else "nothing to download"
    return f"{found.source}: {size(found.total)}, {rest}"


def _memory_lines(memory: Memory) -> list[tuple[str, str]]:
    most = "" if memory.exact else "at most "
    shape = f"{memory.rows} {'row' if memory.rows == 1 else 'rows'} of {most}{memory.tokens:,} tokens"
    lines = [
        ("memory", f"about {size(memory.total)}, besides what computing needs for a moment:"),
        ("", f"{size(memory.weights)} weights ({memory.parameters:,} parameters in {memory.dtype})"),
        ("", f"{size(memory.keys_and_values)} keys and values ({shape})"),
    ]
    if memory.adapters is None or memory.mixed is None:
        return [*lines, ("", "adapters: not known")]
    return [
        *lines,
        ("", f"{size(memory.adapters)} adapters that stay there (--adapter-memory-gb)"),
        ("", f"{size(memory.mixed)} adapters that one batch mixes, at most"),
    ]


def _time(hours: Hours) -> str:
    once = f", {_duration(hours.once)} of preparing once" if hours.once >= 0.05 else ""
    learning = f", {_duration(hours.learning)} of preparing for each dataset" if hours.learning >= 0.05 else ""
    return (
        f"about {_duration(hours.seconds)}: {_duration(hours.row)} per row, from {hours.timed} rows timed"
        f"{once}{learning}, {_duration(hours.loading)} of loading"
    )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
