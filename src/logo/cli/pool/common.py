"""What the commands on pools share: options, opening a pool, going through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logo.cli.options import OnBad
from logo.cli.output import err, progress

if TYPE_CHECKING:
    from logo.adapters.format import Adapter
    from logo.adapters.pool import AdapterPool

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of adapters, at any depth.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR2", help="The new pool; must not exist yet. DIR is never changed.")
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read adapter_model.bin too (tensors only).")]
OnBadAdapter = Annotated[OnBad, typer.Option(help="An adapter that cannot be used: refuse the pool, or leave it out.")]
Threshold = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Two adapters are near-duplicates where the overlap of their column spaces and the cosine of their "
        "updates both reach it.",
    ),
]


def opened(folder: Path, allow_pickle: bool, on_bad: OnBad) -> AdapterPool:
    """The pool in a folder. Nothing is looked up in the cache or kept there."""
    from logo.adapters.pool import AdapterPool

    # Leaving damaged adapters out means finding them first. Otherwise whatever is read is checked as it is read.
    verify = on_bad is OnBad.SKIP
    return AdapterPool.from_directory(
        folder, on_bad_adapter=on_bad.value, allow_pickle=allow_pickle, verify=verify, cache=""
    )


@contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of so many steps on a terminal; yields what ends a step."""
    with progress(disable=not err.is_terminal) as shown:
        bar = shown.add_task(what, total=total)
        yield lambda: shown.advance(bar)


def targets(adapter: Adapter) -> list[str]:
    """The names of the modules it adapts, without their layers."""
    return sorted({path.rsplit(".", 1)[-1] for path in adapter.modules})
