"""Names of models: `logo` selects, the base model's name is that model alone, an adapter's name is that adapter.

Our own server and vLLM share the names, the refusals and their texts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from logo.api.errors import bad_request, model_not_found, not_found
from logo.api.problems import shown
from logo.api.requests import LogoOptions
from logo.errors import closest
from logo.protocol import Patterns, Wish

AUTO = "logo"
"""The model name that selects by itself."""


@dataclass(frozen=True)
class Models:
    """The models that a request may name.

    Attributes:
        base: the name under which the base model alone answers.
        adapters: names of the adapters that the request may use.
        signals: the signals that it may ask for.
    """

    base: str
    adapters: Collection[str]
    signals: Collection[str]

    def wish(self, model: str, options: LogoOptions | None, patterns: Patterns | None = None) -> Wish:
        """What a model's name and the field `logo` ask for.

        Args:
            patterns: what the request's API key is bound to; None: the whole pool.

        Raises:
            ApiError: there is no such model, or it does not go with the options.
        """
        if model not in (AUTO, self.base) and model not in self.adapters:
            raise model_not_found(model, closest(model, (AUTO, self.base, *self.adapters)))
        options = options or LogoOptions()
        if options.adapters is not None:
            return Wish(options.adapters, usable=patterns)
        if options.signal is not None and options.signal not in self.signals:
            raise bad_request(
                f"logo.signal: expected one of {', '.join(self.signals)}, which this server was started with, "
                f"found {shown(options.signal)}",
                "logo.signal",
            )
        if model == AUTO:
            given: Any = {name: getattr(options, name) for name in options.selecting}
            return Wish(None, given, patterns)
        if options.selecting:
            said = ", ".join(map(repr, options.selecting))
            raise bad_request(f"logo: model {shown(model)} selects nothing; leave out {said}", "logo")
        return Wish({} if model == self.base else {model: 1.0}, usable=patterns)

    def check_new(self, name: str, *, replace: bool) -> None:
        """Whether an adapter of this name may be added.

        Args:
            replace: one that there is already.

        Raises:
            ApiError: the name means something else, or there is such an adapter.
        """
        if name in (AUTO, self.base):
            raise bad_request(f"lora_name: {shown(name)} already means another model", "lora_name")
        if name in self.adapters and not replace:
            raise bad_request(f"The lora adapter {shown(name)} has already been loaded.", "lora_name")

    def check_there(self, name: str) -> None:
        """Whether there is an adapter of this name to be removed.

        Raises:
            ApiError: there is none.
        """
        if name not in self.adapters:
            hint = closest(name, self.adapters)
            raise not_found(f"The lora adapter {shown(name)} cannot be found.{hint}", "lora_name")
