"""`Models`: the names that requests may give as `model`, in our own server and in vLLM.

`logo` selects; the base model's name is the base model alone; an adapter's name is that adapter.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from logo.api.errors import bad_request, model_not_found, not_found
from logo.api.requests import LogoOptions
from logo.api.validation import shown
from logo.errors import UsageError, closest
from logo.protocol import MixtureRequest, Patterns

AUTO = "logo"
"""The model name for which the prompt selects the adapters."""


def check_pool(base: str, adapters: Collection[str]) -> None:
    """Checks that every adapter of a pool can be requested by its name.

    Raises:
        UsageError: an adapter has the name of another model, which would answer in its place.
    """
    if AUTO in adapters:
        raise UsageError(
            f"adapter {AUTO!r}: requests for this name select adapters, so nobody could ask for it; rename its folder"
        )
    if base in adapters:
        raise UsageError(
            f"adapter {base!r}: the base model has the same name, so nobody could ask for the adapter; give the base "
            "model another one (--served-model-name)"
        )


@dataclass(frozen=True)
class Models:
    """The models of a request.

    Attributes:
        base: the name of the base model alone.
        adapters: names of the adapters that the request may use.
        signals: the signals that it may use.
        patterns: the adapters to which its API key is bound; None: the whole pool.
    """

    base: str
    adapters: Collection[str]
    signals: Collection[str]
    patterns: Patterns | None = None

    def mixture_request(self, model: str, options: LogoOptions | None) -> MixtureRequest:
        """The mixture that a model's name and the field `logo` request.

        Raises:
            ApiError: there is no such model, or the options do not fit it.
        """
        if model not in (AUTO, self.base) and model not in self.adapters:
            raise model_not_found(model, closest(model, (AUTO, self.base, *self.adapters)))
        options = options or LogoOptions()
        if options.adapters is not None:
            return MixtureRequest(options.adapters, usable=self.patterns)
        if options.signal is not None and options.signal not in self.signals:
            raise bad_request(
                f"logo.signal: expected one of {', '.join(self.signals)}, which this server was started with, "
                f"found {shown(options.signal)}",
                "logo.signal",
            )
        if model == AUTO:
            given: Any = {name: getattr(options, name) for name in options.selecting}
            return MixtureRequest(None, given, self.patterns)
        if options.selecting:
            said = ", ".join(map(repr, options.selecting))
            raise bad_request(f"logo: model {shown(model)} does not select adapters; leave out {said}", "logo")
        return MixtureRequest({} if model == self.base else {model: 1.0}, usable=self.patterns)

    def check_new(self, name: str, *, replace: bool) -> None:
        """Checks that an adapter of this name may be added.

        Args:
            replace: whether an adapter of the same name may be replaced.

        Raises:
            ApiError: the name is reserved, or there is such an adapter.
        """
        if name in (AUTO, self.base):
            raise bad_request(f"lora_name: {shown(name)} is the name of another model", "lora_name")
        if name in self.adapters and not replace:
            raise bad_request(f"The lora adapter {shown(name)} has already been loaded.", "lora_name")

    def check_there(self, name: str) -> None:
        """Checks that an adapter of this name can be removed.

        Raises:
            ApiError: there is none.
        """
        if name not in self.adapters:
            hint = closest(name, self.adapters)
            raise not_found(f"The lora adapter {shown(name)} cannot be found.{hint}", "lora_name")
