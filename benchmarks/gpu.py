"""What LoGo costs on a GPU, in the shapes of Qwen2.5-7B and Llama-3.1-8B, in at most eight minutes.

    PYTHONPATH=src python benchmarks/gpu.py --json gpu.json

It needs torch, transformers, safetensors, scipy, psutil and PyYAML, no network and no checkpoint: weights are random
and bfloat16, since cost depends on their shapes only. Every pool of random adapters is measured beside the base model
alone and beside one plain adapter, which adds `s B A x` to the same modules as PEFT does.

    60 and 260 adapters of rank 16 on q, k, v and o        1.2 to 1.6 GB and 5.3 to 7.1 GB
    60 adapters of rank 64 on all linear modules           19 to 20 GB

260 adapters of rank 64 on all linear modules would take 84 to 87 GB, for which neither a card of 80 GB nor its disk has
room. Of a pool for which the disk or the card is too small, as many adapters are made as fit, and the table says so.

Pools share the time that is left, and each part of a pool has a limit of its own. What fails, or has no time left, is a
line of the table; `--bases` and `--pools` give the whole time to some of them. `--tiny` shows within a minute, on any
CPU, that everything works.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from logo import Adapter, AdapterPool, LoGo, SelectionSettings
from rounds import peak_memory, resident, timed, wait
from synthetic import TARGETS, random_mixtures

ATTENTION = TARGETS[:4]
# Standard deviation of A and B, and of the base model's weights: responses are small beside what they are added to.
_SPREAD = 0.02
# Adapters are pieces of one random vector, which begin at other numbers below this.
_SHIFTS = 2**20
# How far apart these beginnings lie.
_APART = 1009 * 16
# Seconds that a part of a pool may take, in the order in which they are measured.
LIMITS = {"write": 60, "open": 75, "select": 15, "load": 15, "first token": 25, "prefill": 20, "decode": 40}
_WARM = 3  # new tokens of an answer that warms up
_LOADED = 8  # adapters that are loaded one by one
# The share of the card's free memory that adapters and what batches multiply may have.
_ADAPTER_SHARE = 0.85
# How many times a pool's size they need: once as they are loaded, once as a batch multiplies them.
_TWICE = 2.1


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model.

    Attributes:
        kind: `"llama"`, or `"qwen2"`, which has biases at q, k and v.
        hidden, wide, layers, heads, key_heads, vocabulary: its widths and numbers, as in its configuration.
    """

    name: str
    kind: str
    hidden: int
    wide: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def config(self) -> Any:
        """The configuration for transformers."""
        classes = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
        return classes[self.kind](
            hidden_size=self.hidden,
            intermediate_size=self.wide,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=32768,
            initializer_range=_SPREAD,
            tie_word_embeddings=False,
        )


@dataclass(frozen=True)
class PoolShape:
    """The sizes of a pool: how many adapters, their rank, and the modules that they adapt; `weight` is its share of the
    time beside the others."""

    count: int
    rank: int
    targets: tuple[str, ...]
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Such as `60x16`."""
        return f"{self.count}x{self.rank}"

    @property
    def text(self) -> str:
        """In words."""
        where = "all linear modules" if len(self.targets) == len(TARGETS) else "q, k, v, o"
        return f"{self.count} adapters of rank {self.rank} on {where}"


BASES = (
    Shape("llama-3.1-8b", "llama", 4096, 14336, 32, 32, 8, 128256),
    Shape("qwen2.5-7b", "qwen2", 3584, 18944, 28, 28, 4, 152064),
)
POOLS = (PoolShape(60, 16, ATTENTION, 1.0), PoolShape(60, 64, TARGETS, 2.0), PoolShape(260, 16, ATTENTION, 1.5))
TINY_BASES = (
    Shape("llama-3.1-8b", "llama", 32, 112, 4, 4, 1, 512),
    Shape("qwen2.5-7b", "qwen2", 28, 148, 4, 7, 1, 512),
)
TINY_POOLS = (PoolShape(24, 2, ATTENTION), PoolShape(22, 4, TARGETS), PoolShape(30, 2, ATTENTION))


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        bases, pools: every pool on every base model.
        asked: tokens of a prompt that is selected for, and of those whose first tokens are timed.
        prompts: tokens of prompts that are prefilled.
        batches: rows of batches that decode, after prompts of `short` tokens, `decoded` tokens each.
        ks: adapters of a mixture.
        rounds: how often what is not decoding is timed, after a warm-up.
        device, dtype: of the base model.
        minutes: for everything.
        scratch: the folder for temporary files; None: the system's.
    """

    bases: tuple[Shape, ...] = BASES
    pools: tuple[PoolShape, ...] = POOLS
    asked: int = 64
    prompts: tuple[int, ...] = (256, 1000, 4000)
    batches: tuple[int, ...] = (1, 16, 64)
    ks: tuple[int, ...] = (1, 4, 20)
    short: int = 16
    decoded: int = 20
    rounds: int = 5
    device: str = "cuda"
    dtype: str = "bfloat16"
    minutes: float = 7.5
    seed: int = 0
    scratch: Path | None = None


