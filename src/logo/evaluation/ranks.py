"""Processes that share the documents of lm-evaluation-harness, started by `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

# Timeout of collective operations: all ranks wait until the slowest has answered its documents.
_PATIENCE = timedelta(weeks=52)


class Ranks:
    """This process among those that were started together, or alone.

    Attributes:
        rank: its number, from 0.
        world_size: number of processes.
        device: this process's own device; None: it is alone and may use any.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self.device: str | None = None
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator, InitProcessGroupKwargs

            self._accelerator = Accelerator(
                cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)]
            )
            self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
            self.device = str(self._accelerator.device)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, one after the other."""
        gathered: Tensor = tensor if self._accelerator is None else self._accelerator.gather(tensor)
        return gathered

    def gather_object(self, value: Any, dst: int = 0) -> list[Any] | None:
        """The values of all ranks, in one of them; None in all others."""
        if self._accelerator is None:
            return [value]
        found: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(value, found, dst=dst)
        return found

    def barrier(self) -> None:
        """Returns when all ranks are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
