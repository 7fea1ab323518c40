"""`KeptVectors`: the hidden vectors of a calibration's texts, which taps record chunk by chunk while vLLM runs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from logo.selection.calibration import HiddenVectors
from logo.selection.points import Point
from logo.selection.signals import Signal


class KeptVectors:
    """The recorded hidden vectors of texts.

    Args:
        signal: how the texts are read.
        places: module of each recorded point -> the place in vLLM's model where it is read.
    """

    def __init__(self, signal: Signal, places: Mapping[str, str]) -> None:
        self.signal, self._places = signal, dict(places)
        self.places = frozenset(places.values())
        self._vectors: dict[str, dict[str, list[Tensor]]] = {}  # text -> place -> hidden vectors of each chunk

    def add(self, key: str, place: str, hidden: Tensor) -> None:
        """Keeps the next hidden vectors (n, d) of a text at a place."""
        self._vectors.setdefault(key, {}).setdefault(place, []).append(hidden)

    def forget(self, key: str) -> None:
        """Drops the vectors of a text, which is read again from its beginning."""
        self._vectors.pop(key, None)

    def has(self, points: Iterable[Point]) -> bool:
        """Whether all of these points are recorded."""
        return all(point.module in self._places for point in points)

    def vectors(self, points: Sequence[Point], keys: Sequence[str]) -> Iterator[HiddenVectors]:
        """The hidden vectors of these texts at each point, in the form of `logo.selection.calibration.TextRunner`."""
        joined: dict[str, HiddenVectors] = {}
        for point in points:
            place = self._places[point.module]
            if place not in joined:
                parts = [self._read(torch.cat(self._vectors[key][place])) for key in keys]
                counts = torch.tensor([len(part) for part in parts])
                joined[place] = HiddenVectors(torch.cat(parts), torch.arange(len(parts)).repeat_interleave(counts))
            yield joined[place]

    def _read(self, hidden: Tensor) -> Tensor:
        """The hidden vectors of one text (tokens, d) that the signal reads."""
        if self.signal.token == "last":
            return hidden[-1:]
        return hidden.mean(dim=0, keepdim=True) if self.signal.token == "mean" else hidden
