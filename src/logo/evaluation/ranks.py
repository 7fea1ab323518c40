"""Processes that share the documents of lm-evaluation-harness, started by `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor

# Timeout of collective operations: all ranks wait until the slowest has answered its documents.
_PATIENCE = timedelta(weeks=52)


class Ranks(TemplateLM):  # type: ignore[misc]
    """A model of the harness in this process, which is one of those that were started together, or alone.

    Attributes:
        accelerator: of several processes; None: this one is alone.
    """

    def __init__(self) -> None:
        super().__init__()  # alone
        self.accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator, InitProcessGroupKwargs

            self.accelerator = Accelerator(
                cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)]
            )
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, one after the other."""
        gathered: Tensor = tensor if self.accelerator is None else self.accelerator.gather(tensor)
        return gathered

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The values of all ranks, in one of them; None in all others."""
        if self.accelerator is None:
            return [obj]
        found: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        torch.distributed.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        """Returns when all ranks are here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
