"""Listening: the texts of a calibration run through the base model, and what each adapter answers at each point.

One forward pass of the base model per group of layers serves every adapter. Knows models, points and indices; knows
nothing about files or about what the responses are used for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from logo.adapters.format import Adapter
from logo.adapters.layout import linear_modules, linear_shape
from logo.selection.calibration import prompt_means
from logo.selection.index import ScoringIndex
from logo.selection.points import Point
from logo.selection.probe import Probe
from logo.selection.signals import Signal
from logo.selection.whitening import Whitening

# Hidden vectors that are held at once: what does not fit is read in further passes, each up to its own last layer.
_HELD_BYTES = 2**30
_BATCH = 16


@dataclass(frozen=True)
class Texts:
    """Token ids of what is listened to.

    Attributes:
        neutral: texts that give the baseline and the whitening.
        requests: unlabelled prompts on which points are ranked.
        bos: the token that begins every text; None if there is none.
    """

    neutral: Sequence[Sequence[int]]
    requests: Sequence[Sequence[int]]
    bos: int | None

    @property
    def rows(self) -> list[Sequence[int]]:
        """All of them, neutral ones first."""
        return [*self.neutral, *self.requests]


class Whitenings(Protocol):
    """Where whitenings are kept, by module path. They depend on the base model and the texts, not on any adapter."""

    def whitening(self, module: str) -> Whitening | None:
        """The whitening of a module's input, if known."""
        ...

    def keep_whitening(self, module: str, whitening: Whitening) -> None:
        """Keeps it."""
        ...


def listen(
    model: nn.Module,
    wanted: Mapping[Point, Sequence[Adapter]],
    texts: Texts,
    signal: Signal,
    whitenings: Whitenings,
) -> dict[str, dict[str, Tensor]]:
    """Runs the texts through the base model and scores these adapters at these points.

    Args:
        model: the base model, with no adapter active.
        wanted: point -> adapters to score there (none: only the whitening is wanted).
        texts: what to run.
        signal: how to read and score.
        whitenings: those that are known; what the signal needs besides is computed and put there.

    Returns:
        adapter name -> module path -> `a` (texts,), neutral ones first.
    """
    heard: dict[str, dict[str, Tensor]] = {}
    for points in _groups(model, list(wanted), sum(map(len, texts.rows))):
        latest: tuple[Tensor, Whitening] | None = None  # points of one layer may read the same vectors
        for point, (hidden, owners) in zip(points, _read(model, points, texts, signal), strict=True):
            whitening = None
            if signal.scale == "whitened":
                whitening = whitenings.whitening(point.module)
                if whitening is None:
                    if latest is None or latest[0] is not hidden:
                        neutral = hidden[owners.to(hidden.device) < len(texts.neutral)]
                        latest = hidden, Whitening.of(neutral).to(torch.device("cpu"))
                    whitening = latest[1]
                    whitenings.keep_whitening(point.module, whitening)
                latest = hidden, whitening
            if not wanted[point]:
                continue
            index = ScoringIndex.read(wanted[point], point, hidden.device, whitening)
            scores = respond(signal, index, hidden, owners, len(texts.rows)).cpu()
            for adapter, response in zip(wanted[point], scores.T, strict=True):
                heard.setdefault(adapter.name, {})[point.module] = response.clone()
    return heard


def respond(signal: Signal, index: ScoringIndex, hidden: Tensor, owners: Tensor, rows: int) -> Tensor:
    """`a` of each prompt at one point: hidden (vectors, d), owners (vectors,) -> (rows, adapters)."""
    return finished(signal, prompt_means(signal(index, hidden), owners, rows))


def finished(signal: Signal, means: Tensor) -> Tensor:
    """`a` of mean responses; -inf where there is no response at all."""
    return means.log() if signal.scale == "whitened" else means


def candidates(model: nn.Module, points_by_layer: Mapping[int, str], adapters: Sequence[Adapter]) -> list[Point]:
    """Every module of these layers (index -> path) that some adapter touches, in the model's order.

    Modules of single experts are left out: they see some tokens only.
    """
    touched = {module for adapter in adapters for module in adapter.modules}
    found = []
    for path, _ in linear_modules(model):
        for index, layer in points_by_layer.items():
            if path in touched and path.startswith(f"{layer}.") and ".experts." not in path:
                found.append(Point(index, layer, path))
    return sorted(found, key=lambda point: point.layer)


def _groups(model: nn.Module, points: Sequence[Point], tokens: int) -> Iterator[list[Point]]:
    """Points by layer, in groups of whole layers whose hidden vectors fit in memory together."""
    group: list[Point] = []
    size = 0
    for _, layer in groupby(sorted(points, key=lambda point: point.layer), key=lambda point: point.layer):
        part = list(layer)
        shapes = [linear_shape(model.get_submodule(point.module)) for point in part]
        bytes_needed = sum(4 * tokens * shape.in_features for shape in shapes if shape is not None)
        if group and size + bytes_needed > _HELD_BYTES:
            yield group
            group, size = [], 0
        group += part
        size += bytes_needed
    if group:
        yield group


def _read(model: nn.Module, points: Sequence[Point], texts: Texts, signal: Signal) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden vectors of all texts at each point and the text each belongs to; shared vectors are one tensor."""
    probe = Probe(model, points, signal.input, signal.token, texts.bos)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    rows = texts.rows
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts: list[list[Tensor]] = []
    owners = []
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        ids, mask = _pad([rows[i] for i in batch], device)
        parts.append(probe(ids, mask))
        owners.append(torch.tensor(batch)[probe.owners(ids, mask)])
    owner = torch.cat(owners)
    joined: dict[int, Tensor] = {}
    for i, first in enumerate(parts[0]):
        if id(first) not in joined:
            joined[id(first)] = torch.cat([part[i] for part in parts])
        yield joined[id(first)], owner


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, length) ids and mask, padded on the right."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask
