"""`lorahub` (arXiv 2307.13269): random adapters, with weights for a dataset found on a few rows without gradients."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy

from logo.baselines.best_single import labelled
from logo.baselines.method import Prepared, Task, register_method, same_for_all
from logo.errors import need
from logo.scoring import Scored

if TYPE_CHECKING:
    from logo.engine import LoGo

_ROWS_PER_PASS = 8


@register_method(needs="train")
def lorahub(
    logo: LoGo,
    task: Task,
    *,
    k: int = 20,
    rows: int = 5,
    budget: int = 40,
    penalty: float = 0.05,
    bound: float = 1.5,
    seed: int = 0,
) -> Prepared:
    """`k` adapters drawn with the seed, and the weights between `-bound` and `bound` that minimise `objective` on
    `rows` training rows, by nevergrad's NGOpt from all zeros in `budget` trials. The weights are those of the exact
    mixture; LoraHub's own code sums A and B separately.

    Raises:
        MissingLibrary: nevergrad is not installed.
        DataError: there are no training rows, or one cannot be scored.
    """
    pairs = labelled(logo, task, rows, seed)
    candidates = task.candidates(logo)
    names = sorted(Random(seed).sample(candidates, min(k, len(candidates))))

    def loss(weights: Sequence[float]) -> float:
        mixtures = [dict(zip(names, weights, strict=True))] * len(pairs)
        return objective(logo.score_pairs(pairs, mixtures, batch_size=_ROWS_PER_PASS), weights, penalty)

    weights, least = minimise(loss, len(names), budget, bound, seed)
    mixture = dict(zip(names, weights, strict=True))
    record = {"seed": seed, "rows": len(pairs), "budget": budget, "loss": least, "drawn": names, "weights": mixture}
    return Prepared(same_for_all({name: weight for name, weight in mixture.items() if weight}), record)


def objective(scored: Sequence[Scored], weights: Sequence[float], penalty: float) -> float:
    """What LoraHub minimises: `loss / rows + penalty · mean |w|`.

    `loss` is the mean over the tokens of all rows, as a language model's loss of one batch is. The authors' code
    (`default_get_loss` of sail-sg/lorahub) divides it once more by the number of rows, so the penalty weighs the more
    the more rows there are.
    """
    loss = sum(score.nll * score.tokens for score in scored) / sum(score.tokens for score in scored)
    return loss / len(scored) + penalty * sum(map(abs, weights)) / len(weights)


def minimise(
    loss: Callable[[Sequence[float]], float], size: int, budget: int, bound: float, seed: int
) -> tuple[list[float], float]:
    """The weights that nevergrad's NGOpt recommends after `budget` trials, and their loss.

    Raises:
        MissingLibrary: nevergrad is not installed.
    """
    need("method 'lorahub'", "nevergrad")
    with warnings.catch_warnings():
        # nevergrad and cma warn when they are imported, and nevergrad of optimisers that it has chosen itself.
        warnings.simplefilter("ignore")
        with _repeatable(seed), _threads_ended():
            weights = [float(weight) for weight in _optimised(loss, size, budget, bound, seed)]
    return weights, loss(weights)


def _optimised(
    loss: Callable[[Sequence[float]], float], size: int, budget: int, bound: float, seed: int
) -> Sequence[float]:
    """The weights that nevergrad recommends."""
    import nevergrad

    space: Any = nevergrad.p.Array(init=[0.0] * size, lower=[-bound] * size, upper=[bound] * size)
    space.random_state.seed(seed)
    optimiser = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
    weights: Sequence[float] = optimiser.minimize(lambda array: loss([float(weight) for weight in array])).value
    return weights


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


@contextmanager
def _threads_ended() -> Iterator[None]:
    """Behind the block, the threads that nevergrad has started in it have ended. It tells them to stop, and does not
    wait; they would go on to warn."""
    from nevergrad.optimization.recaster import _MessagingThread

    before = set(threading.enumerate())
    try:
        yield
    finally:
        for thread in set(threading.enumerate()) - before:
            if isinstance(thread, _MessagingThread):
                thread.stop()
                thread.join()


def _as_float(value: Any) -> float:
    """An array of one number as a float. nevergrad 1.0 passes such arrays to `float`, and numpy no longer allows it."""
    return float(numpy.asarray(value).reshape(-1)[0])
