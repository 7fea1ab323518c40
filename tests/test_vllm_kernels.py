"""Triton's kernels for the gated product: interpreted on a CPU against the plain products, and compiled for GPUs."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logo.backends.vllm.gates import SIZES, StepGates, add_gated, turned

pytest.importorskip("triton", reason="needs Triton: make test-vllm")

CPU = torch.device("cpu")
DTYPES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # what rounding explains, of the largest sum
NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}  # what Triton calls pointers to them


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("logo.backends.vllm.kernels")  # registers the operator
        yield


def layer(slots: int, rank: int, inside: int, widths: list[int], dtype: torch.dtype, turn: bool) -> Any:
    """Factors of each slice as vLLM stacks them: (slots, 1, rank, d_in), (slots, 1, d_out, rank)."""
    a = [torch.randn(slots, 1, rank, inside).to(dtype) for _ in widths]
    b = []
    for width in widths:
        made = torch.randn(slots, 1, width, rank).to(dtype)
        b.append(turned(made).copy_(made) if turn else made)
    return [part[:, 0] for part in a], [part[:, 0].transpose(1, 2) for part in b]


def by_kernels(y: Tensor, x: Tensor, a: Any, b: Any, starts: list[int], gates: StepGates) -> None:
    assert gates.opened is not None
    of = gates.opened[0]
    widths = [part.shape[2] for part in b]
    torch.ops.logo.add_gated(y, x, a, b, starts, widths, gates.tokens, of.slot_of, of.count_of)


def written(mixtures: Tensor, which: Tensor, dtype: torch.dtype, room: int = 9) -> StepGates:
    gates = StepGates(len(which) + room, len(which), mixtures.shape[1], CPU, dtype, listed=True)
    gates.write(mixtures, which, which)
    return gates


@settings(max_examples=12 if os.environ.get("CI") else 20)
@given(
    tokens=st.integers(1, 40) | st.integers(62, 140),
    slots=st.integers(1, 9),
    rank=st.integers(1, 20) | st.sampled_from([33, 64, 70]),
    inside=st.integers(1, 70) | st.sampled_from([1023, 1024, 1025, 2100]),
    widths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    dtype=st.sampled_from(list(DTYPES)),
    out=st.sampled_from([None, torch.float32]),
    turn=st.booleans(),
    margin=st.integers(0, 3),
    share=st.sampled_from([0.1, 0.4, 1.0]),
    seed=st.integers(0, 999),
)
def test_kernels_are_the_plain_products(
    tokens: int,
    slots: int,
    rank: int,
    inside: int,
    widths: list[int],
    dtype: torch.dtype,
    out: torch.dtype | None,
    turn: bool,
    margin: int,
    share: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    a, b = layer(slots, rank, inside, widths, dtype, turn)
    mixtures = torch.rand(4, slots) * (torch.rand(4, slots) < share)
    mixtures[0] = 0
    which = torch.randint(0, 4, (tokens,))
    gates = written(mixtures, which, dtype)
    x = torch.randn(tokens, inside).to(out or dtype)
    wide = torch.randn(tokens, sum(widths) + 2 * margin).to(out or dtype)
    before = wide[:, margin:]  # columns of something wider
    starts = [sum(widths[:i]) for i in range(len(widths))]
    found = wide.clone()[:, margin:]
    by_kernels(found, x, a, b, starts, gates)
    exact = before.float().clone()
    for factor, other, start, width in zip(a, b, starts, widths, strict=True):
        part = exact[:, start : start + width]
        add_gated(part, x.to(dtype).float(), factor.float(), other.float(), gates.tokens[:tokens].float())
    assert (found.float() - exact).abs().max() <= DTYPES[dtype] * exact.abs().max()
    closed = gates.tokens[:tokens].eq(0).all(dim=1)
    assert torch.equal(found[closed], before[closed])  # to the bit
    assert torch.equal(found[:, sum(widths) :], before[:, sum(widths) :])


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_where_its_gate_is_open(tokens: int, bad: float) -> None:
    a, b = layer(3, 2, 8, [12], torch.float32, True)
    a[0][1] = bad  # an adapter that overflows
    mixtures = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    which = torch.arange(tokens) % 3
    x, y = torch.ones(tokens, 8), torch.zeros(tokens, 12)
    by_kernels(y, x, a, b, [0], written(mixtures, which, torch.float32))
    assert y[which != 2].isfinite().all() and not y[which == 2].isfinite().any()
    assert torch.equal(y[which == 0], torch.zeros_like(y[which == 0]))
    x[0] = bad  # a hidden vector that is not finite spoils its own row alone: here that of the base model
    again = torch.zeros(tokens, 12)
    by_kernels(again, x, a, b, [0], written(mixtures, which, torch.float32))
    assert torch.equal(again.nan_to_num(7.0), y.nan_to_num(7.0)) and again[0].eq(0).all()


@given(steps=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 999)), min_size=1, max_size=5))
def test_what_blocks_open_is_listed_anew_in_every_step(steps: list[tuple[int, int]]) -> None:
    gates = StepGates(90, 90, 5, CPU, torch.float32, listed=True)
    assert gates.opened is not None
    places = [buffer.data_ptr() for of in gates.opened for buffer in (*of.slot_of, *of.count_of)]
    for tokens, seed in steps:
        torch.manual_seed(seed)
        mixtures = torch.rand(4, 5) * (torch.rand(4, 5) < 0.4)
        mixtures[0] = 0
        which = torch.randint(0, 4, (tokens,)).sort().values
        gates.write(mixtures, which, which[: tokens // 2])
        for of, buffer in zip(gates.opened, (gates.tokens, gates.sampled), strict=True):
            for size, slot_of, count_of in zip(SIZES, of.slot_of, of.count_of, strict=True):
                for i, count in enumerate(count_of.tolist()):
                    expected = buffer[i * size : (i + 1) * size].ne(0).any(dim=0).nonzero()[:, 0].tolist()
                    assert slot_of[i, :count].tolist() == expected and count == len(expected)
    assert places == [buffer.data_ptr() for of in gates.opened for buffer in (*of.slot_of, *of.count_of)]


def test_slots_that_no_token_opens_are_not_read() -> None:
    a, b = layer(4, 2, 8, [12], torch.float32, True)
    a[0][2:] = torch.nan
    b[0][2:] = torch.nan  # the plain products would spread it
    y = torch.zeros(2, 12)
    by_kernels(y, torch.ones(2, 8), a, b, [0], written(torch.tensor([[0.5, 0.5, 0, 0]]), torch.tensor([0, 0]), y.dtype))
    assert y.isfinite().all() and y.ne(0).any()


def test_the_operator_says_what_it_does() -> None:
    from logo.backends.vllm import kernels

    a, b = layer(3, 2, 8, [12, 4], torch.float32, True)
    gates = written(torch.rand(3, 3), torch.tensor([0, 1, 2, 1]), torch.float32)
    assert gates.opened is not None
    of = gates.opened[0]
    arguments = (torch.zeros(4, 16), torch.ones(4, 8), a, b, [0, 12], [12, 4], gates.tokens, of.slot_of, of.count_of)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(kernels.add_gated, arguments, test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "dtype"), [(80, torch.bfloat16)], ids=str)
def test_kernels_compile_for_gpus(
    architecture: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, by the assembler that comes with Triton; running it takes a GPU: tools/gpu_check.py."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from logo.backends.vllm import kernels

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for tokens, rank, inside in ((1, 16, 14336), (1, 64, 14336), (64, 300, 4096), (65, 16, 4096), (8192, 64, 4096)):
        how = kernels.Launch.of(tokens, rank, inside, dtype)
        kept = "*fp32" if how.splits > 1 else NAMES[dtype]
        pointers = {"slot_of": "*i32", "count_of": "*i32", "h": kept, "gate": NAMES[dtype]}
        pointers |= dict.fromkeys("xyab", NAMES[dtype])
        for kernel, own, options in (
            (kernels._shrink, {}, kernels.SHRINK),
            (kernels._expand, {"SPLITS": how.splits}, kernels.EXPAND),
        ):
            function = triton.runtime.JITFunction(kernel.fn)
            constants = {**how.constants, **own, "WIDE": False}
            signature = {name: pointers.get(name, "i32") for name in function.arg_names}
            signature |= dict.fromkeys(constants, "constexpr")
            made = triton.compile(
                ASTSource(fn=function, signature=signature, constexprs=constants),
                target=GPUTarget("cuda", architecture, 32),
                options=options,
            )
            assert made.asm["cubin"]
            assert made.metadata.shared <= 99 * 1024, how  # what every GPU of the last years has for a block
            assert dtype == torch.float32 or "mma" in made.asm["ptx"]  # tensor cores


def test_the_check_for_gpus_runs_here_and_notices_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    import gpu_check

    told = tmp_path / "found.json"
    asked = ["--device", "cpu", "--tiny", "--dtype", "float32", "--slots", "3", "--tokens", "5"]
    assert gpu_check.main([*asked, "--json", str(told)]) == 0
    rows = json.loads(told.read_text())["rows"]
    assert f"all {len(rows)} are right" in capsys.readouterr().out
    assert rows and all(row["right"] and row["error"] < 1e-5 for row in rows)
    right = gpu_check.Case.by_kernels
    monkeypatch.setattr(gpu_check.Case, "by_kernels", lambda self, y: right(self, y.mul_(1.01)))
    assert gpu_check.main(asked) == 1
