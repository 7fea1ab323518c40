"""One definition of exhausted memory for batches, the server, plugins and the command line."""

from __future__ import annotations

import pytest
import torch

from logo.errors import LoGoError, is_out_of_memory
from logo.plugins import running
from logo.serve.errors import ApiError

EXHAUSTED = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: type(error).__name__)
def test_memory_that_is_exhausted(error: Exception) -> None:
    assert is_out_of_memory(error) and ApiError.of(error).status == 503
    with pytest.raises(type(error)), running("signal 'x'"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shape"), ValueError("out of memory"), LoGoError("x")])
def test_other_errors(error: Exception) -> None:
    assert not is_out_of_memory(error)
