"""Signatures of a pool: the base model reads the example prompts of its adapters, and ordinary texts beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from logo.adapters.examples import examples_of
from logo.adapters.format import Adapter
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import Listening
from logo.selection.points import Point
from logo.selection.signals import Signal
from logo.selection.signature import Signatures, Space, centred, described
from logo.selection.texts import Texts

Rows = Sequence[Sequence[int]]


def signatures_of(
    adapters: Sequence[Adapter],
    points: Sequence[Point],
    signal: Signal,
    cache: CalibrationCache,
    listening: Listening,
    encode: Callable[[Sequence[str]], list[list[int]]],
) -> Signatures | None:
    """The signatures of the adapters that have example prompts; None where none has.

    Args:
        points: where prompts are read.
        signal: how they are read.
        cache: the texts of the calibration, and what is known already; means of examples are put there.
        listening: runs the base model.
        encode: texts to token ids, as prompts are encoded.
    """
    examples = [examples_of(adapter.folder) for adapter in adapters]
    if not any(examples):
        return None
    modules = [point.module for point in points]

    def name(rows: Rows) -> str:
        stated = json.dumps([modules, [list(row) for row in rows]])
        return hashlib.sha256(stated.encode()).hexdigest()[:24]

    ordinary: Rows = cache.texts.rows
    every: list[Rows] = [ordinary, *(encode(prompts) for prompts in examples if prompts)]
    missing = [rows for rows in every if cache.described(name(rows)) is None]
    if missing:
        places = read(points, signal, [row for rows in missing for row in rows], cache.texts.bos, listening)
        sizes = [len(rows) for rows in missing]
        for rows, *parts in zip(missing, *(torch.split(place, sizes) for place in places), strict=True):
            kept = parts if rows is ordinary else [part.mean(dim=0, keepdim=True) for part in parts]
            cache.keep_described(name(rows), [part.clone() for part in kept])
    found = [cache.described(name(rows)) or [] for rows in every]
    spaces = [Space.of(place) for place in found[0]]
    known = torch.tensor([bool(prompts) for prompts in examples])
    return Signatures(spaces, list(centred(spaces, found[1:])), known)


def read(
    points: Sequence[Point], signal: Signal, rows: Sequence[Sequence[int]], bos: int | None, listening: Listening
) -> list[Tensor]:
    """Per place, the descriptions of these texts: (rows, 2, d), float32 on the CPU."""
    found: dict[int, Tensor] = {}
    for heard in listening(points, Texts(rows, [], bos), signal):
        if id(heard.hidden) not in found:
            hidden, owners = heard.responding
            order = owners.argsort(stable=True)
            found[id(heard.hidden)] = described(hidden[order.to(hidden.device)], owners[order], len(rows)).cpu()
    return list(found.values())
