"""Checks and times the gated product on a GPU: `logo.backends.vllm.kernels` inside a captured CUDA graph.

    PYTHONPATH=src python tools/gpu_check.py [--json FILE]

It needs PyTorch and Triton alone: neither vLLM, nor a model, nor a network. For each shape of an 8B model, one graph is
captured while every gate is closed, other gates are then written and the graph is replayed. The result has to be that
of the plain products in float32, and rows of the base model have to stay as they were to the bit. Times are per call
inside the graph: by the kernels, by the plain products, and what the base layer's own product takes.

On a CPU, `TRITON_INTERPRET=1 python tools/gpu_check.py --tiny` runs the same kernels without a graph; its times mean
nothing. The exit status is 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from logo.backends.vllm import kernels
from logo.backends.vllm.gates import StepGates, add_gated

# Name, number of inputs, and widths of the packed outputs, as vLLM packs them.
Shape = tuple[str, int, tuple[int, ...]]
SHAPES: Sequence[Shape] = (
    ("qkv", 4096, (4096, 1024, 1024)),
    ("o", 4096, (4096,)),
    ("gate_up", 4096, (14336, 14336)),
    ("down", 14336, (4096,)),
)
TINY: Sequence[Shape] = (("qkv", 48, (40, 24, 24)), ("down", 1100, (36,)))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# The error that rounding explains, relative to the largest sum.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Row:
    """What was found for one shape. Times are in microseconds; `error` is relative to the largest sum."""

    shape: str
    slots: int
    tokens: int
    error: float
    base_rows_equal: bool
    kernel_us: float
    plain_us: float
    base_us: float
    right: bool


class Case:
    """One layer with a pool in its slots.

    Args:
        shape: of the layer.
        slots, rank: of the pool.
        tokens: of the step.
        k: adapters in a mixture.
        device, dtype: of the products.
    """

    def __init__(
        self, shape: Shape, slots: int, rank: int, tokens: int, k: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        _, inside, widths = shape
        made = torch.Generator(device).manual_seed(0)

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=made, device=device).to(dtype)

        self.widths = widths
        self.starts = [sum(widths[:i]) for i in range(len(widths))]
        self.a = [drawn(slots, rank, inside) * inside**-0.5 for _ in widths]
        self.b = [drawn(slots, rank, width) for width in widths]
        self.weight = drawn(sum(widths), inside) * inside**-0.5
        self.x, self.before = drawn(tokens, inside), drawn(tokens, sum(widths))
        self.gates = StepGates(tokens, tokens, slots, device, dtype, listed=True)
        # As in a server: in small steps each token is of another request, and large steps hold prompts of 512 tokens;
        # one request in eight uses the base model alone.
        of = torch.arange(tokens) // (1 if tokens <= 256 else 512)
        requests = int(of.max()) + 1
        chosen = torch.rand(requests, slots).argsort(dim=1)[:, :k]
        mixtures = torch.zeros(requests, slots).scatter_(1, chosen, torch.rand(requests, chosen.shape[1]) + 0.1)
        self.mixtures = torch.cat([torch.zeros(1, slots), mixtures])
        self.which = torch.where(of % 8 == 7, 0, of + 1)

    def write(self, closed: bool) -> None:
        """Sets the gates: of the mixtures, or all closed."""
        which = torch.zeros_like(self.which) if closed else self.which
        self.gates.write(self.mixtures, which, which)

    def by_kernels(self, y: Tensor) -> None:
        """Adds the gated product by the kernels, as a layer does."""
        assert self.gates.opened is not None
        opened = self.gates.opened[0]
        kernels.add_gated(
            y, self.x, self.a, self.b, self.starts, self.widths, self.gates.tokens, opened.slot_of, opened.count_of
        )

    def by_plain(self, y: Tensor) -> None:
        """Adds the gated product by PyTorch's own products."""
        for a, b, start, width in zip(self.a, self.b, self.starts, self.widths, strict=True):
            add_gated(y[:, start : start + width], self.x, a, b, self.gates.tokens)

    def by_base(self, y: Tensor) -> None:
        """Computes the base layer's own product."""
        torch.mm(self.x, self.weight.T, out=y)

    def exact(self) -> Tensor:
        """The expected result: the plain products in float32."""
        y = self.before.float()
        for a, b, start, width in zip(self.a, self.b, self.starts, self.widths, strict=True):
            part = y[:, start : start + width]
            add_gated(part, self.x.float(), a.float(), b.float(), self.gates.tokens.float())
        return y


