"""One and two stages over very many adapters: cost, recall, and an extrapolation to a million.

    python tools/many_adapters.py measure --adapters 100000 --points 12 --scratch DIR --json measured.json
    python tools/many_adapters.py recall --base-model M --adapters DIR --rows DIR --json recall.json
    python tools/many_adapters.py model --measured measured.json --png many.png

`measure` makes adapters of random directions with the spectra of a real pool (docs/many-adapters.md), on disk, and
scores random vectors with both. `recall` does so with a real pool and real prompts. `model` extrapolates the
measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logo.selection.calibration import Calibration
from logo.selection.emphasis import emphasised
from logo.selection.index import ScoringIndex, sketched
from logo.selection.mapped import mapped
from logo.selection.points import Point
from logo.selection.reference import finished
from logo.selection.scorer import NOT_SCORED, Best
from logo.selection.signals import get_signal
from logo.selection.two_stage import FirstStages, TwoStageScorer
from logo.selection.whitening import Whitening

# Singular values of 43 adapters of a 270M model (r 8), beside the largest: means at the last query projection, and at
# the value projections in the middle.
SPECTRUM = {
    "norm": (1, 0.39, 0.23, 0.16, 0.12, 0.10, 0.07, 0.06),
    "calibrated": (1, 0.46, 0.29, 0.21, 0.15, 0.11, 0.09, 0.07),
}
# Share of the energy of an adapter's rows in 16 directions that the adapters of the pool share, and of a last token's
# vector in one direction that all texts share.
SHARED_ENERGY, COMMON_ENERGY = 0.73, 0.926
# Size of a family, whose adapters share half of their own first row, and how strongly a prompt excites one adapter.
FAMILY, EXCITED = 20, 1.5
BLOCK = 1024
TEXTS, TEXT_TOKENS, PROMPT_TOKENS = 24, 4, 32


class Drawn:
    """A stand-in for an adapter: its name, and the modules that it adapts."""

    def __init__(self, number: int, modules: dict[str, None]) -> None:
        self.name, self.modules = f"adapter{number:07}", modules


class World:
    """The factors, texts and prompts of one seed, at one point."""

    def __init__(self, args: argparse.Namespace, signal: str, point: int) -> None:
        self.signal, self.width, self.rank, self.seed = signal, args.width, args.rank, 1000 * args.seed + point
        width, rank = args.width, args.rank
        g = self._generator(0)
        self.shared = torch.linalg.qr(torch.randn(width, 16, generator=g)).Q.T
        self.common = _unit(torch.randn(width, generator=g))
        self.axes = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
        spectrum = (1,) if args.flat else SPECTRUM[signal]
        self.noise = torch.randn(2**22, generator=g) / width**0.5
        self.spectrum = torch.tensor([spectrum[min(j, len(spectrum) - 1)] for j in range(rank)])

    def _generator(self, what: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 100_003 + what)

    def factors(self, block: int, count: int) -> Tensor:
        """(count, r, d) of one block of adapters."""
        g = self._generator(block + 1)
        # Pieces of one random vector, which costs less than to draw all of it.
        last = len(self.noise) - self.rank * self.width
        pieces = self.noise.unfold(0, self.rank * self.width, 1)
        own = pieces[torch.randint(last, (count,), generator=g)].view(count, self.rank, self.width)
        families = torch.randn(-(-count // FAMILY), self.width, generator=g).repeat_interleave(FAMILY, dim=0)[:count]
        own[:, 0] = (own[:, 0] + _unit(families)) / 2**0.5
        weights = torch.randn(count, self.rank, 16, generator=g) * 0.8 ** torch.arange(16)
        size = self.spectrum[:, None] * torch.exp(0.25 * torch.randn(count, 1, 1, generator=g))
        rows = (SHARED_ENERGY**0.5 * size * _unit(weights)) @ self.shared
        return rows.addcmul_(own, (1 - SHARED_ENERGY) ** 0.5 * size)

    def vectors(self, number: int, tokens: int, excited: Tensor | None) -> Tensor:
        """Vectors (tokens, d) of one text; those of a prompt also hold a direction of one adapter (r, d)."""
        g = self._generator(-number - 1)
        if self.signal == "norm":
            fall = (1 + torch.arange(self.width)).float() ** -0.6
            rest = _unit((torch.randn(tokens, self.width, generator=g) * fall) @ self.axes)
            x = COMMON_ENERGY**0.5 * self.common + (1 - COMMON_ENERGY) ** 0.5 * rest
            return x if excited is None else x + 0.1 * EXCITED * _unit(excited[0])
        x = torch.randn(tokens, self.width, generator=g)
        gains = torch.exp(0.5 * torch.randn(16, generator=g)) - 1
        x = x + (x @ self.shared.T * gains) @ self.shared
        if excited is not None:
            x = x + EXCITED * torch.randn(tokens, 1, generator=g) * _unit(excited[0])
        return x


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def build(args: argparse.Namespace, signal: str, points: int) -> tuple[TwoStageScorer, list[World]]:
    """Factors in a file of the scratch folder, and a scorer over them that has no model."""
    started = time.perf_counter()
    count, width, rank = args.adapters, args.width, args.rank
    worlds = [World(args, signal, point) for point in range(points)]
    where = [Point(point, f"layers.{point}", f"layers.{point}.v_proj") for point in range(points)]
    modules = dict.fromkeys(point.module for point in where)
    adapters: Any = [Drawn(i, modules) for i in range(count)]
    file = args.scratch / f"{signal}-{count}.safetensors"
    stacks = mapped(file, {point.module: (count * rank, width) for point in where}, {})
    file.unlink()  # the mapping keeps it until the end
    indices, read = [], []
    owners = torch.arange(TEXTS).repeat_interleave(TEXT_TOKENS)
    how = get_signal(signal)
    heard = torch.full((count, points * how.readings, TEXTS), torch.nan)
    # Drawn vectors have no mean and no directions of their own: whitening leaves them as they are.
    plain = Whitening(torch.zeros(width), torch.zeros(width, 0), torch.zeros(0))
    sketch = sketched(plain, torch.device("cpu")) if how.relative else None
    for at, (world, point) in enumerate(zip(worlds, where, strict=True)):
        hidden = torch.cat([world.vectors(i, TEXT_TOKENS, None) for i in range(TEXTS)])
        read.append((hidden, owners))
        for block, start in enumerate(range(0, count, BLOCK)):
            size = min(BLOCK, count - start)
            rows = world.factors(block, size).view(-1, width)
            stacks[point.module][start * rank : (start + size) * rank] = rows
            if how.scale != "raw":
                values = how(ScoringIndex(rows, [rank] * size, None, [], point, sketch), hidden)
                for late in range(how.readings):
                    means = emphasised(values, owners, TEXTS, late)
                    heard[start : start + size, at + late * points] = finished(means, how.scale).T
        indices.append(ScoringIndex(stacks[point.module], [rank] * count, None, adapters, point, sketch))
        say(f"{signal}: point {at + 1} of {points} written, {time.perf_counter() - started:.0f} s")
    touched = torch.ones(count, points, dtype=torch.bool)
    first = FirstStages.of(indices, touched, read, TEXTS, [None] * points, how, args.first_rank)
    say(f"{signal}: first stage of {first.bytes / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s")
    none = torch.zeros(*heard.shape[:2], 0)
    calibration = None if how.scale == "raw" else Calibration(tuple(where), (), heard, none, None, 0, 0.0)
    nothing: Any = None
    return TwoStageScorer(adapters, indices, nothing, nothing, how, first, calibration), worlds


def one_stage(scorer: TwoStageScorer, hidden: list[Tensor]) -> Tensor:
    """(adapters,): every score, from the vectors of one prompt."""
    how = scorer._signal
    values = [how(index, vectors) for index, vectors in zip(scorer.indices, hidden, strict=True)]
    per_point = []
    for late in range(how.readings):
        for one in values:
            means = emphasised(one, torch.zeros(len(one), dtype=torch.int64), 1, late)
            per_point.append(finished(means, how.scale))
    return scorer.scores(per_point)[0]


def measure(args: argparse.Namespace) -> None:
    """Both stages on synthetic adapters, for `norm` at one point and `calibrated` at several."""
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "load": os.getloadavg(), "memory": _memory()}
    for signal in args.signals:
        one_point = signal == "norm"
        points, tokens = (1, 1) if one_point else (args.points, PROMPT_TOKENS)
        prompts = args.prompts if one_point else max(1, args.prompts // 5)
        found[signal] = measured(args, signal, points, tokens, prompts)
        print(json.dumps(found[signal]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def measured(args: argparse.Namespace, signal: str, points: int, tokens: int, prompts: int) -> dict[str, Any]:
    """Medians over the prompts."""
    scorer, worlds = build(args, signal, points)
    each = points * args.rank * args.width * 4
    rows = []
    for number in range(prompts):
        own = (number * 7919 + 13) % args.adapters
        factors = [index.stacked[own * args.rank : (own + 1) * args.rank] for index in scorer.indices]
        hidden = [w.vectors(10_000 + number, tokens, f) for w, f in zip(worlds, factors, strict=True)]
        two, two_seconds, two_read = timed(partial(scorer.of_vectors, hidden, Best(args.k)))
        one, one_seconds, one_read = timed(partial(one_stage, scorer, hidden))
        row = {**compared(one, two, args.k), "one_ms": 1000 * one_seconds, "two_ms": 1000 * two_seconds}
        row |= {"one_disk": one_read, "two_disk": two_read}
        rows.append(row | {"two_bytes": scorer.first.bytes + int((two != NOT_SCORED).sum()) * each})
        say(f"{signal}: {rows[-1]}")
    rows = rows[1:] if len(rows) > 3 else rows  # the first warms up
    summary = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    summary |= {"recall": statistics.mean(row["recall"] for row in rows), "prompts": len(rows)}
    return {
        **{"adapters": args.adapters, "points": points, "width": args.width, "rank": args.rank, "k": args.k},
        **{"first_rank": args.first_rank, "tokens": tokens, "flat": args.flat, **summary},
        **{"one_bytes": sum(index.bytes for index in scorer.indices), "first_bytes": scorer.first.bytes},
    }


def compared(one: Tensor, two: Tensor, k: int) -> dict[str, float]:
    """How many of the k best of one stage are among the k best of two; and how far apart their scores are."""
    best, found = set(one.topk(k).indices.tolist()), set(two.topk(k).indices.tolist())
    scored = two != NOT_SCORED
    apart = ((two[scored] - one[scored]).abs() / one[scored].abs().clamp_min(1e-6)).max()
    first = float(int(one.argmax()) == int(two.argmax()))
    return {"recall": len(best & found) / k, "top1": first, "scored": int(scored.sum()), "apart": float(apart)}


def recall(args: argparse.Namespace) -> None:
    """Both stages on a real pool with real prompts: JSONL rows with a `context`, the first of each file."""
    from logo import AdapterPool, LoGo, SelectionSettings
    from logo.models import load_base

    model, tokenizer = load_base(args.base_model, device="cpu", dtype="float32")
    pool = AdapterPool.from_directory(args.adapters)
    files = sorted(args.rows.rglob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()[: args.each]]
    texts = [json.loads(line)["context"] for line in lines]
    found: dict[str, Any] = {"adapters": len(pool), "prompts": len(texts), "first_rank": args.first_rank}
    for signal in ("norm", "calibrated"):
        # Example prompts are ignored: they would be the same in both stages, and the estimates are what is measured.
        settings = SelectionSettings(signal=signal, index="two-stage", index_rank=args.first_rank, examples="ignore")
        scorer: Any = LoGo(model, tokenizer, pool, settings=settings).scorer
        rows: dict[int, list[dict[str, float]]] = {k: [] for k in args.ks}
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"][-args.tokens :]])
            hidden = scorer._probe(ids, torch.ones_like(ids))
            one = one_stage(scorer, hidden)
            estimate = None if scorer._estimated is None else scorer._estimate(hidden)
            for k in args.ks:
                if estimate is None:
                    rows[k].append(compared(one, scorer.of_vectors(hidden, Best(k)), k))
                else:
                    rows[k].append(left(one, estimate, k))
        found[signal] = {k: averages(some) for k, some in rows.items()}
        print(signal, json.dumps(found[signal]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def left(one: Tensor, estimate: Tensor, k: int) -> dict[str, float]:
    """How many adapters an estimate has to leave for all of the k best, and the recall where it leaves k, 2k, 3k."""
    best = one.topk(k).indices
    needed = float((estimate[:, None] > estimate[best]).sum(dim=0).max() + 1)
    row = {"needed": needed}
    for times in (1, 2, 3):
        kept = estimate.topk(min(times * k, len(estimate))).indices.tolist()
        row[f"recall_{times}k"] = len(set(best.tolist()) & set(kept)) / k
    return row


def averages(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means, and the most that any row needed."""
    most = {"most_needed": max(row["needed"] for row in rows)} if "needed" in rows[0] else {}
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]} | most


