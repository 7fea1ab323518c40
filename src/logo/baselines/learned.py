"""Methods that learn from a few labelled rows: the best adapter of a dataset, and LoraHub's weights for it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch

import numpy

from logo.baselines.method import Example, Learned, Prepared, Task, check_count, prompt_of, same_for_all
from logo.engine import LoGo
from logo.errors import DataError, UsageError, need
from logo.scoring import Scored, encoded

# Number of adapters that one call scores, each alone: the tensors of so many are in memory at once.
_TOGETHER = 32
_ROWS_PER_PASS = 8


@dataclass(frozen=True, kw_only=True)
class BestSingle(Learned):
    """The adapter that does best on training rows of the dataset: most exact matches, then the lower loss.

    Attributes:
        rows: number of labelled rows, drawn from the training rows with the seed; all, if there are fewer.
    """

    name: ClassVar[str] = "best-single"

    rows: int = 16

    def __post_init__(self) -> None:
        check_count("train rows", self.rows)

    @property
    def picks(self) -> int:
        return 1

    def learn(self, logo: LoGo, task: Task) -> dict[str, Any]:
        rows = labelled(self.name, task, self.rows, self.seed)
        table = each_alone(logo, task, rows, task.candidates(logo))
        return {"adapter": best_of(table), "rows": len(rows), "table": table}

    def recall(self, learnt: Mapping[str, Any]) -> Prepared:
        return Prepared(same_for_all({learnt["adapter"]: 1.0}), dict(learnt))


@dataclass(frozen=True, kw_only=True)
class LoraHub(Learned):
    """LoraHub (arXiv 2307.13269): random adapters, with weights for the dataset found on a few rows without gradients.

    Minimises `objective` by nevergrad's NGOpt from all zeros. The weights are those of the exact mixture; LoraHub's own
    code sums A and B separately.

    Attributes:
        k: adapters drawn from the pool with the seed.
        rows: labelled rows, drawn from the training rows with the seed.
        budget: number of mixtures to try.
        penalty: see `objective`.
        bound: weights are between `-bound` and `bound`.
    """

    name: ClassVar[str] = "lorahub"

    k: int = 20
    rows: int = 5
    budget: int = 40
    penalty: float = 0.05
    bound: float = 1.5

    def __post_init__(self) -> None:
        for option, value in (("k", self.k), ("train rows", self.rows), ("lorahub budget", self.budget)):
            check_count(option, value)

    @property
    def picks(self) -> int:
        return self.k

    def learn(self, logo: LoGo, task: Task) -> dict[str, Any]:
        pairs = [_tokens(logo, task, row) for row in labelled(self.name, task, self.rows, self.seed)]
        among = task.candidates(logo)
        names = sorted(random.Random(self.seed).sample(among, min(self.k, len(among))))

        def loss(weights: Sequence[float]) -> float:
            mixtures = [dict(zip(names, weights, strict=True))] * len(pairs)
            return objective(logo.score_pairs(pairs, mixtures, batch_size=_ROWS_PER_PASS), weights, self.penalty)

        weights, found = minimise(loss, len(names), self.budget, self.bound, self.seed)
        record = {"seed": self.seed, "rows": len(pairs), "budget": self.budget, "loss": found, "drawn": names}
        return record | {"weights": dict(zip(names, weights, strict=True))}

    def recall(self, learnt: Mapping[str, Any]) -> Prepared:
        mixture = {name: weight for name, weight in learnt["weights"].items() if weight}
        return Prepared(same_for_all(mixture), dict(learnt))


def each_alone(logo: LoGo, task: Task, rows: Sequence[Example], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Adapter -> its share of `exact_match` and mean `nll` on labelled rows, teacher-forced and alone.

    Raises:
        DataError: a row that cannot be scored.
    """
    table: dict[str, dict[str, float]] = {}
    for start in range(0, len(names), _TOGETHER):
        some = names[start : start + _TOGETHER]
        scored = [_score(logo, task, row, [{name: 1.0} for name in some]) for row in rows]
        for i, name in enumerate(some):
            column = [row[i] for row in scored]
            matches = sum(value.exact_match for value in column) / len(column)
            table[name] = {"exact_match": matches, "nll": sum(value.nll for value in column) / len(column)}
    return table


