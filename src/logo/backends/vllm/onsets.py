"""Onsets: the positions at which the adapters of a request begin to act, and so the mixture of each of its tokens.

    recipe, prompt -> Onset        begins (96, 100)   stages (the adapters from 96 on, those from 100 on)
    Onset, rows of a step -> ids   0 0 0 a a a a b    for vLLM's mapping of tokens to adapters

Positions are absolute, so that a prompt may be read in chunks, or be preempted and begun again. Tokens before the first
of these positions are computed by the base model, and vLLM's KV cache is keyed accordingly (`hash_as`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logo.backends.vllm.marks import prompt_of
from logo.backends.vllm.recipe import Recipe, is_recipe

# Added to the ids of mixtures of only some of a recipe's adapters, so that they differ from vLLM's ids of 31 bits.
_SOME = 2**32

# Stands for an onset that was not computed yet.
_UNKNOWN = object()


@dataclass(frozen=True)
class Onset:
    """The onset of one request.

    Attributes:
        text, number: the request's recipe as vLLM knows it, and its id.
        begins: the positions at which further adapters begin to act, ascending; empty: no adapter acts at all.
        stages: for each of these positions, the mixture of the adapters that act from there on.
        whole: whether all adapters of the recipe act in the last stage.
    """

    text: str
    number: int
    begins: tuple[int, ...]
    stages: tuple[Recipe, ...]
    whole: bool

    @classmethod
    def of(cls, request: Any, parameters: Any, prompt: Sequence[int] | None, length: int) -> Onset | None:
        """The onset of a request; None if all of its adapters act on every token, or if it has no recipe.

        Args:
            request: vLLM's `LoRARequest`.
            parameters: vLLM's `SamplingParams`.
            prompt: the token ids of its prompt; None where it has none.
            length: of the prompt.
        """
        if request is None or not is_recipe(request.lora_path) or "@" not in request.lora_path:
            return None
        recipe = Recipe.parse(request.lora_path)
        tokens = prompt_of(parameters, [-1] * length if prompt is None else prompt)
        begin_of = {key: recipe.activation(key).begin(tokens) for key, _ in recipe.parts}
        begins = tuple(sorted({begin for begin in begin_of.values() if begin is not None}))
        stages = tuple(
            recipe.only(key for key, begin in begin_of.items() if begin is not None and begin <= here)
            for here in begins
        )
        whole = bool(stages) and len(stages[-1].parts) == len(recipe.parts)
        if whole and begins == (0,):
            return None
        return cls(request.lora_path, request.lora_int_id, begins, stages, whole)

    def ids(self, start: int, count: int) -> list[int]:
        """The id of the mixture of each token from position `start` on."""
        numbers = np.array([0, *(self._number(stage) for stage in range(len(self.stages)))])
        found: list[int] = numbers[np.searchsorted(self.begins, np.arange(start, start + count), side="right")].tolist()
        return found

    @property
    def last(self) -> int:
        """The id of the mixture of the prompt's last token and of all tokens of the answer."""
        return self._number(len(self.stages) - 1) if self.stages else 0

    def settled(self, start: int) -> bool:
        """Whether all adapters of the recipe act on every token from `start` on."""
        return self.whole and start >= self.begins[-1]

    @property
    def others(self) -> dict[int, Recipe]:
        """The mixtures that are not the whole recipe, by id."""
        return {self._number(i): stage for i, stage in enumerate(self.stages) if self._number(i) != self.number}

    def _number(self, stage: int) -> int:
        whole = self.whole and stage == len(self.stages) - 1
        return self.number if whole else _SOME + self.stages[stage].number()


@dataclass(frozen=True)
class Rows:
    """The rows of one step that are tokens of a request with an onset.

    Attributes:
        onset: of the request.
        row, count: the first row, and the number of rows.
        start: the position of the first row's token in the request.
        drawn, draws: the first row of logits that is the request's, and the number of these rows.
    """

    onset: Onset
    row: int
    count: int
    start: int
    drawn: int
    draws: int


def mapped(mapping: Any, rows: Iterable[Rows]) -> Any:
    """vLLM's mapping of a step's tokens to adapters, with the ids of the mixtures that act on these rows."""
    tokens, drawn = list(mapping.index_mapping), list(mapping.prompt_mapping)
    for one in rows:
        tokens[one.row : one.row + one.count] = one.onset.ids(one.start, one.count)
        drawn[one.drawn : one.drawn + one.draws] = [one.onset.last] * one.draws
    return replace(mapping, index_mapping=tuple(tokens), prompt_mapping=tuple(drawn))


def others(rows: Iterable[Rows]) -> dict[int, tuple[str, Recipe]]:
    """The mixtures in a step that have only some of a recipe's adapters: id -> (text of the recipe, mixture)."""
    return {number: (one.onset.text, some) for one in rows for number, some in one.onset.others.items()}


def known(state: Any, find: Callable[[], Onset | None]) -> Onset | None:
    """The onset of a request: computed by `find` in the first call, and kept as an attribute of vLLM's `state`."""
    found = getattr(state, "logo_onset", _UNKNOWN)
    if found is _UNKNOWN:
        found = state.logo_onset = find()
    onset: Onset | None = found  # type: ignore[assignment]
    return onset


def hash_as(request: Any, end: int) -> Any:
    """The `LoRARequest` by which vLLM keys a cached block of a request; None if no adapter acts on the block.

    Args:
        request: vLLM's `Request`, as its scheduler knows it.
        end: the position behind the block's last token.
    """
    own = request.lora_request
    onset = known(
        request, lambda: Onset.of(own, request.sampling_params, request.prompt_token_ids, request.num_prompt_tokens)
    )
    if onset is None:
        return own
    if not onset.begins or end <= onset.begins[0]:
        return None
    # Keys and values depend on where adapters begin to act, even if the tokens are the same.
    name = f"{own.lora_name}@{','.join(map(str, onset.begins))}"
    return type(own)(name, own.lora_int_id, name)
