"""Several processes, on this machine or on a Ray cluster, from the options of a command."""

from __future__ import annotations

import functools
import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from logo.adapters.sources import pool_sources, spec_of
from logo.cli.output import note
from logo.cluster.processes import Expected, Layout, usual_address
from logo.models import resolve_base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from logo.cli.options import WorkerOptions
    from logo.evaluation.answer import Opening


def expected(layout: Layout, pool: str, base_model: str, model_dir: str) -> Expected:
    """What every process has to find: the pool that opens here. Says that they start."""
    from logo.adapters.pool import open_pool

    note(f"starting {layout.count} processes {layout}")
    return Expected.of(functools.partial(open_pool, pool, base_model, model_dir))


def anywhere(opening: Opening) -> Opening:
    """The same with absolute paths, for a process with another working directory. A text that may also be a name on the
    Hub is a path if it exists."""
    model_dir = opening.options.get("model_dir")
    sources = pool_sources(opening.pool, opening.base_model, model_dir)
    paths = {"model_dir": os.path.abspath(model_dir or ".")}
    if opening.options.get("encoder") is not None:
        paths["encoder"] = absolute(opening.options["encoder"])
    return replace(
        opening,
        base_model=absolute_base(opening.base_model, model_dir),
        pool=spec_of(sources),
        options={**opening.options, **paths},
    )


def absolute_base(name: str, model_dir: str | None) -> str:
    """A base model, which becomes an absolute path if it is a path that exists, and no other name of a base model."""
    return absolute(name) if resolve_base(name, model_dir) == name else name


def absolute(name: str) -> str:
    """A name, which becomes an absolute path if it is a path that exists."""
    return os.path.abspath(name) if name and os.path.exists(name) else name


@contextmanager
def in_workers(opening: Opening, options: WorkerOptions, answer: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    """The facts of what workers have opened, and what divides blocks of rows among them; `answer`: what one of them
    does with a block."""
    from logo.cluster import workers

    layout = Layout(options.workers or 1, options.ray or usual_address())
    there = anywhere(opening)
    pool = expected(layout, str(there.pool), there.base_model, model_dir=there.options["model_dir"])
    with workers.in_workers(layout, pool, there, answer) as opened:
        yield opened