def best_of(table: Mapping[str, Mapping[str, float]]) -> str:
    """The adapter with most exact matches; among equal ones that with the lower loss."""
    return min(table, key=lambda name: (-table[name]["exact_match"], table[name]["nll"]))


def objective(scored: Sequence[Scored], weights: Sequence[float], penalty: float) -> float:
    """What LoraHub minimises: `loss / rows + penalty · mean |w|`.

    `loss` is the mean over the tokens of all rows, as a language model's loss of one batch is. The authors' code
    (`default_get_loss` of sail-sg/lorahub) divides it once more by the number of rows, so the penalty weighs the more
    the more rows there are.
    """
    loss = sum(value.nll * value.tokens for value in scored) / sum(value.tokens for value in scored)
    return loss / len(scored) + penalty * sum(map(abs, weights)) / len(weights)


def labelled(method: str, task: Task, count: int, seed: int) -> list[Example]:
    """`count` of the training rows, drawn with the seed; all of them if there are fewer.

    Raises:
        DataError: the task has no training rows.
    """
    if not task.train:
        raise DataError(
            f"method {method!r} learns from labelled rows, but dataset {task.name!r} has no train rows: expected some"
        )
    return random.Random(seed).sample(list(task.train), min(count, len(task.train)))


def minimise(
    loss: Callable[[Sequence[float]], float], size: int, budget: int, bound: float, seed: int
) -> tuple[list[float], float]:
    """The weights that nevergrad's NGOpt recommends after `budget` trials, and their loss.

    Raises:
        MissingLibrary: nevergrad is not installed.
    """
    need("method 'lorahub'", "nevergrad")
    with _repeatable(seed), warnings.catch_warnings():
        import nevergrad

        warnings.simplefilter("ignore")  # nevergrad warns about optimisers that it has chosen itself
        space: Any = nevergrad.p.Array(init=[0.0] * size, lower=[-bound] * size, upper=[bound] * size)
        space.random_state.seed(seed)
        optimiser = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
        found = optimiser.minimize(lambda weights: loss([float(w) for w in weights]))
    weights = [float(w) for w in found.value]
    return weights, loss(weights)


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Within the block, all draws of nevergrad depend on the seed. Some of its optimisers draw from numpy's global
    generator, or from one that cma seeds by the clock."""
    state = numpy.random.get_state()  # before the imports: that of nevergrad draws, too
    from cma import options_parameters as cma
    from nevergrad.optimization import metamodel

    numpy.random.seed(seed)
    by_seed = patch.dict(cma.cma_default_options, seed=str(seed + 1))  # 0 means the clock
    try:
        with by_seed, patch.object(metamodel, "float", _as_float, create=True):
            yield
    finally:
        numpy.random.set_state(state)


def _as_float(value: Any) -> float:
    """An array of one number as a float. nevergrad 1.0 passes such arrays to `float`, and numpy no longer allows it."""
    return float(numpy.asarray(value).reshape(-1)[0])


def _score(logo: LoGo, task: Task, row: Example, mixtures: Sequence[dict[str, float]]) -> list[Scored]:
    with _named(task):
        return logo.score(prompt_of(row), _gold(row), mixtures)


def _tokens(logo: LoGo, task: Task, row: Example) -> tuple[list[int], list[int]]:
    """The token ids of a row's prompt and of its gold text, as they are scored."""
    with _named(task):
        prompt, gold = encoded(logo.prompts, prompt_of(row), _gold(row))
        return list(prompt.ids), gold


def _gold(row: Example) -> str:
    return row.completion if isinstance(row.completion, str) else row.completion[0]


@contextmanager
def _named(task: Task) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise DataError(f"dataset {task.name!r}: a train row cannot be scored: {error}") from error
