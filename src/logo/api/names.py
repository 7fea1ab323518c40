"""`Models`: the names that requests may give as `model`, in our own server and in vLLM, and what API keys may use.

`logo` selects; the base model's name is the base model alone; an adapter's name is that adapter; `a:0.7+b:0.3` is a
mixture of two, whose names may hold a ':' and no '+'.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from logo.api.bodies import LogoOptions, Name
from logo.api.errors import bad_request, model_not_found, not_found, shown
from logo.errors import StorageError, UsageError, closest

AUTO = "logo"  # the model for which the prompt selects the adapters
Patterns = tuple[str, ...]  # names of adapters, or patterns of them such as `team-a/*`
_KEYS = TypeAdapter(Annotated[dict[str, Annotated[list[Name], Field(min_length=1)]], Field(min_length=1)])


@dataclass(frozen=True)
class MixtureRequest:
    """The mixture that a request wants: forced (name -> weight; `{}` is the base model alone), or, with None, selected
    with these options of `LoGo.options`. `usable`: the adapters to which its API key is bound; None: the whole pool."""

    adapters: Mapping[str, float] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    usable: Patterns | None = None


def check_pool(base: str, adapters: Collection[str]) -> None:
    """Raises UsageError if an adapter of a pool has the name of another model, which would answer in its place."""
    for name, what, then in (
        (AUTO, "this model selects", "rename its folder"),
        (base, "the base model has the same name", "give it another one (--served-model-name)"),
    ):
        if name in adapters:
            raise UsageError(f"adapter {name!r}: {what}, so nobody could ask for the adapter; {then}")


@dataclass(frozen=True)
class Models:
    """The models that a request may use."""

    base: str  # the name of the base model alone
    adapters: Collection[str]
    signals: Collection[str]
    patterns: Patterns | None = None  # the adapters to which its API key is bound; None: the whole pool

    def mixture_request(self, model: str, options: LogoOptions | None) -> MixtureRequest:
        """The mixture that a model's name and the field `logo` request; ApiError: there is no such model or adapter, or
        the options do not fit it."""
        options = options or LogoOptions()
        weights = self._weights_of(model)
        self._check_options(options)
        if weights is not None and options.selecting:
            selecting = ", ".join(map(repr, options.selecting))
            raise bad_request(f"logo: model {shown(model)} does not select adapters; leave out {selecting}", "logo")
        if options.adapters is not None:
            weights = options.adapters
        return MixtureRequest(weights, options.selecting, self.patterns)

    def _weights_of(self, model: str) -> dict[str, float] | None:
        """The mixture that a model's name means; None: the prompt selects it."""
        if model == AUTO:
            return None
        if model == self.base:
            return {}
        if model in self.adapters:
            return {model: 1.0}
        weights: dict[str, float] = {}
        for term in model.split("+"):
            name, weight = self._weighted(term)
            if not -1e6 < weight < 1e6 or name in weights:
                expected = "expected each adapter once, with a weight between -1e6 and 1e6, as in 'a:0.7+b:0.3'"
                raise bad_request(f"model: {expected}, found {shown(term)}", "model")
            weights[name] = weight
        return weights

    def _weighted(self, term: str) -> tuple[str, float]:
        """The adapter and the weight of a term such as `a:0.7`; NaN: it has none."""
        name, colon, number = term.rpartition(":")
        if not colon:
            name = term
        self._check_name(name, "model")
        with suppress(ValueError):
            return name, float(number) if colon else math.nan
        return name, math.nan

    def _check_options(self, options: LogoOptions) -> None:
        """Raises ApiError for adapters or a signal that are not there."""
        for param in ("adapters", "candidates"):
            for name in getattr(options, param) or ():
                self._check_name(name, f"logo.{param}")
        if options.signal is not None and options.signal not in self.signals:
            choices = f"{', '.join(self.signals)}, which this server was started with"
            expected = f"expected one of {choices}, found {shown(options.signal)}"
            raise bad_request(f"logo.signal: {expected}", "logo.signal")

    def _check_name(self, name: str, param: str) -> None:
        if name not in self.adapters:
            names = (AUTO, self.base, *self.adapters) if param == "model" else self.adapters
            raise model_not_found(name, closest(name, names), param)

    def check_new(self, name: str, *, replace: bool, others: Collection[str] = ()) -> None:
        """Raises ApiError unless an adapter of this name may be added, or `replace` one of the same name; `others` are
        further names of the base model."""
        if name in (AUTO, self.base, *others):
            raise bad_request(f"lora_name: {shown(name)} is the name of another model", "lora_name")
        if name in self.adapters and not replace:
            raise bad_request(f"The lora adapter {shown(name)} has already been loaded.", "lora_name")

    def check_there(self, name: str) -> None:
        """Raises ApiError unless there is an adapter of this name, which may be removed."""
        if name not in self.adapters:
            hint = closest(name, self.adapters)
            raise not_found(f"The lora adapter {shown(name)} cannot be found.{hint}", "lora_name")


def read_key_adapters(file: Path) -> dict[str, Patterns]:
    """Reads a JSON file: API key -> names of adapters, or patterns such as `"team-a/*"`. StorageError, or UsageError if
    it is malformed, whose message never shows a key."""
    try:
        names_by_key = _KEYS.validate_json(file.read_bytes())
    except OSError as error:
        raise StorageError(f"--key-adapters {file}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        expected = 'expected JSON such as {"KEY": ["team-a/*", "translate"]}'
        raise UsageError(f"--key-adapters {file}: {expected}, found: {error.errors()[0]['msg']}") from None
    return {key: tuple(names) for key, names in names_by_key.items()}


@lru_cache(maxsize=512)
def usable(names: tuple[str, ...], patterns: Patterns) -> tuple[str, ...]:
    """The names that match the patterns."""
    return tuple(name for name in names if any(name == own or fnmatchcase(name, own) for own in patterns))


def unmatched(names: Iterable[str], keys: Mapping[str, Patterns]) -> list[str]:
    """The distinct patterns that no adapter matches, in order."""
    names = tuple(names)
    patterns = dict.fromkeys(pattern for own in keys.values() for pattern in own)
    return [pattern for pattern in patterns if not usable(names, (pattern,))]
