"""Safetensors files that are written and read through mapped memory, so that they may be larger than memory.

The library maps a file copy-on-write, which Linux refuses for files that are larger than memory. Here the file is
mapped read-only: writing to a tensor that `read_mapped` returns ends the process.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Bytes. Tensors in memory begin at multiples of it, so tensors in the file do too: otherwise libraries sum in another
# order, and the last digit of a score would depend on whether the index was read from a file.
ALIGNMENT = 64


def mapped(file: str | Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Makes a file of float32 zeros and returns its tensors by name; what is written to them is written to the file.

    Args:
        file: replaced if it exists.
        shapes: of the tensors, in the order of the file.

    Raises:
        OSError: the disk has no room for it.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        places[name], size = end, 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        total = stream.tell() + end
        stream.truncate(total)
        # The room is allocated now, since a full disk raises an error here but kills the process that writes to a map.
        if sys.platform == "linux":
            os.posix_fallocate(stream.fileno(), 0, total)
    start = len(text) // 4 + 2
    whole = torch.from_file(str(file), shared=True, size=total // 4, dtype=torch.float32)
    return {
        name: whole[start + place // 4 : start + place // 4 + math.prod(shapes[name])].view(shapes[name])
        for name, place in places.items()
    }


def read_mapped(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file of float32, by name, and its metadata.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or not all of it.
    """
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, about in header.items():
        begin, end = (8 + size + place for place in about["data_offsets"])
        if about["dtype"] != "F32" or end - begin != 4 * math.prod(about["shape"]) or end > len(whole):
            raise ValueError(f"{name}: expected {about['shape']} numbers in float32 within the file")
        values = np.frombuffer(whole, np.float32, math.prod(about["shape"]), begin)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensors[name] = torch.from_numpy(values).view(about["shape"])
    return tensors, metadata


def will_need(tensors: Iterable[Tensor]) -> None:
    """Tells the kernel to read these scattered pieces of a mapped file now, all at once and nothing around them.

    Without it they are read when they are touched: one after the other, each with megabytes of read-ahead.
    """
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    for tensor in tensors:
        start = tensor.data_ptr() // page * page
        length = tensor.data_ptr() + tensor.nbytes - start
        # It is only a hint, so a failure does not matter.
        _c().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


@lru_cache
def _c() -> Any:
    return ctypes.CDLL(None)
