"""LoRAuter (arXiv 2601.21795): prompts are routed to tasks, and tasks to the adapters that do best on them.

    validation rows of a task -> the mean of their embeddings, and every adapter tried on them -> the best one
    prompt -> its k nearest tasks -> their adapters, mixed by how near the tasks are

Tasks are known by a few labelled rows, and nothing is known of the adapters' training. Every adapter is evaluated on
every task, so the best adapter of any part of a pool follows from the same table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from logo.baselines.embedding import DEFAULT_MODEL
from logo.baselines.learned import best_of, each_alone
from logo.baselines.method import Example, Method, Need, Prepared, Task, check_count, key_of, ranked
from logo.baselines.retrieval import Embedding
from logo.calls import Calls
from logo.errors import DataError, UsageError
from logo.prompts import Conversation
from logo.selection import Selection

# Adapter -> its share of `exact_match` and its mean `nll` on the validation rows of one task.
Table = Mapping[str, Mapping[str, float]]

# Engine -> (task, digest of its rows) -> table. Kept, because all datasets of a run need the same tables.
_TRIED: WeakKeyDictionary[Calls, dict[tuple[str, str], Table]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class LoRAuter(Embedding):
    """LoRAuter (arXiv 2601.21795): the adapters that do best on the tasks most similar to the prompt.

    Attributes:
        validation: task -> its labelled rows.
        rows: number of rows of each task, for its embedding and for evaluating adapters.
        embedding_model, instruction: as in retrieval.
        k: tasks whose adapters are mixed.
        temperature: of the softmax over the tasks' cosine similarities, which gives their weights.
        tables: known results by task; adapters are evaluated on tasks without one that holds all candidates.
    """

    name: ClassVar[str] = "lorauter"
    needs: ClassVar[frozenset[Need]] = frozenset({"validation"})

    validation: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    rows: int = 8
    embedding_model: str = DEFAULT_MODEL
    instruction: str = ""
    k: int = 3
    temperature: float = 0.2
    tables: Mapping[str, Table] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("validation rows", self.rows)
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"lorauter temperature: expected a number above 0, found {self.temperature}")

    @property
    def labelled(self) -> Sequence[Example]:
        return [row for rows in self.validation.values() for row in rows[: self.rows]]

    def as_dict(self) -> dict[str, Any]:
        plain = Method.as_dict(replace(self, validation={}, tables={}))
        del plain["tables"]
        return {**plain, "validation": {"tasks": list(self.validation), "sha256": self._digest(list(self.validation))}}

    def tried(self, logo: Calls, task: str) -> Table:
        """The results of every adapter of the pool alone on a task's validation rows; the long part of the work.

        Raises:
            DataError: a row that cannot be scored.
        """
        known = _TRIED.setdefault(logo, {})
        key = task, self._digest([task])
        if key not in known or set(known[key]) != set(logo.names):
            known[key] = each_alone(logo, Task(task), self.validation[task][: self.rows], logo.names)
        return known[key]

    def knowing(self, tables: Mapping[str, Table]) -> LoRAuter:
        """The same method with these tables, whose tasks need no evaluation."""
        return replace(self, tables=tables)

    def prepare(self, logo: Calls, task: Task) -> Prepared:
        if not self.validation:
            raise DataError(
                f"method {self.name!r} needs labelled rows of tasks, found none: expected a folder "
                "(--validation-rows DIR) with TASK.jsonl for each task"
            )
        among = task.candidates(logo)
        best: dict[str, dict[str, Any]] = {}
        for name in self.validation:
            table = self.tables.get(name, {})
            if not table.keys() >= set(among):
                table = self.tried(logo, name)
            adapter = best_of({one: table[one] for one in among})
            best[name] = {"adapter": adapter, "rows": len(self.validation[name][: self.rows]), **table[adapter]}
        groups = [tuple(row.context for row in rows[: self.rows]) for rows in self.validation.values()]
        tasks = torch.nn.functional.normalize(self.means(logo, groups), dim=-1)
        adapters = [found["adapter"] for found in best.values()]

        def select(prompts: Sequence[str | Conversation], batch_size: int) -> list[Selection]:
            return [self._mixed(adapters, similarities) for similarities in self.embedded(logo, prompts) @ tasks.T]

        return Prepared(select, {"embedding_model": self.embedding_model, "tasks": best})

    def _mixed(self, adapters: Sequence[str], similarities: torch.Tensor) -> Selection:
        """The selection for a prompt, from its similarities (tasks,) and the tasks' adapters. An adapter's score is the
        similarity of its nearest task."""
        order = torch.sort(similarities, descending=True, stable=True).indices.tolist()
        near = order[: self.k]
        weights: dict[str, float] = {}
        for i, share in zip(near, (similarities[near] / self.temperature).softmax(0).tolist(), strict=True):
            weights[adapters[i]] = weights.get(adapters[i], 0.0) + share
        scores: dict[str, float] = {}
        for i in order:
            scores.setdefault(adapters[i], float(similarities[i]))
        return ranked(weights, scores)

    def _digest(self, tasks: Sequence[str]) -> str:
        """The SHA-256, in hex, of the rows of these tasks that are used."""
        rows = {task: [[key_of(row), row.completion] for row in self.validation[task][: self.rows]] for task in tasks}
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
