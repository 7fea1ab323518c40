"""`Facts`: what every engine has and reports about itself. `logo.calls.Calls` adds what it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from logo.adapters.pool import AdapterPool
from logo.decoding import Prompts
from logo.selection.settings import SelectionSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Facts(ABC):
    """The parts of an engine, and the properties that are recorded with its results.

    Attributes:
        model: the base model; without weights if another process has them.
        tokenizer: its tokenizer.
        pool: the adapters.
        settings: how prompts are read, scored and selected.
        prompts: turns prompts into token ids.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pool: AdapterPool
    settings: SelectionSettings
    prompts: Prompts

    @property
    @abstractmethod
    def fitted(self) -> AdapterPool:
        """The pool fitted to the base model, without adapters that do not fit (`on_bad_adapter="skip"`)."""

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in use, in pool order."""
        return self.fitted.names

    @property
    @abstractmethod
    def k(self) -> int:
        """Adapters per prompt: the setting, or the default of the pool as it is now."""

    @property
    @abstractmethod
    def points(self) -> tuple[str, ...]:
        """The points where prompts are read, such as `"4.v_proj"`. The pool is calibrated first if necessary."""

    @property
    @abstractmethod
    def folding(self) -> dict[str, Any]:
        """The settings by which the form of a mixture is chosen, for JSON."""

    @property
    @abstractmethod
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that compute."""

    @property
    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of libraries that run the model, beside PyTorch and transformers."""

    @property
    def engine_options(self) -> Mapping[str, Any]:
        """Options of what runs the model, as the user gave them, on which results depend; none in this process."""
        return {}