def repeated(call: Callable[[Tensor], None], y: Tensor) -> Callable[[], None]:
    """A function that calls `call` on `y`: on a GPU by replaying a graph, which is captured here."""
    if y.device.type != "cuda":
        return lambda: call(y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(y)
    return graph.replay


def timed(call: Callable[[], None], device: torch.device, calls: int) -> float:
    """Microseconds per call."""
    call()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls * 1e6
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / calls * 1e3


def checked(case: Case, name: str, device: torch.device, calls: int) -> Row:
    """Captures with closed gates, replays with open ones, compares and times."""
    y = case.before.clone()
    case.write(closed=True)
    by_kernels = repeated(case.by_kernels, y)
    still = torch.equal(y, case.before)
    case.write(closed=False)
    y.copy_(case.before)
    by_kernels()
    exact = case.exact()
    base = (case.which == 0).to(device)
    equal = still and torch.equal(y[base], case.before[base])
    error = float((y.float() - exact).abs().max() / exact.abs().max())
    case.write(closed=True)  # the replayed graph follows closed gates, too
    again = case.before.clone()
    y.copy_(case.before)
    by_kernels()
    equal = equal and torch.equal(y, again)
    case.write(closed=False)
    others = [repeated(call, case.before.clone()) for call in (case.by_plain, case.by_base)]
    times = [timed(call, device, calls) for call in (by_kernels, *others)]
    right = equal and error <= TOLERANCE[y.dtype]
    return Row(name, case.mixtures.shape[1], len(case.x), error, equal, *times, right)


def rows(asked: argparse.Namespace) -> Iterator[Row]:
    """All cases, one after the other."""
    device, dtype = torch.device(asked.device), DTYPES[asked.dtype]
    torch.manual_seed(0)
    for shape in TINY if asked.tiny else SHAPES:
        for slots in asked.slots:
            for tokens in asked.tokens:
                case = Case(shape, slots, asked.rank, tokens, asked.k, device, dtype)
                yield checked(case, shape[0], device, 1 if device.type == "cpu" else asked.calls)


def numbers(text: str) -> list[int]:
    """The numbers of a text such as `1,2,3`."""
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line says, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--slots", type=numbers, help="adapters in the pool, such as 60,260")
    parser.add_argument("--tokens", type=numbers, help="tokens of a step, such as 1,16,256")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--k", type=int, default=3, help="adapters in a mixture")
    parser.add_argument("--calls", type=int, default=50, help="calls that are timed")
    parser.add_argument("--tiny", action="store_true", help="shapes for Triton's interpreter on a CPU")
    parser.add_argument("--json", type=Path, help="a file for the same numbers")
    asked = parser.parse_args(arguments)
    asked.slots = asked.slots or ([3, 9] if asked.tiny else [60, 260])
    asked.tokens = asked.tokens or ([1, 20, 70] if asked.tiny else [1, 8, 64, 256, 1024, 8192])
    name = torch.cuda.get_device_name() if asked.device.startswith("cuda") else "CPU, interpreted, no graph"
    about = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "dtype": asked.dtype}
    print(", ".join(f"{key} {value}" for key, value in about.items()), f"rank {asked.rank}, k {asked.k}")
    print(f"{'layer':8} {'slots':>6} {'tokens':>7} {'error':>9} {'kernel us':>10} {'plain us':>10} {'base us':>10}")
    found = []
    for row in rows(asked):
        found.append(row)
        print(
            f"{row.shape:8} {row.slots:6} {row.tokens:7} {row.error:9.1e} {row.kernel_us:10.1f} {row.plain_us:10.1f} "
            f"{row.base_us:10.1f}{'' if row.right else '  WRONG'}",
            flush=True,
        )
    if asked.json:
        told = {**about, "rank": asked.rank, "k": asked.k, "rows": [asdict(row) for row in found]}
        asked.json.write_text(json.dumps(told, indent=1) + "\n")
    wrong = sum(not row.right for row in found)
    print(f"{wrong} of {len(found)} are wrong" if wrong else f"all {len(found)} are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
