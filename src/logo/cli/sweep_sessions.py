"""The sessions that answer the cells of `logo eval sweep`: one engine after the other, here or in other processes."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from logo.backends.cluster import Layout
from logo.cli.evaluate import resolved
from logo.cli.evaluate_options import RowOptions
from logo.cli.expanded import command_line
from logo.cli.opening import open_base
from logo.cli.options import EngineOptions
from logo.cli.places import absolute, anywhere, everywhere
from logo.cli.workers import opened

if TYPE_CHECKING:
    from logo.engine import LoGo
    from logo.evaluation.session import Evaluation, Session
    from logo.evaluation.sweep.running import Cell
    from logo.evaluation.workers import Answerer
    from logo.selection.settings import SelectionSettings


class CellSessions:
    """Sessions of cells on one base model and pool; only the last engine is kept."""

    def __init__(self, options: EngineOptions, rows: RowOptions, base_model: str, command: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        self._command = command
        self._options, self._rows, self._base_model = options, rows, base_model
        self._base = open_base(options, base_model)
        self._loading = time.perf_counter() - started
        self._settings: SelectionSettings | None = None
        self._logo: LoGo | None = None

    def __call__(self, cell: Cell) -> Session:
        from logo.evaluation.identity import pool_digests
        from logo.evaluation.session import Session
        from logo.mixing import EXACT

        logo = self._engine(cell)
        logo.merge = EXACT if cell.method is None else cell.method.merging
        return Session(
            logo,
            self._base_model,
            pool=pool_digests(logo),
            seed=cell.seed,
            batch_size=self._rows.batch_size,
            max_new_tokens=self._rows.max_new_tokens,
            generation={"stop_at_newline": self._rows.generation_early_stop},
            options={
                "base_model": self._base_model,
                **asdict(self._rows),
                **cell.options,
                **resolved(logo),
                "command": self._command,
            },
            loading=self._loading,
            method=cell.method,
        )

    def _engine(self, cell: Cell) -> LoGo:
        if self._logo is None or self._settings != cell.settings:
            self._logo = None  # frees its memory before the next one is made
            options = replace(self._options, n_selected_modules=cell.options["n_selected_modules"])
            self._logo = self._base.engine(options, cell.settings)
            self._settings = cell.settings
        return self._logo


class CellsInWorkers:
    """Sessions of cells in processes that have the base model and the pool open."""

    def __init__(self, layout: Layout, options: EngineOptions, rows: RowOptions, base_model: str, first: Cell) -> None:
        from logo.evaluation.workers import facts_of

        self._rows, first = rows, _anywhere(first)
        open_ = functools.partial(_answerer, everywhere(options), rows, absolute(base_model), command_line())
        self.workers = opened(layout, options, base_model, open_, functools.partial(facts_of, key=first))

    def __call__(self, cell: Cell) -> Evaluation:
        from logo.evaluation.workers import InWorkers, facts_of

        there = _anywhere(cell)
        return InWorkers(
            self.workers,
            self.workers.ask(facts_of, there),
            key=there,
            seed=cell.seed,
            batch_size=self._rows.batch_size,
            max_new_tokens=self._rows.max_new_tokens,
            method=cell.method,
        )


def _anywhere(cell: Cell) -> Cell:
    return replace(cell, method=anywhere(cell.method))


def _answerer(options: EngineOptions, rows: RowOptions, base_model: str, command: Mapping[str, Any]) -> Answerer:
    """The sessions that a worker process opens."""
    from logo.evaluation.workers import Answerer

    return Answerer(CellSessions(options, rows, base_model, command))