def model(args: argparse.Namespace) -> None:
    """Bytes and milliseconds per prompt against the number of adapters, from what was measured, drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured: dict[str, Any] = {}
    for file in args.measured:
        measured |= json.loads(file.read_text())
    counts = [int(10 ** (3 + i / 4)) for i in range(13)]
    arms = ("one stage", "two stages", f"two stages, {args.workers} workers")
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    for row, signal in zip(figure.subplots(2, 2), [s for s in ("norm", "calibrated") if s in measured], strict=False):
        at = measured[signal]
        lines = {count: cost(at, count, args.memory_gb * 1e9, args.disk_gbs * 1e9, args.workers) for count in counts}
        for axes, what, unit in zip(row, ("bytes", "ms"), ("GB read per prompt", "ms per prompt"), strict=True):
            for arm in arms:
                axes.plot(counts, [lines[c][arm, what] / (1e9 if what == "bytes" else 1) for c in counts], label=arm)
            for arm, key in (("one stage", f"one_{what}"), ("two stages", f"two_{what}")):
                axes.plot([at["adapters"]], [at[key] / (1e9 if what == "bytes" else 1)], "o", label=f"{arm}, measured")
            axes.set(xscale="log", yscale="log", xlabel="adapters", ylabel=unit)
            axes.set_title(f"{signal}, {at['points']} point{'s' if at['points'] > 1 else ''}, {at['tokens']} tokens")
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=8)
        for count in (10**4, 10**5, 10**6):
            line = cost(at, count, args.memory_gb * 1e9, args.disk_gbs * 1e9, args.workers)
            parts = [f"{arm}: {line[arm, 'bytes'] / 1e9:.2f} GB {line[arm, 'ms']:,.0f} ms" for arm in arms]
            print(f"{signal:10} {count:>9,}", *parts, sep="   ")
    figure.savefig(args.png, dpi=110)


def cost(at: dict[str, Any], count: int, memory: float, disk: float, workers: int) -> dict[tuple[str, str], float]:
    """Bytes and ms of one prompt for so many adapters.

    Computing time is extrapolated in proportion to the number of adapters. What does not fit into a worker's memory is
    also read from its disk. A calibrated signal scores a fixed number of adapters exactly; with a bound (one point), it
    is a share of them.
    """
    ratio = count / at["adapters"]
    each = at["one_bytes"] / at["adapters"]
    scored = at["scored"] * (ratio if at["points"] == 1 else 1)
    found: dict[tuple[str, str], float] = {}

    def disk_ms(size: float, resident: float) -> float:
        return 1000 * size / disk if resident > memory else 0.0

    warm_one = max(0.0, at["one_ms"] - 1000 * at["one_disk"] / disk)
    found["one stage", "bytes"] = at["one_bytes"] * ratio
    found["one stage", "ms"] = warm_one * ratio + disk_ms(at["one_bytes"] * ratio, at["one_bytes"] * ratio)
    warm_two = max(0.0, at["two_ms"] - 1000 * at["two_disk"] / disk)
    for arm, among in (("two stages", 1), (f"two stages, {workers} workers", workers)):
        first = at["first_bytes"] * ratio / among
        exact = scored / (among if at["points"] == 1 else 1) * each  # every worker scores as many as one alone would
        found[arm, "bytes"] = first + exact
        # The exact part is read from the disk if the index exceeds the memory, the first stage if it exceeds it itself.
        from_disk = disk_ms(first, first) + disk_ms(exact, at["one_bytes"] * ratio / among)
        found[arm, "ms"] = warm_two * ratio / among + from_disk
    return found


def timed(call: Any) -> tuple[Tensor, float, int]:
    """The result, seconds, and bytes that were read from the disk."""
    before, began = _read_bytes(), time.perf_counter()
    result = call()
    return result, time.perf_counter() - began, _read_bytes() - before


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def say(text: str) -> None:
    """Prints a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    sizes = {"adapters": 100_000, "points": 12, "width": 1024, "rank": 8, "first-rank": 2, "k": 20}
    for name, default in {**sizes, "prompts": 20, "seed": 0}.items():
        one.add_argument(f"--{name}", type=int, default=default)
    one.add_argument("--flat", action="store_true", help="singular values that do not fall")
    one.add_argument("--signals", nargs="+", default=["norm", "calibrated"])
    one.add_argument("--scratch", type=Path, required=True)
    one.add_argument("--json", type=Path)
    one.set_defaults(run=measure)
    two = commands.add_parser("recall")
    two.add_argument("--base-model", required=True)
    two.add_argument("--adapters", type=Path, required=True)
    two.add_argument("--rows", type=Path, required=True)
    two.add_argument("--each", type=int, default=2, help="prompts of each file")
    two.add_argument("--tokens", type=int, default=256, help="of a prompt, the last ones")
    two.add_argument("--ks", type=int, nargs="+", default=[1, 3, 5])
    two.add_argument("--first-rank", type=int, default=2)
    two.add_argument("--json", type=Path)
    two.set_defaults(run=recall)
    three = commands.add_parser("model")
    three.add_argument("--measured", type=Path, nargs="+", required=True)
    three.add_argument("--png", type=Path, required=True)
    three.add_argument("--memory-gb", type=float, default=20)
    three.add_argument("--disk-gbs", type=float, default=2)
    three.add_argument("--workers", type=int, default=8)
    three.set_defaults(run=model)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
