"""How cost grows with the pool, k, the batch and the prompt: measurements and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from logo.bench.parts import Bench, mixtures_of
from logo.bench.rounds import side_by_side
from logo.bench.synthetic import random_mixtures
from logo.drawing import new_figure
from logo.selection.index import ScoringIndex
from logo.selection.points import Point

POOLS = (16, 64, 260, 1000, 4000, 10000)
KS = (1, 5, 20, 50)
BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = (32, 128, 512, 1024)


@dataclass(frozen=True)
class Curve:
    """One panel of the picture.

    Attributes:
        title, x, y: title and axis labels.
        lines: name of the line -> x -> y.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Mapping[int, float]]


def curves(bench: Bench) -> list[Curve]:
    """All curves, at the bench's sizes."""
    return [_over_pools(bench), _over_k(bench), _over_batches(bench), _over_lengths(bench)]


def _over_pools(bench: Bench) -> Curve:
    bench.say("curve over pools")
    model = bench.logo.model
    width = model.config.hidden_size
    rank = max(bench.logo.pool[bench.logo.names[0]].ranks)
    hidden = torch.randn(1, width)
    lines: dict[str, dict[int, float]] = {"scoring": {}, "one product with the index": {}}
    for count in POOLS:
        index = ScoringIndex(torch.randn(count * rank, width), [rank] * count, None, [], _NOWHERE)
        arms = {"scoring": partial(index.norms, hidden), "product": partial(torch.mv, index.stacked, hidden[0])}
        found = side_by_side(arms, max(bench.rounds, 10))
        lines["scoring"][count] = 1000 * found["scoring"].seconds
        lines["one product with the index"][count] = 1000 * found["product"].seconds
    return Curve("scoring one prompt at one point", "adapters in the pool", "ms", lines)


_NOWHERE = Point(0, "", "")


def _over_k(bench: Bench) -> Curve:
    ks = [k for k in KS if k <= len(bench.logo.names)]
    found = {k: bench.decoding(1, 64, {"mixture": random_mixtures(bench.logo.names, 1, k)}) for k in ks}
    lines = {"LoGo to base, speed": {k: part.ratio("base", "mixture") for k, part in found.items()}}
    return Curve("decoding one sequence", "adapters per prompt (k)", "speed, base = 1", lines)


def _over_batches(bench: Bench) -> Curve:
    names = bench.logo.names
    found = {size: bench.decoding(size, 64, mixtures_of(names, size, bench.k)) for size in BATCHES}
    lines = {name: {size: part.ratio("base", name) for size, part in found.items()} for name in ("related", "random")}
    return Curve("decoding batches of different mixtures", "sequences in the batch", "speed, base = 1", lines)


def _over_lengths(bench: Bench) -> Curve:
    found = {tokens: bench.selecting(tokens) for tokens in LENGTHS}
    lines = {name: {n: part.ratio(name, "prefill") for n, part in found.items()} for name in ("norm", "calibrated")}
    return Curve("selecting", "tokens of the prompt", "time, prefill = 1", lines)


def draw(shown: list[Curve], path: Path) -> None:
    """One PNG with a panel per curve."""
    figure = new_figure(11, 7.5, layout="constrained")
    for axes, curve in zip(figure.subplots(2, 2).flat, shown, strict=True):
        for name, line in curve.lines.items():
            axes.plot(list(line), list(line.values()), marker="o", markersize=4, label=name)
        axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y, xscale="log")
        axes.set_xticks(list(line), [f"{x:,}" for x in line])
        axes.minorticks_off()
        if curve.y != "ms":
            axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
