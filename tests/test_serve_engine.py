"""Sequences that share steps: each is answered as if it were alone, while others join, leave or fail."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

import tiny
from encoders import HeldEncoder, write_encoder
from logo import AdapterPool, LoGo, SelectionSettings
from logo.adapters.adapter import Adapter
from logo.adapters.examples import write_examples
from logo.api.errors import ApiError, NotReady
from logo.api.names import MixtureRequest
from logo.api.replies import Chosen
from logo.core import Prompt, Selection
from logo.decoding import Batch, Decoding, call_config
from logo.errors import AdapterError, CacheFull, ModelError, NotFinite, PoolError, UsageError
from logo.mixing.cache import Resident
from logo.mixing.mixer import Mixture
from logo.serve.batching import AnswerJob
from logo.serve.memory import Memory
from logo.serve.packed import HeldMixture
from logo.serve.sampling import Sampling
from logo.serve.service import Service
from make_adapters import load_peft, write_peft
from test_engine import engine, tokenizer, write_adapter
from tolerances import PATIENCE, same_scores

pytestmark = pytest.mark.slow

_T = TypeVar("_T")
POISON = 77


def served(logo: LoGo, use: Callable[[Service], Awaitable[_T]], **options: Any) -> _T:
    """What `use` makes of a running service."""

    async def run() -> _T:
        memory = options.pop("memory", None) or Memory(concurrent=options.pop("concurrent", 8))
        service = Service(logo, memory, **options)
        service.batching.start()
        try:
            return await use(service)
        finally:
            await service.close()

    return asyncio.run(run())


async def choose(service: Service, prompt: Prompt, wanted: MixtureRequest) -> HeldMixture:
    """The mixture of one prompt, with its adapters loaded."""
    [outcome] = await service.select([prompt], wanted)
    if isinstance(outcome, BaseException):
        raise outcome
    [mixture] = await service.loading.load([outcome])
    return mixture


async def answer(
    service: Service, ids: list[int], wanted: MixtureRequest, sampling: Sampling
) -> tuple[tuple[int, ...], str, HeldMixture]:
    chosen = await choose(service, Prompt.of_ids(ids), wanted)
    tokens: list[int] = []
    reason = None
    try:
        async for _, new, why in service.batching.generate([AnswerJob(ids, chosen, sampling)]):
            tokens += new
            reason = why
    finally:
        chosen.release()
    assert reason is not None
    return tuple(tokens), reason, chosen


def all_of(
    logo: LoGo, rows: list[list[int]], requests: list[MixtureRequest], lengths: list[int], **options: Any
) -> list[tuple[tuple[int, ...], str, HeldMixture]]:
    """The answers to requests that come at once, after which nothing runs or waits."""

    async def use(service: Service) -> Any:
        asked = zip(rows, requests, lengths, strict=True)
        found = await asyncio.gather(*(answer(service, ids, wanted, Sampling(most)) for ids, wanted, most in asked))
        assert await settled(service) == (0, 0, 0)
        return found

    return served(logo, use, **options)


def test_where_memory_is_short_sequences_wait_and_come_out_the_same(llama: nn.Module, adapters: Path) -> None:
    """Each begins once there is room for as long as it may become."""
    logo = engine(llama, adapters, unscorable="skip")
    rows = tiny.prompts([20, 25, 30, 22, 18, 27], seed=8)
    room = 160 * (2 * 3 * 2 * 8 * 4) / 1e9  # for so many tokens
    assert Service(logo, Memory(6, room)).batching.kv_tokens[1] <= 160
    requests = [MixtureRequest()] * len(rows)
    found = all_of(logo, rows, requests, [60] * len(rows), memory=Memory(6, room))
    assert [entry[0] for entry in found] == [entry[0] for entry in alone(logo, rows, requests, 60)]


async def settled(service: Service) -> tuple[int, int, int]:
    """Blocks, running and waiting sequences, once the generating thread has heard of everything."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = (service.batching.kv_tokens[0], service.batching.running, service.waiting)
        if found == (0, 0, 0):
            break
        await asyncio.sleep(0.02)
    return found