TINY = Plan(TINY_BASES, TINY_POOLS, 8, (12, 24, 48), (1, 2, 4), short=4, decoded=3, rounds=2, device="cpu")


# -- what is found -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        base, pool, part, arm: what was measured.
        seconds: of each repetition, or of each step; empty if only memory was measured, or if it failed.
        bytes: memory: the most that the arm took beside what was there, or what is named; None: not known.
        problem: why there is no number, in one line.
    """

    base: str
    pool: str
    part: str
    arm: str
    seconds: tuple[float, ...] = ()
    bytes: int | None = None
    problem: str | None = None

    @property
    def median(self) -> float | None:
        """Of `seconds`."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def p90(self) -> float | None:
        """The least of `seconds` that nine in ten do not exceed."""
        if not self.seconds:
            return None
        return sorted(self.seconds)[math.ceil(0.9 * len(self.seconds)) - 1]


@dataclass
class Table:
    """The lines, which are shown as they come."""

    about: Mapping[str, Any]
    lines: list[Line] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begins the lines of one pool on one base model."""
        print(f"\n{text}\n{'part':<18}{'arm':<30}{'median ms':>11}{'p90 ms':>11}{'x base':>8}{'MB':>10}", flush=True)

    def add(self, line: Line) -> None:
        """Shows a line."""
        self.lines.append(line)
        shown = f"{line.part:<18}{line.arm:<30}"
        if line.problem is not None:
            print(f"{shown} {line.problem}", flush=True)
            return
        numbers = [None if value is None else f"{1000 * value:,.2f}" for value in (line.median, line.p90)]
        base = self._base(line)
        beside = None if base is None or line.median is None else f"{line.median / base:.2f}"
        memory = None if line.bytes is None else f"{line.bytes / 1e6:,.1f}"
        cells = zip((*numbers, beside, memory), (11, 11, 8, 10), strict=True)
        print(shown + "".join(f"{'' if cell is None else cell:>{width}}" for cell, width in cells), flush=True)

    def write(self, file: Path) -> None:
        """Writes everything as JSON."""
        lines = [asdict(line) | {"median": line.median, "p90": line.p90} for line in self.lines]
        file.write_text(json.dumps({"about": self.about, "lines": lines}, indent=2) + "\n", encoding="utf-8")

    def _base(self, line: Line) -> float | None:
        """The median of the base model alone in the same part; None: it was not measured."""
        alike = (line.base, line.pool, line.part, "base")
        found = [one for one in self.lines if (one.base, one.pool, one.part, one.arm) == alike]
        return found[0].median if found else None


class OutOfTime(BaseException):
    """A part has taken its time. Like an interrupt it is no `Exception`, so that nothing in between handles it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside the block after so many seconds, or at once if there are none; in the main thread of a
    system with timers. A kernel or a copy that runs is not interrupted."""
    if seconds <= 0:
        raise OutOfTime
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again, since Python drops what is raised in a finalizer
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


# -- what is measured on -----------------------------------------------------------------------------------------------


def base_model(shape: Shape, plan: Plan) -> Any:
    """A random model, made on the device and in the dtype in which it computes, so that no other copy is needed."""
    torch.manual_seed(plan.seed)
    with torch.device(plan.device):
        config = shape.config
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, plan.dtype))
    model = model.eval().requires_grad_(False)
    # The model never ends an answer by itself, so that every arm decodes the same number of tokens.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def text_tokenizer() -> Any:
    """A tokenizer made of the texts of calibrations, which have as many tokens with it as with one of a large model.

    Prompts are given as token ids; only these texts are read with it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from logo.selection.texts import EVERYDAY, NEUTRAL, REQUESTS

    special = ["<pad>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*NEUTRAL, *REQUESTS, *EVERYDAY], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def adapted(model: nn.Module, pool: PoolShape) -> dict[str, nn.Linear]:
    """The modules that the adapters of a pool adapt, by path."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {path: module for path, module in linears.items() if path.rsplit(".", 1)[-1] in pool.targets}


def adapter_bytes(model: nn.Module, pool: PoolShape, dtype: torch.dtype) -> int:
    """The size of one adapter."""
    modules = adapted(model, pool).values()
    return sum(pool.rank * (module.in_features + module.out_features) for module in modules) * dtype.itemsize


def fitting(model: nn.Module, pool: PoolShape, plan: Plan, folder: Path) -> PoolShape:
    """The pool with as many adapters as fit on the disk and, twice, on the card."""
    size = adapter_bytes(model, pool, getattr(torch, plan.dtype))
    room = 0.9 * shutil.disk_usage(folder).free / size
    if plan.device.startswith("cuda"):
        room = min(room, _ADAPTER_SHARE * torch.cuda.mem_get_info(plan.device)[0] / (_TWICE * size))
    return replace(pool, count=min(pool.count, int(room)))


def write_adapters(folder: Path, model: nn.Module, pool: PoolShape, plan: Plan) -> None:
    """PEFT folders `000`, `001`, ...: files of safetensors with one header, behind which each has another piece of one
    random vector, so that 20 GB are written as fast as the disk takes them."""
    dtype = getattr(torch, plan.dtype)
    header = _header(adapted(model, pool), pool.rank, dtype)
    size = adapter_bytes(model, pool, dtype)
    with torch.device(plan.device):
        noise = torch.empty(size // dtype.itemsize + _SHIFTS, dtype=dtype).normal_(std=_SPREAD)
    written = noise.cpu().view(torch.uint8).numpy().data
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": pool.rank, "lora_alpha": 2 * pool.rank}
    config |= {"lora_dropout": 0.0, "bias": "none", "target_modules": list(pool.targets)}
    for number in range(pool.count):
        adapter = folder / f"{number:03d}"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        start = number * _APART % _SHIFTS * dtype.itemsize
        with open(adapter / "adapter_model.safetensors", "wb") as file:
            file.write(header)
            file.write(written[start : start + size])


def _header(modules: Mapping[str, nn.Linear], rank: int, dtype: torch.dtype) -> bytes:
    """The header of a file of safetensors with the tensors of an adapter."""
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for path, module in modules.items():
        for factor, shape in (("A", [rank, module.in_features]), ("B", [module.out_features, rank])):
            begin = end
            end += math.prod(shape) * dtype.itemsize
            key = f"base_model.model.{path}.lora_{factor}.weight"
            entries[key] = {"dtype": name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def plain_adapter(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor, float]]) -> Iterator[None]:
    """Inside the block one adapter, `A` (r, in), `B` (out, r) and `s` by module, acts as a layer of PEFT acts."""

    def added(A: Tensor, B: Tensor, scale: float, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y + nn.functional.linear(nn.functional.linear(inputs[0], A), B) * scale

    hooks = []
    try:
        for path, pair in factors.items():
            hooks.append(model.get_submodule(path).register_forward_hook(partial(added, *pair)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def step_starts(model: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Inside the block, the list gets the time at which each forward pass begins: when the device has finished the pass
    before, for which `generate` waits after every token."""
    starts: list[float] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        wait(device)
        starts.append(time.perf_counter())

    hook = model.register_forward_pre_hook(note)
    try:
        yield starts
    finally:
        hook.remove()


# -- the parts ---------------------------------------------------------------------------------------------------------

# Warms up, measures and appends the seconds of each repetition, so that those before the end of the time count.
Arm = Callable[[list[float]], None]
Mixtures = Sequence[Mapping[str, float]]


@dataclass
class PoolBench:
    """One pool on one base model.

    Attributes:
        ends: the time at which its parts have to be done, on the monotonic clock.
        opened: the engine, once it is there; `plain`: the factors of the plain adapter.
    """

    plan: Plan
    shape: Shape
    pool: PoolShape
    model: Any
    tokenizer: Any
    folder: Path
    ends: float
    table: Table
    opened: LoGo | None = None
    plain: Mapping[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)

    @property
    def logo(self) -> LoGo:
        """The engine."""
        if self.opened is None:
            raise RuntimeError("the pool could not be opened")
        return self.opened

    @property
    def device(self) -> torch.device:
        """Of the base model."""
        return torch.device(self.plan.device)

    def measure(self) -> None:
        """All parts."""
        self.note("memory", "base model", sum(weight.nbytes for weight in self.model.parameters()))
        self.part("write", {"pool": self.once(self.write)})
        if self.table.lines[-1].problem is not None:
            return
        before = self.allocated()
        self.part("open", {"new pool": self.once(self.open), "known pool": self.once(self.open)})
        if self.opened is None:
            return
        self.note("memory", "engine with its index", self.allocated() - before)
        self.plain = self.plain_factors()
        [asked] = self.rows(1, self.plan.asked)
        self.part("select", self.selecting(asked))
        self.part("load", {"one adapter": self.loading})
        self.part("first token", self.first_token(asked))
        before = self.allocated()
        for tokens in self.plan.prompts:
            self.part("prefill", self.prefilling(tokens), f"prefill {tokens:,}")
        for batch in self.plan.batches:
            self.part("decode", self.decoding(batch), f"decode, batch {batch}")
        self.note("memory", "loaded adapters", self.logo.adapter_cache.bytes)
        self.note("memory", "with what a batch multiplies", self.allocated() - before)

    def part(self, limit: str, arms: Mapping[str, Arm], name: str | None = None) -> None:
        """Measures arms one after the other; each failure is a line."""
        ends = min(self.ends, time.monotonic() + LIMITS[limit])
        for arm, measure in arms.items():
            seconds: list[float] = []
            problem = None
            with peak_memory(self.device) as peak:
                try:
                    with limited(ends - time.monotonic()):
                        measure(seconds)
                except OutOfTime:
                    problem = None if seconds else "left out: no time left"
                except Exception as error:
                    problem = one_line(error)
                    traceback.clear_frames(error.__traceback__)  # they hold memory
            if problem is not None:
                seconds.clear()
                free(self.device)
            self.table.add(Line(self.shape.name, self.pool.name, name or limit, arm, tuple(seconds), peak[0], problem))

    def note(self, part: str, arm: str, count: int) -> None:
        """A line of memory alone."""
        self.table.add(Line(self.shape.name, self.pool.name, part, arm, bytes=count))

    def allocated(self) -> int:
        """Bytes in use: on the card, or of this process."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else resident()

    def once(self, run: Callable[[], object]) -> Arm:
        """An arm that is measured once, without a warm-up."""
        return lambda seconds: seconds.append(timed(run, self.device))

    def often(self, run: Callable[[], object], before: Callable[[], object] | None = None) -> Arm:
        """An arm that is measured in rounds, after a warm-up; `before` is called before each of them, untimed."""

        def measure(seconds: list[float]) -> None:
            run()
            for _ in range(self.plan.rounds):
                if before is not None:
                    before()
                seconds.append(timed(run, self.device))

        return measure

    def steps(self, run: Callable[[int], object]) -> Arm:
        """An arm of decoding steps: `run` answers with so many tokens, of which the first comes with the prefill."""

        def measure(seconds: list[float]) -> None:
            run(_WARM)
            with step_starts(self.model, self.device) as starts:
                run(self.plan.decoded + 2)
            durations = [after - before for before, after in pairwise(starts)]
            seconds += durations[1:]  # the first one is the prefill

        return measure

    # what arms do

    def write(self) -> None:
        """Makes the adapters."""
        write_adapters(self.folder / "pool", self.model, self.pool, self.plan)

    def open(self) -> None:
        """From a folder to an engine that can select; what a calibration has measured is kept for the next one."""
        size = self.pool.count * adapter_bytes(self.model, self.pool, self.model.dtype)
        self.opened = LoGo(
            self.model,
            self.tokenizer,
            AdapterPool.open(self.folder / "pool"),
            settings=SelectionSettings(k=max(self.plan.ks), cache=str(self.folder / "cache")),
            adapter_memory_gb=_TWICE * size / 1e9,
        )
        self.opened.calibrate()

    def plain_factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """The first adapter of the pool, on the device."""
        first = self.logo.fitted[self.logo.names[0]]
        weights = first.read()
        return {path: (one.A.to(self.device), one.B.to(self.device), one.scaling) for path, one in weights.items()}

    def rows(self, count: int, tokens: int) -> list[list[int]]:
        """Random prompts as token ids, the same ones in each call."""
        generator = torch.Generator().manual_seed(self.plan.seed)
        ids: list[list[int]] = torch.randint(2, self.shape.vocabulary, (count, tokens), generator=generator).tolist()
        return ids

    def base(self, rows: list[list[int]], new: int) -> None:
        """Answers a batch by the base model alone, with transformers' `generate`."""
        ids = torch.tensor(rows, device=self.device)
        with torch.no_grad():
            self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=exactly(new))

    def beside(self, rows: list[list[int]], new: int) -> None:
        """Answers a batch with the plain adapter."""
        with plain_adapter(self.model, self.plain):
            self.base(rows, new)

    def mixed(self, rows: list[list[int]], mixtures: Mixtures | None, new: int) -> None:
        """Answers a batch by LoGo, with these mixtures, or with the selected ones."""
        adapters = None if mixtures is None else list(mixtures)
        self.logo.generate(rows, adapters=adapters, batch_size=len(rows), generation_config=exactly(new))

    def forget_adapters(self) -> None:
        """Removes all adapters from the device, so that they are read from their files again."""
        self.logo.adapter_cache.retain(())

    # the arms of the parts

    def both(self, rows: list[list[int]]) -> dict[str, Arm]:
        """The base model alone and the plain adapter, up to the first token."""
        return {
            "base": self.often(partial(self.base, rows, 1)),
            "one plain adapter": self.often(partial(self.beside, rows, 1)),
        }

    def selecting(self, row: list[int]) -> dict[str, Arm]:
        """A selection, beside a prefill of the same prompt."""
        signals = ("calibrated", "norm")
        selections = {
            f"LoGo selects, {name}": self.often(partial(self.logo.select, [row], signal=name)) for name in signals
        }
        return self.both([row]) | selections

    def loading(self, seconds: list[float]) -> None:
        """From the file of an adapter to the device, of each of a few."""
        self.forget_adapters()

        def load(adapter: Adapter) -> None:
            with self.logo.adapter_cache.held([adapter]):
                pass

        for adapter in list(self.logo.fitted)[:_LOADED]:
            seconds.append(timed(partial(load, adapter), self.device))

    def first_token(self, row: list[int]) -> dict[str, Arm]:
        """From a prompt to its first token, with a selection."""
        answer = partial(self.mixed, [row], None, 1)
        return self.both([row]) | {
            "LoGo, adapters loaded": self.often(answer),
            "LoGo, adapters in files": self.often(answer, self.forget_adapters),
        }

    def prefilling(self, tokens: int) -> dict[str, Arm]:
        """From a prompt to its first token, with a mixture that is given."""
        rows = self.rows(1, tokens)
        arms = self.both(rows)
        for k in self.plan.ks:
            mixture = random_mixtures(self.logo.names, 1, k, self.plan.seed)
            arms[f"LoGo, k {k}"] = self.often(partial(self.mixed, rows, mixture, 1))
        return arms

    def decoding(self, batch: int) -> dict[str, Arm]:
        """Decoding steps, with one mixture for all rows and with a mixture for each, drawn independently."""
        rows = self.rows(batch, self.plan.short)
        arms = {
            "base": self.steps(partial(self.base, rows)),
            "one plain adapter": self.steps(partial(self.beside, rows)),
        }
        for k in self.plan.ks:
            mixtures = random_mixtures(self.logo.names, batch, k, self.plan.seed)
            arms[f"LoGo, k {k}, one mixture"] = self.steps(partial(self.mixed, rows, mixtures[:1] * batch))
            if batch > 1:
                arms[f"LoGo, k {k}, one per row"] = self.steps(partial(self.mixed, rows, mixtures))
        return arms


