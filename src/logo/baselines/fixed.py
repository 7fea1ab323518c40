"""`base`, `uniform` and `random`: bounds for every selection, which do not look at the prompt."""

from __future__ import annotations

import random as chance
from typing import TYPE_CHECKING

from logo.baselines.method import Prepared, Task, ranked, register_method, same_for_all, text_of
from logo.core import Selection

if TYPE_CHECKING:
    from logo.engine import LoGo


@register_method(picks=0)
def base(logo: LoGo, task: Task) -> Prepared:
    """The base model alone."""
    return Prepared(same_for_all({}))


@register_method(picks="pool")
def uniform(logo: LoGo, task: Task) -> Prepared:
    """The whole pool with equal weights."""
    names = task.candidates(logo)
    return Prepared(same_for_all(dict.fromkeys(names, 1 / len(names))))


@register_method()
def random(logo: LoGo, task: Task, *, k: int = 20, seed: int = 0) -> Prepared:
    """k adapters for each prompt, with equal weights; the draw depends on the seed and the prompt's text alone."""
    names = task.candidates(logo)
    size = min(k, len(names))

    def draw(prompt: str) -> Selection:
        return ranked(dict.fromkeys(chance.Random(f"{seed} {prompt}").sample(names, size), 1 / size))

    return Prepared(lambda prompts, batch_size: [draw(text_of(prompt)) for prompt in prompts])
