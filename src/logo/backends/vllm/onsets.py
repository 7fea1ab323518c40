"""Where the adapters of a request begin to act: which mixture each of its tokens has, by its position in the prompt.

    recipe, prompt -> Onset        begins (96, 100)   stages (the adapters from 96 on, those from 100 on)
    Onset, rows of a step -> ids   0 0 0 a a a a b    that vLLM's mapping of tokens to adapters gets

Positions are absolute, so that a prompt may be read in chunks, put back and begun again. What comes before the first
of them is the base model's, and vLLM's cache of keys and values is keyed accordingly (`hash_as`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logo.adapters.activation import OFF, Activation
from logo.backends.vllm.marks import prompt_of
from logo.backends.vllm.recipe import Recipe, is_recipe
from logo.errors import ModelError

# Ids of mixtures of some of a recipe's adapters, beside vLLM's, which are of 31 bits.
_SOME = 2**32

# What was not looked at yet.
_UNKNOWN = object()


@dataclass(frozen=True)
class Onset:
    """Of one request.

    Attributes:
        text: its recipe as vLLM knows it, and `number`: its id.
        begins: the positions at which more adapters begin to act, in order; none: no adapter acts at all.
        stages: the adapters that act from each of them on.
        whole: whether all of the recipe's adapters act in the end.
    """

    text: str
    number: int
    begins: tuple[int, ...]
    stages: tuple[Recipe, ...]
    whole: bool

    @classmethod
    def of(cls, request: Any, parameters: Any, prompt: Sequence[int] | None, length: int) -> Onset | None:
        """The onset of a request; None where its adapters act on every token, or it has none.

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
        begin_of = {key: _quiet(recipe.activation(key)).begin(tokens) for key, _ in recipe.parts}
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
        """The id of the mixture of the prompt's last token, and of all behind it."""
        return self._number(len(self.stages) - 1) if self.stages else 0

    def settled(self, start: int) -> bool:
        """Whether all tokens from `start` on have the whole recipe."""
        return self.whole and start >= self.begins[-1]

    @property
    def others(self) -> dict[int, Recipe]:
        """The mixtures that are not the whole recipe, by id."""
        return {self._number(i): stage for i, stage in enumerate(self.stages) if self._number(i) != self.number}

    @property
    def silent(self) -> tuple[str, ...]:
        """The keys of the adapters that act nowhere."""
        acting = self.stages[-1].keys if self.stages else ()
        return tuple(key for key in Recipe.parse(self.text).keys if key not in acting)

    def _number(self, stage: int) -> int:
        whole = self.whole and stage == len(self.stages) - 1
        return self.number if whole else _SOME + self.stages[stage].number()


@dataclass(frozen=True)
class Rows:
    """The rows of one step that are tokens of a request with an onset.

    Attributes:
        onset: of the request.
        row, count: the first row and how many.
        start: the position of that token.
        drawn, draws: likewise, which of the rows of logits are the request's.
    """

    onset: Onset
    row: int
    count: int
    start: int
    drawn: int
    draws: int


def mapped(mapping: Any, rows: Iterable[Rows]) -> Any:
    """vLLM's mapping of a step's tokens to adapters, with what acts on each of them."""
    tokens, drawn = list(mapping.index_mapping), list(mapping.prompt_mapping)
    for one in rows:
        tokens[one.row : one.row + one.count] = one.onset.ids(one.start, one.count)
        drawn[one.drawn : one.drawn + one.draws] = [one.onset.last] * one.draws
    return replace(mapping, index_mapping=tuple(tokens), prompt_mapping=tuple(drawn))


def others(rows: Iterable[Rows], mode: str) -> dict[int, tuple[str, Recipe]]:
    """The mixtures of some of a recipe's adapters in a step, by id, with the recipe.

    Raises:
        ModelError: adapters begin to act at different positions, which merged ones cannot.
    """
    found = {number: (one.onset.text, some) for one in rows for number, some in one.onset.others.items()}
    if found and mode != "gate":
        raise ModelError(f"in {mode} mode all adapters of a mixture begin to act at the same token")
    return found


def known(state: Any, find: Callable[[], Onset | None]) -> Onset | None:
    """The onset that was found for a request before, kept on what vLLM knows of it; else it is found now."""
    found = getattr(state, "logo_onset", _UNKNOWN)
    if found is _UNKNOWN:
        found = state.logo_onset = find()
    onset: Onset | None = found  # type: ignore[assignment]
    return onset


def check_invoked(request: Any, parameters: Any, prompt: Sequence[int] | None) -> None:
    """Raises UsageError where a prompt lacks the invocation tokens of an adapter, and that is an error."""
    if request is not None and prompt is not None and is_recipe(request.lora_path) and "~error" in request.lora_path:
        for activation in Recipe.parse(request.lora_path).activations.values():
            activation.begin(prompt_of(parameters, prompt))


def hash_as(request: Any, end: int) -> Any:
    """The `LoRARequest` by which vLLM's cache is to know a block of a request: none where the base model has read it.

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
    # With another beginning, the same tokens have other keys and values.
    name = f"{own.lora_name}@{','.join(map(str, onset.begins))}"
    return type(own)(name, own.lora_int_id, name)


def _quiet(activation: Activation) -> Activation:
    """Such that `begin` raises nothing: what is an error was refused when the request came."""
    return replace(activation, without=OFF) if activation.without == "error" else activation