def exactly(new: int) -> Any:
    """Greedy decoding of this many tokens."""
    return transformers.GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)


def one_line(error: Exception) -> str:
    """What went wrong."""
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text:.120}"


def free(device: torch.device) -> None:
    """Gives memory back that nobody uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- all of them -------------------------------------------------------------------------------------------------------


def measure(plan: Plan, table: Table) -> None:
    """Every pool on every base model, each with its share of the time that is left."""
    ends = time.monotonic() + 60 * plan.minutes
    left = len(plan.bases) * sum(pool.weight for pool in plan.pools)
    tokenizer = text_tokenizer()
    for shape in plan.bases:
        try:
            model = base_model(shape, plan)
        except Exception as error:
            table.heading(shape.name)
            table.add(Line(shape.name, "", "base model", "made", problem=one_line(error)))
            left -= sum(pool.weight for pool in plan.pools)
            continue
        for pool in plan.pools:
            share = pool.weight / left
            left -= pool.weight
            now = time.monotonic()
            _measure_pool(plan, shape, pool, model, tokenizer, now + share * (ends - now), table)
        del model
        free(torch.device(plan.device))


def _measure_pool(
    plan: Plan, shape: Shape, pool: PoolShape, model: Any, tokenizer: Any, ends: float, table: Table
) -> None:
    with tempfile.TemporaryDirectory(dir=plan.scratch, prefix="logo-gpu-") as scratch:
        folder = Path(scratch)
        made = fitting(model, pool, plan, folder)
        short = "" if made.count == pool.count else f" (no room for {pool.count})"
        table.heading(f"{shape.name}, {made.text}{short}")
        if made.count < max(plan.ks):
            table.add(Line(shape.name, pool.name, "write", "pool", problem=f"left out: room for {made.count} adapters"))
            return
        PoolBench(plan, shape, made, model, tokenizer, folder, ends, table).measure()
    free(torch.device(plan.device))


def about(plan: Plan) -> dict[str, Any]:
    """The machine, the versions, and what is measured, as JSON."""
    cuda = plan.device.startswith("cuda")
    return {
        "card": torch.cuda.get_device_name(plan.device) if cuda else None,
        "card_bytes": torch.cuda.get_device_properties(plan.device).total_memory if cuda else None,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "plan": json.loads(json.dumps(asdict(plan), default=str)),
    }


def _driver() -> str | None:
    """The version of the card's driver; None if there is nothing to ask."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _asked(argv: Sequence[str] | None) -> tuple[Plan, Path | None]:
    """The plan that the options ask for, and the file for JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to this file")
    parser.add_argument("--bases", nargs="+", choices=[shape.name for shape in BASES], help="these base models alone")
    parser.add_argument("--pools", nargs="+", choices=[pool.name for pool in POOLS], help="these pools alone")
    parser.add_argument("--minutes", type=float, default=Plan().minutes, help="for everything (default: 7.5)")
    parser.add_argument("--device", default="cuda", help="the card (default: cuda)")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="for adapters, up to 21 GB at a time")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and prompts")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, whose numbers say nothing")
    options = parser.parse_args(argv)
    plan = TINY if options.tiny else Plan(device=options.device)
    if plan.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here: expected a CUDA device; --tiny shows on the CPU that the script works")
    bases = [shape for shape in plan.bases if options.bases is None or shape.name in options.bases]
    # Tiny pools stand in the places of the large ones, and go by their names.
    named = zip(POOLS, plan.pools, strict=True)
    pools = [pool for large, pool in named if options.pools is None or large.name in options.pools]
    plan = replace(plan, bases=tuple(bases), pools=tuple(pools))
    return replace(plan, minutes=options.minutes, seed=options.seed, scratch=options.scratch), options.json


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    started = time.monotonic()
    plan, file = _asked(argv)
    table = Table(about(plan))
    shown = {name: value for name, value in table.about.items() if name != "plan" and value is not None}
    print(" · ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    print(f"{plan.dtype}; medians and 90th percentiles of {plan.rounds} rounds or {plan.decoded} steps after a warm-up")
    try:
        measure(plan, table)
    finally:
        if file is not None:
            table.write(file)
            print(f"written: {file}", file=sys.stderr)
    failed = sum(line.problem is not None for line in table.lines)
    print(f"\n{len(table.lines)} lines, {failed} without a number, in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