WISHES = [
    MixtureRequest(),
    MixtureRequest(adapters={}),
    MixtureRequest(adapters={"tasks/t0": 1.0}),
    MixtureRequest(adapters={"tasks/t1": 0.3, "tasks/t4": -2.0}),
]


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma3", "mistral", "gpt2", "phi3", "gpt_neox", "opt", "falcon", "codegen"]
)
def test_answers_are_those_of_generating_alone(architecture: str, tmp_path: Path) -> None:
    """Also where windows slide, where prompts are longer than a step, and where more come than fit a step."""
    model = tiny.model(architecture)
    fused = {"gpt_neox": "query_key_value", "falcon": "query_key_value", "codegen": "qkv_proj"}
    names = {"gpt2": "c_attn", "phi3": "qkv_proj", **fused}.get(architecture, "q_proj")
    for i in range(5):
        write_adapter(tmp_path / "tasks" / f"t{i}", model, (names, "down_proj"), rank=i + 1, seed=i)
    logo = engine(model, tmp_path)
    rows = tiny.prompts([1, 3, 40, 9, 2, 70, 5, 12, 30, 4, 6, 90], seed=4)
    requests = [WISHES[i % len(WISHES)] for i in range(len(rows))]
    lengths = [1 + 7 * i % 23 for i in range(len(rows))]

    found = all_of(logo, rows, requests, lengths, concurrent=5)
    for ids, wanted, length, (tokens, reason, chosen) in zip(rows, requests, lengths, found, strict=True):
        [want] = alone(logo, [ids], [wanted], length)
        assert (tokens, reason) == (want[0], want[1])
        assert chosen.chosen.selection.adapters == want[2]


@pytest.mark.parametrize("step", [512, 16], ids=["whole prompts", "prompts in parts"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_on_the_output_head_answer_as_alone_and_as_in_peft(
    architecture: str, step: int, tmp_path: Path
) -> None:
    """The head is given one token of each sequence, in steps that read prompts and in others."""
    model = tiny.model(architecture, tie_word_embeddings=False)
    names = ["lm_head", {"gpt2": "c_attn"}.get(architecture, "q_proj")]
    for i in range(4):
        base = tiny.model(architecture, tie_word_embeddings=False)
        how: Any = {"target_modules": names if i else names[1:], "save": {"save_embedding_layers": False}}
        write_peft(tmp_path / f"t{i}", base, seed=i, r=i + 1, lora_alpha=8, **how)
    logo = engine(model, tmp_path)
    rows = tiny.prompts([1, 3, 40, 9, 2, 70, 5, 12], seed=4)
    requests = [MixtureRequest(adapters={f"t{i % 4}": 1.0, f"t{(i + 1) % 4}": 0.5 * (i % 2)}) for i in range(len(rows))]

    found = all_of(logo, rows, requests, [9 + i for i in range(len(rows))], memory=Memory(5, step_tokens=step))
    for i, (ids, wanted, (tokens, *_)) in enumerate(zip(rows, requests, found, strict=True)):
        assert tokens == alone(logo, [ids], [wanted], 9 + i)[0][0]
    wrapped = load_peft(tmp_path / "t2", tiny.model(architecture, tie_word_embeddings=False)).eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=11, pad_token_id=2)
    ids = torch.tensor([rows[2]])
    want = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert found[2][0] == tuple(want[0, len(rows[2]) :].tolist())


def alone(logo: LoGo, rows: list[list[int]], requests: list[MixtureRequest], length: int) -> list[tuple[Any, ...]]:
    """One by one, by the engine's own decoder."""
    config = call_config(logo.prompts, None, {"pad_token_id": 2}, length, logo.model.generation_config)
    results = []
    for ids, wanted in zip(rows, requests, strict=True):
        forced = wanted.adapters is not None
        selection = Selection.forced(wanted.adapters or {}) if forced else logo.select(ids, max_new_tokens=length)
        [made] = logo._decode(Batch(logo.fitted, [ids], [selection], Decoding(config)), None)
        results.append((made.token_ids, made.finish_reason, selection.adapters))
    return results


def test_requests_that_come_while_a_step_ends_share_one_probe(
    llama: nn.Module, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the one that was cancelled before the step ended."""
    logo = engine(llama, adapters, unscorable="skip")
    rows = tiny.prompts([20, 25, 30, 22], seed=8)
    alone = logo.select(rows)
    probed: list[int] = []
    select = logo.outcomes

    def counted(some: list[Any], *arguments: Any, **options: Any) -> Any:
        probed.append(len(some))
        return select(some, *arguments, **options)

    async def use(service: Service) -> list[HeldMixture]:
        paused, waits, ended = service.batching.paused, threading.Event(), threading.Event()

        @contextmanager
        def slowly() -> Iterator[None]:
            waits.set()
            assert ended.wait(PATIENCE)
            with paused():
                yield

        monkeypatch.setattr(service.batching, "paused", slowly)
        monkeypatch.setattr(logo, "outcomes", counted)
        asked = [asyncio.create_task(choose(service, Prompt.of_ids(rows[0]), MixtureRequest()))]
        await asyncio.to_thread(waits.wait, PATIENCE)
        asked += [asyncio.create_task(choose(service, Prompt.of_ids(ids), MixtureRequest())) for ids in rows[1:]]
        await asyncio.sleep(0)
        asked.pop().cancel()
        await asyncio.sleep(0)
        ended.set()
        return await asyncio.gather(*asked)

    found = served(logo, use)
    assert probed == [3]
    for chosen, want in zip(found, alone, strict=False):
        assert chosen.chosen.selection.adapters == want.adapters
        chosen.release()


def test_answers_go_on_while_a_text_encoder_reads(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And prompts that wait for it are read together."""
    shutil.copytree(adapters, tmp_path / "pool")
    folders = sorted(file.parent for file in (tmp_path / "pool").rglob("adapter_config.json"))
    for i, folder in enumerate(folders[1:]):
        write_examples(folder, [f"w{5 + i} w{9 + 2 * i} w7", f"w{50 - i}"])
    encoder = write_encoder(tmp_path / "encoder")
    logo = engine(tiny.model("llama"), tmp_path / "pool", signal="calibrated", unscorable="skip", encoder=encoder)
    rows = tiny.prompts([20, 25, 30, 22], seed=8)
    alone = logo.select(rows)
    held = HeldEncoder(monkeypatch, PATIENCE)

    async def use(service: Service) -> list[HeldMixture]:
        forced = await choose(service, Prompt.of_ids(rows[0]), MixtureRequest({}))
        asked = [asyncio.create_task(choose(service, Prompt.of_ids(rows[0]), MixtureRequest()))]
        try:
            await asyncio.to_thread(held.began.wait, PATIENCE)
            asked += [asyncio.create_task(choose(service, Prompt.of_ids(ids), MixtureRequest())) for ids in rows[1:]]
            tokens: list[int] = []
            async for _, new, _ in service.batching.generate([AnswerJob(rows[0], forced, Sampling(max_tokens=5))]):
                tokens += new
            assert tokens and held.calls == [1]
        finally:
            held.go.set()
            forced.release()
        return await asyncio.gather(*asked)

    for chosen, want in zip(served(logo, use), alone, strict=True):
        assert chosen.chosen.selection.scores == same_scores(want.scores)
        chosen.release()
    assert held.calls == [1, 3]


def test_a_step_that_fails_ends_one_sequence_and_no_other(adapters: Path) -> None:
    model = tiny.model("llama")
    logo = engine(model, adapters, unscorable="skip")
    good = tiny.prompts([6, 11, 3], seed=3)
    good = [[i if i != POISON else 5 for i in row] for row in good]
    want = alone(logo, good, [MixtureRequest()] * 3, 25)
    bad = [4, POISON, 5]

    def refuse(module: nn.Module, inputs: Any, options: Any) -> None:
        ids = options["input_ids"] if "input_ids" in options else inputs[0]
        if options.get("use_cache") and bool((ids == POISON).any()):
            raise torch.OutOfMemoryError("no room for this one")

    async def use(service: Service) -> Any:
        handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
        try:
            jobs = [answer(service, ids, MixtureRequest(), Sampling(25)) for ids in good]
            jobs.insert(1, answer(service, bad, MixtureRequest(), Sampling(25)))
            found = await asyncio.gather(*jobs, return_exceptions=True)
            return found, await settled(service), service.batching.alive
        finally:
            handle.remove()

    found, after, alive = served(logo, use)
    error = found.pop(1)
    assert isinstance(error, torch.OutOfMemoryError)
    assert [entry[0] for entry in found] == [entry[0] for entry in want]
    assert alive
    assert after == (0, 0, 0)


def test_an_end_rule_that_fails_ends_one_sequence_and_repeats_no_token(
    adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows before it have their tokens of this step already."""
    logo = engine(tiny.model("llama"), adapters)
    logo.model.generation_config.stop_strings = ["never"]
    prompts = tiny.prompts([6, 11, 3, 9], seed=3)
    wanted = [MixtureRequest()] * 4
    lengths = [10] * 4
    want = [tokens for tokens, _, _ in all_of(logo, prompts, wanted, lengths)]
    decode = logo.tokenizer.decode

    def refuse(ids: Any, *given: Any, **options: Any) -> Any:
        if tuple(ids) == want[2][:4]:
            raise IndexError("no such token")
        return decode(ids, *given, **options)

    monkeypatch.setattr(logo.tokenizer, "decode", refuse)

    async def use(service: Service) -> Any:
        jobs = [answer(service, ids, MixtureRequest(), Sampling(10)) for ids in prompts]
        return await asyncio.gather(*jobs, return_exceptions=True)

    found = served(logo, use)
    assert isinstance(found.pop(2), IndexError)
    assert [tokens for tokens, _, _ in found] == [want[0], want[1], want[3]]


def test_the_pool_changes_under_way_and_answers_keep_what_they_selected(llama: nn.Module, tmp_path: Path) -> None:
    for i in range(3):
        write_adapter(tmp_path / "pool" / f"t{i}", llama, ("q_proj", "v_proj"), rank=2, seed=i)
    write_adapter(tmp_path / "other", llama, ("q_proj", "v_proj"), rank=3, seed=9)
    ids = tiny.prompts([6], seed=5)[0]
    wanted = MixtureRequest(adapters={"t1": 1.0})
    before = alone(engine(llama, tmp_path / "pool"), [ids], [wanted], 30)[0][0]
    shutil.copytree(tmp_path / "pool", tmp_path / "changed")
    shutil.rmtree(tmp_path / "changed" / "t1")
    shutil.copytree(tmp_path / "other", tmp_path / "changed" / "t1")
    later = alone(engine(llama, tmp_path / "changed"), [ids], [wanted], 30)[0][0]
    assert before != later

    async def use(service: Service) -> Any:
        chosen = await choose(service, Prompt.of_ids(ids), wanted)
        deltas = service.batching.generate([AnswerJob(ids, chosen, Sampling(30))])
        first = (await anext(deltas))[1]
        waiting = await choose(service, Prompt.of_ids(ids), wanted)  # selected, not begun
        await service.selecting.remove("t1")
        shutil.rmtree(tmp_path / "pool" / "t1")
        with pytest.raises(ApiError, match="t1"):
            await choose(service, Prompt.of_ids(ids), wanted)
        await service.selecting.add(tmp_path / "other", "t1")
        new = await answer(service, ids, wanted, Sampling(30))
        rest = [token async for _, new, _ in deltas for token in new]
        more = service.batching.generate([AnswerJob(ids, waiting, Sampling(30))])
        held = [token async for _, new, _ in more for token in new]
        scores = (await choose(service, Prompt.of_ids(ids), MixtureRequest())).chosen.selection.scores
        return (*first, *rest), tuple(held), new[0], scores

    begun, held, new, scores = served(engine(llama, tmp_path / "pool", k=2), use)
    assert begun == held == before
    assert new == later
    fresh = engine(llama, tmp_path / "changed", k=2).select(ids).scores
    assert scores == same_scores(fresh)


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize("fault", ["nan", "shape", "unscorable", "taken", "pickle"])
def test_what_cannot_be_used_changes_nothing(fault: str, on_bad: str, llama: nn.Module, tmp_path: Path) -> None:
    for i in range(3):
        write_adapter(tmp_path / "pool" / f"t{i}", llama, ("q_proj", "v_proj"), rank=2, seed=i)
    bad = tmp_path / "bad"
    names = ("v_proj",) if fault == "unscorable" else ("q_proj",)
    maker = tiny.model("llama", hidden_size=64) if fault == "shape" else llama
    write_adapter(bad, maker, names, rank=2, seed=7, scale=float("nan") if fault == "nan" else 0.2)
    if fault == "pickle":
        (bad / "adapter_model.safetensors").rename(bad / "adapter_model.bin")
    ids = Prompt.of_ids(tiny.prompts([6], seed=5)[0])
    pool = AdapterPool.open(tmp_path / "pool")
    logo = LoGo(llama, tokenizer(), pool, settings=SelectionSettings("norm", k=3), on_bad_adapter=on_bad)

    async def use(service: Service) -> Any:
        before = (await choose(service, ids, MixtureRequest())).chosen.selection
        with pytest.raises((AdapterError, PoolError)):
            await service.selecting.add(bad, "t1" if fault == "taken" else "new")
        return (
            before,
            (await choose(service, ids, MixtureRequest())).chosen.selection,
            tuple(service.selecting.adapters),
        )

    before, after, names_after = served(logo, use)
    assert before == after
    assert names_after == ("t0", "t1", "t2")


def test_no_request_waits_for_an_adapter_that_another_one_loads(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests with loaded adapters are selected for and answered while one is still being read."""
    for i in range(3):
        write_adapter(tmp_path / f"t{i}", llama, ("q_proj",), rank=2, seed=i)
    logo = engine(llama, tmp_path, k=1)
    ids = tiny.prompts([6], seed=5)[0]
    reading, may = threading.Event(), threading.Event()
    ordinary = Adapter.read

    def slow(adapter: Adapter, *modules: Any) -> Any:
        if adapter.name == "t0":
            reading.set()
            assert may.wait(PATIENCE)
        return ordinary(adapter, *modules)

    async def use(service: Service) -> Any:
        warm, cold = MixtureRequest(adapters={"t1": 1.0}), MixtureRequest(adapters={"t0": 1.0})
        await answer(service, ids, warm, Sampling(2))  # loads it
        monkeypatch.setattr(Adapter, "read", slow)
        waiting = [asyncio.create_task(answer(service, ids, cold, Sampling(2))) for _ in range(2)]
        try:
            assert await asyncio.to_thread(reading.wait, PATIENCE)
            waiting.pop().cancel()  # the other one is not concerned
            await asyncio.wait_for(answer(service, ids, warm, Sampling(2)), PATIENCE)
            selected = MixtureRequest(options={"candidates": ["t1"]})
            await asyncio.wait_for(answer(service, ids, selected, Sampling(2)), PATIENCE)
            assert not waiting[0].done()
        finally:
            may.set()
        [tokens, *_] = await waiting[0]
        return tokens, await settled(service), [one.users for one in logo.adapter_cache._residents.values()]

    tokens, after, users = served(logo, use)
    assert tokens == alone(logo, [ids], [MixtureRequest(adapters={"t0": 1.0})], 2)[0][0]
    assert after == (0, 0, 0) and not any(users)


def test_answers_go_on_while_a_burst_of_prompts_is_read(
    llama: nn.Module, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of their tokens, the model is given so many tokens of prompts at most."""
    logo = engine(llama, adapters, unscorable="skip")
    base, most = MixtureRequest({}), 64
    rows = tiny.prompts([30] * 40, seed=8)
    given: list[tuple[int, int]] = []  # rows and columns of each forward pass

    def note(module: nn.Module, inputs: Any, options: Any) -> None:
        given.append(tuple(options["input_ids"].shape))

    async def use(service: Service) -> None:
        mixtures = [await choose(service, Prompt.of_ids(ids), base) for ids in rows]
        first = service.batching.generate([AnswerJob(rows[0], mixtures[0], Sampling(200))])
        await anext(first)
        handle = llama.register_forward_pre_hook(note, with_kwargs=True)
        try:
            jobs = [AnswerJob(ids, mixture, Sampling(5)) for ids, mixture in zip(rows, mixtures, strict=True)]
            async for _ in service.batching.generate(jobs):
                pass
        finally:
            handle.remove()
            await first.aclose()

    monkeypatch.setattr(llama.generation_config, "eos_token_id", None)  # answers are as long as they may be
    served(logo, use, memory=Memory(64, step_tokens=most))
    read = 0
    for count, width in given:
        read = 0 if width == 1 else read + count * width
        assert read <= most
    assert sum(width > 1 for _, width in given) >= 40 * 29 / most


def test_the_base_model_answers_while_a_request_waits_for_memory(llama: nn.Module, tmp_path: Path) -> None:
    """However many have passed that one; those that need adapters pass it a limited number of times, and it is next."""
    for i in range(2):
        write_adapter(tmp_path / f"t{i}", llama, ("q_proj",), rank=2, seed=i)
    size = sum(weights.A.numel() + weights.B.numel() for weights in AdapterPool.open(tmp_path)["t0"].read().values())
    pool = AdapterPool.open(tmp_path)
    settings = SelectionSettings("norm", k=1)
    one_adapter = 2 * 4 * size / 1e9  # half of it is for what a batch multiplies
    logo = LoGo(llama, tokenizer(), pool, settings=settings, adapter_memory_gb=one_adapter)
    prompt = Prompt.of_ids(tiny.prompts([6], seed=5)[0])
    held, other = MixtureRequest({"t0": 1.0}), MixtureRequest({"t1": 1.0})

    async def use(service: Service) -> None:
        first = await choose(service, prompt, held)
        waiting = asyncio.create_task(choose(service, prompt, other))
        while not service.loading.waiting:
            await asyncio.sleep(0.001)
        passing = [asyncio.create_task(choose(service, prompt, held)) for _ in range(40)]
        while sum(task.done() for task in passing) < service.batching.schedule.most_passes:
            await asyncio.sleep(0.001)
        for _ in range(3):
            await asyncio.wait_for(choose(service, prompt, MixtureRequest({})), PATIENCE)
        assert not waiting.done() and sum(task.done() for task in passing) == service.batching.schedule.most_passes
        for task in passing:
            if task.done():
                task.result().release()
        first.release()
        (await waiting).release()
        for task in passing:
            (await task).release()

    served(logo, use)


def test_other_signals_are_there_while_they_can_score_the_pool(llama: nn.Module, tmp_path: Path) -> None:
    for place, modules in (("pool/t0", ("q_proj",)), ("values", ("v_proj",))):
        write_adapter(tmp_path / place, llama, modules, rank=2, seed=1)

    async def use(service: Service) -> list[tuple[str, ...]]:
        found = [service.selecting.signals]
        await service.selecting.add(tmp_path / "values", "values")
        found.append(service.selecting.signals)
        await service.selecting.remove("values")
        return [*found, service.selecting.signals]

    logo = LoGo(llama, tokenizer(), AdapterPool.open(tmp_path / "pool"))
    assert served(logo, use, signals=["norm"]) == [("calibrated", "norm"), ("calibrated",), ("calibrated", "norm")]


def test_the_last_adapter_stays(llama: nn.Module, tmp_path: Path) -> None:
    write_adapter(tmp_path / "pool" / "t0", llama, ("q_proj",), rank=2, seed=0)

    async def use(service: Service) -> None:
        with pytest.raises(UsageError, match="is the last one of the pool and cannot be removed"):
            await service.selecting.remove("t0")

    served(engine(llama, tmp_path / "pool", k=1), use)


def test_a_model_that_keeps_a_state_is_refused_at_the_start(tmp_path: Path) -> None:
    model = tiny.model("mamba")
    write_adapter(tmp_path / "t0", model, ("in_proj",), rank=2, seed=0)
    with pytest.raises(ModelError, match="MambaForCausalLM cannot be served: it keeps more"):
        Service(engine(model, tmp_path, k=1, signal="calibrated"), Memory(concurrent=2))


def test_where_generation_has_stopped_nothing_is_taken(llama: nn.Module, adapters: Path) -> None:
    async def use(service: Service) -> None:
        service.batching.stop()
        with pytest.raises(NotReady, match="start"), service.entrance.admitted():
            pass
        for _ in range(2):  # whoever was taken before hears of it, and nobody waits for ever
            with pytest.raises(NotReady, match="generation has stopped"):
                await asyncio.wait_for(
                    choose(service, Prompt.of_ids(tiny.prompts([20], seed=8)[0]), MixtureRequest()), PATIENCE
                )

    served(engine(llama, adapters, unscorable="skip"), use)


# -- mixtures that overflow -----------------------------------------------------------------------------------------

GOOD, BAD = MixtureRequest(adapters={"good": 1.0}), MixtureRequest(adapters={"bad": 1.0})
# Each of them is finite in its file; what they make of a prompt is not.
FAULTS = {
    "B (A x)": (torch.float32, 1e20),
    "A x": (torch.float32, 1e38),  # not finite in columns that other tokens are multiplied with, too
    "half precision": (torch.float16, 1e3),
}


def alike(one: tuple[tuple[int, ...], str], other: tuple[tuple[int, ...], str]) -> bool:
    """Whether two answers are as long and end for the same reason."""
    return (len(one[0]), one[1]) == (len(other[0]), other[1])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("dtype", "scale"), FAULTS.values(), ids=FAULTS)
def test_a_mixture_that_overflows_is_an_error_of_its_own_request(
    dtype: torch.dtype, scale: float, temperature: float, tmp_path: Path
) -> None:
    """The request that asked for it fails with a reason, and others are not affected."""
    model = tiny.model("llama").to(dtype)
    write_adapter(tmp_path / "good", model, ("q_proj", "v_proj"), rank=2, seed=1)
    write_adapter(tmp_path / "bad", model, ("q_proj", "v_proj"), rank=2, seed=2, scale=scale)
    logo = engine(model, tmp_path, k=1)
    rows = tiny.prompts([6, 11, 3, 8], seed=3)
    way = Sampling(20, temperature, seed=4)

    async def use(service: Service) -> Any:
        single = [(await answer(service, ids, GOOD, way))[:2] for ids in rows]
        jobs = [answer(service, ids, wanted, way) for ids in rows for wanted in (GOOD, BAD)]
        together = await asyncio.gather(*jobs, return_exceptions=True)
        after = await answer(service, rows[0], GOOD, way)  # the bad adapter's columns may still be there
        return single, together, after[:2], await settled(service), service.batching.alive

    single, together, after, left, alive = served(logo, use)
    for entry, want in zip(together[::2], single, strict=True):  # half precision rounds differently in company
        assert entry[:2] == want or (dtype is torch.float16 and alike(entry[:2], want))
    for error in together[1::2]:
        # Before the prompt is read where an adapter alone overflows, else in the middle of the answer.
        assert isinstance(error, NotFinite)
    assert after == single[0] or (dtype is torch.float16 and alike(after, single[0]))
    assert (left, alive) == ((0, 0, 0), True)
    if dtype is torch.float32 and not temperature:
        assert [tokens for tokens, _ in single] == [found[0] for found in alone(logo, rows, [GOOD] * 4, 20)]


def test_who_leaves_while_an_adapter_loads_leaves_no_error_that_nobody_hears(llama: nn.Module, adapters: Path) -> None:
    """Asyncio would write it into the log with a traceback."""
    logo = engine(llama, adapters)
    adapter = logo.fitted[logo.names[0]]
    selection = Selection.forced({adapter.name: 1.0})
    mixture = Mixture.of(logo.fitted, selection.mixture, [1])

    async def leave() -> None:
        resident = Resident(adapter, users=1)
        held = HeldMixture(Chosen(selection), mixture, 0, (resident,), logo.adapter_cache)
        waiting = asyncio.create_task(held.loaded())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        resident.ready.set_exception(CacheFull("no room"))

    async def left() -> list[Any]:
        unheard: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        await leave()
        await asyncio.sleep(0)
        gc.collect()
        return unheard

    assert asyncio.run(left()) == []
