"""Makes the signatures of a pool: the base model reads the example prompts of its adapters, and ordinary texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from logo.adapters.adapter import Adapter
from logo.selection.cache import CalibrationCache
from logo.selection.calibration import TextRunner
from logo.selection.points import Point
from logo.selection.signals import Signal
from logo.selection.signature import Signatures, Space, described
from logo.selection.texts import Texts

Rows = Sequence[Sequence[int]]

# Hidden vectors of examples that are held at once, in bytes, and texts that are read together.
_HELD_BYTES = 2**29
_TOGETHER = 1024


def signatures_of(
    adapters: Sequence[Adapter],
    points: Sequence[Point],
    signal: Signal,
    cache: CalibrationCache,
    run_texts: TextRunner,
    encode: Callable[[Sequence[str]], list[list[int]]],
    device_of: Callable[[Point], torch.device],
) -> Signatures | None:
    """The signatures of the adapters that have example prompts; None if no adapter has any.

    Args:
        points: where prompts are read.
        signal: how they are read.
        cache: holds the texts of the calibration; descriptions are stored there.
        run_texts: runs the base model. If it raises, what was read before stays in the cache.
        encode: texts to token ids, as prompts are encoded.
        device_of: the device on which descriptions at a point are compared.
    """
    examples = [encode(prompts) if (prompts := adapter.examples) else [] for adapter in adapters]
    known = torch.tensor([bool(rows) for rows in examples])
    if not known.any():
        cache.release_described(())
        return None
    modules = [point.module for point in points]

    def name(rows: Rows) -> str:
        stated = json.dumps(["even and late", modules, [list(row) for row in rows]])
        return hashlib.sha256(stated.encode()).hexdigest()[:24]

    ordinary = cache.described(name(cache.texts.rows))
    if ordinary is None:
        ordinary = read(points, signal, cache.texts, run_texts)
        cache.keep_described(name(cache.texts.rows), ordinary)
    width = sum(place.shape[-1] for place in ordinary.values())
    every = {name(rows): rows for rows in examples if rows}
    for part in _portions(every, _HELD_BYTES // (4 * width)):
        missing = {key: rows for key, rows in part.items() if cache.described(key) is None}
        if missing:
            together = Texts([row for rows in missing.values() for row in rows], [])
            found = read(points, signal, together, run_texts)
            first = 0
            for key, rows in missing.items():
                own = slice(first, first := first + len(rows))
                cache.keep_described(key, {at: place[own].mean(dim=0, keepdim=True) for at, place in found.items()})
    means = [cache.described(name(rows)) or {} for rows in examples if rows]
    cache.release_described({name(cache.texts.rows), *every})  # pools change, and each leaves its own behind
    spaces, centres = [], []
    for at, place in ordinary.items():
        space = Space.of(place)
        # The mean of what is whitened is the whitened mean.
        centre = space(torch.cat([one[at] for one in means]))
        device = device_of(points[at])
        spaces.append(space.to(device))
        centres.append(centre.to(device))
    return Signatures(spaces, centres, known, tuple(ordinary))


def read(points: Sequence[Point], signal: Signal, texts: Texts, run_texts: TextRunner) -> dict[int, Tensor]:
    """The descriptions of texts by the first point of each place: (rows, 2, d), float32 on the CPU."""
    found: dict[int, Tensor] = {}
    seen: list[Tensor] = []  # points of a layer may read the same tensor, which is one place
    for at, vectors in enumerate(run_texts(points, texts, signal)):
        if not any(vectors.hidden is other for other in seen):
            seen.append(vectors.hidden)
            found[at] = described(*vectors.responding, len(texts.rows)).cpu()
    return found


def _portions(every: Mapping[str, Rows], tokens: int) -> Iterator[dict[str, Rows]]:
    """Examples in portions of so many tokens at most, or of one adapter.

    Portions do not depend on what is cached, so that processes side by side read the same texts together.
    """
    part: dict[str, Rows] = {}
    held = count = 0
    for key, rows in every.items():
        size = sum(map(len, rows))
        if part and (held + size > tokens or count + len(rows) > _TOGETHER):
            yield part
            part, held, count = {}, 0, 0
        part[key] = rows
        held, count = held + size, count + len(rows)
    if part:
        yield part
